// Logits of bfloat16 queries and keys, taken in pairs by the instruction that multiplies and adds these (product_bf16.h).
//
// Products are exact and sums float32s, as of floats; a sum takes the second of a pair before the first.
#ifndef CPU_KERNELS_ATTENTION_PAIRS_H_
#define CPU_KERNELS_ATTENTION_PAIRS_H_

#include "attention_keys.h"
#include "attention_tiles.h"

namespace cpu_kernels::CPU_KERNELS_ISA {
namespace attending {

// The left-hand side, whose product with `Pairs` goes to c.
struct PairedRows {
  int64_t rows;
  const int32_t* a;  // [rows, pairs]
  int64_t pairs;
  float* c;  // [rows, columns of the right-hand side]
};

#if defined(CPU_KERNELS_AVX512BF16)

constexpr bool kHasPairs = true;

// c = a b for a few rows and vectors of c.
template <int kRows, int kVecs, class Ahead>
inline void multiply_tile(const PairedRows& rows, int64_t first, const Pairs& b, int64_t column, Ahead& ahead) {
  const int32_t* a = rows.a + first * rows.pairs;
  Vec sums[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) sums[r][v] = splat(0);
  for (int64_t k = 0; k < rows.pairs; ++k) {
    if (k % 2 == 0) ahead.fetch_some();  // as often as beside floats
    __m512bh keys[kVecs];
    for (int v = 0; v < kVecs; ++v)
      keys[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b.data + 2 * (k * b.columns + column + v * kLanes)));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512bh query = reinterpret_cast<__m512bh>(_mm512_set1_epi32(a[r * rows.pairs + k]));
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], keys[v], query);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) store(rows.c + (first + r) * b.columns + column + v * kLanes, sums[r][v]);
}

#else

constexpr bool kHasPairs = false;

#endif

inline float scale_of(const AttentionCall& call) { return 1 / __builtin_sqrtf(float(call.head_size)); }

// Whether a call's logits are taken in pairs: keys and scaled queries must be bfloat16s, and keys whole cache lines.
inline bool takes_pairs(const AttentionCall& call) {
  const float scale = scale_of(call);
  uint32_t bits;
  memcpy(&bits, &scale, sizeof bits);
  const bool exact = bits << (32 - kMantissaBits) == 0;  // a power of two changes no significant bit
  return kHasPairs && call.bfloat16_keys && call.q.bfloat16 && call.head_size % 32 == 0 && exact;
}

// Float32s that are bfloat16s as pairs of them, in place if need be.
inline void narrow(const float* in, int64_t count, int32_t* pairs) {
  for (int64_t i = 0; i < count; i += 2) {
    uint32_t words[2];
    memcpy(words, in + i, sizeof words);
    pairs[i / 2] = int32_t(words[1] & 0xFFFF0000u) | int32_t(words[0] >> 16);
  }
}

}  // namespace attending
}  // namespace cpu_kernels::CPU_KERNELS_ISA

#endif  // CPU_KERNELS_ATTENTION_PAIRS_H_
