// Attention on one instruction set: a block of queries over blocks of keys, by a softmax under way (arXiv:1805.02867).
//
// A key is read once for all query rows of a block (tokens times heads of the group). Every sum has one order, whatever
// the block: a logit is summed over the head in order, a value over the keys in order, in blocks of 64 and spans of
// 1,024 counted from the sequence's start. A key that a query does not see enters with weight 0, which changes no bit.
#ifndef CPU_KERNELS_ATTENTION_H_
#define CPU_KERNELS_ATTENTION_H_

#include "attention_call.h"
#include "attention_tiles.h"
#include "parallel.h"
#include "tiles.h"
#include "vec.h"

namespace cpu_kernels::CPU_KERNELS_ISA {
namespace attending {

// Keys of one sequence that are summed before they meet the others'. Fixed, whatever the number of threads.
constexpr int64_t kSpanKeys = 1024;

// Tasks for each thread that make it matter little which thread ends last.
constexpr int64_t kItemsPerThread = 8;

constexpr int kKeyVecs = kBlockKeys / kLanes;

// ---- where keys lie ----

// Where each key of a block and its value lie.
struct Block {
  const char *keys[kBlockKeys], *values[kBlockKeys];
};

// Fetches a block into the cache while another is computed with, some lines at a time: all at once, they would queue.
struct Ahead {
  const Block& block;
  int64_t head_bytes;
  int lines;  // at a time
  int token = 0;
  bool value = false;  // the token's key comes first
  int64_t byte = 0;

  void fetch_some() {
    for (int i = 0; i < lines && token < kBlockKeys; ++i) {
      __builtin_prefetch((value ? block.values : block.keys)[token] + byte);
      if ((byte += 64) < head_bytes) continue;
      byte = 0;
      token += value;
      value = !value;
    }
  }
};

// ---- right-hand sides of products, beside `Floats` ----

// Pairs of bfloat16s, of rows k and k + 1, side by side: [. / 2, columns, 2].
struct Pairs {
  const uint16_t* data;
  int64_t columns;

  void two_rows(int64_t k, int64_t column, Vec& first, Vec& second) const {
    unpack_bf16(data + k * columns + 2 * column, first, second);
  }
  Vec row(int64_t k, int64_t column) const {
    Vec first, second;
    two_rows(k / 2 * 2, column, first, second);
    return k % 2 == 0 ? first : second;
  }
};

// Rows wherever they lie.
template <typename Element>
struct Scattered {
  const char* const* rows;
  int64_t columns;

