// Sums of product.h on AVX2, whose sixteen registers hold too few of them: half of the lanes at a time, a plane.
//
// With a register for a sum in place of two, twelve sums stay in registers. Rows of bfloat16 weights beside a few of
// activations are unpacked in registers, once for each plane; beside many, weights of any width are unpacked once, into
// memory.
#ifndef CPU_KERNELS_PRODUCT_PLANES_H_
#define CPU_KERNELS_PRODUCT_PLANES_H_

#include "product_rows.h"

namespace cpu_kernels::CPU_KERNELS_ISA {

constexpr int kPlanes = 2, kPlaneLanes = kLanes / kPlanes;
constexpr int64_t kPlaneDepth = 24;  // blocks of four rows of activations that stay in the first cache

inline __m256 plane_of(Vec a, int plane) { return plane == 0 ? a.lo : a.hi; }

// Made here and once: left to itself the compiler reads again for each product, or brings loads forward, and has no
// registers for the sums.
inline __m256 kept(__m256 a) {
  asm("" : "+x"(a));
  return a;
}

// ---- few rows of activations, bfloat16 weights ----

// Of a plane of a block of weights, eight pairs: those of even index, or of odd. (A mask would take a register.)
inline __m256 half_of_pairs(const uint16_t* p, int parity) {
  __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  if (parity == 1) words = _mm256_srli_epi32(words, 16);
  return kept(_mm256_castsi256_ps(_mm256_slli_epi32(words, 16)));
}

// Adds to sums [M, R] of one plane the products of `blocks` blocks of R rows of weights, `row_inputs` apart, and M rows
// of activations. Asks meanwhile for as much from `ahead`, unless that is null: into the second cache, as the first is
// full of activations.
template <int R, int M>
inline void add_pairs(const uint16_t* w, int64_t row_inputs, int64_t blocks, const float* const (&x)[M],
                      const uint16_t* ahead, __m256 (&sums)[M][R]) {
  __m256 all[M][R];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) all[m][r] = sums[m][r];
  for (int64_t at = 0; at < blocks * kBlock; at += kBlock) {
    if (ahead) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) __builtin_prefetch(ahead + r * row_inputs + at, 0, 2);
    }
#pragma GCC unroll 2
    for (int parity = 0; parity < 2; ++parity) {
      __m256 weights[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) weights[r] = half_of_pairs(w + r * row_inputs + at, parity);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const __m256 input = kept(_mm256_loadu_ps(x[m] + at + parity * kLanes));
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) all[m][r] = kept(fma(weights[r], input, all[m][r]));
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[m][r] = all[m][r];
}

// out[m * stride + r] for `count` rows of weights from `first` on, at most a panel, and M rows of activations: some
// blocks of all rows at a time, so that the activations of these stay in the first cache.
template <int R, int M>
inline void multiply_pairs_of(const DenseWeights<uint16_t>& w, int64_t first, int64_t count, const float* const* x,
                              bool fetch, float* out, int64_t stride) {
  const int64_t tiles = count / R;
  __m256 sums[kPanelRows / R][kPlanes][M][R] = {};
  for (int64_t begin = 0; begin < w.whole_blocks(); begin += kPlaneDepth) {
    const int64_t blocks = begin + kPlaneDepth < w.whole_blocks() ? kPlaneDepth : w.whole_blocks() - begin;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const uint16_t* from = w.data + (first + tile * R) * w.inputs + begin * kBlock;
      const uint16_t* next_blocks = w.data + first * w.inputs + (begin + blocks) * kBlock;
      const uint16_t* ahead = tile + 1 < tiles ? from + R * w.inputs : next_blocks;
      for (int plane = 0; plane < kPlanes; ++plane) {
        const float* inputs[M];
        for (int m = 0; m < M; ++m) inputs[m] = x[m] + begin * kBlock + plane * kPlaneLanes;
        add_pairs<R, M>(from + plane * kLanes, w.inputs, blocks, inputs, fetch && plane == 0 ? ahead : nullptr,
                        sums[tile][plane]);
      }
    }
  }
  for (int64_t r = 0; r < tiles * R; ++r)
    for (int m = 0; m < M; ++m)
      out[m * stride + r] = sum(Vec{sums[r / R][0][m][r % R], sums[r / R][1][m][r % R]});
}

// out[m * stride + r] for `count` rows of weights, which are whole blocks, from `first` on, at most a panel, and any
// number of rows of activations, M and fewer at a time.
template <int M = 4>
inline void multiply_pairs(const DenseWeights<uint16_t>& w, int64_t first, int64_t count, const float* const* x,
                           int64_t rows, float* out, int64_t stride, bool fetch = true) {
  if constexpr (M == 1) {
    for (; rows > 0; --rows, ++x, out += stride) multiply_few<1>(w, first, count, x, out, stride);
  } else {
    constexpr int R = M == 2 ? 4 : 3;
    const int64_t whole = count - count % R;
    for (; rows >= M; rows -= M, x += M, out += M * stride, fetch = false) {
      multiply_pairs_of<R, M>(w, first, whole, x, fetch, out, stride);
      multiply_pairs_of<1, M>(w, first + whole, count - whole, x, fetch, out + whole, stride);
    }
    multiply_pairs<M - 1>(w, first, count, x, rows, out, stride, fetch);
  }
}

