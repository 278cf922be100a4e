// Attention on one instruction set: a block of queries over blocks of keys, by a softmax under way (arXiv:1805.02867).
//
// A key is read once for all query rows of a block (tokens times heads of the group). Every sum has one order, whatever
// the block: a logit is summed over the head in order (pairs: attention_pairs.h), a value over the keys in order, in
// blocks of 64 and spans of 1,024 counted from the sequence's start. A key that a query does not see enters with weight
// 0, which changes no bit.
#ifndef CPU_KERNELS_ATTENTION_H_
#define CPU_KERNELS_ATTENTION_H_

#include "attention_call.h"
#include "attention_keys.h"
#include "attention_pairs.h"
#include "attention_tiles.h"
#include "parallel.h"
#include "tiles.h"
#include "vec.h"

namespace cpu_kernels::CPU_KERNELS_ISA {
namespace attending {

// Keys of one sequence that are summed before they meet the others'. Fixed, whatever the number of threads.
constexpr int64_t kSpanKeys = 1024;

// Tasks for each worker that make it matter little which one ends last.
constexpr int64_t kTasksPerWorker = 8;

constexpr int kKeyVecs = kBlockKeys / kLanes;

// ---- softmax ----

// Sums of the rows of a block of queries, over the keys so far.
struct Sums {
  float* top;    // [rows] the largest logit, the sink's included
  float* total;  // [rows] sum of exp(logit - top)
  float* value;  // [rows, padded H] sum of exp(logit - top) value
};

// Sums as they lie in memory.
inline Sums sums_at(float* memory, int64_t rows) { return {memory, memory + rows, memory + padded(2 * rows)}; }
inline int64_t floats_of_sums(int64_t rows, int64_t width) { return padded(2 * rows) + rows * width; }

// A block of queries at work, and its scratch. Its key heads share what one after the other uses up at once.
struct Shared {
  const AttentionCall& call;
  const Queries& queries;
  int64_t group, rows, size, width;  // query heads of a key head, rows of queries of each, H, padded H
  int64_t floats_of_head;
  bool paired;  // whether logits are products of pairs
  Range any;    // what some token sees
  Range* seen;  // what each sees
  float *keys, *values, *logits, *shrink, *zeros, *heads;
  float* spans;  // sums of a span, of each head

  Shared(const AttentionCall& call, const Queries& queries, float* scratch);

  int64_t floats_of_span() const { return floats_of_sums(rows, width); }
};

// One key head of it.
struct Work {
  const Shared& shared;
  int64_t head;  // of the block's
  float *q, *lanes;
  Sums span, all;

  Work(const Shared& shared, int64_t head);

  void load_queries() const;
  void start(const Sums& sums, bool with_sink) const;
  void start_all() const { start(all, true); }
  void start_span() const;
  template <typename Element>
  void add_block(int64_t first, const Block& block, const Block& next) const;
  void weigh(int64_t first, Ahead& ahead) const;
  void end_span() const;
  void fold() const;
  void finish() const;

