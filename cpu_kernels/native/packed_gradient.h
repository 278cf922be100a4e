// Attention over packed rows, its gradient: FlashAttention's backward pass (arXiv:2205.14135, algorithm 4), and sinks.
//
// A task has a span of a row's keys, under one key/value head, and goes over all queries that see any of them: it alone
// sums the gradients of its keys and values. The queries' gradients are summed for each span apart, and then span after
// span, so that no sum depends on which thread came first.
#ifndef CPU_KERNELS_PACKED_GRADIENT_H_
#define CPU_KERNELS_PACKED_GRADIENT_H_

#include "packed_attention.h"

namespace cpu_kernels::CPU_KERNELS_ISA {
namespace packed {

// Keys of a span at least; and spans of a row at most, since each has sums of its own for all queries after it.
constexpr int64_t kSpanKeys = 256, kMostSpans = 4;

// Tokens whose shares in the sinks' gradients are summed before they meet the others'.
constexpr int64_t kSinkTokens = 64;

// ---- spans ----

struct Spans {
  const Plan& plan;
  int64_t keys, number;
  float* sums = nullptr;  // queries' gradients of all spans but the first, whose are the result's

  explicit Spans(const Plan& plan) : plan(plan) {
    const int64_t tokens = plan.call.tokens;
    const int64_t blocks = (tokens + kBlockKeys * kMostSpans - 1) / (kBlockKeys * kMostSpans);
    keys = most(kSpanKeys, blocks * kBlockKeys);
    number = (tokens + keys - 1) / keys;
  }

  Range range(int64_t span) const { return {span * keys, least(plan.call.tokens, (span + 1) * keys)}; }
  int64_t token_floats() const { return plan.call.heads * plan.size; }
  // The first block of queries that may see a span's keys.
  int64_t first_block(int64_t span) const { return span * keys / plan.block_tokens; }
  // Tokens that have sums in rows and spans before this one, the first spans aside.
  int64_t tokens_before(int64_t row, int64_t span) const {
    int64_t in_row = 0, before = 0;
    for (int64_t i = 1; i < number; ++i) {
      const int64_t tokens = plan.call.tokens - first_block(i) * plan.block_tokens;
      in_row += tokens;
      if (i < span) before += tokens;
    }
    return row * in_row + before;
  }
  // Sums of a block of queries, [tokens, N, H].
  float* sums_of(int64_t row, int64_t span, int64_t block, float* dq) const {
    const int64_t token = (block - first_block(span)) * plan.block_tokens;
    if (span == 0) return dq + (row * plan.call.tokens + token) * token_floats();
    return sums + (tokens_before(row, span) + token) * token_floats();
  }
};

// ---- a span's keys ----

struct SpanWork {
  const Spans& spans;
  const Plan& plan;
  const PackedGradient& gradient;
  const float* mean;                      // [B, T, N], see `find_means`
  float *keys, *values, *dk, *dv;         // [span, width]
  float* turned_keys;                     // [width, 64] for each block
  float *q, *turned_q;                    // [lanes, width], [width, lanes]
  float *d_out, *turned_d_out, *turned_dq;  // likewise
  float *weights, *d_logits;              // [64, lanes]
  float *lse, *lane_means;                // [lanes]
  float* ones;
  Seen* seen;

  SpanWork(const Spans& spans, const PackedGradient& gradient, const float* mean, Pieces& pieces)
      : spans(spans), plan(spans.plan), gradient(gradient), mean(mean) {
    const int64_t span = spans.keys * plan.width, block = plan.lanes * plan.width;
    float** const of_span[] = {&keys, &values, &dk, &dv, &turned_keys};
    float** const of_block[] = {&q, &turned_q, &d_out, &turned_d_out, &turned_dq};
    for (float** tile : of_span) *tile = pieces.take(span);
    for (float** tile : of_block) *tile = pieces.take(block);
    weights = pieces.take(kBlockKeys * plan.lanes);
    d_logits = pieces.take(kBlockKeys * plan.lanes);
    lse = pieces.take(plan.lanes);
    lane_means = pieces.take(plan.lanes);
    ones = pieces.take(most(kBlockKeys, plan.width));
    seen = reinterpret_cast<Seen*>(pieces.take(plan.block_tokens * int64_t(sizeof(Seen) / sizeof(float))));
  }

  void run(int64_t row, int64_t kv_head, int64_t span) const;

