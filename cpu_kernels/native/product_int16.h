// Dot products of bfloat16 activations with MXFP4 weights in whole numbers: exact over each block of 32.
//
// A block of activations becomes 16-bit whole numbers under one power of two: down to 1/128 of the block's largest they
// stay exact, and what is smaller is off by at most 2^-15 of that largest, far below bfloat16's own rounding of it.
// MXFP4 codes doubled are whole numbers up to 12. So the sum over a block fits 32 bits and is the same whoever adds it
// up, in whatever order: by pairs of 16-bit products (vpmaddwd, vpdpwssd, SMLAL), or plainly. (Weights under scale byte
// 0, 2^-127, are taken as zero.)
//
// Sums of blocks are multiplied by both scales and added up in float32, sixteen lanes side by side: block b goes to lane
// lane_of(b), block b + 16 to the same one, and the lanes are added up as `sum` does. That is the one order for any
// number of rows of activations and every instruction set, so they all give the same bits.
//
// There are two ways to the same sums. Few rows of activations meet each row of weights as it is unpacked, lanes being
// inputs (`multiply_few_rows`). Many rows lie transposed, lanes being rows of activations, and weights are unpacked once
// for all of them (product_tokens.h).
#ifndef CPU_KERNELS_PRODUCT_INT16_H_
#define CPU_KERNELS_PRODUCT_INT16_H_

#include "vec.h"

