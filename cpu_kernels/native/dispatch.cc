// Which instruction set's kernels run: the best that was built and this machine has, or the one that a test asks for.
#include <atomic>
#include <cstring>

#include "kernels.h"

namespace cpu_kernels {
namespace {

// The compiler's own test asks the operating system too: whether it keeps the wide registers of a thread. A compiler
// that lacks an instruction set does not know its name either.
#if defined(CPU_KERNELS_HAVE_AVX512)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}
#endif
#if defined(CPU_KERNELS_HAVE_AVX512BF16)
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif
#if defined(CPU_KERNELS_HAVE_AVX2)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

// Those that were built and that this machine can run, the best first; null after the last.
struct Supported {
  const Kernels* kernels[5] = {};

  Supported() {
    const Kernels** next = kernels;
#if defined(CPU_KERNELS_HAVE_AVX512BF16)
    if (has_avx512bf16()) *next++ = &avx512bf16::kKernels;
#endif
#if defined(CPU_KERNELS_HAVE_AVX512)
    if (has_avx512()) *next++ = &avx512::kKernels;
#endif
#if defined(CPU_KERNELS_HAVE_AVX2)
    if (has_avx2()) *next++ = &avx2::kKernels;
#endif
#if defined(CPU_KERNELS_HAVE_NEON)
    *next++ = &neon::kKernels;
#endif
    *next++ = &portable::kKernels;
  }
};

const Supported& supported() {
  static const Supported found;
  return found;
}

std::atomic<const Kernels*> selected{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* asked_for = selected.load(std::memory_order_relaxed);
  return asked_for ? *asked_for : *supported().kernels[0];
}

}  // namespace cpu_kernels

// The name of the i-th instruction set that this machine can run, the best first; null after the last.
extern "C" const char* cpu_kernels_supported(int i) {
  const auto* kernels = cpu_kernels::supported().kernels[i];
  return kernels ? kernels->name : nullptr;
}

// Has all later calls use the instruction set of this name. Gives 0, or 1 where this machine cannot run it.
extern "C" int cpu_kernels_select(const char* name) {
  for (const auto* kernels : cpu_kernels::supported().kernels) {
    if (!kernels || std::strcmp(kernels->name, name) != 0) continue;
    cpu_kernels::selected = kernels;
    return 0;
  }
  return 1;
}
