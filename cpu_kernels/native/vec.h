// Sixteen float32 lanes on every instruction set, with the same bits as the result wherever IEEE 754 allows it.
//
// A source that includes this is compiled once per instruction set (isa.h); everything then lives in a namespace of that
// name. Such sources use no standard C++ templates and no inline functions from elsewhere: of equal inline functions the
// linker keeps one, perhaps that for a newer machine.
//
// Lanes are added up by one fixed tree, exp uses no fused operation, and min, max give b where a or b is NaN. `fma`
// rounds once, except in portable code, which rounds twice: equal where the product is exact, as of two bfloat16s.
#ifndef CPU_KERNELS_VEC_H_
#define CPU_KERNELS_VEC_H_

#include <stdint.h>
#include <string.h>

#include "isa.h"

#if defined(CPU_KERNELS_AVX512) || defined(CPU_KERNELS_AVX2)
#include <immintrin.h>
#elif defined(CPU_KERNELS_NEON)
#include <arm_neon.h>
#endif

namespace cpu_kernels::CPU_KERNELS_ISA {

constexpr int kLanes = 16;

// The MXFP4 codes, and 2^n as the exponent bits of a float32.
constexpr float kFp4[16] = {0, .5, 1, 1.5, 2, 3, 4, 6, -0.f, -.5, -1, -1.5, -2, -3, -4, -6};
constexpr int32_t kExponentBias = 127, kMantissaBits = 23;

// 2^(scale - 127) for each E8M0 scale: 0 is below float32's normal numbers, 255 is infinity as the exponent's bits are.
struct Powers {
  float of[256];
};
constexpr Powers powers() {
  Powers result{};
  result.of[0] = 5.877471754111437539843683e-39f;
  for (int scale = 1; scale < 255; ++scale) result.of[scale] = 2 * result.of[scale - 1];
  result.of[255] = __builtin_inff();
  return result;
}
constexpr Powers kPowers = powers();

// An MXFP4 code under an E8M0 scale: exactly a bfloat16, whose bits these are.
constexpr uint16_t bf16_of_fp4(int code, int scale) {
  // Without their sign codes are 0, 0.5, then 1, 1.5, 2, 3, 4, 6: an exponent for each two.
  const int size = code % 8, exponent = scale - 1 + size / 2, fraction = size > 1 && size % 2 ? 0x40 : 0;
  int bits = exponent < 1 ? (0x80 | fraction) >> (1 - exponent) : exponent << 7 | fraction;
  if (exponent > 254 || scale == 255) bits = 0x7F80;
  if (size == 0) bits = scale == 255 ? 0x7FC0 : 0;  // times infinity it is not a number
  return uint16_t(bits | (code & 8) << 12);
}

// Added to a float32 below 2^22 it rounds that to an integer, and its last bits are then that integer.
constexpr float kRounder = 12582912;  // 1.5 * 2^23
constexpr int32_t kRounderBits = 0x4B400000;

// Each section below defines, for its instruction set:
//   Vec         sixteen lanes; splat, load, store; add, sub, mul, div, min, max; fma(a, b, c) = a b + c
//   first_lanes(n, a, b)        a in the first n lanes, b in the others
//   unless_greater(a, b, c)     c where a > b is false, else 0
//   sum, largest                of all lanes: i with i + 8, then i + 4, i + 2, i + 1
//   load_bf16(p)                sixteen bfloat16s as float32
//   unpack_bf16(p, even, odd)   thirty-two bfloat16s, those of even and of odd index
//   unpack_int8(p, even, odd)   thirty-two signed bytes, those of even and of odd index
//   round_bf16(a)               a as the nearest bfloat16s, ties to even
//   times_power(a, n)           a 2^n, rounded once; n as kRounder + n, -300 < n < 300
//   Codes, codes(scale)         the sixteen MXFP4 codes under an E8M0 scale
//   unpack_fp4(p, codes, even, odd)   thirty-two weights from sixteen bytes, the low nibbles being the even ones

#if defined(CPU_KERNELS_AVX512)

using Vec = __m512;

inline Vec splat(float a) { return _mm512_set1_ps(a); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

inline Vec first_lanes(int n, Vec a, Vec b) { return _mm512_mask_blend_ps(__mmask16((1u << n) - 1), b, a); }

inline Vec unless_greater(Vec a, Vec b, Vec c) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_NGT_UQ), c); }

inline __m256 low(Vec a) { return _mm512_castps512_ps256(a); }
inline __m256 high(Vec a) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)); }

inline Vec load_bf16(const uint16_t* p) {
  const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(a, 16));
}

