// Sums of product.h in registers: how weights unpack, how activations lie beside them, tiles of a few rows of each.
#ifndef CPU_KERNELS_PRODUCT_ROWS_H_
#define CPU_KERNELS_PRODUCT_ROWS_H_

#include "kernels.h"
#include "vec.h"
#if defined(CPU_KERNELS_AVX512BF16)
#include "product_bf16.h"
#endif

namespace cpu_kernels::CPU_KERNELS_ISA {

constexpr int64_t kBlock = 32;
constexpr int64_t kPanelRows = 32;  // rows of weights that one task takes
constexpr int64_t kDepth = 48;      // blocks of some rows of activations that stay in the first cache, weights beside

// A block of a row of weights in registers.
struct Floats {
  Vec even, odd;

  // Rows of weights and of activations whose products are summed in registers at a time; and rows of weights where
  // there is one row of activations: several sums hide each other's latency, one alone is read in memory's own order.
  // By trial.
#if defined(CPU_KERNELS_AVX512)
  static constexpr int kTileWeights = 4, kTileRows = 5, kWeightsOfOneRow = 8;
  static constexpr bool kSideBySide = true;
#elif defined(CPU_KERNELS_AVX2)
  static constexpr int kTileWeights = 1, kTileRows = 4, kWeightsOfOneRow = 1;
  static constexpr bool kSideBySide = false;
#else
  static constexpr int kTileWeights = 1, kTileRows = 4, kWeightsOfOneRow = 4;
  static constexpr bool kSideBySide = false;
#endif
};

// What blocks become beside activations of type X.
Floats block_of(float);
template <typename X>
using Block = decltype(block_of(X{}));

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
inline void lay_out(const T* in, int64_t n, float* out) {
  const int64_t whole = n / kBlock * kBlock;
  for (int64_t k = 0; k < whole; k += kBlock) unzip_block(in + k, out + k);
  if (whole == n) return;
  T rest[kBlock] = {};
  memcpy(rest, in + whole, sizeof(T) * size_t(n - whole));
  unzip_block(rest, out + whole);
}

// Sixteen inputs from the at-th on into a row.
inline void lay_out(Vec values, int64_t at, float* row) {
  float in[kLanes], *out = row + at / kBlock * kBlock + at % kBlock / 2;
  store(in, values);
  for (int i = 0; i < kLanes / 2; ++i) out[i] = in[2 * i], out[kLanes + i] = in[2 * i + 1];
}

// Rows of activations of type X, laid out for products, and a pointer to each.
template <typename X>
class Rows {
 public:
  Rows(int64_t rows, int64_t columns)
      : values_(rows * round_up(columns, kBlock) * int64_t(sizeof(X))), rows_(rows * int64_t(sizeof(X*))) {
    if (!ok()) return;
    for (int64_t i = 0; i < rows; ++i) all()[i] = static_cast<X*>(values_.data()) + i * round_up(columns, kBlock);
  }

  // All of x; X may be float32 whatever x is.
  Rows(const Pool& pool, const Activations& x) : Rows(x.rows, x.columns) {
    if (!ok()) return;
    auto lay_out_row = [&](int64_t row, int64_t) {
      if constexpr (sizeof(X) == sizeof(float))
        if (!x.is_bf16) return lay_out(static_cast<const float*>(x.data) + row * x.columns, x.columns, all()[row]);
      lay_out(static_cast<const uint16_t*>(x.data) + row * x.columns, x.columns, all()[row]);
    };
    parallel_for(pool.for_work(x.rows * x.columns), x.rows, lay_out_row);
  }

  bool ok() const { return values_.data() && rows_.data(); }
  X** all() const { return static_cast<X**>(rows_.data()); }

 private:
  Scratch values_, rows_;
};

inline void unpack(const uint16_t* p, Floats& to) { unpack_bf16(p, to.even, to.odd); }
inline void unpack(const int8_t* p, Floats& to) { unpack_int8(p, to.even, to.odd); }

// Weights as packed; `block` unpacks one block of a row, `rest` what lies after its last whole block.

// [outputs, inputs], of bfloat16s or of signed bytes; what a row of the latter is to be multiplied with is the caller's
// business.
template <typename T>
struct DenseWeights {
  const T* data;
  int64_t inputs;

  int64_t whole_blocks() const { return inputs / kBlock; }
  bool has_rest() const { return inputs % kBlock != 0; }
  static constexpr int kRowsAhead = 4, kBlockBytes = kBlock * int(sizeof(T));
  const void* row_at(int64_t row) const { return data + row * inputs; }
  template <class To>
  void block(int64_t row, int64_t i, To& to) const {
    unpack(data + row * inputs + i * kBlock, to);
  }
  template <class To>
  void rest(int64_t row, To& to) const {
    T last[kBlock] = {};
    memcpy(last, data + row * inputs + whole_blocks() * kBlock, sizeof(T) * size_t(inputs % kBlock));
    unpack(last, to);
  }
};

inline void unpack(const uint8_t* p, uint8_t scale, Floats& to) {
  unpack_fp4(p, codes(scale), to.even, to.odd);
}

// [outputs, blocks, 16] MXFP4 codes and their scales, [outputs, blocks].
struct Mxfp4Weights {
  const uint8_t* codes;
  const uint8_t* scales;
  int64_t blocks;

