// The gradient of the experts with dense weights: to x, routing weights, both matrices and both biases.
//
// Tokens go chunk by chunk. First, by blocks of tokens: inner activations are computed again, and from them the
// gradients of gate_up's outputs, of x and of the routing weights. Then, by expert and matrix, what the chunk adds to
// the gradients of the weights. Each number is summed on one thread, in an order that depends on the chunks alone.
#ifndef CPU_KERNELS_DENSE_EXPERTS_GRADIENT_H_
#define CPU_KERNELS_DENSE_EXPERTS_GRADIENT_H_

#include "dense_experts.h"

namespace cpu_kernels::CPU_KERNELS_ISA {

constexpr int64_t kChunkTokens = 1024;
constexpr int64_t kRunRows = 256;  // of activations whose outer products are summed in registers at a time

// What a worker keeps: as for the forward pass, and the gradients of a group's inner activations; or, for the weights,
// a run of rows of either factor, packed.
struct BackwardRoom : ForwardRoom {
  float *by_inner, *b;

  BackwardRoom(const DenseExperts& call, float* at)
      : ForwardRoom(call, at), by_inner(at + ForwardRoom::size()), b(at + kRunRows * kStrideOfA) {}

  int64_t size() const {
    const int64_t group = ForwardRoom::size() + kGroupRows * inner;
    const int64_t run = kRunRows * kStrideOfA + packed_size(kRunRows, hidden > inner ? hidden : inner);
    return group > run ? group : run;
  }
};

// The assignments of a chunk of tokens, expert after expert, and what is known of each: inner activations, and the
// gradients of the gate's and of the linear part's outputs.
class Chunk {
 public:
  explicit Chunk(const DenseExperts& call)
      : call_(call),
        stride_(whole_lanes(call.inner)),
        rows_((call.tokens < kChunkTokens ? call.tokens : kChunkTokens) * call.top_k),
        spans_(call.experts * int64_t(sizeof(Span))),
        offsets_(call.experts * kInt),
        values_(3 * rows_ * stride_ * kFloat) {}

  bool ok() const { return spans_.data() && offsets_.data() && values_.data(); }

  void begin(const Assignments& sorted, int64_t first_token, int64_t end_token) {
    int64_t row = 0;
    for (int64_t expert = 0; expert < call_.experts; ++expert) {
      const Span span = sorted.of(expert, first_token, end_token);
      static_cast<Span*>(spans_.data())[expert] = span;
      static_cast<int64_t*>(offsets_.data())[expert] = row - span.begin;
      row += span.end - span.begin;
    }
  }

  Span span(int64_t expert) const { return static_cast<Span*>(spans_.data())[expert]; }

  // The gradients of the gate's (0) and the linear part's (1) outputs, and the inner activations (2), of a place.
  float* row(int64_t expert, int64_t place, int what) const {
    const int64_t at = place + static_cast<int64_t*>(offsets_.data())[expert];
    return values_.floats() + (what * rows_ + at) * stride_;
  }

 private:
  const DenseExperts& call_;
  int64_t stride_, rows_;
  Scratch spans_, offsets_, values_;
};

// A gradient's rows, `stride` apart, and its bias's elements.
struct MatrixGradient {
  float* rows;
  int64_t stride;
  float* bias;
  int64_t bias_stride;
};

// Adds scale(k) a(k) b(k)^T over `inputs` to a gradient [rows, columns], and scale(k) a(k) to its bias.
template <class A, class Scale, class B>
inline void add_outer_products(const A& a, const Scale& scale, const B& b, int64_t inputs, int64_t rows,
                               int64_t columns, const MatrixGradient& to, const BackwardRoom& room) {
  pack_b(b, inputs, columns, room.b);
  for (int64_t first = 0; first < rows; first += kPanelRowsOfA) {
    const int64_t count = rows - first < kPanelRowsOfA ? rows - first : kPanelRowsOfA;
    pack_columns(a, scale, inputs, first, rows, kStrideOfA, room.a, kStrideOfA);
    Vec sums = splat(0);
    for (int64_t k = 0; k < inputs; ++k) sums = add(sums, load(room.a + k * kStrideOfA));
    float lanes[kLanes];
    store(lanes, sums);
    for (int64_t i = 0; i < count; ++i) to.bias[(first + i) * to.bias_stride] += lanes[i];
    const float* panel = room.b;
    for (int64_t column = 0; column < columns; column += kPanelColumns, panel += kPanelColumns * inputs)
      multiply_panel_of_a(count, room.a, panel, inputs, to.rows + first * to.stride + column, to.stride,
                          columns - column, true);
  }
}

class DenseExpertsBackward {
 public:
  DenseExpertsBackward(const Pool& pool, const DenseExperts& call, const DenseExpertsGradient& gradient)
      : call_(call),
        gradient_(gradient),
        sorted_(call),
        chunk_(call),
        gate_(packed_up(pool, call, 0)),
        linear_(packed_up(pool, call, 1)),
        gate_back_(packed_up_back(pool, call, 0)),
        linear_back_(packed_up_back(pool, call, 1)),
        down_back_(packed_down_back(pool, call)),
        biases_(call),
        rooms_((pool.size + 1) * BackwardRoom(call, nullptr).size() * kFloat) {}

