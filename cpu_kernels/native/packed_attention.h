// Attention over packed rows on one instruction set: blocks of queries over the blocks of 64 keys that they see.
//
// A query, a token's head, is a lane. Tiles [keys, queries] of logits are products of keys, as they lie, and of turned
// queries; so the softmax goes along whole vectors, and what the gradient (packed_gradient.h) multiplies lies as it has
// to. Every sum has one order, whatever the number of threads.
#ifndef CPU_KERNELS_PACKED_ATTENTION_H_
#define CPU_KERNELS_PACKED_ATTENTION_H_

#include "attention_tiles.h"
#include "packed_call.h"
#include "parallel.h"

namespace cpu_kernels::CPU_KERNELS_ISA {
namespace packed {

using attending::kBlockKeys;
using attending::kLowest;
using attending::least;
using attending::most;
using attending::padded;
using attending::Range;
using attending::weight_of;

// ---- what a query sees ----

inline Range common(const Range& a, const Range& b) { return {most(a.first, b.first), least(a.end, b.end)}; }
inline bool meet(const Range& a, const Range& b) { return common(a, b).first < common(a, b).end; }

// Indices of the keys that one token sees: of its conversation's own part, and, before them, of the row's head.
struct Seen {
  Range shared, own;

  bool any_of(const Range& keys) const { return meet(shared, keys) || meet(own, keys); }
};

inline Seen seen_by(const PackedCall& call, int64_t row, int64_t token) {
  const int64_t at = row * call.tokens + token, position = call.position[at];
  if (position < 0) return {{0, 0}, {0, 0}};
  const int64_t far = call.window ? call.window - 1 : int64_t(1) << 32;  // the longest way back to a key
  const int64_t first = most(0, least(call.first[at], token));
  const Range own = {most(first, token - far), token + 1};
  const Range shared = {most(0, position - far), least(call.head[at], first)};
  return {shared.first < shared.end ? shared : Range{0, 0}, own};
}

// Query tokens [first, end) of a row, for the heads that share one key/value head.
struct Queries {
  int64_t row, kv_head, first, end;
};

// ---- a call, cut up ----

// Sizes of tiles. A block of queries has some whole tokens, all heads of the group; its lanes are whole vectors.
struct Plan {
  const PackedCall& call;
  int64_t group, block_tokens, blocks, lanes, size, width;  // size: H; width: H in whole vectors

  explicit Plan(const PackedCall& call)
      : call(call), group(call.heads / call.kv_heads), size(call.head_size), width(padded(size)) {
    block_tokens = most(1, least(call.tokens, attending::kBlockRows / group));
    blocks = (call.tokens + block_tokens - 1) / block_tokens;
    lanes = padded(block_tokens * group);
  }

  Queries queries(int64_t row, int64_t kv_head, int64_t block) const {
    const int64_t first = block * block_tokens;
    return {row, kv_head, first, least(call.tokens, first + block_tokens)};
  }
  // Where a lane's query stands in [B, T, N].
  int64_t query_at(const Queries& queries, int64_t lane) const {
    const int64_t token = queries.row * call.tokens + queries.first + lane / group;
    return token * call.heads + queries.kv_head * group + lane % group;
  }
  // Where a key stands in [B, T, K].
  int64_t key_at(int64_t row, int64_t kv_head, int64_t key) const {
    return (row * call.tokens + key) * call.kv_heads + kv_head;
  }
  // Multiplications that a product of all queries with all keys that they may see is at most.
  int64_t operations() const {
    const int64_t keys = call.window ? least(call.tokens, call.window) : call.tokens;
    return call.rows * call.tokens * call.heads * keys * size;
  }
};

// ---- tiles ----

// Takes pieces of whole vectors off a worker's memory; of no memory it only counts.
struct Pieces {
  float* memory;
  int64_t floats = 0;

