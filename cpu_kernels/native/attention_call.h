// What one call of attention is: plain arguments, for the handlers that make it and the kernels that run it.
#ifndef CPU_KERNELS_ATTENTION_CALL_H_
#define CPU_KERNELS_ATTENTION_CALL_H_

#include <stdint.h>

namespace cpu_kernels {

// Float32 or bfloat16 numbers.
struct Numbers {
  const void* data;
  bool bfloat16;
};

// Tokens' keys and values, [tokens, K, H] each, of one dtype: a pool of pages, all sequences' rings, or new tokens.
struct KeysAndValues {
  const void *keys, *values;
};

// The arrays of `pallas_kernels.attention`, in its letters: B sequences, T tokens, N heads, K key/value heads, H head
// size.
struct AttentionCall {
  Numbers q;                 // [B, T, N, H]
  Numbers sinks;             // [N]
  const int32_t* positions;  // [B, T]; -1 is padding
  float* out;                // [B, T, N, H]
  float* lse;                // [B, T, N]
  int64_t sequences, tokens, heads, kv_heads, head_size;
  bool bfloat16_keys;    // else float32, and values alike
  KeysAndValues stored;  // paged: [P, S, K, H]; sliding window: [B, W, K, H]
  int64_t slots;         // S or W

  const int32_t* page_table;  // [B, M], or null: sliding window
  int64_t pages, pages_per_sequence;

  KeysAndValues fresh;   // sliding window: [B, T, K, H], at positions start, start + 1, ...
  const int32_t* start;  // [B]
};

}  // namespace cpu_kernels

#endif  // CPU_KERNELS_ATTENTION_CALL_H_