  Vec row(int64_t k, int64_t column) const { return load_wide(reinterpret_cast<const Element*>(rows[k]) + column); }
  void two_rows(int64_t k, int64_t column, Vec& first, Vec& second) const {
    first = row(k, column);
    second = row(k + 1, column);
  }
};

// ---- what a query sees ----

// Query tokens [first, end) of a sequence under one key/value head: they read each key once, for all heads of its
// group.
struct Queries {
  int64_t sequence, kv_head, first, end;
};

inline Range seen_by(const AttentionCall& call, int64_t sequence, int64_t token) {
  const int64_t position = call.positions[sequence * call.tokens + token];
  if (position < 0) return {0, 0};
  if (call.page_table) return {0, least(position + 1, call.pages_per_sequence * call.slots)};
  const int64_t start = call.start[sequence];
  const int64_t oldest = most(0, most(start, position + 1) - call.slots);
  const Range range = {most(oldest, position + 1 - call.slots), least(position + 1, start + call.tokens)};
  return range.first < range.end ? range : Range{0, 0};
}

inline Range seen_by_any(const AttentionCall& call, const Queries& queries) {
  Range any = {0, 0};
  for (int64_t token = queries.first; token < queries.end; ++token) {
    const Range range = seen_by(call, queries.sequence, token);
    if (range.first == range.end) continue;
    any = any.first == any.end ? range : Range{least(any.first, range.first), most(any.end, range.end)};
  }
  return any;
}

struct Tokens {
  const KeysAndValues* in;
  int64_t first, count;  // tokens of `in`
};

// The longest run of stored tokens from a position on, `limit` at most.
inline Tokens run_from(const AttentionCall& call, int64_t sequence, int64_t position, int64_t limit) {
  const int64_t slot = position % call.slots, run = least(call.slots - slot, limit);
  if (call.page_table) {
    const int64_t page = call.page_table[sequence * call.pages_per_sequence + position / call.slots];
    return {&call.stored, most(0, least(page, call.pages - 1)) * call.slots + slot, run};
  }
  const int64_t start = call.start[sequence];
  if (position < start) return {&call.stored, sequence * call.slots + slot, least(run, start - position)};
  return {&call.fresh, sequence * call.tokens + position - start, limit};
}

// Finds the keys from `first` on; outside `seen` they are zeros.
inline void locate(const AttentionCall& call, const Queries& queries, int64_t first, const Range& seen,
                   const float* zeros, Block* block) {
  const int64_t element = call.bfloat16_keys ? 2 : 4, head_bytes = call.head_size * element;
  const int64_t token_bytes = call.kv_heads * head_bytes, head = queries.kv_head * head_bytes;
  int64_t i = 0;
  auto blank = [&](int64_t end) {
    for (; i < end; ++i) block->keys[i] = block->values[i] = reinterpret_cast<const char*>(zeros);
  };
  const int64_t end = most(0, least(kBlockKeys, seen.end - first));
  blank(least(kBlockKeys, most(0, seen.first - first)));
  while (i < end) {
    const Tokens run = run_from(call, queries.sequence, first + i, end - i);
    const char* key = static_cast<const char*>(run.in->keys) + run.first * token_bytes + head;
    const char* value = static_cast<const char*>(run.in->values) + run.first * token_bytes + head;
    for (int64_t stop = i + run.count; i < stop; ++i, key += token_bytes, value += token_bytes)
      block->keys[i] = key, block->values[i] = value;
  }
  blank(kBlockKeys);
}

// A block's keys with lanes for keys: words of four bytes as they lie, [words of a key, 64]. Whole cache lines only.
inline void transpose_keys(const Block& block, int64_t head_bytes, float* tile) {
  for (int key = 0; key < kBlockKeys; key += kLanes)
    for (int64_t byte = 0; byte < head_bytes; byte += 64)
      transpose(block.keys + key, byte, tile + byte / 4 * kBlockKeys + key, kBlockKeys);
}

// The same for keys of any size, as float32s: [H, 64].
template <typename Element>
inline void widen_keys(const Block& block, int64_t size, float* tile) {
  for (int64_t i = 0; i < size; ++i)
    for (int key = 0; key < kBlockKeys; ++key) *tile++ = widen(reinterpret_cast<const Element*>(block.keys[key])[i]);
}

// Values as [64, H], padded with zeros to whole vectors.
template <typename Element>
inline void widen_values(const Block& block, int64_t size, float* tile) {
  for (int key = 0; key < kBlockKeys; ++key) {
    const Element* value = reinterpret_cast<const Element*>(block.values[key]);
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(tile + i, load_wide(value + i));
    for (; i < padded(size); ++i) tile[i] = i < size ? widen(value[i]) : 0;
    tile += padded(size);
  }
}

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

// A block of queries at work: its scratch, and its sizes.
struct Work {
  const AttentionCall& call;
  const Queries& queries;
  int64_t group, rows, size, width;  // heads of the group, rows of queries, H, padded H
  float *q, *keys, *values, *logits, *lanes, *shrink, *zeros;
  Sums span, all;
  Range* seen;  // by each token

  Work(const AttentionCall& call, const Queries& queries, float* scratch);

  void start(const Sums& sums, bool with_sink) const;
  template <typename Element>
  void add_block(int64_t first, const Block& block, const Block& next) const;
  void weigh(int64_t first) const;
  void add_span(int64_t span, const Range& range) const;
  void fold(const Sums& sums) const;
  void finish() const;