  bool ok() const {
    return sorted_.ok() && chunk_.ok() && gate_.ok() && linear_.ok() && gate_back_.ok() && linear_back_.ok() &&
           down_back_.ok() && biases_.ok() && rooms_.data();
  }

  void run(const Pool& pool) {
    set_to_zero();
    for (int64_t begin = 0; begin < call_.tokens; begin += kChunkTokens)
      run_chunk(pool.for_work(multiplications(call_)), begin,
                begin + kChunkTokens < call_.tokens ? begin + kChunkTokens : call_.tokens);
  }

 private:
  void set_to_zero() const {
    const int64_t matrix = call_.experts * call_.hidden * call_.inner;
    memset(gradient_.x, 0, size_t(call_.tokens * call_.hidden * kFloat));
    memset(gradient_.routing, 0, size_t(call_.tokens * call_.top_k * kFloat));
    memset(gradient_.gate_up, 0, size_t(2 * matrix * kFloat));
    memset(gradient_.gate_up_bias, 0, size_t(2 * call_.experts * call_.inner * kFloat));
    memset(gradient_.down, 0, size_t(matrix * kFloat));
    memset(gradient_.down_bias, 0, size_t(call_.experts * call_.hidden * kFloat));
  }

  void run_chunk(const Pool& pool, int64_t begin, int64_t end) {
    chunk_.begin(sorted_, begin, end);
    const int64_t tokens = block_tokens(pool, end - begin);
    auto block = [&](int64_t task, int64_t worker) {
      const int64_t first = begin + task * tokens;
      run_block(first, first + tokens < end ? first + tokens : end, room_of(worker));
    };
    parallel_for(pool, divide_up(end - begin, tokens), block);
    auto matrix = [&](int64_t task, int64_t worker) { add_matrix(task / 3, int(task % 3), room_of(worker)); };
    parallel_for(pool, 3 * call_.experts, matrix);
  }

  BackwardRoom room_of(int64_t worker) const {
    return {call_, rooms_.floats() + worker * BackwardRoom(call_, nullptr).size()};
  }

  void run_block(int64_t begin, int64_t end, const BackwardRoom& room) const {
    for (int64_t expert = 0; expert < call_.experts; ++expert) {
      const Span span = sorted_.of(expert, begin, end);
      for (int64_t at = span.begin; at < span.end; at += kGroupRows)
        run_group(expert, at, span.end - at < kGroupRows ? span.end - at : kGroupRows, room);
    }
  }

  const float* x(int64_t place) const { return call_.x + sorted_.token(place) * call_.hidden; }
  const float* by_y(int64_t place) const { return gradient_.y + sorted_.token(place) * call_.hidden; }

  void run_group(int64_t expert, int64_t at, int64_t rows, const BackwardRoom& room) const {
    const int64_t hidden = call_.hidden, inner = call_.inner;
    const RowPanels panels(rows);
    pack_a(panels, [&](int64_t i) { return x(at + i); }, hidden, room.a);
    multiply(panels, room.a, gate_.of(expert), hidden, inner, room.gate, room.inner);
    multiply(panels, room.a, linear_.of(expert), hidden, inner, room.linear, room.inner);
    pack_a(panels, [&](int64_t i) { return by_y(at + i); }, hidden, room.a);
    multiply(panels, room.a, down_back_.of(expert), hidden, inner, room.by_inner, room.inner);
    for (int64_t i = 0; i < rows; ++i) run_row(expert, at + i, i * room.inner, room);
    pack_a(panels, [&](int64_t i) { return chunk_.row(expert, at + i, 0); }, inner, room.a);
    multiply(panels, room.a, gate_back_.of(expert), inner, hidden, room.out, room.hidden);
    pack_a(panels, [&](int64_t i) { return chunk_.row(expert, at + i, 1); }, inner, room.a);
    multiply(panels, room.a, linear_back_.of(expert), inner, hidden, room.out, room.hidden, true);
    for (int64_t i = 0; i < rows; ++i) add_row(room.out + i * room.hidden, at + i);
  }