  int32_t* pairs() const { return reinterpret_cast<int32_t*>(q); }
  int64_t first_query_head() const { return (shared.queries.kv_head + head) * shared.group; }
};

// Scratch for blocks of so many query tokens under so many key heads.
inline int64_t scratch_floats(const AttentionCall& call, int64_t tokens, int64_t kv_heads) {
  const int64_t rows = tokens * (call.heads / call.kv_heads), width = padded(call.head_size);
  const int64_t tiles = kBlockKeys * (call.head_size + width) + rows * kBlockKeys + padded(rows);
  const int64_t of_head = padded(rows * call.head_size) + rows * kLanes + 2 * floats_of_sums(rows, width);
  const int64_t seen = tokens * int64_t(sizeof(Range) / sizeof(float));
  return padded(seen) + tiles + kv_heads * (width + of_head);
}

inline Shared::Shared(const AttentionCall& call, const Queries& queries, float* scratch)
    : call(call), queries(queries), group(call.heads / call.kv_heads), rows((queries.end - queries.first) * group),
      size(call.head_size), width(padded(size)), paired(takes_pairs(call)), any(seen_by_any(call, queries)) {
  auto take = [&](int64_t floats) {
    float* taken = scratch;
    scratch += padded(floats);
    return taken;
  };
  const int64_t tokens = queries.end - queries.first;
  seen = reinterpret_cast<Range*>(take(tokens * int64_t(sizeof(Range) / sizeof(float))));
  keys = take(kBlockKeys * size);
  values = take(kBlockKeys * width);
  logits = take(rows * kBlockKeys);
  shrink = take(rows);
  zeros = take(queries.kv_heads * width);
  floats_of_head = padded(rows * size) + rows * kLanes + floats_of_span();
  heads = take(queries.kv_heads * floats_of_head);
  spans = take(queries.kv_heads * floats_of_span());
  memset(zeros, 0, size_t(queries.kv_heads * width) * sizeof(float));
  for (int64_t token = 0; token < tokens; ++token) seen[token] = seen_by(call, queries.sequence, queries.first + token);
}

inline Work::Work(const Shared& shared, int64_t head) : shared(shared), head(head) {
  const int64_t rows = shared.rows;
  q = shared.heads + head * shared.floats_of_head;
  lanes = q + padded(rows * shared.size);
  all = sums_at(lanes + rows * kLanes, rows);
  span = sums_at(shared.spans + head * shared.floats_of_span(), rows);
}

// q / sqrt(H), the rows by token, then by head: float32s, or pairs of bfloat16s.
inline void Work::load_queries() const {
  const AttentionCall& call = shared.call;
  const int64_t size = shared.size, group = shared.group;
  const float scale = scale_of(call);
  for (int64_t row = 0; row < shared.rows; ++row) {
    const int64_t token = shared.queries.sequence * call.tokens + shared.queries.first + row / group;
    const int64_t first = (token * call.heads + first_query_head() + row % group) * size;
    for (int64_t i = 0; i < size; ++i) q[row * size + i] = number(call.q, first + i) * scale;
    if (shared.paired) narrow(q + row * size, size, pairs() + row * size / 2);
  }
}

// Sums before any key. The sink is a logit from the start, so that there always is one, but it counts once.
inline void Work::start(const Sums& sums, bool with_sink) const {
  for (int64_t row = 0; row < shared.rows; ++row) {
    const float sink = number(shared.call.sinks, first_query_head() + row % shared.group);
    sums.top[row] = sink < kLowest ? kLowest : sink;
    sums.total[row] = with_sink ? weight_of(sink - sums.top[row]) : 0;
  }
  memset(sums.value, 0, size_t(shared.rows * shared.width) * sizeof(float));
}

inline void Work::start_span() const {
  start(span, false);
  memset(lanes, 0, size_t(shared.rows * kLanes) * sizeof(float));
}

inline void Work::end_span() const {
  for (int64_t row = 0; row < shared.rows; ++row) span.total[row] = sum(load(lanes + row * kLanes));
}

// Logits of a block of keys to weights, against the largest so far; shrink says what that does to earlier weights.
inline void Work::weigh(int64_t first, Ahead& ahead) const {
  for (int64_t row = 0; row < shared.rows; ++row) {
    for (int i = 0; i < kFetchesBeside; ++i) ahead.fetch_some();
    float* logit = shared.logits + row * kBlockKeys;
    const Range& range = shared.seen[row / shared.group];
    for (int64_t i = 0; i < least(kBlockKeys, range.first - first); ++i) logit[i] = -__builtin_inff();
    for (int64_t i = most(0, range.end - first); i < kBlockKeys; ++i) logit[i] = -__builtin_inff();

    Vec weights[kKeyVecs];
    for (int v = 0; v < kKeyVecs; ++v) weights[v] = load(logit + v * kLanes);
    Vec high = weights[0];
    for (int v = 1; v < kKeyVecs; ++v) high = max(high, weights[v]);
    const float before = span.top[row], block_top = largest(high), top = block_top > before ? block_top : before;
    const float shrink = top == before ? 1 : weight_of(before - top);
    shared.shrink[row] = shrink;
    span.top[row] = top;
    Vec total = mul(load(lanes + row * kLanes), splat(shrink));
    for (int v = 0; v < kKeyVecs; ++v) {
      weights[v] = weight_of(sub(weights[v], splat(top)));
      store(logit + v * kLanes, weights[v]);
      total = add(total, weights[v]);
    }
    store(lanes + row * kLanes, total);
  }
}

// Takes a block of keys in, and fetches this head's share of the next.
template <typename Element>
inline void Work::add_block(int64_t first, const Block& block, const Block& next) const {
  const int64_t rows = shared.rows, size = shared.size, width = shared.width;
  const int64_t head_bytes = size * int64_t(sizeof(Element)), heads = shared.queries.kv_heads;
  const bool in_lines = head_bytes % 64 == 0;
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t beside = rows + (in_lines ? kKeyVecs * (head_bytes / 64) : 0);
  const int64_t steps = tiles * (kBlockKeys * (size + width) / (4 * kTileVecs * kLanes)) + kFetchesBeside * beside;
  Ahead ahead(next, heads * head_bytes, head, heads, steps);
  float *keys = shared.keys, *values = shared.values;
  const Rows to_logits = {rows, q, size, size, shared.logits, nullptr};
  if (!in_lines) {
    widen_keys<Element>(block, head, size, keys);
    multiply(to_logits, Floats{keys, kBlockKeys}, ahead);
  } else {
    transpose_keys(block, head, head_bytes, keys, ahead);
    const Pairs in_pairs = {reinterpret_cast<const uint16_t*>(keys), kBlockKeys};
    if constexpr (sizeof(Element) == sizeof(float))
      multiply(to_logits, Floats{keys, kBlockKeys}, ahead);
    else if (!shared.paired)
      multiply(to_logits, in_pairs, ahead);
    else if constexpr (kHasPairs)
      multiply(PairedRows{rows, pairs(), size / 2, shared.logits}, in_pairs, ahead);
  }
  weigh(first, ahead);
  const Rows to_values = {rows, shared.logits, kBlockKeys, kBlockKeys, span.value, shared.shrink};
  if (size % kLanes == 0 && rows <= kTileRows) {  // each value is read once: no need for a tile
    multiply(to_values, Scattered<Element>{block.values(), head, width}, ahead);
  } else {
    widen_values<Element>(block, head, size, values);
    multiply(to_values, Floats{values, width}, ahead);
  }
}

// Takes the span's sums in.
inline void Work::fold() const {
  for (int64_t row = 0; row < shared.rows; ++row) {
    const float top = span.top[row] > all.top[row] ? span.top[row] : all.top[row];
    const Vec ours = splat(weight_of(all.top[row] - top)), theirs = splat(weight_of(span.top[row] - top));
    float lanes_of_total[kLanes];
    store(lanes_of_total, fma(splat(all.total[row]), ours, mul(splat(span.total[row]), theirs)));
    all.total[row] = lanes_of_total[0];
    all.top[row] = top;
    for (int64_t i = row * shared.width; i < (row + 1) * shared.width; i += kLanes)
      store(all.value + i, fma(load(all.value + i), ours, mul(load(span.value + i), theirs)));
  }
}

// The weighted means, the sink's share going to no value, and ln(sum of exp(logit)); 0 and -inf for padding. The
// logarithm is a double's, so that different mathematical libraries round to the same float32.
inline void Work::finish() const {
  const AttentionCall& call = shared.call;
  const int64_t size = shared.size;
  for (int64_t row = 0; row < shared.rows; ++row) {
    const int64_t token = shared.queries.sequence * call.tokens + shared.queries.first + row / shared.group;
    const int64_t query_head = token * call.heads + first_query_head() + row % shared.group;
    const bool padding = call.positions[token] < 0;
    for (int64_t i = 0; i < size; ++i)
      call.out[query_head * size + i] = padding ? 0 : all.value[row * shared.width + i] / all.total[row];
    call.lse[query_head] = padding ? -__builtin_inff() : float(all.top[row] + __builtin_log(all.total[row]));
  }
}

// The sums of a span's keys, those that are seen. The heads go through its blocks side by side, so that memory is read
// as it lies; while a block is summed, the next is fetched.
inline void add_span(const Shared& shared, int64_t span) {
  const AttentionCall& call = shared.call;
  const Queries& queries = shared.queries;
  const int64_t first = most(span * kSpanKeys, shared.any.first / kBlockKeys * kBlockKeys);
  const int64_t end = least((span + 1) * kSpanKeys, shared.any.end);
  Block blocks[2];
  locate(call, queries, first, shared.any, shared.zeros, &blocks[0]);
  for (int64_t head = 0; head < queries.kv_heads; ++head) Work(shared, head).start_span();
  for (int64_t key = first, i = 0; key < end; key += kBlockKeys, ++i) {
    const Block& block = blocks[i % 2];
    Block& next = blocks[(i + 1) % 2];
    locate(call, queries, key + kBlockKeys, shared.any, shared.zeros, &next);
    for (int64_t head = 0; head < queries.kv_heads; ++head) {
      const Work work(shared, head);
      if (call.bfloat16_keys)
        work.add_block<uint16_t>(key, block, next);
      else
        work.add_block<float>(key, block, next);
    }
  }
  for (int64_t head = 0; head < queries.kv_heads; ++head) Work(shared, head).end_span();
}

// ---- all of a call ----

// A call cut into items, blocks of queries, and those, where they are few, into spans of keys.
struct Plan {
  const AttentionCall& call;
  int64_t group, block_tokens, blocks, kv_heads, most_spans;  // key heads of an item

