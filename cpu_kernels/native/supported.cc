// Whether this machine can run the kernels of one instruction set: setup.py compiles this file once for each.
//
// By itself, since the compiler may know an instruction set and not its name here: it then loses that one and no other.
// Without the instruction set's flags, since it runs on machines that lack it. The compiler's own test asks the operating
// system too: whether it keeps the wide registers of a thread.
#include "isa.h"
#include "kernels.h"

namespace cpu_kernels::CPU_KERNELS_ISA {

bool is_supported() {
#if defined(CPU_KERNELS_AVX512)
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return false;
#endif
#if defined(CPU_KERNELS_AVX512BF16)
  if (!__builtin_cpu_supports("avx512bf16")) return false;
#endif
#if defined(CPU_KERNELS_AVX512VNNI) || defined(CPU_KERNELS_AVX512BF16)
  if (!__builtin_cpu_supports("avx512vnni")) return false;
#endif
#if defined(CPU_KERNELS_AVXVNNI)
  if (!__builtin_cpu_supports("avxvnni")) return false;
#endif
#if defined(CPU_KERNELS_AVX512) || defined(CPU_KERNELS_AVX2)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return true;
#endif
}

}  // namespace cpu_kernels::CPU_KERNELS_ISA
