// Which instruction set's kernels run: the best that was built and this machine has, or the one that a test asks for.
#include <atomic>
#include <cstring>

#include "kernels.h"

namespace cpu_kernels {
namespace {

// Those that were built and that this machine can run, the best first; null after the last.
struct Supported {
  const Kernels* kernels[8] = {};

  Supported() {
    const Kernels** next = kernels;
#if defined(CPU_KERNELS_HAVE_AVX512BF16)
    if (avx512bf16::is_supported()) *next++ = &avx512bf16::kKernels;
#endif
#if defined(CPU_KERNELS_HAVE_AVX512VNNI)
    if (avx512vnni::is_supported()) *next++ = &avx512vnni::kKernels;
#endif
#if defined(CPU_KERNELS_HAVE_AVX512)
    if (avx512::is_supported()) *next++ = &avx512::kKernels;
#endif
#if defined(CPU_KERNELS_HAVE_AVXVNNI)
    if (avxvnni::is_supported()) *next++ = &avxvnni::kKernels;
#endif
#if defined(CPU_KERNELS_HAVE_AVX2)
    if (avx2::is_supported()) *next++ = &avx2::kKernels;
#endif
#if defined(CPU_KERNELS_HAVE_NEON)
    if (neon::is_supported()) *next++ = &neon::kKernels;
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