 private:
  void load_span(int64_t row, int64_t kv_head, const Range& range) const;
  void load_block(const Queries& queries) const;
  void add_block(const View& view, int64_t first, const Range& used) const;
  void differentiate(int64_t used) const;
  void store_dq(const Queries& queries, float* to) const;
  void store_span(int64_t row, int64_t kv_head, const Range& range) const;
};

inline void SpanWork::load_span(int64_t row, int64_t kv_head, const Range& range) const {
  const Queries queries = {row, kv_head, 0, 0};
  for (int64_t first = range.first; first < range.end; first += kBlockKeys) {
    const int64_t at = (first - range.first) * plan.width;
    load_keys(plan, queries, plan.call.k, block_at(first), keys + at);
    load_keys(plan, queries, plan.call.v, block_at(first), values + at);
    turn(keys + at, kBlockKeys, plan.width, turned_keys + at);
  }
  zero(dk, spans.keys * plan.width);
  zero(dv, spans.keys * plan.width);
  for (int64_t i = 0; i < most(kBlockKeys, plan.width); ++i) ones[i] = 1;
}

inline void SpanWork::load_block(const Queries& queries) const {
  load_queries(plan, queries, plan.call.q, 1 / __builtin_sqrtf(float(plan.size)), q);
  load_queries(plan, queries, {gradient.d_out, false}, 1, d_out);
  turn(q, plan.lanes, plan.width, turned_q);
  turn(d_out, plan.lanes, plan.width, turned_d_out);
  zero(turned_dq, plan.lanes * plan.width);
  const int64_t used = (queries.end - queries.first) * plan.group;
  for (int64_t lane = 0; lane < plan.lanes; ++lane) {
    const int64_t at = lane < used ? plan.query_at(queries, lane) : -1;
    lse[lane] = at < 0 ? __builtin_inff() : gradient.lse[at];  // infinite, where no key has a weight
    lane_means[lane] = at < 0 ? 0 : mean[at];
  }
}

// A logit's gradient is its weight times what its value adds beyond the mean of all.
inline void SpanWork::differentiate(int64_t used) const {
  for (int64_t i = 0; i < used * plan.lanes; i += plan.lanes)
    for (int64_t lane = 0; lane < plan.lanes; lane += kLanes) {
      const Vec weight = weight_of(sub(load(weights + i + lane), load(lse + lane)));
      store(weights + i + lane, weight);
      store(d_logits + i + lane, mul(weight, sub(load(d_logits + i + lane), load(lane_means + lane))));
    }
}

// Adds what some keys, of the span from `first` on, and a block of queries mean to each other.
inline void SpanWork::add_block(const View& view, int64_t first, const Range& used) const {
  const int64_t count = used.end - used.first, lanes = plan.lanes, width = plan.width;
  const int64_t at = (used.first - first) * width, in_block = used.first % kBlockKeys;
  Product{count, width, lanes, keys + at, width, turned_q}.to(weights);
  view.hide(used, weights);
  Product{count, width, lanes, values + at, width, turned_d_out}.to(d_logits);
  differentiate(count);
  Product{count, lanes, width, weights, lanes, d_out}.add_to(dv + at, ones);
  Product{count, lanes, width, d_logits, lanes, q}.add_to(dk + at, ones);
  const float* turned = turned_keys + at - in_block * width + in_block;
  Product{width, count, lanes, turned, kBlockKeys, d_logits}.add_to(turned_dq, ones);
}

// The gradients of a block of queries to [tokens, N, H].
inline void SpanWork::store_dq(const Queries& queries, float* to) const {
  const Vec scale = splat(1 / __builtin_sqrtf(float(plan.size)));
  for (int64_t i = 0; i < plan.width * plan.lanes; i += kLanes) store(turned_dq + i, mul(load(turned_dq + i), scale));
  turn(turned_dq, plan.width, plan.lanes, q);  // which is no longer needed
  for (int64_t lane = 0; lane < (queries.end - queries.first) * plan.group; ++lane) {
    const int64_t head = lane / plan.group * plan.call.heads + queries.kv_head * plan.group + lane % plan.group;
    copy(q + lane * plan.width, plan.size, to + head * plan.size);
  }
}

inline void SpanWork::store_span(int64_t row, int64_t kv_head, const Range& range) const {
  for (int64_t key = range.first; key < range.end; ++key) {
    const int64_t to = plan.key_at(row, kv_head, key) * plan.size, from = (key - range.first) * plan.width;
    copy(dk + from, plan.size, gradient.dk + to);
    copy(dv + from, plan.size, gradient.dv + to);
  }
}

inline void SpanWork::run(int64_t row, int64_t kv_head, int64_t span) const {
  const Range range = spans.range(span);
  load_span(row, kv_head, range);
  for (int64_t block = spans.first_block(span); block < plan.blocks; ++block) {
    const Queries queries = plan.queries(row, kv_head, block);
    const View view(plan, queries, seen);
    if (!view.any_of(range) && span > 0) continue;  // nor are these sums read
    load_block(queries);
    for (int64_t first = range.first; first < least(range.end, queries.end); first += kBlockKeys) {
      const Range used = view.used_of(block_at(first));
      if (used.first < used.end) add_block(view, range.first, used);
    }
    store_dq(queries, spans.sums_of(row, span, block, gradient.dq));
  }
  store_span(row, kv_head, range);
}

// Adds to the gradients of a block of queries what the spans after the first have summed.
inline void add_spans(const Spans& spans, int64_t row, int64_t block, Seen* seen, float* dq) {
  const Plan& plan = spans.plan;
  const Queries queries = plan.queries(row, 0, block);
  const View view(plan, queries, seen);
  const int64_t floats = (queries.end - queries.first) * spans.token_floats();
  float* to = spans.sums_of(row, 0, block, dq);
  for (int64_t span = 1; span < spans.number; ++span) {
    if (!view.any_of(spans.range(span))) continue;
    const float* from = spans.sums_of(row, span, block, dq);
    int64_t i = 0;
    for (; i + kLanes <= floats; i += kLanes) store(to + i, add(load(to + i), load(from + i)));
    for (; i < floats; ++i) to[i] += from[i];
  }
}

// ---- means and sinks ----

// The gradient by the output times the output: what a value has to exceed for its logit to gain.
inline float mean_of(const float* out, const float* d_out, int64_t size) {
  Vec sums = splat(0);
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) sums = fma(load(out + i), load(d_out + i), sums);
  float total = sum(sums);
  for (; i < size; ++i) total += out[i] * d_out[i];
  return total;
}

// Means of a block of tokens of all rows, [., N], and its share in the sinks' gradients: a sink's value is 0.
inline void find_means(const Plan& plan, const PackedGradient& gradient, const Range& tokens, float* mean,
                       float* d_sinks) {
  const int64_t heads = plan.call.heads;
  for (int64_t head = 0; head < heads; ++head) {
    const float sink = attending::number(plan.call.sinks, head);
    Vec shares = splat(0);
    for (int64_t first = tokens.first; first < tokens.end; first += kLanes) {
      float exponents[kLanes], means[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const bool used = first + i < tokens.end;
        const int64_t at = (first + i) * heads + head;
        means[i] = used ? mean_of(gradient.out + at * plan.size, gradient.d_out + at * plan.size, plan.size) : 0;
        exponents[i] = used ? sink - gradient.lse[at] : -__builtin_inff();
        if (used) mean[at] = means[i];
      }
      shares = fma(weight_of(load(exponents)), load(means), shares);
    }
    d_sinks[head] = -sum(shares);
  }
}

inline bool means_and_sinks(const Pool& pool, const Plan& plan, const PackedGradient& gradient, float* mean) {
  const int64_t tokens = plan.call.rows * plan.call.tokens, heads = plan.call.heads;
  const int64_t tasks = (tokens + kSinkTokens - 1) / kSinkTokens;
  const Scratch shares(tasks * heads * int64_t(sizeof(float)));
  if (!shares.floats()) return false;
  auto body = [&](int64_t task, int64_t) {
    const Range range = {task * kSinkTokens, least(tokens, (task + 1) * kSinkTokens)};
    find_means(plan, gradient, range, mean, shares.floats() + task * heads);
  };
  parallel_for(pool, tasks, body);
  for (int64_t head = 0; head < heads; ++head) {
    double total = 0;
    for (int64_t task = 0; task < tasks; ++task) total += shares.floats()[task * heads + head];
    gradient.d_sinks[head] = float(total);
  }
  return true;
}

}  // namespace packed

