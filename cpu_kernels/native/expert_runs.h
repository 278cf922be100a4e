// Assignments of tokens to experts, sorted by expert, so that each expert's weights are read once for all its tokens.
#ifndef CPU_KERNELS_EXPERT_RUNS_H_
#define CPU_KERNELS_EXPERT_RUNS_H_

#include "kernels.h"
#include "vec.h"

namespace cpu_kernels::CPU_KERNELS_ISA {

// Sorted assignments go in batches whose inner activations fit into cache.
constexpr int64_t kBatchAssignments = 256;

// Assignments of one expert, `begin` to `end` in the sorted order.
struct Run {
  int64_t expert, begin, end;
};

// All assignments to real experts in the order of those, and the runs that they make, of at most kBatchAssignments
// each.
class SortedAssignments {
 public:
  explicit SortedAssignments(const ExpertCall& call)
      : counts_((call.experts + 1) * int64_t(sizeof(int64_t))),
        order_(call.x.rows * call.top_k * int64_t(sizeof(int64_t))),
        runs_((call.x.rows * call.top_k) * int64_t(sizeof(Run))) {
    if (ok()) sort(call);
  }

  bool ok() const { return counts_.data() && order_.data() && runs_.data(); }
  int64_t size() const { return size_; }
  int64_t assignment(int64_t i) const { return static_cast<const int64_t*>(order_.data())[i]; }
  int64_t num_runs() const { return num_runs_; }
  const Run& run(int64_t i) const { return static_cast<const Run*>(runs_.data())[i]; }

 private:
  void sort(const ExpertCall& call) {
    int64_t* next = static_cast<int64_t*>(counts_.data());  // where each expert's next assignment goes
    int64_t* order = static_cast<int64_t*>(order_.data());
    const int64_t all = call.x.rows * call.top_k;
    memset(next, 0, size_t(call.experts + 1) * sizeof(int64_t));
    for (int64_t i = 0; i < all; ++i)
      if (is_real(call, i)) ++next[call.ids[i] + 1];
    for (int64_t e = 0; e < call.experts; ++e) {
      add_runs(e, next[e], next[e] + next[e + 1]);
      next[e + 1] += next[e];
    }
    size_ = next[call.experts];
    for (int64_t i = 0; i < all; ++i)
      if (is_real(call, i)) order[next[call.ids[i]]++] = i;
  }

  static bool is_real(const ExpertCall& call, int64_t i) { return call.ids[i] >= 0 && call.ids[i] < call.experts; }

  void add_runs(int64_t expert, int64_t begin, int64_t end) {
    for (; begin < end; begin += kBatchAssignments) {
      const int64_t stop = begin + kBatchAssignments < end ? begin + kBatchAssignments : end;
      static_cast<Run*>(runs_.data())[num_runs_++] = {expert, begin, stop};
    }
  }

  int64_t size_ = 0, num_runs_ = 0;
  Scratch counts_, order_, runs_;
};

// Calls batch.run(pool, first, last) for some runs after the other, of at most kBatchAssignments together.
template <class Batch>
inline void run_batches(const Pool& pool, const SortedAssignments& sorted, Batch& batch) {
  for (int64_t first = 0, last; first < sorted.num_runs(); first = last) {
    for (last = first + 1; last < sorted.num_runs(); ++last)
      if (sorted.run(last).end - sorted.run(first).begin > kBatchAssignments) break;
    batch.run(pool, first, last);
  }
}

// Adds to a token's y, `values` from row `first` on, what an assignment's down product and its biases amount to.
inline void add_to_token(const ExpertCall& call, int64_t assignment, int64_t first, const float* products,
                         const Vec (&biases)[2]) {
  float* y = call.y + assignment / call.top_k * call.down.rows + first;
  const Vec routing_weight = splat(call.routing_weights[assignment]);
  for (int half = 0; half < 2; ++half, y += kLanes, products += kLanes)
    store(y, add(load(y), mul(routing_weight, add(load(products), biases[half]))));
}

// The biases of 32 rows of an expert's down from row `first` on.
inline void down_biases(const ExpertCall& call, int64_t expert, int64_t first, Vec (&biases)[2]) {
  const uint16_t* bias = call.down.bias + expert * call.down.rows + first;
  biases[0] = load_bf16(bias), biases[1] = load_bf16(bias + kLanes);
}

// Sixteen inner activations of an expert from products with its rows `first` to `first` + 32 of gate_up, gate and linear
// alternating.
inline Vec activate(const ExpertCall& call, int64_t expert, int64_t first, const float* products) {
  float gate[kLanes], linear[kLanes];
  for (int i = 0; i < kLanes; ++i) gate[i] = products[2 * i], linear[i] = products[2 * i + 1];
  Vec gate_bias, linear_bias;
  unpack_bf16(call.gate_up.bias + expert * call.gate_up.rows + first, gate_bias, linear_bias);
  return swiglu(add(load(gate), gate_bias), add(load(linear), linear_bias), call.limit);
}

}  // namespace cpu_kernels::CPU_KERNELS_ISA

#endif  // CPU_KERNELS_EXPERT_RUNS_H_
