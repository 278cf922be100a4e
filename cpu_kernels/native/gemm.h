// Products of float32 matrices: both packed into panels, multiplied tile by tile, each tile's sums in registers.
//
// A is packed in panels of at most kPanelRowsOfA rows: input k of all of them side by side, kStrideOfA floats from
// input k + 1. B is packed in panels of kPanelColumns columns alike. A product's inputs are added up in their order,
// one fused multiplication after the other, so an element's bits depend on its row of A and its column of B alone
// (portable code rounds twice). Matrices that lie transposed are turned while they are packed.
#ifndef CPU_KERNELS_GEMM_H_
#define CPU_KERNELS_GEMM_H_

#include "tiles.h"

namespace cpu_kernels::CPU_KERNELS_ISA {

// Rows of A and vectors of columns of B whose products are summed in registers at a time; and the rows of a panel, some
// tiles of them.
#if defined(CPU_KERNELS_AVX512)
constexpr int kGemmRows = 14, kGemmVectors = 2;
constexpr int64_t kPanelRowsOfA = 14;
#elif defined(CPU_KERNELS_PORTABLE)
constexpr int kGemmRows = 2, kGemmVectors = 1;
constexpr int64_t kPanelRowsOfA = 16;
#else
constexpr int kGemmRows = 6, kGemmVectors = 1;
constexpr int64_t kPanelRowsOfA = 12;
#endif
constexpr int64_t kStrideOfA = 16, kPanelColumns = kGemmVectors * kLanes;

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// The first n numbers from p on, zeros after them; n may be more than there are lanes.
inline Vec load_part(const float* p, int64_t n) {
  if (n >= kLanes) return load(p);
  float lanes[kLanes] = {};
  if (n > 0) memcpy(lanes, p, size_t(n) * sizeof(float));
  return load(lanes);
}
inline void store_part(float* p, const Vec& a, int64_t n) {
  if (n >= kLanes) return store(p, a);
  float lanes[kLanes];
  store(lanes, a);
  if (n > 0) memcpy(p, lanes, size_t(n) * sizeof(float));
}

// ---- packing ----

// Inputs 0 to `inputs` of sixteen rows, row after row, become columns: out[k * stride + i] = rows[i][k].
inline void pack_rows(const float* const rows[kLanes], int64_t inputs, float* out, int64_t stride) {
  const int64_t whole = inputs / kLanes * kLanes;
  const char* bytes[kLanes];
  for (int i = 0; i < kLanes; ++i) bytes[i] = reinterpret_cast<const char*>(rows[i]);
  for (int64_t k = 0; k < whole; k += kLanes) transpose(bytes, k * int64_t(sizeof(float)), out + k * stride, stride);
  for (int64_t k = whole; k < inputs; ++k)
    for (int i = 0; i < kLanes; ++i) out[k * stride + i] = rows[i][k];
}

// Columns `first` to `first` + width of `inputs` rows of which each has `columns`; zeros beyond. row(k) points to row k
// and scale(k) multiplies it.
template <class Row, class Scale>
inline void pack_columns(const Row& row, const Scale& scale, int64_t inputs, int64_t first, int64_t columns,
                         int64_t width, float* out, int64_t stride) {
  for (int64_t k = 0; k < inputs; ++k) {
    const float* from = row(k);
    const Vec factor = splat(scale(k));
    for (int64_t i = 0; i < width; i += kLanes)
      store(out + k * stride + i, mul(factor, load_part(from + first + i, columns - first - i)));
  }
}

// Floats of a packed B of this size.
inline int64_t packed_size(int64_t inputs, int64_t columns) {
  return divide_up(columns, kPanelColumns) * kPanelColumns * inputs;
}

// B whose column n is the row that row(n) points to, of `inputs` numbers.
template <class Row>
inline void pack_transposed_b(const Row& row, int64_t inputs, int64_t columns, float* out) {
  for (int64_t first = 0; first < columns; first += kPanelColumns, out += kPanelColumns * inputs)
    for (int64_t i = 0; i < kPanelColumns; i += kLanes) {
      const float* rows[kLanes];
      for (int64_t r = 0; r < kLanes; ++r) {
        const int64_t column = first + i + r;  // beyond the last one: any, since nobody reads what becomes of it
        rows[r] = row(column < columns ? column : columns - 1);
      }
      pack_rows(rows, inputs, out + i, kPanelColumns);
    }
}

// B whose row k is the row that row(k) points to, of `columns` numbers.
template <class Row>
inline void pack_b(const Row& row, int64_t inputs, int64_t columns, float* out) {
  const auto one = [](int64_t) { return 1.0f; };
  for (int64_t first = 0; first < columns; first += kPanelColumns, out += kPanelColumns * inputs)
    pack_columns(row, one, inputs, first, columns, kPanelColumns, out, kPanelColumns);
}

// ---- products ----

// c[m * stride + n] (+)= the sum over `inputs` of a[k * kStrideOfA + m] b[k * kPanelColumns + n], for M rows and the
// first `columns` of a panel of B.
template <int M>
inline void multiply_panels(const float* a, const float* b, int64_t inputs, float* c, int64_t stride, int64_t columns,
                            bool add_to) {
  Vec sums[M][kGemmVectors];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < kGemmVectors; ++v) sums[m][v] = splat(0);
  for (int64_t k = 0; k < inputs; ++k, a += kStrideOfA, b += kPanelColumns) {
    Vec right[kGemmVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kGemmVectors; ++v) right[v] = load(b + v * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Vec left = splat(a[m]);
#pragma GCC unroll 2
      for (int v = 0; v < kGemmVectors; ++v) sums[m][v] = fma(left, right[v], sums[m][v]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < kGemmVectors; ++v) {
      float* to = c + m * stride + v * kLanes;
      const int64_t count = columns - v * kLanes;
      store_part(to, add_to ? add(load_part(to, count), sums[m][v]) : sums[m][v], count);
    }
}

// The same for any number of rows up to M.
template <int M>
inline void multiply_rows(int64_t rows, const float* a, const float* b, int64_t inputs, float* c, int64_t stride,
                          int64_t columns, bool add_to) {
  if (rows == M) return multiply_panels<M>(a, b, inputs, c, stride, columns, add_to);
  if constexpr (M > 1) multiply_rows<M - 1>(rows, a, b, inputs, c, stride, columns, add_to);
}

// A whole panel of A, tile by tile.
inline void multiply_panel_of_a(int64_t rows, const float* a, const float* b, int64_t inputs, float* c, int64_t stride,
                                int64_t columns, bool add_to) {
  for (; rows > kGemmRows; rows -= kGemmRows, a += kGemmRows, c += kGemmRows * stride)
    multiply_panels<kGemmRows>(a, b, inputs, c, stride, columns, add_to);
  if (rows > 0) multiply_rows<kGemmRows>(rows, a, b, inputs, c, stride, columns, add_to);
}

// Rows of A cut into panels of nearly equal size: rows `begin(i)` to `begin(i + 1)` are panel i's.
struct RowPanels {
  int64_t rows, count;

  explicit RowPanels(int64_t n) : rows(n), count(divide_up(n, kPanelRowsOfA)) {}
  int64_t begin(int64_t i) const { return i * rows / count; }
  int64_t rows_of(int64_t i) const { return begin(i + 1) - begin(i); }

  // Floats of all panels.
  int64_t size(int64_t inputs) const { return count * kStrideOfA * inputs; }
};

// All panels of the rows that row(m) points to, of `inputs` numbers.
template <class Row>
inline void pack_a(const RowPanels& panels, const Row& row, int64_t inputs, float* out) {
  for (int64_t i = 0; i < panels.count; ++i, out += kStrideOfA * inputs) {
    const float* rows[kLanes];
    const int64_t first = panels.begin(i), last = panels.begin(i + 1) - 1;
    for (int64_t r = 0; r < kLanes; ++r) rows[r] = row(first + r < last ? first + r : last);
    pack_rows(rows, inputs, out, kStrideOfA);
  }
}

// c [rows, columns] (+)= a b, of packed panels: a panel of B stays in the first cache while all of A's meet it.
inline void multiply(const RowPanels& panels, const float* a, const float* b, int64_t inputs, int64_t columns, float* c,
                     int64_t stride, bool add_to = false) {
  for (int64_t first = 0; first < columns; first += kPanelColumns, b += kPanelColumns * inputs)
    for (int64_t i = 0; i < panels.count; ++i)
      multiply_panel_of_a(panels.rows_of(i), a + i * kStrideOfA * inputs, b, inputs,
                          c + panels.begin(i) * stride + first, stride, columns - first, add_to);
}

}  // namespace cpu_kernels::CPU_KERNELS_ISA

#endif  // CPU_KERNELS_GEMM_H_