  // From a row's products at `offset` in the room: its inner activations and the gradients that its place in the chunk
  // keeps, and the gradient of its routing weight.
  void run_row(int64_t expert, int64_t place, int64_t offset, const BackwardRoom& room) const {
    float *by_gate = chunk_.row(expert, place, 0), *by_linear = chunk_.row(expert, place, 1);
    float* values = chunk_.row(expert, place, 2);
    const Vec share = splat(sorted_.share(place));
    Vec by_share = splat(0);
    for (int64_t i = 0; i < call_.inner; i += kLanes) {
      const Vec gate = add(load(room.gate + offset + i), biases_.load_at(expert, 0, i));
      const Vec linear = add(load(room.linear + offset + i), biases_.load_at(expert, 1, i));
      const SwigluGradient found = swiglu_gradient(gate, linear, call_.limit);
      const Vec by_inner = load_part(room.by_inner + offset + i, call_.inner - i), weighted = mul(share, by_inner);
      store(values + i, found.value);
      store(by_gate + i, mul(weighted, found.by_gate));
      store(by_linear + i, mul(weighted, found.by_linear));
      by_share = add(by_share, first_lanes(lanes_of(call_.inner - i), mul(by_inner, found.value), splat(0)));
    }
    const float *by_y_row = by_y(place), *bias = call_.down_bias + expert * call_.hidden;
    for (int64_t i = 0; i < call_.hidden; i += kLanes) {
      const int64_t count = call_.hidden - i;
      by_share = add(by_share, mul(load_part(by_y_row + i, count), load_part(bias + i, count)));
    }
    gradient_.routing[sorted_.assignment(place)] = sum(by_share);
  }

  static int lanes_of(int64_t n) { return n < kLanes ? int(n) : kLanes; }

  void add_row(const float* products, int64_t place) const {
    float* to = gradient_.x + sorted_.token(place) * call_.hidden;
    for (int64_t i = 0; i < call_.hidden; i += kLanes) {
      const int64_t count = call_.hidden - i;
      store_part(to + i, add(load_part(to + i, count), load(products + i)), count);
    }
  }

  // What the chunk adds to an expert's gate rows (0), linear rows (1) or down (2), run by run.
  void add_matrix(int64_t expert, int what, const BackwardRoom& room) const {
    const Span span = chunk_.span(expert);
    for (int64_t at = span.begin; at < span.end; at += kRunRows) {
      const int64_t rows = span.end - at < kRunRows ? span.end - at : kRunRows;
      what < 2 ? add_gate_up(expert, what, at, rows, room) : add_down(expert, at, rows, room);
    }
  }

  void add_gate_up(int64_t expert, int half, int64_t at, int64_t rows, const BackwardRoom& room) const {
    const int64_t first = expert * 2 * call_.inner + half;
    const int64_t stride = 2 * call_.hidden;
    const MatrixGradient to{gradient_.gate_up + first * call_.hidden, stride, gradient_.gate_up_bias + first, 2};
    const auto a = [&](int64_t k) { return chunk_.row(expert, at + k, half); };
    const auto b = [&](int64_t k) { return x(at + k); };
    add_outer_products(a, [](int64_t) { return 1.0f; }, b, rows, call_.inner, call_.hidden, to, room);
  }

  void add_down(int64_t expert, int64_t at, int64_t rows, const BackwardRoom& room) const {
    const int64_t first = expert * call_.hidden;
    const MatrixGradient to{gradient_.down + first * call_.inner, call_.inner, gradient_.down_bias + first, 1};
    const auto a = [&](int64_t k) { return by_y(at + k); };
    const auto scale = [&](int64_t k) { return sorted_.share(at + k); };
    const auto b = [&](int64_t k) { return chunk_.row(expert, at + k, 2); };
    add_outer_products(a, scale, b, rows, call_.hidden, call_.inner, to, room);
  }

  const DenseExperts& call_;
  const DenseExpertsGradient& gradient_;
  Assignments sorted_;
  Chunk chunk_;
  PackedExperts gate_, linear_, gate_back_, linear_back_, down_back_;
  HalvedBiases biases_;
  Scratch rooms_;
};

inline bool dense_experts_gradient(const Pool& pool, const DenseExperts& call, const DenseExpertsGradient& gradient) {
  DenseExpertsBackward backward(pool, call, gradient);
  if (!backward.ok()) return false;
  backward.run(pool);
  return true;
}

}  // namespace cpu_kernels::CPU_KERNELS_ISA

#endif  // CPU_KERNELS_DENSE_EXPERTS_GRADIENT_H_