inline void unpack_bf16(const uint16_t* p, Vec& even, Vec& odd) {
  const __m512i pairs = _mm512_loadu_si512(p);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int32_t(0xFFFF0000))));
}

inline void unpack_int8(const int8_t* p, Vec& even, Vec& odd) {
  const __m512i pairs = _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  even = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(pairs, 24), 24));
  odd = _mm512_cvtepi32_ps(_mm512_srai_epi32(pairs, 8));
}

inline Vec round_bf16(Vec a) {
  const __m512i bits = _mm512_castps_si512(a), one = _mm512_set1_epi32(1);
  const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  const __m512i near = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), last);
  const __m512i rounded = _mm512_and_si512(near, _mm512_set1_epi32(int32_t(0xFFFF0000)));
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_castsi512_ps(rounded), a);
}

inline Vec times_power(Vec a, Vec n) {
  const __m512i power = _mm512_sub_epi32(_mm512_castps_si512(n), _mm512_set1_epi32(kRounderBits));
  const __m512i half = _mm512_srai_epi32(power, 1), rest = _mm512_sub_epi32(power, half);
  const __m512i bias = _mm512_set1_epi32(kExponentBias);
  a = mul(a, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(half, bias), kMantissaBits)));
  return mul(a, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(rest, bias), kMantissaBits)));
}

using Codes = __m512;

inline Codes codes(uint8_t scale) { return mul(load(kFp4), splat(kPowers.of[scale])); }

inline void unpack_fp4(const uint8_t* p, Codes codes, Vec& even, Vec& odd) {
  // The permutation reads the last four bits of an index only, so the low nibble needs no mask.
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  even = _mm512_permutexvar_ps(bytes, codes);
  odd = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), codes);
}

#elif defined(CPU_KERNELS_AVX2)

struct Vec {
  __m256 lo, hi;
};

inline Vec splat(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Vec a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }

inline Vec first_lanes(int n, Vec a, Vec b) {
  const __m256i count = _mm256_set1_epi32(n), lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i lo = _mm256_cmpgt_epi32(count, lane);
  const __m256i hi = _mm256_cmpgt_epi32(count, _mm256_add_epi32(lane, _mm256_set1_epi32(8)));
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_castsi256_ps(lo)), _mm256_blendv_ps(b.hi, a.hi, _mm256_castsi256_ps(hi))};
}

inline Vec unless_greater(Vec a, Vec b, Vec c) {
  return {_mm256_and_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_NGT_UQ), c.lo),
          _mm256_and_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_NGT_UQ), c.hi)};
}

inline __m256 low(Vec a) { return a.lo; }
inline __m256 high(Vec a) { return a.hi; }

inline __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }

inline __m256 load_bf16_half(const uint16_t* p) {
  const __m256i a = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(a, 16));
}
inline Vec load_bf16(const uint16_t* p) { return {load_bf16_half(p), load_bf16_half(p + 8)}; }

inline void unpack_bf16(const uint16_t* p, Vec& even, Vec& odd) {
  const __m256i lo = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i hi = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16));
  const __m256i upper = _mm256_set1_epi32(int32_t(0xFFFF0000));
  even = {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
  odd = {_mm256_castsi256_ps(_mm256_and_si256(lo, upper)), _mm256_castsi256_ps(_mm256_and_si256(hi, upper))};
}

inline void unpack_int8(const int8_t* p, Vec& even, Vec& odd) {
  const auto pairs = [&](int half) {
    return _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + half));
  };
  const __m256i lo = pairs(0), hi = pairs(1);
  const auto low_byte = [](__m256i a) { return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(a, 24), 24)); };
  even = {low_byte(lo), low_byte(hi)};
  odd = {_mm256_cvtepi32_ps(_mm256_srai_epi32(lo, 8)), _mm256_cvtepi32_ps(_mm256_srai_epi32(hi, 8))};
}

inline __m256 round_bf16_half(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a), one = _mm256_set1_epi32(1);
  const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
  const __m256i near = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), last);
  const __m256i rounded = _mm256_and_si256(near, _mm256_set1_epi32(int32_t(0xFFFF0000)));
  return _mm256_blendv_ps(_mm256_castsi256_ps(rounded), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
}
inline Vec round_bf16(Vec a) { return {round_bf16_half(a.lo), round_bf16_half(a.hi)}; }