namespace cpu_kernels::CPU_KERNELS_ISA {

constexpr int kBlockInputs = 32, kCodeBytes = kBlockInputs / 2;
constexpr int kGroupBlocks = kLanes;  // blocks whose sums fill the lanes
constexpr int kQuadBlocks = 4, kQuads = kGroupBlocks / kQuadBlocks;

// Where the sum of a block goes: as adding up pairs of neighbours, twice, leaves the blocks of four quads.
constexpr int lane_of(int block) { return 4 * (block % kQuadBlocks) + block / kQuadBlocks % kQuads; }

// Weights are looked up as whole numbers from 0 to 24, which bytes and words hold without a sign: the codes doubled,
// and 12 more. What these 12 add to a sum depends on activations alone.
constexpr int kOffset = 12;
constexpr uint8_t kOffsetCodes[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

// A byte of codes holds inputs 2 i and 2 i + 1, and two of them are looked up into a word: a block's weights come in four
// parts of eight words, part p being its inputs 4 j + p. So do its activations.
constexpr int kParts = 4, kPartWords = 8;

// Sixteen blocks of a row of activations.
struct Group {
  int16_t words[kQuads][kParts][kQuadBlocks][kPartWords];
  float scales[kLanes];                      // by lane; half of it, since codes are doubled
  int32_t offsets[kLanes];                   // by lane: kOffset times the sum of the words
};

inline int64_t groups_of(int64_t blocks) { return (blocks + kGroupBlocks - 1) / kGroupBlocks; }

// The power of two whose multiples a block's inputs become, as its exponent's bits: all eight bits of the largest stay,
// seven more below. Inputs of which one is infinite or not a number: 0, and NaN as the scale.
struct Exponent {
  uint32_t scale, inverse;  // bits of float32s
};
inline Exponent exponent_of(const uint32_t (&bits)[kBlockInputs]) {
  uint32_t largest = 24u << kMantissaBits;  // below 2^-103: so that both powers are normal numbers
  for (uint32_t each : bits) {
    const uint32_t size = each & 0x7FFFFFFF;
    largest = size > largest ? size : largest;
  }
  const uint32_t exponent = largest >> kMantissaBits;
  if (exponent == 255) return {0x7FC00000, 0};
  return {(exponent - 15) << kMantissaBits, (268 - exponent) << kMantissaBits};
}

// 32 inputs, which are bfloat16s, as words in their four parts; gives their scale.
inline float quantise(const float* in, int16_t (&words)[kParts][kPartWords]) {
  uint32_t bits[kBlockInputs];
  memcpy(bits, in, sizeof bits);
  const Exponent exponent = exponent_of(bits);
  float scale, inverse;
  memcpy(&scale, &exponent.scale, sizeof scale);
  memcpy(&inverse, &exponent.inverse, sizeof inverse);
  float rounded[kBlockInputs] = {};
  if (exponent.inverse != 0)
    for (int i = 0; i < kBlockInputs; i += kLanes)
      store(rounded + i, add(mul(load(in + i), splat(inverse)), splat(kRounder)));
  memcpy(bits, rounded, sizeof bits);
  for (int part = 0; part < kParts; ++part)
    for (int j = 0; j < kPartWords; ++j) words[part][j] = int16_t(bits[4 * j + part] & 0xFFFF);
  return scale;
}

// Block `block` of a row of activations.
inline void put_block(const int16_t (&words)[kParts][kPartWords], float scale, int64_t block, Group* row) {
  Group& group = row[block / kGroupBlocks];
  const int at = int(block % kGroupBlocks), lane = lane_of(at);
  int32_t sum = 0;
  for (int part = 0; part < kParts; ++part) {
    memcpy(group.words[at / kQuadBlocks][part][at % kQuadBlocks], words[part], sizeof words[part]);
    for (int16_t word : words[part]) sum += word;
  }
  group.scales[lane] = scale;
  group.offsets[lane] = kOffset * sum;
}

// A row of bfloat16s, whole blocks of them.
inline void quantise_row(const uint16_t* in, int64_t blocks, Group* row) {
  const int rest = int(blocks % kGroupBlocks);
  if (rest) memset(row + blocks / kGroupBlocks, 0, sizeof(Group));
  for (int64_t block = 0; block < blocks; ++block) {
    float values[kBlockInputs];
    int16_t words[kParts][kPartWords];
    for (int i = 0; i < kBlockInputs; i += kLanes) store(values + i, load_bf16(in + block * kBlockInputs + i));
    const float scale = quantise(values, words);
    put_block(words, scale, block, row);
  }
}

// Each instruction set defines:
//   power_of_scales(p)     2^(scale - 127) of sixteen E8M0 bytes, by lane; 0 for a byte of 0
//   sums_of_blocks<M>(codes, count, x, sums)  the exact sums of `count` blocks and of M rows' x[m], by lane

#if defined(CPU_KERNELS_AVX512)

inline Vec power_of_scales(const uint8_t* p) {
  const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m512i thirds = _mm512_set_epi32(0x800f8080, 0x800b8080, 0x80078080, 0x80038080, 0x800e8080, 0x800a8080,
                                          0x80068080, 0x80028080, 0x800d8080, 0x80098080, 0x80058080, 0x80018080,
                                          0x800c8080, 0x80088080, 0x80048080, 0x80008080);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_shuffle_epi8(bytes, thirds), kMantissaBits - 16));
}

inline __m512i add_pairs(__m512i sum, __m512i a, __m512i b) {
#if defined(__AVX512VNNI__)
  return _mm512_dpwssd_epi32(sum, a, b);
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}

// Pairs of neighbouring lanes added up, as vphaddd would.
inline __m512i add_neighbours(__m512i a, __m512i b) {
  const __m512 x = _mm512_castsi512_ps(a), y = _mm512_castsi512_ps(b);
  return _mm512_add_epi32(_mm512_castps_si512(_mm512_shuffle_ps(x, y, 0x88)),
                          _mm512_castps_si512(_mm512_shuffle_ps(x, y, 0xDD)));
}

template <int M>
inline void sums_of_blocks(const uint8_t* codes, int count, const Group* const (&x)[M], Vec (&sums)[M]) {
  const __m512i table =
      _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kOffsetCodes)));
  const __m512i nibble = _mm512_set1_epi8(15), low = _mm512_set1_epi16(255);
  __m512i quads[M][kQuads];
