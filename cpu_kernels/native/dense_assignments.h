// Assignments of tokens to experts with dense weights, sorted by expert, then token; and each expert's packed matrices.
#ifndef CPU_KERNELS_DENSE_ASSIGNMENTS_H_
#define CPU_KERNELS_DENSE_ASSIGNMENTS_H_

#include "dense_experts_call.h"
#include "gemm.h"
#include "parallel.h"

namespace cpu_kernels::CPU_KERNELS_ISA {

constexpr int64_t kFloat = sizeof(float), kInt = sizeof(int64_t);

// Places `begin` to `end` in the sorted order.
struct Span {
  int64_t begin, end;
};

// All assignments to real experts, sorted.
class Assignments {
 public:
  explicit Assignments(const DenseExperts& call)
      : call_(call), first_((call.experts + 2) * kInt), order_(call.tokens * call.top_k * kInt) {
    if (ok()) sort();
  }

  bool ok() const { return first_.data() && order_.data(); }
  int64_t size() const { return first()[call_.experts]; }
  int64_t assignment(int64_t place) const { return order()[place]; }
  int64_t token(int64_t place) const { return order()[place] / call_.top_k; }
  float share(int64_t place) const { return call_.routing[order()[place]]; }

  // An expert's assignments of tokens `begin` to `end`.
  Span of(int64_t expert, int64_t begin, int64_t end) const {
    return {place_of(expert, begin * call_.top_k), place_of(expert, end * call_.top_k)};
  }

 private:
  int64_t* first() const { return static_cast<int64_t*>(first_.data()); }
  int64_t* order() const { return static_cast<int64_t*>(order_.data()); }
  bool is_real(int64_t i) const { return call_.ids[i] >= 0 && call_.ids[i] < call_.experts; }

  void sort() {
    // An expert's next place stands one further on than where it belongs in the end, which is where it stops.
    int64_t* next = first() + 1;
    const int64_t all = call_.tokens * call_.top_k;
    memset(first(), 0, size_t((call_.experts + 2) * kInt));
    for (int64_t i = 0; i < all; ++i)
      if (is_real(i)) ++next[call_.ids[i] + 1];
    for (int64_t e = 0; e < call_.experts; ++e) next[e + 1] += next[e];
    for (int64_t i = 0; i < all; ++i)
      if (is_real(i)) order()[next[call_.ids[i]]++] = i;
  }

  // The first of an expert's places whose assignment is not below this one.
  int64_t place_of(int64_t expert, int64_t assignment) const {
    int64_t low = first()[expert], high = first()[expert + 1];
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (order()[middle] < assignment)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }

  const DenseExperts& call_;
  Scratch first_, order_;
};

// A matrix of each expert, packed as the right-hand side of products.
class PackedExperts {
 public:
  // pack(expert, out) packs one of `inputs` by `columns`.
  template <class Pack>
  PackedExperts(const Pool& pool, int64_t experts, int64_t inputs, int64_t columns, const Pack& pack)
      : size_(packed_size(inputs, columns)), values_(experts * size_ * kFloat) {
    if (!ok()) return;
    auto one = [&](int64_t expert, int64_t) { pack(expert, values_.floats() + expert * size_); };
    parallel_for(pool.for_work(experts * size_), experts, one);
  }

  bool ok() const { return values_.data(); }
  const float* of(int64_t expert) const { return values_.floats() + expert * size_; }

 private:
  int64_t size_;
  Scratch values_;
};

// Row n of an expert's gate (half 0) or linear part (half 1), of D numbers.
inline const float* gate_up_row(const DenseExperts& call, int64_t expert, int half, int64_t n) {
  return call.gate_up + ((expert * call.inner + n) * 2 + half) * call.hidden;
}

inline PackedExperts packed_up(const Pool& pool, const DenseExperts& call, int half) {
  return {pool, call.experts, call.hidden, call.inner, [&](int64_t expert, float* out) {
            const auto row = [&](int64_t n) { return gate_up_row(call, expert, half, n); };
            pack_transposed_b(row, call.hidden, call.inner, out);
          }};
}

// The same matrix for the way back, from F to D.
inline PackedExperts packed_up_back(const Pool& pool, const DenseExperts& call, int half) {
  return {pool, call.experts, call.inner, call.hidden, [&](int64_t expert, float* out) {
            const auto row = [&](int64_t n) { return gate_up_row(call, expert, half, n); };
            pack_b(row, call.inner, call.hidden, out);
          }};
}

inline PackedExperts packed_down(const Pool& pool, const DenseExperts& call) {
  return {pool, call.experts, call.inner, call.hidden, [&](int64_t expert, float* out) {
            const auto row = [&](int64_t n) { return call.down + (expert * call.hidden + n) * call.inner; };
            pack_transposed_b(row, call.inner, call.hidden, out);
          }};
}

// The same matrix for the way back, from D to F.
inline PackedExperts packed_down_back(const Pool& pool, const DenseExperts& call) {
  return {pool, call.experts, call.hidden, call.inner, [&](int64_t expert, float* out) {
            const auto row = [&](int64_t n) { return call.down + (expert * call.hidden + n) * call.inner; };
            pack_b(row, call.hidden, call.inner, out);
          }};
}

// gate_up's biases, those of the gate and of the linear part apart, zeros after the last.
class HalvedBiases {
 public:
  explicit HalvedBiases(const DenseExperts& call)
      : columns_(divide_up(call.inner, kLanes) * kLanes), values_(call.experts * 2 * columns_ * kFloat) {
    if (!ok()) return;
    memset(values_.data(), 0, size_t(call.experts * 2 * columns_ * kFloat));
    for (int64_t expert = 0; expert < call.experts; ++expert)
      for (int64_t i = 0; i < 2 * call.inner; ++i)
        values_.floats()[(2 * expert + i % 2) * columns_ + i / 2] = call.gate_up_bias[expert * 2 * call.inner + i];
  }

  bool ok() const { return values_.data(); }
  Vec load_at(int64_t expert, int half, int64_t i) const {
    return load(values_.floats() + (2 * expert + half) * columns_ + i);
  }

 private:
  int64_t columns_;
  Scratch values_;
};

}  // namespace cpu_kernels::CPU_KERNELS_ISA

#endif  // CPU_KERNELS_DENSE_ASSIGNMENTS_H_