inline __m256 times_power_half(__m256 a, __m256 n) {
  const __m256i power = _mm256_sub_epi32(_mm256_castps_si256(n), _mm256_set1_epi32(kRounderBits));
  const __m256i half = _mm256_srai_epi32(power, 1), rest = _mm256_sub_epi32(power, half);
  const __m256i bias = _mm256_set1_epi32(kExponentBias);
  a = _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), kMantissaBits)));
  return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), kMantissaBits)));
}
inline Vec times_power(Vec a, Vec n) { return {times_power_half(a.lo, n.lo), times_power_half(a.hi, n.hi)}; }

// The sixteen codes under a scale as bfloat16s, whose bytes are looked up one by one.
struct Codes {
  uint8_t low[16], high[16];
};
struct AllCodes {
  Codes under[256];
};
constexpr AllCodes all_codes() {
  AllCodes result{};
  for (int scale = 0; scale < 256; ++scale)
    for (int code = 0; code < 16; ++code) {
      result.under[scale].low[code] = uint8_t(bf16_of_fp4(code, scale) & 0xFF);
      result.under[scale].high[code] = uint8_t(bf16_of_fp4(code, scale) >> 8);
    }
  return result;
}
alignas(64) constexpr AllCodes kAllCodes = all_codes();

inline const Codes& codes(uint8_t scale) { return kAllCodes.under[scale]; }

// A word of four gets two weights of one parity, as unpack_bf16 splits them: lane i and lane i + 8. (Neither a
// permutation of eight floats, which takes twice as long on some processors, nor a conversion, nor a multiplication.)
inline void unpack_fp4(const uint8_t* p, const Codes& codes, Vec& even, Vec& odd) {
  const auto twice = [](const uint8_t* bytes) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  };
  const __m256i order = _mm256_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 0, 8, 1, 9, 2, 10, 3, 11,  //
                                         4, 12, 5, 13, 6, 14, 7, 15, 4, 12, 5, 13, 6, 14, 7, 15);
  const __m256i bytes = _mm256_srlv_epi64(_mm256_shuffle_epi8(twice(p), order), _mm256_setr_epi64x(0, 4, 0, 4));
  const __m256i nibbles = _mm256_and_si256(bytes, _mm256_set1_epi8(15));  // in each half those of even, then of odd
  const __m256i low = _mm256_shuffle_epi8(twice(codes.low), nibbles);
  const __m256i high = _mm256_shuffle_epi8(twice(codes.high), nibbles);
  const __m256i upper = _mm256_set1_epi32(int32_t(0xFFFF0000));
  const auto pair = [&](__m256i words) {
    return Vec{_mm256_castsi256_ps(_mm256_slli_epi32(words, 16)), _mm256_castsi256_ps(_mm256_and_si256(words, upper))};
  };
  even = pair(_mm256_unpacklo_epi8(low, high));
  odd = pair(_mm256_unpackhi_epi8(low, high));
}

#elif defined(CPU_KERNELS_NEON)

struct Vec {
  float32x4_t q[4];
};

template <typename F>
inline Vec each_quarter(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}

inline Vec splat(float a) {
  return each_quarter([&](int) { return vdupq_n_f32(a); });
}
inline Vec load(const float* p) {
  return each_quarter([&](int i) { return vld1q_f32(p + 4 * i); });
}
inline void store(float* p, Vec a) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.q[i]);
}
inline Vec add(Vec a, Vec b) {
  return each_quarter([&](int i) { return vaddq_f32(a.q[i], b.q[i]); });
}
inline Vec sub(Vec a, Vec b) {
  return each_quarter([&](int i) { return vsubq_f32(a.q[i], b.q[i]); });
}
inline Vec mul(Vec a, Vec b) {
  return each_quarter([&](int i) { return vmulq_f32(a.q[i], b.q[i]); });
}
inline Vec div(Vec a, Vec b) {
  return each_quarter([&](int i) { return vdivq_f32(a.q[i], b.q[i]); });
}
inline Vec min(Vec a, Vec b) {
  return each_quarter([&](int i) { return vbslq_f32(vcltq_f32(a.q[i], b.q[i]), a.q[i], b.q[i]); });
}
inline Vec max(Vec a, Vec b) {
  return each_quarter([&](int i) { return vbslq_f32(vcgtq_f32(a.q[i], b.q[i]), a.q[i], b.q[i]); });
}
inline Vec fma(Vec a, Vec b, Vec c) {
  return each_quarter([&](int i) { return vfmaq_f32(c.q[i], a.q[i], b.q[i]); });
}

inline Vec first_lanes(int n, Vec a, Vec b) {
  static const int32_t kLane[4] = {0, 1, 2, 3};
  return each_quarter(
      [&](int i) { return vbslq_f32(vcltq_s32(vld1q_s32(kLane), vdupq_n_s32(n - 4 * i)), a.q[i], b.q[i]); });
}

