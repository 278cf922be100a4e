// The top_k experts' MLPs from dense float32 weights: what training on a CPU needs; the gradient is beside this file.
//
// A task takes a block of tokens and goes through the experts that these are assigned to, so that a token's sum runs
// over its assignments in the order of their experts, on one thread: no bit depends on the block or on other tokens.
#ifndef CPU_KERNELS_DENSE_EXPERTS_H_
#define CPU_KERNELS_DENSE_EXPERTS_H_

#include "dense_assignments.h"
#include "swiglu.h"

namespace cpu_kernels::CPU_KERNELS_ISA {

constexpr int64_t kGroupRows = 8 * kPanelRowsOfA;  // that meet a panel of weights while it is in the first cache
constexpr int64_t kMostBlockTokens = 512, kFewestBlockTokens = 32, kBlocksOfAWorker = 4;

// Tokens of a task: many enough to fill groups, few enough to keep every thread busy.
inline int64_t block_tokens(const Pool& pool, int64_t tokens) {
  const int64_t even = divide_up(tokens, kBlocksOfAWorker * (pool.size + 1));
  return even < kFewestBlockTokens ? kFewestBlockTokens : even < kMostBlockTokens ? even : kMostBlockTokens;
}

inline int64_t multiplications(const DenseExperts& call) {
  return call.tokens * call.top_k * call.hidden * call.inner * 3;
}

inline int64_t whole_lanes(int64_t n) { return divide_up(n, kLanes) * kLanes; }

// What a worker keeps of a group of rows: packed rows, both parts of gate_up's products, and products of down's width.
struct ForwardRoom {
  int64_t inner, hidden, packed;
  float *a, *gate, *linear, *out;

  ForwardRoom(const DenseExperts& call, float* at)
      : inner(whole_lanes(call.inner)),
        hidden(whole_lanes(call.hidden)),
        packed(RowPanels(kGroupRows).size(hidden > inner ? hidden : inner)),
        a(at),
        gate(a + packed),
        linear(gate + kGroupRows * inner),
        out(linear + kGroupRows * inner) {}

  int64_t size() const { return packed + kGroupRows * (2 * inner + hidden); }
};

// y's row of a token += share * (products + bias).
inline void add_weighted(const float* products, const float* bias, float share, int64_t columns, float* y) {
  for (int64_t i = 0; i < columns; i += kLanes) {
    const int64_t count = columns - i;
    const Vec value = add(load(products + i), load_part(bias + i, count));
    store_part(y + i, add(load_part(y + i, count), mul(splat(share), value)), count);
  }
}

class DenseExpertsForward {
 public:
  DenseExpertsForward(const Pool& pool, const DenseExperts& call, float* y)
      : call_(call),
        y_(y),
        sorted_(call),
        gate_(packed_up(pool, call, 0)),
        linear_(packed_up(pool, call, 1)),
        down_(packed_down(pool, call)),
        biases_(call),
        rooms_((pool.size + 1) * ForwardRoom(call, nullptr).size() * kFloat) {}

  bool ok() const {
    return sorted_.ok() && gate_.ok() && linear_.ok() && down_.ok() && biases_.ok() && rooms_.data();
  }

  void run(const Pool& pool) const {
    const int64_t tokens = block_tokens(pool, call_.tokens);
    auto block = [&](int64_t task, int64_t worker) {
      const int64_t end = (task + 1) * tokens;
      run_block(task * tokens, end < call_.tokens ? end : call_.tokens, worker);
    };
    parallel_for(pool.for_work(multiplications(call_)), divide_up(call_.tokens, tokens), block);
  }

 private:
  void run_block(int64_t begin, int64_t end, int64_t worker) const {
    const ForwardRoom room(call_, rooms_.floats() + worker * ForwardRoom(call_, nullptr).size());
    memset(y_ + begin * call_.hidden, 0, size_t((end - begin) * call_.hidden * kFloat));
    for (int64_t expert = 0; expert < call_.experts; ++expert) {
      const Span span = sorted_.of(expert, begin, end);
      for (int64_t at = span.begin; at < span.end; at += kGroupRows)
        run_group(expert, at, span.end - at < kGroupRows ? span.end - at : kGroupRows, room);
    }
  }

  void run_group(int64_t expert, int64_t at, int64_t rows, const ForwardRoom& room) const {
    const int64_t hidden = call_.hidden, inner = call_.inner;
    const RowPanels panels(rows);
    const auto token = [&](int64_t i) { return call_.x + sorted_.token(at + i) * hidden; };
    pack_a(panels, token, hidden, room.a);
    multiply(panels, room.a, gate_.of(expert), hidden, inner, room.gate, room.inner);
    multiply(panels, room.a, linear_.of(expert), hidden, inner, room.linear, room.inner);
    for (int64_t i = 0; i < rows; ++i) activate(expert, room.gate + i * room.inner, room.linear + i * room.inner);
    pack_a(panels, [&](int64_t i) { return room.gate + i * room.inner; }, inner, room.a);
    multiply(panels, room.a, down_.of(expert), inner, hidden, room.out, room.hidden);
    for (int64_t i = 0; i < rows; ++i)
      add_weighted(room.out + i * room.hidden, call_.down_bias + expert * hidden, sorted_.share(at + i), hidden,
                   y_ + sorted_.token(at + i) * hidden);
  }

  // A row's inner activations, in place of the gate's products.
  void activate(int64_t expert, float* gate, const float* linear) const {
    for (int64_t i = 0; i < call_.inner; i += kLanes) {
      const Vec gate_sum = add(load(gate + i), biases_.load_at(expert, 0, i));
      const Vec linear_sum = add(load(linear + i), biases_.load_at(expert, 1, i));
      store(gate + i, swiglu(gate_sum, linear_sum, call_.limit));
    }
  }

  const DenseExperts& call_;
  float* y_;
  Assignments sorted_;
  PackedExperts gate_, linear_, down_;
  HalvedBiases biases_;
  Scratch rooms_;
};

inline bool dense_experts(const Pool& pool, const DenseExperts& call, float* y) {
  const DenseExpertsForward forward(pool, call, y);
  if (!forward.ok()) return false;
  forward.run(pool);
  return true;
}

}  // namespace cpu_kernels::CPU_KERNELS_ISA

#endif  // CPU_KERNELS_DENSE_EXPERTS_H_
