// XLA's way in: each handler checks shapes and dtypes, and calls the kernel of the instruction set in use.
#include <atomic>
#include <cstring>
#include <string>
#include <utility>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace cpu_kernels {
namespace {

namespace ffi = xla::ffi;

// ---- which instruction set ----

#if defined(CPU_KERNELS_HAVE_X86)
// The compiler's own test asks the operating system too: whether it keeps the wide registers of a thread.
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

// All that this machine can run, the best first; null at the end.
const Kernels* const* supported() {
  static const Kernels* found[4] = {};
  static const bool once = [] {
    int n = 0;
#if defined(CPU_KERNELS_HAVE_X86)
    if (has_avx512()) found[n++] = &avx512::kKernels;
    if (has_avx2()) found[n++] = &avx2::kKernels;
#elif defined(CPU_KERNELS_HAVE_NEON)
    found[n++] = &neon::kKernels;
#endif
    found[n++] = &portable::kKernels;
    return true;
  }();
  (void)once;
  return found;
}

std::atomic<const Kernels*> selected{nullptr};

// ---- what handlers share ----

Pool pool_of(ffi::ThreadPool& threads) {
  const auto schedule = [](void* to, void (*run)(void*), void* task) {
    static_cast<ffi::ThreadPool*>(to)->Schedule([run, task] { run(task); });
  };
  return {&threads, threads.num_threads() - 1, schedule};
}

ffi::Error invalid(const std::string& what) { return ffi::Error::InvalidArgument(what); }

ffi::Error finished(bool done) {
  return done ? ffi::Error::Success() : ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for a kernel's scratch");
}

bool is_float(ffi::DataType type) { return type == ffi::F32 || type == ffi::BF16; }

Activations activations(const ffi::AnyBuffer& x) {
  return {x.untyped_data(), x.element_type() == ffi::BF16, x.dimensions()[0], x.dimensions()[1]};
}

template <typename Buffer>
const uint16_t* bf16(const Buffer& a) {
  return static_cast<const uint16_t*>(a.untyped_data());
}

// ---- the handlers ----

ffi::Error linear(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::BufferR2<ffi::BF16> w, ffi::ResultBufferR2<ffi::F32> y) {
  const auto out = w.dimensions();
  if (x.dimensions().size() != 2 || !is_float(x.element_type()) || x.dimensions()[1] != out[1])
    return invalid("linear: expected x [T, I] of float32 or bfloat16 and w [O, I]");
  if (y->dimensions()[0] != x.dimensions()[0] || y->dimensions()[1] != out[0])
    return invalid("linear: expected a result [T, O]");
  const LinearCall call{activations(x), bf16(w), out[0], y->typed_data()};
  return finished(kernels().linear(pool_of(threads), call));
}

}  // namespace

const Kernels& kernels() {
  const Kernels* asked_for = selected.load(std::memory_order_relaxed);
  return asked_for ? *asked_for : *supported()[0];
}

}  // namespace cpu_kernels

// The names of the instruction sets that this machine can run, the best first: the i-th, or null behind the last.
extern "C" const char* cpu_kernels_supported(int i) {
  const auto* const* found = cpu_kernels::supported();
  for (int at = 0; found[at]; ++at)
    if (at == i) return found[at]->name;
  return nullptr;
}

// Has all later calls use the instruction set of this name. Gives 0, or 1 where this machine cannot run it.
extern "C" int cpu_kernels_select(const char* name) {
  for (const auto* const* found = cpu_kernels::supported(); *found; ++found) {
    if (std::strcmp((*found)->name, name) != 0) continue;
    cpu_kernels::selected = *found;
    return 0;
  }
  return 1;
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(cpu_kernels_linear, cpu_kernels::linear,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::BF16>>()
                                  .Ret<xla::ffi::BufferR2<xla::ffi::F32>>());