// ---- many rows of activations ----

constexpr int kUnpackedTile = 3;       // rows of weights beside four of activations: all sixteen registers
constexpr int64_t kUnpackedRows = 12;  // of weights, so that they stay in the second cache

// A row of weights, one plane after the other.
template <class Weights>
inline void unpack_row(const Weights& w, int64_t row, int64_t blocks, float* to, int64_t plane_floats) {
  for (int64_t i = 0; i < blocks; ++i, to += kPlanes * kPlaneLanes) {
    Floats block;
    i < w.whole_blocks() ? w.block(row, i, block) : w.rest(row, block);
    for (int plane = 0; plane < kPlanes; ++plane) {
      _mm256_storeu_ps(to + plane * plane_floats, plane_of(block.even, plane));
      _mm256_storeu_ps(to + plane * plane_floats + kPlaneLanes, plane_of(block.odd, plane));
    }
  }
}

// Adds to sums [M, R] of one plane the products of `count` vectors of R rows of unpacked weights and M of activations.
template <int R, int M>
inline void add_unpacked(const float* w, int64_t row_floats, const float* const (&x)[M], int64_t count,
                         __m256 (&sums)[M][R]) {
  __m256 all[M][R];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) all[m][r] = sums[m][r];
#pragma GCC unroll 2
  for (int64_t i = 0; i < count; ++i) {
    __m256 weights[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) weights[r] = _mm256_loadu_ps(w + r * row_floats + i * kPlaneLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const __m256 input = kept(_mm256_loadu_ps(x[m] + i * kLanes));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) all[m][r] = fma(weights[r], input, all[m][r]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[m][r] = all[m][r];
}

// out[m * stride + r] for the first `count` unpacked rows of weights and any of activations, M and fewer at a time.
template <int M>
inline void multiply_unpacked(const float* w, int64_t blocks, int64_t count, const float* const* x, int64_t rows,
                              float* out, int64_t stride) {
  constexpr int R = kUnpackedTile;
  const int64_t row_floats = blocks * kBlock / kPlanes, plane_floats = kUnpackedRows * row_floats;
  for (; rows >= M; rows -= M, x += M, out += M * stride) {
    __m256 sums[kUnpackedRows / R][kPlanes][M][R] = {};
    for (int64_t begin = 0; begin < blocks; begin += kPlaneDepth) {
      const int64_t some = begin + kPlaneDepth < blocks ? kPlaneDepth : blocks - begin;
      for (int64_t tile = 0; tile * R < count; ++tile)
        for (int plane = 0; plane < kPlanes; ++plane) {
          const float* from[M];
          for (int m = 0; m < M; ++m) from[m] = x[m] + begin * kBlock + plane * kPlaneLanes;
          const float* tile_w = w + plane * plane_floats + tile * R * row_floats + begin * kLanes;
          add_unpacked<R, M>(tile_w, row_floats, from, 2 * some, sums[tile][plane]);
        }
    }
    for (int64_t r = 0; r < count; ++r)
      for (int m = 0; m < M; ++m)
        out[m * stride + r] = sum(Vec{sums[r / R][0][m][r % R], sums[r / R][1][m][r % R]});
  }
  if constexpr (M > 1) multiply_unpacked<M - 1>(w, blocks, count, x, rows, out, stride);
}

// The same of packed weights, from row `first` on, which are unpacked to `room`.
template <class Weights>
inline void multiply_many(const Weights& w, int64_t first, int64_t count, const float* const* x, int64_t rows,
                          float* out, int64_t stride, float* room) {
  const int64_t blocks = w.whole_blocks() + w.has_rest(), row_floats = blocks * kBlock / kPlanes;
  for (int64_t begin = 0; begin < count; begin += kUnpackedRows) {
    const int64_t some = count - begin < kUnpackedRows ? count - begin : kUnpackedRows;
    if (some < kUnpackedRows) memset(room, 0, size_t(kUnpackedRows * blocks * kBlock) * sizeof(float));
    for (int64_t r = 0; r < some; ++r)
      unpack_row(w, first + begin + r, blocks, room + r * row_floats, kUnpackedRows * row_floats);
    multiply_unpacked<4>(room, blocks, some, x, rows, out + begin, stride);
  }
}

}  // namespace cpu_kernels::CPU_KERNELS_ISA

#endif  // CPU_KERNELS_PRODUCT_PLANES_H_
