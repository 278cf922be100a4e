// y = x w^T with bfloat16 or int8 weights: each task takes a panel of the weights' rows, read once for all rows of x.
#ifndef CPU_KERNELS_LINEAR_H_
#define CPU_KERNELS_LINEAR_H_

#include "product.h"

namespace cpu_kernels::CPU_KERNELS_ISA {

template <typename X, class Weights>
inline bool linear_of(const Pool& pool, const LinearCall& call, const Weights& w) {
  const Pool useful = pool.for_work(call.x.rows * call.outputs * call.x.columns);
  const int64_t tasks = round_up(call.outputs, kPanelRows) / kPanelRows;
  const int64_t room = room_of(call.x.rows, call.x.columns);
  const Rows<X> x(pool, call.x);
  const Scratch rooms(useful.max_workers(tasks) * room * int64_t(sizeof(float)));
  if (!x.ok() || !rooms.data()) return false;
  auto panel = [&](int64_t task, int64_t worker) {
    const int64_t first = task * kPanelRows, rest = call.outputs - first;
    multiply(w, first, rest < kPanelRows ? rest : kPanelRows, x.all(), call.x.rows, call.y + first, call.outputs,
             rooms.floats() + worker * room);
  };
  parallel_for(useful, tasks, panel);
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
