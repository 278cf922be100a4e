// Dot products of activations with packed weights: one order of adding, whatever the number of rows.
//
// A dot product over K inputs goes in blocks of 32: sixteen lanes take the even inputs of a block, then, in the same
// accumulator, the odd ones; the lanes are added up at the end. That is the order in which bytes of two MXFP4 codes and
// words of two bfloat16s unpack without a shuffle, and activations are laid out to fit ("unzipped": of each block first
// the even inputs, then the odd ones, zeros after the last). Weights are unpacked in registers, again for each few
// rows of activations: next to their products that costs less than a copy of unpacked weights in cache would, and a
// panel of packed weights stays in cache from the first few rows to the last. AVX2 alone, with half the registers, keeps
// such a copy where rows are many. Every tile adds in this one order, so a row of the result has the same bits beside
// any neighbours.
//
// All this is of float32, which bfloat16 activations of dense weights are made too. Where the instruction set multiplies
// bfloat16 itself they stay what they are, and product_bf16.h says how a block is laid out, unpacked and added then.
// MXFP4 weights meet float32 activations alone here, and bfloat16 ones in product_int16.h.
#ifndef CPU_KERNELS_PRODUCT_H_
#define CPU_KERNELS_PRODUCT_H_

#include "product_rows.h"
#if defined(CPU_KERNELS_AVX2)
#include "product_planes.h"
#endif

namespace cpu_kernels::CPU_KERNELS_ISA {

#if defined(CPU_KERNELS_AVX2)
constexpr bool kUnpacksOnce = true;
#else
constexpr bool kUnpacksOnce = false;
#endif

// Rows of activations that are worth unpacking weights once; bfloat16s unpack in so few steps that it takes more of
// them. By trial.
constexpr int64_t kManyRows = 6;
template <class Weights>
constexpr int64_t kManyRowsOf = Weights::kBlockBytes >= 64 ? 32 : kManyRows;

// Floats that each worker needs beside the arrays of a product of so many rows of activations.
inline int64_t room_of([[maybe_unused]] int64_t rows, [[maybe_unused]] int64_t inputs) {
#if defined(CPU_KERNELS_AVX2)
  if (rows >= kManyRows) return kUnpackedRows * round_up(inputs, kBlock);
#endif
  return 0;
}

// out[m * stride + r] = dot(weights of row first + r, x[m]) for r below `count` and m below `rows`; `room` as `room_of`
// says, or more.
template <class Weights, typename X>
inline void multiply(const Weights& w, int64_t first, int64_t count, const X* const* x, int64_t rows, float* out,
                     int64_t stride, [[maybe_unused]] float* room) {
  constexpr int kRows = Block<X>::kTileRows;
#if defined(CPU_KERNELS_AVX2)
  if (rows >= kManyRowsOf<Weights>) return multiply_many(w, first, count, x, rows, out, stride, room);
  if constexpr (Weights::kBlockBytes == 64)
    if (!w.has_rest()) return multiply_pairs(w, first, count, x, rows, out, stride);
#endif
  if constexpr (Weights::kBlockBytes >= 64)
    if (count == kPanelRows && w.whole_blocks() > kDepth)
      for (bool fetch = true; rows >= kRows; rows -= kRows, x += kRows, out += kRows * stride, fetch = false)
        multiply_panel<Block<X>::kTileWeights, kRows>(w, first, x, fetch, out, stride);
  multiply_all<kRows>(w, first, count, x, rows, out, stride);
}

}  // namespace cpu_kernels::CPU_KERNELS_ISA

#endif  // CPU_KERNELS_PRODUCT_H_