 private:
  void load_queries() const;
};

// Scratch for blocks of so many query tokens.
inline int64_t scratch_floats(const AttentionCall& call, int64_t tokens) {
  const int64_t rows = tokens * (call.heads / call.kv_heads), width = padded(call.head_size);
  const int64_t tiles = kBlockKeys * (call.head_size + width), logits = rows * (kBlockKeys + kLanes);
  const int64_t seen = tokens * int64_t(sizeof(Range) / sizeof(float));
  return padded(rows * call.head_size) + tiles + logits + padded(rows) + width + 2 * floats_of_sums(rows, width) +
         padded(seen);
}

inline Work::Work(const AttentionCall& call, const Queries& queries, float* scratch)
    : call(call), queries(queries), group(call.heads / call.kv_heads),
      rows((queries.end - queries.first) * group), size(call.head_size), width(padded(size)) {
  auto take = [&](int64_t floats) {
    float* taken = scratch;
    scratch += floats;
    return taken;
  };
  q = take(padded(rows * size));
  keys = take(kBlockKeys * size);
  values = take(kBlockKeys * width);
  logits = take(rows * kBlockKeys);
  lanes = take(rows * kLanes);
  shrink = take(padded(rows));
  zeros = take(width);
  span = sums_at(take(floats_of_sums(rows, width)), rows);
  all = sums_at(take(floats_of_sums(rows, width)), rows);
  seen = reinterpret_cast<Range*>(scratch);
  memset(zeros, 0, size_t(width) * sizeof(float));
  for (int64_t token = 0; token < queries.end - queries.first; ++token)
    seen[token] = seen_by(call, queries.sequence, queries.first + token);
  load_queries();
}

// q / sqrt(H), the rows by token, then by head.
inline void Work::load_queries() const {
  const float scale = 1 / __builtin_sqrtf(float(size));
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t token = queries.sequence * call.tokens + queries.first + row / group;
    const int64_t first = (token * call.heads + queries.kv_head * group + row % group) * size;
    for (int64_t i = 0; i < size; ++i) q[row * size + i] = number(call.q, first + i) * scale;
  }
}

// Sums before any key. The sink is a logit from the start, so that there always is one, but it counts once.
inline void Work::start(const Sums& sums, bool with_sink) const {
  for (int64_t row = 0; row < rows; ++row) {
    const float sink = number(call.sinks, queries.kv_head * group + row % group);
    sums.top[row] = sink < kLowest ? kLowest : sink;
    sums.total[row] = with_sink ? weight_of(sink - sums.top[row]) : 0;
  }
  memset(sums.value, 0, size_t(rows * width) * sizeof(float));
}

// Logits of a block of keys to weights, against the largest so far; shrink says what that does to earlier weights.
inline void Work::weigh(int64_t first) const {
  for (int64_t row = 0; row < rows; ++row) {
    float* logit = logits + row * kBlockKeys;
    const Range& range = seen[row / group];
    for (int64_t i = 0; i < least(kBlockKeys, range.first - first); ++i) logit[i] = -__builtin_inff();
    for (int64_t i = most(0, range.end - first); i < kBlockKeys; ++i) logit[i] = -__builtin_inff();

    Vec weights[kKeyVecs];
    for (int v = 0; v < kKeyVecs; ++v) weights[v] = load(logit + v * kLanes);
    Vec high = weights[0];
    for (int v = 1; v < kKeyVecs; ++v) high = max(high, weights[v]);
    const float before = span.top[row], block_top = largest(high), top = block_top > before ? block_top : before;
    shrink[row] = top == before ? 1 : weight_of(before - top);
    span.top[row] = top;
    Vec total = mul(load(lanes + row * kLanes), splat(shrink[row]));
    for (int v = 0; v < kKeyVecs; ++v) {
      weights[v] = weight_of(sub(weights[v], splat(top)));
      store(logit + v * kLanes, weights[v]);
      total = add(total, weights[v]);
    }
    store(lanes + row * kLanes, total);
  }
}

template <typename Element>
inline void Work::add_block(int64_t first, const Block& block, const Block& next) const {
  const int64_t head_bytes = size * int64_t(sizeof(Element));
  // Spread over all the steps of both products.
  const int64_t steps = (rows + kTileRows - 1) / kTileRows * (kBlockKeys * (size + width) / (4 * kTileVecs * kLanes));
  const int64_t all_lines = 2 * kBlockKeys * ((head_bytes + 63) / 64);
  Ahead ahead = {next, head_bytes, int((all_lines + steps - 1) / steps)};
  const Rows to_logits = {rows, q, size, size, logits, nullptr};
  if (head_bytes % 64 != 0) {
    widen_keys<Element>(block, size, keys);
    multiply(to_logits, Floats{keys, kBlockKeys}, ahead);
  } else {
    transpose_keys(block, head_bytes, keys);
    if (sizeof(Element) == sizeof(float))
      multiply(to_logits, Floats{keys, kBlockKeys}, ahead);
    else
      multiply(to_logits, Pairs{reinterpret_cast<const uint16_t*>(keys), kBlockKeys}, ahead);
  }
  weigh(first);
  const Rows to_values = {rows, logits, kBlockKeys, kBlockKeys, span.value, shrink};
  if (size % kLanes == 0 && rows <= kTileRows) {  // each value is read once: no need for a tile
    multiply(to_values, Scattered<Element>{block.values, width}, ahead);
  } else {
    widen_values<Element>(block, size, values);
    multiply(to_values, Floats{values, width}, ahead);
  }
}

// The sums of a span's keys, those within `range`. While a block is summed, the next is fetched.
inline void Work::add_span(int64_t span_number, const Range& range) const {
  start(span, false);
  memset(lanes, 0, size_t(rows * kLanes) * sizeof(float));
  const int64_t first = most(span_number * kSpanKeys, range.first / kBlockKeys * kBlockKeys);
  const int64_t end = least((span_number + 1) * kSpanKeys, range.end);
  Block blocks[2];
  locate(call, queries, first, range, zeros, &blocks[0]);
  for (int64_t key = first, i = 0; key < end; key += kBlockKeys, ++i) {
    Block& next = blocks[(i + 1) % 2];
    locate(call, queries, key + kBlockKeys, range, zeros, &next);
    if (call.bfloat16_keys)
      add_block<uint16_t>(key, blocks[i % 2], next);
    else
      add_block<float>(key, blocks[i % 2], next);
  }
  for (int64_t row = 0; row < rows; ++row) span.total[row] = sum(load(lanes + row * kLanes));
}

// Takes a span's sums in.
inline void Work::fold(const Sums& sums) const {
  for (int64_t row = 0; row < rows; ++row) {
    const float top = sums.top[row] > all.top[row] ? sums.top[row] : all.top[row];
    const Vec ours = splat(weight_of(all.top[row] - top)), theirs = splat(weight_of(sums.top[row] - top));
    float lanes_of_total[kLanes];
    store(lanes_of_total, fma(splat(all.total[row]), ours, mul(splat(sums.total[row]), theirs)));
    all.total[row] = lanes_of_total[0];
    all.top[row] = top;
    for (int64_t i = row * width; i < (row + 1) * width; i += kLanes)
      store(all.value + i, fma(load(all.value + i), ours, mul(load(sums.value + i), theirs)));
  }
}

// The weighted means, the sink's share going to no value, and ln(sum of exp(logit)); 0 and -inf for padding. The
// logarithm is a double's, so that different mathematical libraries round to the same float32.
inline void Work::finish() const {
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t token = queries.sequence * call.tokens + queries.first + row / group;
    const int64_t head = token * call.heads + queries.kv_head * group + row % group;
    const bool padding = call.positions[token] < 0;
    for (int64_t i = 0; i < size; ++i)
      call.out[head * size + i] = padding ? 0 : all.value[row * width + i] / all.total[row];
    call.lse[head] = padding ? -__builtin_inff() : float(all.top[row] + __builtin_log(all.total[row]));
  }
}