  Plan(const AttentionCall& call, int64_t workers)
      : call(call), group(call.heads / call.kv_heads), block_tokens(most(1, least(call.tokens, kBlockRows / group))),
        blocks((call.tokens + block_tokens - 1) / block_tokens), kv_heads(1), most_spans(0) {
    for (int64_t sequence = 0; sequence < call.sequences; ++sequence)
      for (int64_t block = 0; block < blocks; ++block) {
        const Range spans = spans_of(seen_by_any(call, queries(sequence, 0, block)));
        most_spans = most(most_spans, spans.end - spans.first);
      }
    // As many as leave tasks enough, and few enough rows.
    for (int64_t heads = 2; heads <= call.kv_heads && heads * block_tokens * group <= kBlockRows; ++heads)
      if (call.kv_heads % heads == 0 && items() / heads * kv_heads * most_spans >= kTasksPerWorker * workers)
        kv_heads = heads;
  }

  int64_t items() const { return call.sequences * (call.kv_heads / kv_heads) * blocks; }

  // Blocks of one sequence and its heads are neighbours: the keys that one has read, the next finds in the cache.
  Queries item(int64_t i) const {
    const int64_t heads = call.kv_heads / kv_heads;
    return queries(i / blocks / heads, i / blocks % heads * kv_heads, i % blocks);
  }