  float* take(int64_t count) {
    float* taken = memory ? memory + floats : nullptr;
    floats += padded(count);
    return taken;
  }
};

template <typename Element>
inline void widen_row(const Element* from, int64_t size, float scale, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(to + i, mul(load_wide(from + i), splat(scale)));
  for (; i < padded(size); ++i) to[i] = i < size ? widen(from[i]) * scale : 0;
}

// Numbers [at, at + size), scaled and padded with zeros to whole vectors.
inline void load_row(const Numbers& numbers, int64_t at, int64_t size, float scale, float* to) {
  if (numbers.bfloat16)
    widen_row(static_cast<const uint16_t*>(numbers.data) + at, size, scale, to);
  else
    widen_row(static_cast<const float*>(numbers.data) + at, size, scale, to);
}

inline void zero(float* to, int64_t floats) { memset(to, 0, size_t(floats) * sizeof(float)); }
inline void copy(const float* from, int64_t floats, float* to) { memcpy(to, from, size_t(floats) * sizeof(float)); }

// A block's queries, or what has their shape: [lanes, width], zeros beyond the last.
inline void load_queries(const Plan& plan, const Queries& queries, const Numbers& numbers, float scale, float* tile) {
  const int64_t used = (queries.end - queries.first) * plan.group;
  for (int64_t lane = 0; lane < used; ++lane)
    load_row(numbers, plan.query_at(queries, lane) * plan.size, plan.size, scale, tile + lane * plan.width);
  zero(tile + used * plan.width, (plan.lanes - used) * plan.width);
}

// Keys or values: [keys, width], zeros beyond the row's end.
inline void load_keys(const Plan& plan, const Queries& queries, const Numbers& numbers, const Range& keys,
                      float* tile) {
  const int64_t used = least(keys.end, plan.call.tokens) - keys.first;
  for (int64_t i = 0; i < used; ++i)
    load_row(numbers, plan.key_at(queries.row, queries.kv_head, keys.first + i) * plan.size, plan.size, 1,
             tile + i * plan.width);
  zero(tile + used * plan.width, (keys.end - keys.first - used) * plan.width);
}

// from [rows, columns] to [columns, rows], both of whole vectors.
inline void turn(const float* from, int64_t rows, int64_t columns, float* to) {
  for (int64_t row = 0; row < rows; row += kLanes) {
    const char* starts[kLanes];
    for (int i = 0; i < kLanes; ++i) starts[i] = reinterpret_cast<const char*>(from + (row + i) * columns);
    for (int64_t column = 0; column < columns; column += kLanes)
      transpose(starts, column * int64_t(sizeof(float)), to + column * rows + row, rows);
  }
}

// a [rows, depth] b [depth, columns], to c [rows, columns]; or added to what c holds: then `ones` are `rows` of them.
struct Product {
  int64_t rows, depth, columns;
  const float* a;
  int64_t stride;  // of a's rows
  const float* b;

  void to(float* c) const { add_to(c, nullptr); }
  void add_to(float* c, const float* ones) const {
    attending::NothingAhead nothing;
    attending::multiply(attending::Rows{rows, a, stride, depth, c, ones}, attending::Floats{b, columns}, nothing);
  }
};

// What a block's tokens see, one by one and together.
struct View {
  const Plan& plan;
  Queries queries;
  Seen* tokens;       // [block_tokens]
  Range shared, own;  // around all tokens'

  View(const Plan& plan, const Queries& queries, Seen* tokens) : plan(plan), queries(queries), tokens(tokens) {
    shared = own = {plan.call.tokens, 0};
    for (int64_t i = 0; i < queries.end - queries.first; ++i) {
      tokens[i] = seen_by(plan.call, queries.row, queries.first + i);
      widen_to(tokens[i].shared, &shared);
      widen_to(tokens[i].own, &own);
    }
  }

  bool any_of(const Range& keys) const {
    if (!meet(shared, keys) && !meet(own, keys)) return false;
    for (int64_t i = 0; i < queries.end - queries.first; ++i)
      if (tokens[i].any_of(keys)) return true;
    return false;
  }

