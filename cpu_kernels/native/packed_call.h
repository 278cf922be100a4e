// What one call of attention over packed rows is: plain arguments, for the handlers that make it and the kernels.
#ifndef CPU_KERNELS_PACKED_CALL_H_
#define CPU_KERNELS_PACKED_CALL_H_

#include <stdint.h>

#include "attention_call.h"

namespace cpu_kernels {

// The arrays of `pallas_kernels.attention.attend_packed`, in its letters: B rows, T tokens, N heads, K key/value heads,
// H head size. Places are such as `Places` describes; whatever they hold, nothing outside the arrays is read.
struct PackedCall {
  Numbers q;                              // [B, T, N, H]
  Numbers k, v;                           // [B, T, K, H]
  const int32_t *position, *first, *head;  // [B, T]
  Numbers sinks;                          // [N]
  int64_t rows, tokens, heads, kv_heads, head_size;
  int64_t window;  // 0: none
};

// What attention gives: out [B, T, N, H], and lse [B, T, N], ln(sum of exp(logit)) with the sink's; +inf for padding.
struct PackedResult {
  float *out, *lse;
};

// The gradient of a loss by the output, and by each of the inputs, whose shapes these have.
struct PackedGradient {
  const float *out, *lse, *d_out;
  float *dq, *dk, *dv, *d_sinks;
};

}  // namespace cpu_kernels

#endif  // CPU_KERNELS_PACKED_CALL_H_