// ---- all of a call ----

// A call cut into blocks of queries, and those, where they are few, into spans of keys.
struct Plan {
  const AttentionCall& call;
  int64_t block_tokens, blocks;

  explicit Plan(const AttentionCall& call) : call(call) {
    block_tokens = most(1, least(call.tokens, kBlockRows / (call.heads / call.kv_heads)));
    blocks = (call.tokens + block_tokens - 1) / block_tokens;
  }

  int64_t items() const { return call.sequences * call.kv_heads * blocks; }

  // Blocks of one sequence and head are neighbours: the keys that one has read, the next finds in the cache.
  Queries item(int64_t i) const {
    const int64_t first = i % blocks * block_tokens;
    return {i / blocks / call.kv_heads, i / blocks % call.kv_heads, first, least(call.tokens, first + block_tokens)};
  }

  int64_t most_spans() const {
    int64_t spans = 0;
    for (int64_t sequence = 0; sequence < call.sequences; ++sequence)
      for (int64_t block = 0; block < blocks; ++block) {
        const Range range = spans_of(item((sequence * call.kv_heads) * blocks + block));
        spans = most(spans, range.end - range.first);
      }
    return spans;
  }

  // The spans of keys that these queries see.
  Range spans_of(const Queries& queries) const {
    const Range range = seen_by_any(call, queries);
    return {range.first / kSpanKeys, (range.end + kSpanKeys - 1) / kSpanKeys};
  }
};

