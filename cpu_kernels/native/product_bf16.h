// Blocks of weights as bfloat16 pairs, for the instruction that multiplies and adds these: twice as many at a time.
//
// Sixteen lanes take a pair of neighbouring inputs each: sum = odd w * odd x + sum, then the even ones, each rounded
// once. Nothing is unzipped; signed bytes are bfloat16s exactly. The instruction takes operands and results below 2^-126
// as zero.
#ifndef CPU_KERNELS_PRODUCT_BF16_H_
#define CPU_KERNELS_PRODUCT_BF16_H_

#include "vec.h"

namespace cpu_kernels::CPU_KERNELS_ISA {

struct Pairs {
  __m512i all;

  static constexpr int kTileWeights = 4, kTileRows = 6, kWeightsOfOneRow = 8;  // as of Floats
  static constexpr bool kSideBySide = true;
};

Pairs block_of(uint16_t);

// A row of n inputs into round_up(n, 32).
inline void lay_out(const uint16_t* in, int64_t n, uint16_t* out) {
  memcpy(out, in, sizeof(uint16_t) * size_t(n));
  memset(out + n, 0, sizeof(uint16_t) * size_t(-n & 31));
}

// Sixteen inputs from the at-th on into a row; they are bfloat16s.
inline void lay_out(Vec values, int64_t at, uint16_t* row) {
  const __m512i words = _mm512_srli_epi32(_mm512_castps_si512(values), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + at), _mm512_cvtepi32_epi16(words));
}

inline void unpack(const uint16_t* p, Pairs& to) { to.all = _mm512_loadu_si512(p); }

inline void unpack(const int8_t* p, Pairs& to) {
  const __m128i* bytes = reinterpret_cast<const __m128i*>(p);
  const __m512 lo = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes)));
  const __m512 hi = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes + 1)));
  to.all = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(hi, lo));
}

// Adds the products of one block of R rows of weights and of x to their sums.
template <int R>
inline void add_products(const Pairs (&w)[R], const uint16_t* x, Vec (&sums)[R]) {
  const __m512bh pairs = reinterpret_cast<__m512bh>(_mm512_loadu_si512(x));
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sums[r] = _mm512_dpbf16_ps(sums[r], reinterpret_cast<__m512bh>(w[r].all), pairs);
}

}  // namespace cpu_kernels::CPU_KERNELS_ISA

#endif  // CPU_KERNELS_PRODUCT_BF16_H_