inline Vec unless_greater(Vec a, Vec b, Vec c) {
  return each_quarter([&](int i) { return vbslq_f32(vcgtq_f32(a.q[i], b.q[i]), vdupq_n_f32(0), c.q[i]); });
}

inline float sum(Vec a) {
  const float32x4_t four = vaddq_f32(vaddq_f32(a.q[0], a.q[2]), vaddq_f32(a.q[1], a.q[3]));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
inline float largest(Vec a) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.q[0], a.q[2]), vmaxq_f32(a.q[1], a.q[3]))); }

inline Vec load_bf16(const uint16_t* p) {
  return each_quarter([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
}

inline void unpack_bf16(const uint16_t* p, Vec& even, Vec& odd) {
  const auto pairs = [&](int i) { return vreinterpretq_u32_u16(vld1q_u16(p + 8 * i)); };
  even = each_quarter([&](int i) { return vreinterpretq_f32_u32(vshlq_n_u32(pairs(i), 16)); });
  odd = each_quarter([&](int i) { return vreinterpretq_f32_u32(vandq_u32(pairs(i), vdupq_n_u32(0xFFFF0000u))); });
}

inline void unpack_int8(const int8_t* p, Vec& even, Vec& odd) {
  const auto pairs = [&](int i) { return vmovl_s16(vreinterpret_s16_s8(vld1_s8(p + 8 * i))); };
  even = each_quarter([&](int i) { return vcvtq_f32_s32(vshrq_n_s32(vshlq_n_s32(pairs(i), 24), 24)); });
  odd = each_quarter([&](int i) { return vcvtq_f32_s32(vshrq_n_s32(pairs(i), 8)); });
}

inline Vec round_bf16(Vec a) {
  return each_quarter([&](int i) {
    const uint32x4_t bits = vreinterpretq_u32_f32(a.q[i]), last = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t near = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7FFF)), last);
    const float32x4_t rounded = vreinterpretq_f32_u32(vandq_u32(near, vdupq_n_u32(0xFFFF0000u)));
    return vbslq_f32(vceqq_f32(a.q[i], a.q[i]), rounded, a.q[i]);
  });
}

inline float32x4_t power_of_two(int32x4_t n) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(kExponentBias)), kMantissaBits));
}
inline Vec times_power(Vec a, Vec n) {
  return each_quarter([&](int i) {
    const int32x4_t power = vsubq_s32(vreinterpretq_s32_f32(n.q[i]), vdupq_n_s32(kRounderBits));
    const int32x4_t half = vshrq_n_s32(power, 1);
    return vmulq_f32(vmulq_f32(a.q[i], power_of_two(half)), power_of_two(vsubq_s32(power, half)));
  });
}

struct Codes {
  uint8x16x4_t bytes;  // the codes' first bytes, their second, third and fourth ones
};

inline Codes codes(uint8_t scale) {
  float values[16];
  for (int i = 0; i < 16; ++i) values[i] = kFp4[i] * kPowers.of[scale];
  return {vld4q_u8(reinterpret_cast<const uint8_t*>(values))};
}

inline Vec look_up(uint8x16_t nibbles, const Codes& codes) {
  uint8_t values[64];
  uint8x16x4_t found;
  for (int i = 0; i < 4; ++i) found.val[i] = vqtbl1q_u8(codes.bytes.val[i], nibbles);
  vst4q_u8(values, found);
  return load(reinterpret_cast<const float*>(values));
}

inline void unpack_fp4(const uint8_t* p, const Codes& codes, Vec& even, Vec& odd) {
  const uint8x16_t bytes = vld1q_u8(p);
  even = look_up(vandq_u8(bytes, vdupq_n_u8(15)), codes);
  odd = look_up(vshrq_n_u8(bytes, 4), codes);
}

#else  // portable

struct Vec {
  float lane[kLanes];
};

template <typename F>
inline Vec each_lane(F f) {
  Vec result;
  for (int i = 0; i < kLanes; ++i) result.lane[i] = f(i);
  return result;
}

inline float from_bits(uint32_t bits) {
  float result;
  memcpy(&result, &bits, sizeof result);
  return result;
}
inline uint32_t to_bits(float a) {
  uint32_t result;
  memcpy(&result, &a, sizeof result);
  return result;
}