inline void attend(const Plan& plan, const Queries& queries, float* scratch) {
  const Work work(plan.call, queries, scratch);
  const Range range = seen_by_any(plan.call, queries), spans = plan.spans_of(queries);
  work.start(work.all, true);
  for (int64_t span = spans.first; span < spans.end; ++span) {
    work.add_span(span, range);
    work.fold(work.span);
  }
  work.finish();
}

inline void attend_span(const Plan& plan, const Queries& queries, int64_t span, float* scratch, float* sums) {
  Work work(plan.call, queries, scratch);
  work.span = sums_at(sums, work.rows);
  work.add_span(span, seen_by_any(plan.call, queries));
}

// The output from the sums of all spans.
inline void combine(const Plan& plan, const Queries& queries, float* sums, int64_t span_floats, float* scratch) {
  const Work work(plan.call, queries, scratch);
  const Range spans = plan.spans_of(queries);
  work.start(work.all, true);
  for (int64_t span = spans.first; span < spans.end; ++span, sums += span_floats)
    work.fold(sums_at(sums, work.rows));
  work.finish();
}

// One task for each block of queries.
inline bool attend_whole(const Pool& pool, const Plan& plan) {
  const int64_t items = plan.items(), floats = scratch_floats(plan.call, plan.block_tokens);
  const Scratch scratch(pool.max_workers(items) * floats * int64_t(sizeof(float)));
  if (!scratch.floats()) return false;
  auto body = [&](int64_t i, int64_t worker) { attend(plan, plan.item(i), scratch.floats() + worker * floats); };
  parallel_for(pool, items, body);
  return true;
}

// One task for each span of each block of queries, then one for each block. The bits are those of `attend_whole`.
inline bool attend_by_span(const Pool& pool, const Plan& plan, int64_t most_spans) {
  const int64_t items = plan.items(), tasks = items * most_spans;
  const int64_t rows = plan.block_tokens * (plan.call.heads / plan.call.kv_heads);
  const int64_t span_floats = floats_of_sums(rows, padded(plan.call.head_size));
  const int64_t floats = scratch_floats(plan.call, plan.block_tokens);
  const Scratch scratch(pool.max_workers(tasks) * floats * int64_t(sizeof(float)));
  const Scratch sums(tasks * span_floats * int64_t(sizeof(float)));
  if (!scratch.floats() || !sums.floats()) return false;
  auto body = [&](int64_t task, int64_t worker) {
    // Neighbours read the same pages: the heads of one span.
    const int64_t span = task / items % most_spans, i = task % items;
    const Queries queries = plan.item(i);
    const Range spans = plan.spans_of(queries);
    if (spans.first + span >= spans.end) return;
    float* to = sums.floats() + (i * most_spans + span) * span_floats;
    attend_span(plan, queries, spans.first + span, scratch.floats() + worker * floats, to);
  };
  parallel_for(pool, tasks, body);
  auto last = [&](int64_t i, int64_t worker) {
    combine(plan, plan.item(i), sums.floats() + i * most_spans * span_floats, span_floats,
            scratch.floats() + worker * floats);
  };
  parallel_for(pool, items, last);
  return true;
}

}  // namespace attending

// Attention of a call. Spans are spread over the threads where blocks of queries alone are too few to keep them busy.
inline bool attention(const Pool& pool, const AttentionCall& call) {
  const attending::Plan plan(call);
  const int64_t most_spans = plan.most_spans();
  const bool few = plan.items() < attending::kItemsPerThread * (pool.size + 1);
  if (few && most_spans > 1) return attending::attend_by_span(pool, plan, most_spans);
  return attending::attend_whole(pool, plan);
}

}  // namespace cpu_kernels::CPU_KERNELS_ISA

#endif  // CPU_KERNELS_ATTENTION_H_