  // Of a block's keys those from the first to the last that any token sees, in whole vectors from the block's start.
  Range used_of(const Range& block) const {
    Range used = {block.end, block.first};
    if (meet(shared, block) || meet(own, block))
      for (int64_t i = 0; i < queries.end - queries.first; ++i) {
        widen_to(common(tokens[i].shared, block), &used);
        widen_to(common(tokens[i].own, block), &used);
      }
    if (used.first >= used.end) return {block.first, block.first};
    return {used.first / kLanes * kLanes, padded(used.end)};
  }

  // Of a tile [keys, lanes] of logits those of unseen keys become minus infinity.
  void hide(const Range& keys, float* logits) const {
    for (int64_t i = 0; i < queries.end - queries.first; ++i) {
      const Seen& seen = tokens[i];
      float* of_token = logits + i * plan.group;
      hide_keys(of_token, keys, {0, seen.shared.first});
      hide_keys(of_token, keys, {seen.shared.end, seen.own.first});
      hide_keys(of_token, keys, {seen.own.end, keys.end});
    }
  }

 private:
  static void widen_to(const Range& range, Range* around) {
    if (range.first >= range.end) return;
    *around = {least(around->first, range.first), most(around->end, range.end)};
  }

  void hide_keys(float* of_token, const Range& keys, const Range& hidden) const {
    const Range range = common(keys, hidden);
    for (int64_t key = range.first; key < range.end; ++key)
      for (int64_t i = 0; i < plan.group; ++i) of_token[(key - keys.first) * plan.lanes + i] = -__builtin_inff();
  }
};

// Blocks start at multiples of 64, and so of vectors.
inline Range block_at(int64_t first) { return {first, first + kBlockKeys}; }

// ---- attention ----

// One block of queries at work. Sums and values have a lane for each query.
struct Work {
  const Plan& plan;
  float *q, *turned_q, *rows, *turned_values, *logits, *values, *top, *total, *shrink, *ones;
  Seen* seen;

  Work(const Plan& plan, Pieces& pieces) : plan(plan) {
    q = pieces.take(plan.lanes * plan.width);
    turned_q = pieces.take(plan.lanes * plan.width);
    rows = pieces.take(kBlockKeys * plan.width);
    turned_values = pieces.take(kBlockKeys * plan.width);
    logits = pieces.take(kBlockKeys * plan.lanes);
    values = pieces.take(plan.width * plan.lanes);
    top = pieces.take(plan.lanes);
    total = pieces.take(plan.lanes);
    shrink = pieces.take(plan.lanes);
    ones = pieces.take(plan.width);
    seen = reinterpret_cast<Seen*>(pieces.take(plan.block_tokens * int64_t(sizeof(Seen) / sizeof(float))));
  }

  void attend(const Queries& queries, const PackedResult& result) const;