inline bool packed_attention_gradient(const Pool& all, const PackedCall& call, const PackedGradient& gradient) {
  const packed::Plan plan(call);
  packed::Spans spans(plan);
  const Pool pool = all.for_work(5 * plan.operations());
  const int64_t tasks = spans.number * call.rows * call.kv_heads, queries = call.rows * call.tokens * call.heads;
  packed::Pieces needed = {nullptr};
  const packed::SpanWork counted(spans, gradient, nullptr, needed);
  const int64_t floats = needed.floats, workers = pool.max_workers(attending::most(tasks, call.rows * plan.blocks));
  const Scratch scratch(workers * floats * int64_t(sizeof(float))), mean(queries * int64_t(sizeof(float)));
  const Scratch sums(spans.tokens_before(call.rows, 0) * spans.token_floats() * int64_t(sizeof(float)));
  if (!scratch.floats() || !mean.floats() || !sums.floats()) return false;
  spans.sums = sums.floats();
  if (!packed::means_and_sinks(pool, plan, gradient, mean.floats())) return false;

  auto run = [&](int64_t task, int64_t worker) {  // the first spans, which most queries see, first
    packed::Pieces pieces = {scratch.floats() + worker * floats};
    const int64_t span = task / (call.rows * call.kv_heads), of_head = task % (call.rows * call.kv_heads);
    packed::SpanWork(spans, gradient, mean.floats(), pieces)
        .run(of_head / call.kv_heads, of_head % call.kv_heads, span);
  };
  parallel_for(pool, tasks, run);
  if (spans.number == 1) return true;
  auto add = [&](int64_t task, int64_t worker) {
    auto* seen = reinterpret_cast<packed::Seen*>(scratch.floats() + worker * floats);
    packed::add_spans(spans, task / plan.blocks, task % plan.blocks, seen, gradient.dq);
  };
  parallel_for(pool, call.rows * plan.blocks, add);
  return true;
}

}  // namespace cpu_kernels::CPU_KERNELS_ISA

#endif  // CPU_KERNELS_PACKED_GRADIENT_H_