#pragma GCC unroll 4
  for (int q = 0; q < kQuads; ++q) {
    const int here = count - q * kQuadBlocks;
    if (here <= 0) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) quads[m][q] = _mm512_setzero_si512();
      continue;
    }
    const uint8_t* p = codes + q * kQuadBlocks * kCodeBytes;
    const __m512i bytes = here >= kQuadBlocks ? _mm512_loadu_si512(p)
                                              : _mm512_maskz_loadu_epi64(__mmask8((1u << 2 * here) - 1), p);
    const __m512i even = _mm512_shuffle_epi8(table, _mm512_and_si512(bytes, nibble));
    const __m512i odd = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble));
    const __m512i parts[kParts] = {_mm512_and_si512(even, low), _mm512_and_si512(odd, low), _mm512_srli_epi16(even, 8),
                                   _mm512_srli_epi16(odd, 8)};
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      __m512i all = _mm512_setzero_si512();
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part)
        all = add_pairs(all, parts[part], _mm512_loadu_si512(x[m]->words[q][part]));
      quads[m][q] = all;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    const __m512i all = add_neighbours(add_neighbours(quads[m][0], quads[m][1]),
                                       add_neighbours(quads[m][2], quads[m][3]));
    sums[m] = _mm512_cvtepi32_ps(_mm512_sub_epi32(all, _mm512_loadu_si512(x[m]->offsets)));
  }
}

#elif defined(CPU_KERNELS_AVX2)

inline Vec power_of_scales(const uint8_t* p) {
  const __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const auto power = [&](__m256i thirds) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_shuffle_epi8(bytes, thirds), kMantissaBits - 16));
  };
  return {power(_mm256_set_epi32(0x800d8080, 0x80098080, 0x80058080, 0x80018080, 0x800c8080, 0x80088080, 0x80048080,
                                 0x80008080)),
          power(_mm256_set_epi32(0x800f8080, 0x800b8080, 0x80078080, 0x80038080, 0x800e8080, 0x800a8080, 0x80068080,
                                 0x80028080))};
}

inline __m256i add_pairs(__m256i sum, __m256i a, __m256i b) {
#if defined(__AVXVNNI__)
  return _mm256_dpwssd_avx_epi32(sum, a, b);
#else
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#endif
}

// Pairs of neighbouring lanes added up, as vphaddd does in more steps.
inline __m256i add_neighbours(__m256i a, __m256i b) {
  const __m256 x = _mm256_castsi256_ps(a), y = _mm256_castsi256_ps(b);
  return _mm256_add_epi32(_mm256_castps_si256(_mm256_shuffle_ps(x, y, 0x88)),
                          _mm256_castps_si256(_mm256_shuffle_ps(x, y, 0xDD)));
}

// Two blocks of codes, or one and zeros, or none.
inline __m256i load_codes(const uint8_t* p, int blocks) {
  if (blocks >= 2) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  if (blocks == 1) return _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_setzero_si256();
}

// The first two blocks of each quad, or the last two.
template <int M>
inline void half_sums(const uint8_t* codes, int count, int half, const Group* const (&x)[M], __m256 (&sums)[M]) {
  const __m256i table =
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kOffsetCodes)));
  const __m256i nibble = _mm256_set1_epi8(15), low = _mm256_set1_epi16(255);
  __m256i quads[M][kQuads];
#pragma GCC unroll 4
  for (int q = 0; q < kQuads; ++q) {
    const int first = q * kQuadBlocks + 2 * half;
    const __m256i bytes = load_codes(codes + first * kCodeBytes, count - first);
    const __m256i even = _mm256_shuffle_epi8(table, _mm256_and_si256(bytes, nibble));
    const __m256i odd = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble));
    const __m256i parts[kParts] = {_mm256_and_si256(even, low), _mm256_and_si256(odd, low), _mm256_srli_epi16(even, 8),
                                   _mm256_srli_epi16(odd, 8)};
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const auto words = [&](int part) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x[m]->words[q][part][2 * half]));
      };
      __m256i all = _mm256_madd_epi16(parts[0], words(0));
