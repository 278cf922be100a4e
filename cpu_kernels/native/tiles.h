// What attention needs of vectors: sixteen keys turned so that a lane is a key, bfloat16 widened, powers of two.
#ifndef CPU_KERNELS_TILES_H_
#define CPU_KERNELS_TILES_H_

#include "vec.h"

namespace cpu_kernels::CPU_KERNELS_ISA {

inline float widen(uint16_t a) {
  const uint32_t word = uint32_t(a) << 16;
  float value;
  memcpy(&value, &word, sizeof value);
  return value;
}

inline float widen(float a) { return a; }

inline Vec load_wide(const uint16_t* p) { return load_bf16(p); }
inline Vec load_wide(const float* p) { return load(p); }

// 2^n for n as kRounder + n, -127 <= n <= 127, of which -127 gives 0.
constexpr int32_t kPowerBits = kRounderBits - kExponentBias;

#if defined(CPU_KERNELS_AVX512)

inline Vec power_of_two(Vec n) {
  const __m512i biased = _mm512_sub_epi32(_mm512_castps_si512(n), _mm512_set1_epi32(kPowerBits));
  return _mm512_castsi512_ps(_mm512_slli_epi32(biased, kMantissaBits));
}

// Sixteen words of four bytes of each of sixteen rows, columns for rows: word c of all rows to `columns` + c stride.
inline void transpose(const char* const rows[16], int64_t byte, float* columns, int64_t stride) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(rows[i] + byte);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // Now a[4 q + c] has in its quarter g word 4 g + c of rows 4 q to 4 q + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512i even01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88);
    const __m512i odd01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
    const __m512i even23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
    _mm512_storeu_si512(columns + c * stride, _mm512_shuffle_i32x4(even01, even23, 0x88));
    _mm512_storeu_si512(columns + (4 + c) * stride, _mm512_shuffle_i32x4(odd01, odd23, 0x88));
    _mm512_storeu_si512(columns + (8 + c) * stride, _mm512_shuffle_i32x4(even01, even23, 0xdd));
    _mm512_storeu_si512(columns + (12 + c) * stride, _mm512_shuffle_i32x4(odd01, odd23, 0xdd));
  }
}

#else

#if defined(CPU_KERNELS_AVX2)

inline __m256 power_of_two(__m256 n) {
  const __m256i biased = _mm256_sub_epi32(_mm256_castps_si256(n), _mm256_set1_epi32(kPowerBits));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, kMantissaBits));
}
inline Vec power_of_two(Vec n) { return {power_of_two(n.lo), power_of_two(n.hi)}; }

// Eight words of each of eight rows.
inline void transpose_eight(const char* const rows[8], int64_t byte, float* columns, int64_t stride) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(rows[i] + byte));
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  // Now a[4 q + c] has in its half h word 4 h + c of rows 4 q to 4 q + 3.
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_ps(columns + c * stride, _mm256_permute2f128_ps(a[c], a[4 + c], 0x20));
    _mm256_storeu_ps(columns + (4 + c) * stride, _mm256_permute2f128_ps(a[c], a[4 + c], 0x31));
  }
}

inline void transpose(const char* const rows[16], int64_t byte, float* columns, int64_t stride) {
  for (int half = 0; half < 2; ++half)
    for (int row = 0; row < 16; row += 8)
      transpose_eight(rows + row, byte + 32 * half, columns + 8 * half * stride + row, stride);
}

#else

inline Vec power_of_two(const Vec& n) {
  float lanes[kLanes];
  uint32_t words[kLanes];
  store(lanes, n);
  memcpy(words, lanes, sizeof words);
  for (uint32_t& word : words) word = (word - uint32_t(kPowerBits)) << kMantissaBits;
  memcpy(lanes, words, sizeof lanes);
  return load(lanes);
}

inline void transpose(const char* const rows[16], int64_t byte, float* columns, int64_t stride) {
  for (int c = 0; c < 16; ++c)
    for (int row = 0; row < 16; ++row) memcpy(columns + c * stride + row, rows[row] + byte + 4 * c, 4);
}

#endif

#endif

}  // namespace cpu_kernels::CPU_KERNELS_ISA

#endif  // CPU_KERNELS_TILES_H_
