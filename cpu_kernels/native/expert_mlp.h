// The top_k experts' MLPs from packed MXFP4: assignments sorted by expert, so that each expert's weights are read once.
//
// Sorted assignments go in batches whose inner activations fit into cache. Of each batch first every panel of gate_up
// of every expert is a task (products, bias, SwiGLU), then every panel of down: it adds to y, expert after expert, what
// they make of their tokens. So a token's sum runs over its assignments in the order of their experts, whatever other
// tokens there are.
#ifndef CPU_KERNELS_EXPERT_MLP_H_
#define CPU_KERNELS_EXPERT_MLP_H_

#include "product.h"
#include "swiglu.h"

namespace cpu_kernels::CPU_KERNELS_ISA {

constexpr int64_t kBatchAssignments = 256;
template <typename X>  // rows whose products wait for their epilogue at a time
constexpr int64_t kChunkRows = kUnpacksOnce ? kBatchAssignments : 8 * Block<X>::kTileRows;

static_assert(kPanelRows == 2 * kLanes && kBlock == 2 * kLanes);

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

inline Mxfp4Weights of_expert(const ExpertMatrix& m, int64_t expert) {
  const int64_t first = expert * m.rows * m.blocks;
  return {m.codes + first * (kBlock / 2), m.scales + first, m.blocks};
}

// Sixteen inner activations from `products`, gate and linear alternating, into their places in a row.
template <typename X>
inline void activate(const ExpertCall& call, int64_t expert, int64_t panel, const float* products, X* inner) {
  float gate[kLanes], linear[kLanes];
  for (int i = 0; i < kLanes; ++i) gate[i] = products[2 * i], linear[i] = products[2 * i + 1];
  Vec gate_bias, linear_bias;
  unpack_bf16(call.gate_up.bias + expert * call.gate_up.rows + panel * kPanelRows, gate_bias, linear_bias);
  const Vec value = swiglu(add(load(gate), gate_bias), add(load(linear), linear_bias), call.limit);
  // The next product takes operands of x's dtype.
  lay_out(call.x.is_bf16 ? round_bf16(value) : value, panel * kLanes, inner);
}

// Runs first to last of the sorted assignments: their inner activations, then what these add to y.
template <typename X>
class Batch {
 public:
  Batch(const ExpertCall& call, const SortedAssignments& sorted, const X* const* x, X* const* inner, float* rooms)
      : call_(call), sorted_(sorted), x_(x), inner_(inner), rooms_(rooms) {}

  // Floats of each worker's room.
  static int64_t room(const ExpertCall& call) {
    const int64_t blocks = call.gate_up.blocks > call.down.blocks ? call.gate_up.blocks : call.down.blocks;
    return room_of(call.x.rows, blocks * kBlock);
  }

  void run(const Pool& pool, int64_t first, int64_t last) const {
    const int64_t panels = call_.gate_up.rows / kPanelRows, begin = sorted_.run(first).begin;
    const int64_t products = (sorted_.run(last - 1).end - begin) * call_.gate_up.rows * call_.down.rows;
    auto gate_up = [&](int64_t task, int64_t worker) {
      gate_up_panel(sorted_.run(first + task / panels), begin, task % panels, rooms_ + worker * room(call_));
    };
    parallel_for(pool.for_work(products), (last - first) * panels, gate_up);
    auto down = [&](int64_t panel, int64_t worker) {
      for (int64_t i = first; i < last; ++i) down_panel(sorted_.run(i), begin, panel, rooms_ + worker * room(call_));
    };
    parallel_for(pool.for_work(products / 2), call_.down.rows / kPanelRows, down);
  }

 private:
  void gate_up_panel(const Run& run, int64_t batch_begin, int64_t panel, float* room) const {
    const Mxfp4Weights w = of_expert(call_.gate_up, run.expert);
    float products[kChunkRows<X> * kPanelRows];
    const X* rows[kChunkRows<X>];
    for (int64_t at = run.begin; at < run.end; at += kChunkRows<X>) {
      const int64_t count = run.end - at < kChunkRows<X> ? run.end - at : kChunkRows<X>;
      for (int64_t i = 0; i < count; ++i) rows[i] = x_[sorted_.assignment(at + i) / call_.top_k];
      multiply(w, panel * kPanelRows, kPanelRows, rows, count, products, kPanelRows, room);
      for (int64_t i = 0; i < count; ++i)
        activate(call_, run.expert, panel, products + i * kPanelRows, inner_[at + i - batch_begin]);
    }
  }

  void down_panel(const Run& run, int64_t batch_begin, int64_t panel, float* room) const {
    const Mxfp4Weights w = of_expert(call_.down, run.expert);
    const int64_t first = panel * kPanelRows;
    const uint16_t* bias = call_.down.bias + run.expert * call_.down.rows + first;
    const Vec biases[2] = {load_bf16(bias), load_bf16(bias + kLanes)};
    float products[kChunkRows<X> * kPanelRows];
    for (int64_t at = run.begin; at < run.end; at += kChunkRows<X>) {
      const int64_t count = run.end - at < kChunkRows<X> ? run.end - at : kChunkRows<X>;
      multiply(w, first, kPanelRows, inner_ + at - batch_begin, count, products, kPanelRows, room);
      for (int64_t i = 0; i < count; ++i)
        add_to_token(sorted_.assignment(at + i), first, products + i * kPanelRows, biases);
    }
  }

  void add_to_token(int64_t assignment, int64_t first, const float* products, const Vec (&biases)[2]) const {
    float* y = call_.y + assignment / call_.top_k * call_.down.rows + first;
    const Vec routing_weight = splat(call_.routing_weights[assignment]);
    for (int half = 0; half < 2; ++half, y += kLanes, products += kLanes)
      store(y, add(load(y), mul(routing_weight, add(load(products), biases[half]))));
  }

  const ExpertCall& call_;
  const SortedAssignments& sorted_;
  const X* const* x_;  // by token
  X* const* inner_;    // by assignment of the batch
  float* rooms_;       // by worker
};

template <typename X>
inline bool expert_mlp_of(const Pool& pool, const ExpertCall& call) {
  memset(call.y, 0, sizeof(float) * size_t(call.x.rows * call.down.rows));
  const SortedAssignments sorted(call);
  if (!sorted.ok()) return false;
  const Rows<X> x(pool, call.x);
  const Rows<X> inner(sorted.size() < kBatchAssignments ? sorted.size() : kBatchAssignments, call.down.blocks * kBlock);
  const Scratch rooms((pool.size + 1) * Batch<X>::room(call) * int64_t(sizeof(float)));
  if (!x.ok() || !inner.ok() || !rooms.data()) return false;

  const Batch<X> batch(call, sorted, x.all(), inner.all(), rooms.floats());
  for (int64_t first = 0, last; first < sorted.num_runs(); first = last) {
    for (last = first + 1; last < sorted.num_runs(); ++last)
      if (sorted.run(last).end - sorted.run(first).begin > kBatchAssignments) break;
    batch.run(pool, first, last);
  }
  return true;
}

inline bool expert_mlp(const Pool& pool, const ExpertCall& call) {
#if defined(CPU_KERNELS_AVX512BF16)
  if (call.x.is_bf16) return expert_mlp_of<uint16_t>(pool, call);
#endif
  return expert_mlp_of<float>(pool, call);
}

}  // namespace cpu_kernels::CPU_KERNELS_ISA

#endif  // CPU_KERNELS_EXPERT_MLP_H_
