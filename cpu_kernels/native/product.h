// Dot products of activations with packed weights: one order of adding, whatever the number of rows.
//
// A dot product over K inputs goes in blocks of 32: sixteen lanes take the even inputs of a block, then, in the same
// accumulator, the odd ones; the lanes are added up at the end. That is the order in which bytes of two MXFP4 codes and
// words of two bfloat16s unpack without a shuffle, and activations are laid out to fit ("unzipped": of each block first
// the even inputs, then the odd ones, zeros behind the last). Weights are unpacked in registers, again for each few
// rows of activations: next to their products that costs less than a copy of unpacked weights in cache would, and a
// panel of packed weights stays in cache from the first few rows to the last. Every tile adds in this one order, so a
// row of the result has the same bits beside any neighbours.
#ifndef CPU_KERNELS_PRODUCT_H_
#define CPU_KERNELS_PRODUCT_H_

#include "kernels.h"
#include "vec.h"

namespace cpu_kernels::CPU_KERNELS_ISA {

constexpr int64_t kBlock = 32;
constexpr int64_t kPanelRows = 32;  // rows of weights that one task takes

// Rows of weights and of activations whose products are summed in registers at a time; and rows of weights where there
// is one row of activations, so that several sums hide each other's latency. By trial.
#if defined(CPU_KERNELS_AVX512)
constexpr int kTileWeights = 4, kTileRows = 5, kWeightsOfOneRow = 8;
#else
constexpr int kTileWeights = 1, kTileRows = 4, kWeightsOfOneRow = 4;
#endif

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// One block, its even inputs first.
inline void unzip_block(const float* in, float* out) {
  for (int64_t i = 0; i < kLanes; ++i) out[i] = in[2 * i], out[kLanes + i] = in[2 * i + 1];
}
inline void unzip_block(const uint16_t* in, float* out) {
  Vec even, odd;
  unpack_bf16(in, even, odd);
  store(out, even);
  store(out + kLanes, odd);
}

// A row of n inputs into round_up(n, 32) floats.
template <typename T>
inline void unzip(const T* in, int64_t n, float* out) {
  const int64_t whole = n / kBlock * kBlock;
  for (int64_t k = 0; k < whole; k += kBlock) unzip_block(in + k, out + k);
  if (whole == n) return;
  T rest[kBlock] = {};
  memcpy(rest, in + whole, sizeof(T) * size_t(n - whole));
  unzip_block(rest, out + whole);
}

// All of x, unzipped, and a pointer to each row.
class Unzipped {
 public:
  Unzipped(const Pool& pool, const Activations& x)
      : stride_(round_up(x.columns, kBlock)),
        values_(x.rows * stride_ * int64_t(sizeof(float))),
        rows_(x.rows * int64_t(sizeof(float*))) {
    if (!ok()) return;
    auto unzip_row = [&](int64_t row, int64_t) {
      float* out = values_.floats() + row * stride_;
      rows()[row] = out;
      if (x.is_bf16)
        unzip(static_cast<const uint16_t*>(x.data) + row * x.columns, x.columns, out);
      else
        unzip(static_cast<const float*>(x.data) + row * x.columns, x.columns, out);
    };
    parallel_for(pool.for_work(x.rows * x.columns), x.rows, unzip_row);
  }

  bool ok() const { return values_.data() && rows_.data(); }
  const float** rows() const { return static_cast<const float**>(rows_.data()); }

 private:
  int64_t stride_;
  Scratch values_, rows_;
};

// Weights as packed; `unpack` gives one block of a row, `unpack_rest` what lies behind its last whole block.

// [outputs, inputs] bfloat16.
struct Bf16Weights {
  const uint16_t* data;
  int64_t inputs;

  int64_t whole_blocks() const { return inputs / kBlock; }
  bool has_rest() const { return inputs % kBlock != 0; }
  static constexpr int kRowsAhead = 4, kBlockBytes = 64;
  const void* row_at(int64_t row) const { return data + row * inputs; }
  void unpack(int64_t row, int64_t block, Vec& even, Vec& odd) const {
    unpack_bf16(data + row * inputs + block * kBlock, even, odd);
  }
  void unpack_rest(int64_t row, Vec& even, Vec& odd) const {
    uint16_t rest[kBlock] = {};
    memcpy(rest, data + row * inputs + whole_blocks() * kBlock, sizeof(uint16_t) * size_t(inputs % kBlock));
    unpack_bf16(rest, even, odd);
  }
};

// [outputs, inputs] signed bytes. What a row of them is to be multiplied with is the caller's business.
struct Int8Weights {
  const int8_t* data;
  int64_t inputs;