inline Vec splat(float a) {
  return each_lane([&](int) { return a; });
}
inline Vec load(const float* p) {
  return each_lane([&](int i) { return p[i]; });
}
inline void store(float* p, const Vec& a) { memcpy(p, a.lane, sizeof a.lane); }
inline Vec add(const Vec& a, const Vec& b) {
  return each_lane([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline Vec sub(const Vec& a, const Vec& b) {
  return each_lane([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline Vec mul(const Vec& a, const Vec& b) {
  return each_lane([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline Vec div(const Vec& a, const Vec& b) {
  return each_lane([&](int i) { return a.lane[i] / b.lane[i]; });
}
inline Vec min(const Vec& a, const Vec& b) {
  return each_lane([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Vec max(const Vec& a, const Vec& b) {
  return each_lane([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Vec fma(const Vec& a, const Vec& b, const Vec& c) {
  return each_lane([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}

inline Vec first_lanes(int n, const Vec& a, const Vec& b) {
  return each_lane([&](int i) { return i < n ? a.lane[i] : b.lane[i]; });
}

inline Vec unless_greater(const Vec& a, const Vec& b, const Vec& c) {
  return each_lane([&](int i) { return a.lane[i] > b.lane[i] ? 0 : c.lane[i]; });
}

inline float sum(Vec a) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a.lane[i] += a.lane[i + half];
  return a.lane[0];
}
inline float largest(Vec a) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a.lane[i] = a.lane[i] > a.lane[i + half] ? a.lane[i] : a.lane[i + half];
  return a.lane[0];
}

inline Vec load_bf16(const uint16_t* p) {
  return each_lane([&](int i) { return from_bits(uint32_t(p[i]) << 16); });
}

inline void unpack_bf16(const uint16_t* p, Vec& even, Vec& odd) {
  even = each_lane([&](int i) { return from_bits(uint32_t(p[2 * i]) << 16); });
  odd = each_lane([&](int i) { return from_bits(uint32_t(p[2 * i + 1]) << 16); });
}

inline void unpack_int8(const int8_t* p, Vec& even, Vec& odd) {
  even = each_lane([&](int i) { return float(p[2 * i]); });
  odd = each_lane([&](int i) { return float(p[2 * i + 1]); });
}

inline Vec round_bf16(const Vec& a) {
  return each_lane([&](int i) {
    const uint32_t bits = to_bits(a.lane[i]);
    return a.lane[i] == a.lane[i] ? from_bits((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000u) : a.lane[i];
  });
}

inline float power_of_two(int32_t n) { return from_bits(uint32_t(n + kExponentBias) << kMantissaBits); }
inline Vec times_power(const Vec& a, const Vec& n) {
  return each_lane([&](int i) {
    const int32_t power = int32_t(to_bits(n.lane[i]) - uint32_t(kRounderBits)), half = power >> 1;
    return a.lane[i] * power_of_two(half) * power_of_two(power - half);
  });
}

using Codes = Vec;

inline Codes codes(uint8_t scale) { return mul(load(kFp4), splat(kPowers.of[scale])); }

inline void unpack_fp4(const uint8_t* p, const Codes& codes, Vec& even, Vec& odd) {
  even = each_lane([&](int i) { return codes.lane[p[i] & 15]; });
  odd = each_lane([&](int i) { return codes.lane[p[i] >> 4]; });
}

#endif

#if defined(CPU_KERNELS_AVX512) || defined(CPU_KERNELS_AVX2)

inline float sum(Vec a) {
  const __m256 eight = _mm256_add_ps(low(a), high(a));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
inline float largest(Vec a) {
  const __m256 eight = _mm256_max_ps(low(a), high(a));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

#endif

constexpr float kExpTerms[5] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                                5.0000001201e-1f};

// e^a to about 1 unit in the last place, subnormal results included (Cephes' expf: S. L. Moshier, netlib.org/cephes).
inline Vec exp(Vec a) {
  a = min(splat(89), max(splat(-104), a));  // beyond these the result is infinity or 0; a NaN stays one
  const Vec n = add(mul(a, splat(1.44269504f)), splat(kRounder));
  const Vec whole = sub(n, splat(kRounder));
  Vec r = sub(a, mul(whole, splat(0.693359375f)));  // ln 2 in two parts, the first exact in few bits
  r = sub(r, mul(whole, splat(-2.12194440e-4f)));
  Vec p = splat(1.9875691500e-4f);
  for (float c : kExpTerms) p = add(mul(p, r), splat(c));
  return times_power(add(add(mul(p, mul(r, r)), r), splat(1)), n);
}

}  // namespace cpu_kernels::CPU_KERNELS_ISA

#endif  // CPU_KERNELS_VEC_H_
