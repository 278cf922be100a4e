// What both kinds of attention are made of: products of small tiles, weights of logits, numbers of either dtype.
#ifndef CPU_KERNELS_ATTENTION_TILES_H_
#define CPU_KERNELS_ATTENTION_TILES_H_

#include "attention_call.h"
#include "tiles.h"
#include "vec.h"

namespace cpu_kernels::CPU_KERNELS_ISA {
namespace attending {

// Rows of queries, tokens times heads of the group, that are worth taking together.
constexpr int64_t kBlockRows = 64;

constexpr int kBlockKeys = 64;

// Below all logits: stands for a sink of minus infinity, the difference of two of which is no number.
constexpr float kLowest = -1e38f;

// Rows and vectors of the sums that stay in registers while a product's inner dimension goes by.
#if defined(CPU_KERNELS_AVX512)
constexpr int kTileRows = 8, kTileVecs = 2;
#else
constexpr int kTileRows = 4, kTileVecs = 1;
#endif

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t padded(int64_t lanes) { return (lanes + kLanes - 1) / kLanes * kLanes; }

// Key positions [first, end).
struct Range {
  int64_t first, end;
};

// ---- products ----

// The right-hand side of a product, whose rows k are read two at a time, vector by vector, from one of these.

// Float32s [., columns].
struct Floats {
  const float* data;
  int64_t columns;

  Vec row(int64_t k, int64_t column) const { return load(data + k * columns + column); }
  void two_rows(int64_t k, int64_t column, Vec& first, Vec& second) const {
    first = row(k, column);
    second = row(k + 1, column);
  }
};

// The left-hand side and the result: `rows` rows of each.
struct Rows {
  int64_t rows;
  const float* a;  // [rows, depth], its rows `stride` apart
  int64_t stride, depth;
  float* c;             // [rows, columns of the right-hand side]
  const float* shrink;  // [rows], or null
};

// c = shrink c + a b for a few rows and vectors of c; without shrink, c = a b. `ahead` fetches what comes next.
template <int kRows, int kVecs, class Right, class Ahead>
inline void multiply_tile(const Rows& rows, int64_t first, const Right& b, int64_t column, Ahead& ahead) {
  const float* a = rows.a + first * rows.stride;
  float* c = rows.c + first * b.columns + column;
  Vec sums[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) {
      const bool kept = rows.shrink != nullptr;
      sums[r][v] = kept ? mul(load(c + r * b.columns + v * kLanes), splat(rows.shrink[first + r])) : splat(0);
    }
  const int64_t whole = rows.depth / 4 * 4;
  for (int64_t k = 0; k < whole; k += 4) {
    ahead.fetch_some();
#pragma GCC unroll 2
    for (int pair = 0; pair < 4; pair += 2) {
      Vec even[kVecs], odd[kVecs];
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) b.two_rows(k + pair, column + v * kLanes, even[v], odd[v]);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vec factor = splat(a[r * rows.stride + k + pair]);
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) sums[r][v] = fma(factor, even[v], sums[r][v]);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vec factor = splat(a[r * rows.stride + k + pair + 1]);
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) sums[r][v] = fma(factor, odd[v], sums[r][v]);
      }
    }
  }
  for (int64_t k = whole; k < rows.depth; ++k)
    for (int v = 0; v < kVecs; ++v) {
      const Vec row = b.row(k, column + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sums[r][v] = fma(splat(a[r * rows.stride + k]), row, sums[r][v]);
    }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) store(c + r * b.columns + v * kLanes, sums[r][v]);
}

template <int kRows, class Left, class Right, class Ahead>
inline void multiply_rows(const Left& rows, int64_t first, const Right& b, Ahead& ahead) {
  int64_t column = 0;
  for (; column + kTileVecs * kLanes <= b.columns; column += kTileVecs * kLanes)
    multiply_tile<kRows, kTileVecs>(rows, first, b, column, ahead);
  for (; column < b.columns; column += kLanes) multiply_tile<kRows, 1>(rows, first, b, column, ahead);
}

// The same for all of c, whose rows are whole vectors.
template <class Left, class Right, class Ahead>
inline void multiply(const Left& rows, const Right& b, Ahead& ahead) {
  int64_t r = 0;
  for (; r + kTileRows <= rows.rows; r += kTileRows) multiply_rows<kTileRows>(rows, r, b, ahead);
  for (; r < rows.rows; ++r) multiply_rows<1>(rows, r, b, ahead);
}

// Fetches nothing: for operands that are in the cache already.
struct NothingAhead {
  void fetch_some() {}
};

// ---- numbers ----

// e^a for a <= 0, as `exp` but for fused operations and weights below 2^-126, which are 0.
inline Vec weight_of(Vec a) {
  a = max(splat(-88), a);  // e^-88 rounds to the power -127, which is 0; a NaN stays one
  const Vec n = fma(a, splat(1.44269504f), splat(kRounder)), whole = sub(n, splat(kRounder));
  const Vec r = fma(whole, splat(2.12194440e-4f), fma(whole, splat(-0.693359375f), a));
  constexpr float kSeries[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                               5.0000001201e-1f, 1,                1};
  Vec p = splat(1.9875691500e-4f);
  for (float c : kSeries) p = fma(p, r, splat(c));
  return mul(p, power_of_two(n));
}

inline float weight_of(float a) {
  float lanes[kLanes];
  store(lanes, weight_of(splat(a)));
  return lanes[0];
}

inline float number(const Numbers& numbers, int64_t i) {
  return numbers.bfloat16 ? widen(static_cast<const uint16_t*>(numbers.data)[i])
                          : static_cast<const float*>(numbers.data)[i];
}

}  // namespace attending
}  // namespace cpu_kernels::CPU_KERNELS_ISA

#endif  // CPU_KERNELS_ATTENTION_TILES_H_
