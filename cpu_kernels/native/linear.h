// y = x w^T with bfloat16 or int8 weights: each task takes a panel of the weights' rows, read once for all rows of x.
#ifndef CPU_KERNELS_LINEAR_H_
#define CPU_KERNELS_LINEAR_H_

#include "product.h"

namespace cpu_kernels::CPU_KERNELS_ISA {

template <typename X, class Weights>
inline bool linear_of(const Pool& pool, const LinearCall& call, const Weights& w) {
  const Rows<X> x(pool, call.x);
  if (!x.ok()) return false;
  auto panel = [&](int64_t task, int64_t) {
    const int64_t first = task * kPanelRows, rest = call.outputs - first;
    multiply(w, first, rest < kPanelRows ? rest : kPanelRows, x.all(), call.x.rows, call.y + first, call.outputs);
  };
  const int64_t products = call.x.rows * call.outputs * call.x.columns;
  parallel_for(pool.for_work(products), round_up(call.outputs, kPanelRows) / kPanelRows, panel);
  return true;
}

template <class Weights>
inline bool linear_by(const Pool& pool, const LinearCall& call, const Weights& w) {
#if defined(CPU_KERNELS_AVX512BF16)
  if (call.x.is_bf16) return linear_of<uint16_t>(pool, call, w);
#endif
  return linear_of<float>(pool, call, w);
}

inline bool linear(const Pool& pool, const LinearCall& call) {
  const int64_t inputs = call.x.columns;
  if (call.is_int8) return linear_by(pool, call, DenseWeights<int8_t>{static_cast<const int8_t*>(call.w), inputs});
  return linear_by(pool, call, DenseWeights<uint16_t>{static_cast<const uint16_t*>(call.w), inputs});
}

}  // namespace cpu_kernels::CPU_KERNELS_ISA

#endif  // CPU_KERNELS_LINEAR_H_
