// What one call of experts with dense weights is: plain arguments, for the handlers that make it and the kernels.
#ifndef CPU_KERNELS_DENSE_EXPERTS_CALL_H_
#define CPU_KERNELS_DENSE_EXPERTS_CALL_H_

#include <stdint.h>

namespace cpu_kernels {

// The arrays of `pallas_kernels.expert_mlp`, all float32: T tokens, X = top_k, E experts, D hidden, F inner.
struct DenseExperts {
  const float* x;            // [T, D]
  const int32_t* ids;        // [T, X]; those outside [0, E) are skipped
  const float* routing;      // [T, X]
  const float* gate_up;      // [E, 2 F, D]: even rows are the gate, odd ones the linear part
  const float* gate_up_bias;  // [E, 2 F]
  const float* down;         // [E, D, F]
  const float* down_bias;    // [E, D]
  float limit;
  int64_t tokens, top_k, experts, hidden, inner;
};

// The gradient of y, [T, D], and where those of the arguments go, of the arguments' shapes.
struct DenseExpertsGradient {
  const float* y;
  float *x, *routing, *gate_up, *gate_up_bias, *down, *down_bias;
};

}  // namespace cpu_kernels

#endif  // CPU_KERNELS_DENSE_EXPERTS_CALL_H_
