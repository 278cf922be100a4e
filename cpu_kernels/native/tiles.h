// Blocks of keys and values as float32 tiles: values as they lie, keys turned so that a lane is a key.
#ifndef CPU_KERNELS_TILES_H_
#define CPU_KERNELS_TILES_H_

#include "vec.h"

namespace cpu_kernels::CPU_KERNELS_ISA {

// The float32 whose upper half is a bfloat16.
inline float widen(uint16_t a) {
  const uint32_t word = uint32_t(a) << 16;
  float value;
  memcpy(&value, &word, sizeof value);
  return value;
}

inline float widen(float a) { return a; }

inline Vec load_wide(const float* p) { return load(p); }
inline Vec load_wide(const uint16_t* p) { return load_bf16(p); }

#if defined(CPU_KERNELS_AVX512)

// Sixteen rows of sixteen dwords, columns for rows: turned[c] holds dword c of every row.
inline void transpose(const char* const rows[16], int64_t byte, __m512i turned[16]) {
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
  // a[4 q + c], lane group g: dword 4 g + c of rows 4 q to 4 q + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512i even01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88), odd01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
    const __m512i even23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
    turned[c] = _mm512_shuffle_i32x4(even01, even23, 0x88);
    turned[8 + c] = _mm512_shuffle_i32x4(even01, even23, 0xdd);
    turned[4 + c] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
    turned[12 + c] = _mm512_shuffle_i32x4(odd01, odd23, 0xdd);
  }
}

// The next elements of sixteen keys, which fill 64 bytes of each, to `tile` [elements, stride].
inline void turn(const char* const keys[16], int64_t byte, float* tile, int64_t stride, const float*) {
  __m512i turned[16];
  transpose(keys, byte, turned);
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(tile + i * stride, turned[i]);
}

inline void turn(const char* const keys[16], int64_t byte, float* tile, int64_t stride, const uint16_t*) {
  __m512i turned[16];
  transpose(keys, byte, turned);
  for (int i = 0; i < 16; ++i) {
    _mm512_storeu_si512(tile + 2 * i * stride, _mm512_slli_epi32(turned[i], 16));
    _mm512_storeu_si512(tile + (2 * i + 1) * stride, _mm512_and_si512(turned[i], _mm512_set1_epi32(int(0xffff0000))));
  }
}

#else

template <typename Element>
inline void turn(const char* const keys[16], int64_t byte, float* tile, int64_t stride, const Element*) {
  for (int i = 0; i < int(64 / sizeof(Element)); ++i)
    for (int lane = 0; lane < kLanes; ++lane)
      tile[i * stride + lane] = widen(reinterpret_cast<const Element*>(keys[lane] + byte)[i]);
}

#endif

}  // namespace cpu_kernels::CPU_KERNELS_ISA

#endif  // CPU_KERNELS_TILES_H_