 private:
  void start(const Queries& queries) const;
  void add_block(const View& view, const Range& keys) const;
  void weigh(int64_t keys) const;
  void finish(const Queries& queries, const PackedResult& result) const;
};

// The sink is a logit from the start, so that there always is one.
inline void Work::start(const Queries& queries) const {
  load_queries(plan, queries, plan.call.q, 1 / __builtin_sqrtf(float(plan.size)), q);
  turn(q, plan.lanes, plan.width, turned_q);
  const int64_t used = (queries.end - queries.first) * plan.group;
  for (int64_t lane = 0; lane < plan.lanes; ++lane) {
    const int64_t head = queries.kv_head * plan.group + lane % plan.group;
    const float sink = lane < used ? attending::number(plan.call.sinks, head) : 0;
    top[lane] = sink < kLowest ? kLowest : sink;
    total[lane] = weight_of(sink - top[lane]);
  }
  zero(values, plan.width * plan.lanes);
  for (int64_t i = 0; i < plan.width; ++i) ones[i] = 1;
}

// Logits to weights, against the largest so far; what this does to earlier weights is done to their sums.
inline void Work::weigh(int64_t keys) const {
  for (int64_t lane = 0; lane < plan.lanes; lane += kLanes) {
    float* column = logits + lane;
    const Vec before = load(top + lane);
    Vec high = before;
    for (int64_t key = 0; key < keys; ++key) high = max(load(column + key * plan.lanes), high);
    const Vec less = weight_of(sub(before, high));
    Vec sum = mul(load(total + lane), less);
    for (int64_t key = 0; key < keys; ++key) {
      const Vec weight = weight_of(sub(load(column + key * plan.lanes), high));
      store(column + key * plan.lanes, weight);
      sum = add(sum, weight);
    }
    store(top + lane, high);
    store(total + lane, sum);
    store(shrink + lane, less);
  }
  for (int64_t i = 0; i < plan.width; ++i)
    for (int64_t lane = 0; lane < plan.lanes; lane += kLanes)
      store(values + i * plan.lanes + lane, mul(load(values + i * plan.lanes + lane), load(shrink + lane)));
}

inline void Work::add_block(const View& view, const Range& keys) const {
  const int64_t count = keys.end - keys.first, width = plan.width, lanes = plan.lanes;
  load_keys(plan, view.queries, plan.call.k, keys, rows);
  Product{count, width, lanes, rows, width, turned_q}.to(logits);
  view.hide(keys, logits);
  weigh(count);
  load_keys(plan, view.queries, plan.call.v, keys, rows);
  turn(rows, count, width, turned_values);
  Product{width, count, lanes, turned_values, count, logits}.add_to(values, ones);
}

// The logarithm is a double's, so that different mathematical libraries round to the same float32.
inline void Work::finish(const Queries& queries, const PackedResult& result) const {
  for (int64_t i = 0; i < plan.width; ++i)
    for (int64_t lane = 0; lane < plan.lanes; lane += kLanes)
      store(values + i * plan.lanes + lane, div(load(values + i * plan.lanes + lane), load(total + lane)));
  turn(values, plan.width, plan.lanes, q);  // which is no longer needed
  for (int64_t lane = 0; lane < (queries.end - queries.first) * plan.group; ++lane) {
    const int64_t at = plan.query_at(queries, lane);
    const bool padding = plan.call.position[at / plan.call.heads] < 0;
    if (padding)
      zero(result.out + at * plan.size, plan.size);
    else
      copy(q + lane * plan.width, plan.size, result.out + at * plan.size);
    result.lse[at] = padding ? __builtin_inff() : float(top[lane] + __builtin_log(total[lane]));
  }
}

inline void Work::attend(const Queries& queries, const PackedResult& result) const {
  const View view(plan, queries, seen);
  start(queries);
  for (int64_t first = 0; first < queries.end; first += kBlockKeys) {
    const Range keys = view.used_of(block_at(first));
    if (keys.first < keys.end) add_block(view, keys);
  }
  finish(queries, result);
}

}  // namespace packed

// One task for each block of queries; those of one row and head are neighbours, and find its keys in the cache.
inline bool packed_attention(const Pool& all, const PackedCall& call, const PackedResult& result) {
  const packed::Plan plan(call);
  const Pool pool = all.for_work(2 * plan.operations());
  packed::Pieces needed = {nullptr};
  const packed::Work counted(plan, needed);
  const int64_t tasks = call.rows * call.kv_heads * plan.blocks, floats = needed.floats;
  const Scratch scratch(pool.max_workers(tasks) * floats * int64_t(sizeof(float)));
  if (!scratch.floats()) return false;
  auto body = [&](int64_t task, int64_t worker) {
    packed::Pieces pieces = {scratch.floats() + worker * floats};
    const packed::Work work(plan, pieces);
    const int64_t of_head = task / plan.blocks;
    work.attend(plan.queries(of_head / call.kv_heads, of_head % call.kv_heads, task % plan.blocks), result);
  };
  parallel_for(pool, tasks, body);
  return true;
}

}  // namespace cpu_kernels::CPU_KERNELS_ISA

#endif  // CPU_KERNELS_PACKED_ATTENTION_H_
