// What XLA's handlers share: its thread pool as a Pool, its errors, and checks of shapes and dtypes.
#ifndef CPU_KERNELS_HANDLERS_H_
#define CPU_KERNELS_HANDLERS_H_

#include <initializer_list>
#include <string>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace cpu_kernels {

namespace ffi = xla::ffi;

// `threads` has to live as long as the pool.
inline Pool pool_of(ffi::ThreadPool& threads) {
  const auto schedule = [](void* to, void (*run)(void*), void* task) {
    static_cast<ffi::ThreadPool*>(to)->Schedule([run, task] { run(task); });
  };
  return {&threads, threads.num_threads() - 1, schedule};
}

inline ffi::Error invalid(const std::string& what) { return ffi::Error::InvalidArgument(what); }

inline ffi::Error finished(bool done) {
  if (done) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "cpu_kernels: no memory for scratch");
}

inline bool is_float(const ffi::AnyBuffer& a) { return a.element_type() == ffi::F32 || a.element_type() == ffi::BF16; }

inline Numbers numbers(const ffi::AnyBuffer& a) { return {a.untyped_data(), a.element_type() == ffi::BF16}; }

template <typename Buffer>
bool has_shape(const Buffer& a, std::initializer_list<int64_t> shape) {
  const auto dimensions = a.dimensions();
  if (dimensions.size() != shape.size()) return false;
  size_t i = 0;
  for (int64_t size : shape)
    if (dimensions[i++] != size) return false;
  return true;
}

template <typename Buffer>
const uint16_t* bf16(const Buffer& a) {
  return static_cast<const uint16_t*>(a.untyped_data());
}

}  // namespace cpu_kernels

#endif  // CPU_KERNELS_HANDLERS_H_