  int64_t whole_blocks() const { return blocks; }
  static constexpr bool has_rest() { return false; }
  static constexpr int kRowsAhead = 8, kBlockBytes = 16;
  const void* row_at(int64_t row) const { return codes + row * blocks * kBlockBytes; }
  template <class To>
  void block(int64_t row, int64_t i, To& to) const {
    const int64_t at = row * blocks + i;
    unpack(codes + at * kBlockBytes, scales[at], to);
  }
  template <class To>
  void rest(int64_t, To&) const {}
};

// Adds the products of one block of R rows of weights and of x to their sums.
template <int R>
inline void add_products(const Floats (&w)[R], const float* x, Vec (&sums)[R]) {
  const Vec even = load(x), odd = load(x + kLanes);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sums[r] = fma(w[r].even, even, sums[r]);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sums[r] = fma(w[r].odd, odd, sums[r]);
}

template <bool kRest, class Weights, class To>
inline void unpack_block(const Weights& w, int64_t row, int64_t block, To& to) {
  if constexpr (kRest)
    w.rest(row, to);
  else
    w.block(row, block, to);
}

// Adds the products of one block of R rows of weights, unpacked in registers, and M rows of activations to their sums:
// where there are registers for it all rows of weights are unpacked, then multiplied; else one after the other.
template <int R, int M, bool kRest, class Weights, typename X>
inline void add_block(const Weights& w, int64_t row, int64_t block, const X* const* x, Vec (&sums)[M][R]) {
  if constexpr (Block<X>::kSideBySide) {
    Block<X> weights[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) unpack_block<kRest>(w, row + r, block, weights[r]);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) add_products(weights, x[m] + block * kBlock, sums[m]);
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Block<X> weights;
      unpack_block<kRest>(w, row + r, block, weights);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        sums[m][r] = fma(weights.even, load(x[m] + block * kBlock), sums[m][r]);
        sums[m][r] = fma(weights.odd, load(x[m] + block * kBlock + kLanes), sums[m][r]);
      }
    }
  }
}

// The same for blocks `begin` to `end`.
template <int R, int M, class Weights, typename X>
inline void add_blocks(const Weights& w, int64_t row, int64_t begin, int64_t end, const X* const* x, bool fetch,
                       Vec (&sums)[M][R]) {
  // Rows to come are fetched in the order in which they lie in memory, while these are read side by side: that is
  // what memory gives fastest, and rows are too short for the processor to see where the next one begins. What is read
  // in memory's order with nothing but a row of activations beside it, the processor fetches better by itself.
  constexpr bool kFetches = R > 1 || M > 1;
  constexpr int kAhead = R > Weights::kRowsAhead ? R : Weights::kRowsAhead;
  constexpr int kStep = R * Weights::kBlockBytes;
  const char* ahead = static_cast<const char*>(w.row_at(row + kAhead));
  for (int64_t block = begin; block < end; ++block) {
    if (kFetches && fetch) {
#pragma GCC unroll 8
      for (int byte = 0; byte < kStep; byte += 64) __builtin_prefetch(ahead + block * kStep + byte, 0, 3);
    }
    add_block<R, M, false>(w, row, block, x, sums);
  }
  if (w.has_rest() && end == w.whole_blocks()) add_block<R, M, true>(w, row, end, x, sums);
}

// out[m * stride + r] for R rows of weights from `row` on and M rows of activations.
template <int R, int M, class Weights, typename X>
inline void multiply_tile(const Weights& w, int64_t row, const X* const* x, float* out, int64_t stride) {
  Vec sums[M][R];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[m][r] = splat(0);
  add_blocks(w, row, 0, w.whole_blocks(), x, true, sums);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) out[m * stride + r] = sum(sums[m][r]);
}

// The same for a panel, kDepth blocks of all its rows at a time: sums wait in memory, so that activations can stay in
// the first cache. That pays where weights as wide as bfloat16 would push them out.
template <int R, int M, class Weights, typename X>
inline void multiply_panel(const Weights& w, int64_t first, const X* const* x, bool fetch, float* out, int64_t stride) {
  constexpr int64_t kTiles = kPanelRows / R;
  Vec sums[kTiles][M][R];
  for (int64_t begin = 0, end; begin < w.whole_blocks(); begin = end) {
    end = begin + kDepth < w.whole_blocks() ? begin + kDepth : w.whole_blocks();
    for (int64_t i = 0; i < kTiles; ++i) {
      Vec tile[M][R];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) tile[m][r] = begin == 0 ? splat(0) : sums[i][m][r];
      add_blocks(w, first + i * R, begin, end, x, fetch, tile);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[i][m][r] = tile[m][r];
    }
  }
  for (int64_t r = 0; r < kPanelRows; ++r)
    for (int m = 0; m < M; ++m) out[m * stride + r] = sum(sums[r / R][m][r % R]);
}

// The same for `count` rows of weights from row `first` on.
template <int M, class Weights, typename X>
inline void multiply_few(const Weights& w, int64_t first, int64_t count, const X* const* x, float* out,
                         int64_t stride) {
  constexpr int kRows = M == 1 ? Block<X>::kWeightsOfOneRow : Block<X>::kTileWeights;
  const int64_t whole = count - count % kRows;
  for (int64_t r = 0; r < whole; r += kRows) multiply_tile<kRows, M>(w, first + r, x, out + r, stride);
  for (int64_t r = whole; r < count; ++r) multiply_tile<1, M>(w, first + r, x, out + r, stride);
}

// The same for any number of rows of activations, the last ones fewer than M.
template <int M, class Weights, typename X>
inline void multiply_all(const Weights& w, int64_t first, int64_t count, const X* const* x, int64_t rows, float* out,
                         int64_t stride) {
  for (; rows >= M; rows -= M, x += M, out += M * stride) multiply_few<M>(w, first, count, x, out, stride);
  if constexpr (M > 1) multiply_all<M - 1>(w, first, count, x, rows, out, stride);
}

}  // namespace cpu_kernels::CPU_KERNELS_ISA

#endif  // CPU_KERNELS_PRODUCT_ROWS_H_
