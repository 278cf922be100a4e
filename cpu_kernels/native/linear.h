// y = x w^T with bfloat16 weights: each task takes a panel of the weights' rows, read once for all rows of x.
#ifndef CPU_KERNELS_LINEAR_H_
#define CPU_KERNELS_LINEAR_H_

#include "product.h"

namespace cpu_kernels::CPU_KERNELS_ISA {

inline bool linear(const Pool& pool, const LinearCall& call) {
  const Unzipped x(pool, call.x);
  if (!x.ok()) return false;
  const Bf16Weights w{call.w, call.x.columns};
  auto panel = [&](int64_t task, int64_t) {
    const int64_t first = task * kPanelRows, rest = call.outputs - first;
    multiply(w, first, rest < kPanelRows ? rest : kPanelRows, x.rows(), call.x.rows, call.y + first, call.outputs);
  };
  const int64_t products = call.x.rows * call.outputs * call.x.columns;
  parallel_for(pool.for_work(products), round_up(call.outputs, kPanelRows) / kPanelRows, panel);
  return true;
}

}  // namespace cpu_kernels::CPU_KERNELS_ISA

#endif  // CPU_KERNELS_LINEAR_H_