#pragma GCC unroll 4
      for (int part = 1; part < kParts; ++part) all = add_pairs(all, parts[part], words(part));
      quads[m][q] = all;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    const __m256i all = add_neighbours(add_neighbours(quads[m][0], quads[m][1]),
                                       add_neighbours(quads[m][2], quads[m][3]));
    const __m256i offsets = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x[m]->offsets + 8 * half));
    sums[m] = _mm256_cvtepi32_ps(_mm256_sub_epi32(all, offsets));
  }
}

template <int M>
inline void sums_of_blocks(const uint8_t* codes, int count, const Group* const (&x)[M], Vec (&sums)[M]) {
  __m256 lo[M], hi[M];
  half_sums(codes, count, 0, x, lo);
  half_sums(codes, count, 1, x, hi);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) sums[m] = {lo[m], hi[m]};
}

#else

inline Vec power_of_scales(const uint8_t* p) {
  float powers[kLanes];
  for (int block = 0; block < kGroupBlocks; ++block) {
    const uint32_t bits = uint32_t(p[block]) << kMantissaBits;
    memcpy(powers + lane_of(block), &bits, sizeof bits);
  }
  return load(powers);
}

#if defined(CPU_KERNELS_NEON)

inline int32x4_t add_pairs(int32x4_t sum, uint16x8_t w, const int16_t* x) {
  const int16x8_t a = vreinterpretq_s16_u16(w), b = vld1q_s16(x);
  return vmlal_high_s16(vmlal_s16(sum, vget_low_s16(a), vget_low_s16(b)), a, b);
}

template <int M>
inline void sums_of_blocks(const uint8_t* codes, int count, const Group* const (&x)[M], Vec (&sums)[M]) {
  const uint8x16_t table = vld1q_u8(kOffsetCodes);
  for (int i = 0; i < kQuadBlocks; ++i) {  // block i of each quad
    int32x4_t quads[M][kQuads];
    for (int q = 0; q < kQuads; ++q) {
      const int at = q * kQuadBlocks + i;
      const uint8x16_t bytes = at < count ? vld1q_u8(codes + at * kCodeBytes) : vdupq_n_u8(0);
      const uint16x8_t even = vreinterpretq_u16_u8(vqtbl1q_u8(table, vandq_u8(bytes, vdupq_n_u8(15))));
      const uint16x8_t odd = vreinterpretq_u16_u8(vqtbl1q_u8(table, vshrq_n_u8(bytes, 4)));
      const uint16x8_t parts[kParts] = {vandq_u16(even, vdupq_n_u16(255)), vandq_u16(odd, vdupq_n_u16(255)),
                                        vshrq_n_u16(even, 8), vshrq_n_u16(odd, 8)};
      for (int m = 0; m < M; ++m) {
        quads[m][q] = vdupq_n_s32(0);
        for (int part = 0; part < kParts; ++part)
          quads[m][q] = add_pairs(quads[m][q], parts[part], x[m]->words[q][part][i]);
      }
    }
    for (int m = 0; m < M; ++m) {
      const int32x4_t all =
          vpaddq_s32(vpaddq_s32(quads[m][0], quads[m][1]), vpaddq_s32(quads[m][2], quads[m][3]));
      sums[m].q[i] = vcvtq_f32_s32(vsubq_s32(all, vld1q_s32(x[m]->offsets + 4 * i)));
    }
  }
}

#else