  int64_t whole_blocks() const { return inputs / kBlock; }
  bool has_rest() const { return inputs % kBlock != 0; }
  static constexpr int kRowsAhead = 4, kBlockBytes = 32;
  const void* row_at(int64_t row) const { return data + row * inputs; }
  void unpack(int64_t row, int64_t block, Vec& even, Vec& odd) const {
    unpack_int8(data + row * inputs + block * kBlock, even, odd);
  }
  void unpack_rest(int64_t row, Vec& even, Vec& odd) const {
    int8_t rest[kBlock] = {};
    memcpy(rest, data + row * inputs + whole_blocks() * kBlock, size_t(inputs % kBlock));
    unpack_int8(rest, even, odd);
  }
};

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

// [outputs, blocks, 16] MXFP4 codes and their scales, [outputs, blocks].
struct Mxfp4Weights {
  const uint8_t* codes_of;
  const uint8_t* scales;
  int64_t blocks;

  int64_t whole_blocks() const { return blocks; }
  static constexpr bool has_rest() { return false; }
  static constexpr int kRowsAhead = 8, kBlockBytes = 16;
  const void* row_at(int64_t row) const { return codes_of + row * blocks * kBlockBytes; }
  void unpack(int64_t row, int64_t block, Vec& even, Vec& odd) const {
    const int64_t at = row * blocks + block;
    unpack_fp4(codes_of + at * (kBlock / 2), codes(kPowers.of[scales[at]]), even, odd);
  }
  void unpack_rest(int64_t, Vec&, Vec&) const {}
};

// Adds the products of one block of R rows of weights and M rows of activations to their sums.
template <int R, int M>
inline void add_block(const Vec (&even)[R], const Vec (&odd)[R], const float* const* x, int64_t block,
                      Vec (&sums)[M][R]) {
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    const Vec x_even = load(x[m] + block * kBlock), x_odd = load(x[m] + block * kBlock + kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[m][r] = fma(even[r], x_even, sums[m][r]);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[m][r] = fma(odd[r], x_odd, sums[m][r]);
  }
}

// out[m * stride + r] for R rows of weights from `row` on and M rows of activations, weights unpacked in registers.
template <int R, int M, class Weights>
inline void multiply_tile(const Weights& w, int64_t row, const float* const* x, float* out, int64_t stride) {
  Vec sums[M][R], even[R], odd[R];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[m][r] = splat(0);
  // Rows to come are fetched in the order in which they lie in memory, while these are read side by side: that is
  // what memory gives fastest, and rows are too short for the processor to see where the next one begins.
  constexpr int kAhead = R > Weights::kRowsAhead ? R : Weights::kRowsAhead;
  constexpr int kStep = R * Weights::kBlockBytes;
  const char* ahead = static_cast<const char*>(w.row_at(row + kAhead));
  const int64_t whole = w.whole_blocks();
  for (int64_t block = 0; block < whole; ++block) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) w.unpack(row + r, block, even[r], odd[r]);
#pragma GCC unroll 8
    for (int byte = 0; byte < kStep; byte += 64) __builtin_prefetch(ahead + block * kStep + byte, 0, 2);
    add_block(even, odd, x, block, sums);
  }
  if (w.has_rest()) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) w.unpack_rest(row + r, even[r], odd[r]);
    add_block(even, odd, x, whole, sums);
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) out[m * stride + r] = sum(sums[m][r]);
}

template <int M, class Weights>
inline void multiply_few(const Weights& w, int64_t first, int64_t count, const float* const* x, float* out,
                         int64_t stride) {
  constexpr int kRows = M == 1 ? kWeightsOfOneRow : kTileWeights;
  const int64_t whole = count - count % kRows;
  for (int64_t r = 0; r < whole; r += kRows) multiply_tile<kRows, M>(w, first + r, x, out + r, stride);
  for (int64_t r = whole; r < count; ++r) multiply_tile<1, M>(w, first + r, x, out + r, stride);
}

// out[m * stride + r] = dot(weights of row first + r, x[m]) for r below `count` and m below `rows`.
template <class Weights>
inline void multiply(const Weights& w, int64_t first, int64_t count, const float* const* x, int64_t rows, float* out,
                     int64_t stride) {
  for (; rows >= kTileRows; rows -= kTileRows, x += kTileRows, out += kTileRows * stride)
    multiply_few<kTileRows>(w, first, count, x, out, stride);
  if constexpr (kTileRows > 4)
    if (rows == 4) multiply_few<4>(w, first, count, x, out, stride);
  if constexpr (kTileRows > 3)
    if (rows == 3) multiply_few<3>(w, first, count, x, out, stride);
  if (rows == 2) multiply_few<2>(w, first, count, x, out, stride);
  if (rows == 1) multiply_few<1>(w, first, count, x, out, stride);
}

}  // namespace cpu_kernels::CPU_KERNELS_ISA

#endif  // CPU_KERNELS_PRODUCT_H_