  Queries queries(int64_t sequence, int64_t kv_head, int64_t block) const {
    const int64_t first = block * block_tokens;
    return {sequence, kv_head, kv_heads, first, least(call.tokens, first + block_tokens)};
  }

  static Range spans_of(const Range& keys) {
    return {keys.first / kSpanKeys, (keys.end + kSpanKeys - 1) / kSpanKeys};
  }

  int64_t floats() const { return scratch_floats(call, block_tokens, kv_heads); }
  int64_t floats_of_span() const {
    return kv_heads * floats_of_sums(block_tokens * group, padded(call.head_size));
  }
};

inline void attend(const Plan& plan, const Queries& queries, float* scratch) {
  const Shared shared(plan.call, queries, scratch);
  const Range spans = Plan::spans_of(shared.any);
  for (int64_t head = 0; head < queries.kv_heads; ++head) Work(shared, head).load_queries();
  for (int64_t head = 0; head < queries.kv_heads; ++head) Work(shared, head).start_all();
  for (int64_t span = spans.first; span < spans.end; ++span) {
    add_span(shared, span);
    for (int64_t head = 0; head < queries.kv_heads; ++head) Work(shared, head).fold();
  }
  for (int64_t head = 0; head < queries.kv_heads; ++head) Work(shared, head).finish();
}

// Writes the sums of an item's `span`-th span, if it has one.
inline void attend_span(const Plan& plan, const Queries& queries, int64_t span, float* scratch, float* sums) {
  Shared shared(plan.call, queries, scratch);
  const Range spans = Plan::spans_of(shared.any);
  if (spans.first + span >= spans.end) return;
  shared.spans = sums;
  for (int64_t head = 0; head < queries.kv_heads; ++head) Work(shared, head).load_queries();
  add_span(shared, spans.first + span);
}

// The output from the sums of all spans.
inline void combine(const Plan& plan, const Queries& queries, float* sums, float* scratch) {
  Shared shared(plan.call, queries, scratch);
  const Range spans = Plan::spans_of(shared.any);
  for (int64_t head = 0; head < queries.kv_heads; ++head) Work(shared, head).start_all();
  for (int64_t span = spans.first; span < spans.end; ++span, sums += plan.floats_of_span()) {
    shared.spans = sums;
    for (int64_t head = 0; head < queries.kv_heads; ++head) Work(shared, head).fold();
  }
  for (int64_t head = 0; head < queries.kv_heads; ++head) Work(shared, head).finish();
}

// One task for each item.
inline bool attend_whole(const Pool& pool, const Plan& plan) {
  const int64_t items = plan.items(), floats = plan.floats();
  const Scratch scratch(pool.max_workers(items) * floats * int64_t(sizeof(float)));
  if (!scratch.floats()) return false;
  auto body = [&](int64_t i, int64_t worker) { attend(plan, plan.item(i), scratch.floats() + worker * floats); };
  parallel_for(pool, items, body);
  return true;
}

// One task for each span of each item, then one for each item. The bits are those of `attend_whole`.
inline bool attend_by_span(const Pool& pool, const Plan& plan) {
  const int64_t items = plan.items(), tasks = items * plan.most_spans;
  const int64_t floats = plan.floats(), floats_of_item = plan.most_spans * plan.floats_of_span();
  const Scratch scratch(pool.max_workers(tasks) * floats * int64_t(sizeof(float)));
  const Scratch sums(items * floats_of_item * int64_t(sizeof(float)));
  if (!scratch.floats() || !sums.floats()) return false;
  auto body = [&](int64_t task, int64_t worker) {
    // Neighbours read the same pages: the heads of one span.
    const int64_t span = task / items, i = task % items;
    float* to = sums.floats() + i * floats_of_item + span * plan.floats_of_span();
    attend_span(plan, plan.item(i), span, scratch.floats() + worker * floats, to);
  };
  parallel_for(pool, tasks, body);
  auto last = [&](int64_t i, int64_t worker) {
    combine(plan, plan.item(i), sums.floats() + i * floats_of_item, scratch.floats() + worker * floats);
  };
  parallel_for(pool, items, last);
  return true;
}

}  // namespace attending

// Attention of a call. Spans are spread over the threads where blocks of queries alone are too few to keep them busy.
inline bool attention(const Pool& pool, const AttentionCall& call) {
  const attending::Plan plan(call, pool.size + 1);
  const bool few = plan.items() < attending::kTasksPerWorker * (pool.size + 1);
  if (few && plan.most_spans > 1) return attending::attend_by_span(pool, plan);
  return attending::attend_whole(pool, plan);
}

}  // namespace cpu_kernels::CPU_KERNELS_ISA

#endif  // CPU_KERNELS_ATTENTION_H_