template <int M>
inline void sums_of_blocks(const uint8_t* codes, int count, const Group* const (&x)[M], Vec (&sums)[M]) {
  for (int m = 0; m < M; ++m) sums[m] = splat(0);
  for (int block = 0; block < count; ++block, codes += kCodeBytes) {
    int16_t parts[kParts][kPartWords];
    for (int j = 0; j < kPartWords; ++j) {
      parts[0][j] = kOffsetCodes[codes[2 * j] & 15], parts[1][j] = kOffsetCodes[codes[2 * j] >> 4];
      parts[2][j] = kOffsetCodes[codes[2 * j + 1] & 15], parts[3][j] = kOffsetCodes[codes[2 * j + 1] >> 4];
    }
    for (int m = 0; m < M; ++m) {
      int32_t all = -x[m]->offsets[lane_of(block)];
      for (int part = 0; part < kParts; ++part) {
        const int16_t* words = x[m]->words[block / kQuadBlocks][part][block % kQuadBlocks];
        for (int j = 0; j < kPartWords; ++j) all += int32_t(parts[part][j]) * words[j];
      }
      sums[m].lane[lane_of(block)] = float(all);
    }
  }
}

#endif

#endif

// A matrix of MXFP4 weights: codes [rows, blocks, 16] and their scales, [rows, blocks].
struct PackedRows {
  const uint8_t *codes, *scales;
  int64_t blocks;

  const uint8_t* codes_of(int64_t row) const { return codes + row * blocks * kCodeBytes; }
};

// Asks for memory that is read soon.
inline void fetch(const uint8_t* from, int64_t bytes) {
  for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(from + byte, 0, 3);
}

// out[m * stride] = dot(row `row` of weights, x[m]) for M rows of activations. Asks meanwhile for as much from `ahead`.
template <int M>
inline void multiply_row(const PackedRows& w, int64_t row, const Group* const* x, const uint8_t* ahead, float* out,
                         int64_t stride) {
  const uint8_t *codes = w.codes_of(row), *scales = w.scales + row * w.blocks;
  Vec sums[M];
  const Group* at[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) sums[m] = splat(0), at[m] = x[m];
  int64_t left = w.blocks;
  const auto add_group = [&](const uint8_t* group_scales, int count) __attribute__((always_inline)) {
    Vec products[M];
    sums_of_blocks<M>(codes, count, at, products);
    const Vec powers = power_of_scales(group_scales);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      sums[m] = fma(products[m], mul(powers, load(at[m]->scales)), sums[m]);
      ++at[m];
    }
  };
  for (; left >= kGroupBlocks; left -= kGroupBlocks) {
    fetch(ahead, kGroupBlocks * kCodeBytes);
    add_group(scales, kGroupBlocks);
    codes += kGroupBlocks * kCodeBytes, ahead += kGroupBlocks * kCodeBytes, scales += kGroupBlocks;
  }
  if (left > 0) {
    fetch(ahead, left * kCodeBytes);
    uint8_t last[kGroupBlocks] = {};
    memcpy(last, scales, size_t(left));
    add_group(last, int(left));
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) out[m * stride] = sum(sums[m]);
}

#if defined(CPU_KERNELS_AVX512) || defined(CPU_KERNELS_AVX2)
constexpr int kFewRows = 4;
#else
constexpr int kFewRows = 2;
#endif

// out[m * stride + r] = dot(row first + r of weights, x[m]) for r below `count`, and any number of rows of activations.
// `next` are the codes that are multiplied after these: some rows ahead of the last ones come from there.
template <int M = kFewRows>
inline void multiply_few_rows(const PackedRows& w, int64_t first, int64_t count, const uint8_t* next,
                              const Group* const* x, int64_t rows, float* out, int64_t stride) {
  constexpr int64_t kRowsAhead = 6;  // of the 20b 8.6 kB
  for (; rows >= M; rows -= M, x += M, out += M * stride)
    for (int64_t r = 0; r < count; ++r) {
      const int64_t beyond = r + kRowsAhead - count;
      const uint8_t* ahead = beyond < 0 ? w.codes_of(first + r + kRowsAhead) : next + beyond * w.blocks * kCodeBytes;
      multiply_row<M>(w, first + r, x, ahead, out + r, stride);
    }
  if constexpr (M > 1) multiply_few_rows<M - 1>(w, first, count, next, x, rows, out, stride);
}

}  // namespace cpu_kernels::CPU_KERNELS_ISA

#endif  // CPU_KERNELS_PRODUCT_INT16_H_
