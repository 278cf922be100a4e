// Calls the kernels on arrays of exactly their size, with pools of several sizes whose results must be equal.
//
// For sanitizers: it knows no XLA, so nothing but the kernels is under test.
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "kernels.h"

namespace {

using cpu_kernels::Pool;

// Threads that are started for one call and joined after it, late ones too.
struct Threads {
  std::vector<std::thread> started;

  ~Threads() {
    for (std::thread& thread : started) thread.join();
  }
  Pool pool(int64_t size) {
    return {this, size, [](void* threads, void (*run)(void*), void* task) {
              static_cast<Threads*>(threads)->started.emplace_back(run, task);
            }};
  }
};

std::mt19937 random_bits(0);

template <typename T>
std::vector<T> filled(int64_t size, uint32_t (*make)(uint32_t)) {
  std::vector<T> result(static_cast<size_t>(size));
  for (T& value : result) value = static_cast<T>(make(static_cast<uint32_t>(random_bits())));
  return result;
}

std::vector<uint16_t> bfloat16s(int64_t size) {  // of either sign, from 1 to 2
  return filled<uint16_t>(size, [](uint32_t bits) { return (bits & 0x807F) | 0x3F80; });
}
std::vector<uint8_t> bytes(int64_t size) {
  return filled<uint8_t>(size, [](uint32_t bits) { return bits & 0xFF; });
}
std::vector<uint8_t> scales(int64_t size) {
  return filled<uint8_t>(size, [](uint32_t bits) { return 115 + bits % 5; });
}

const cpu_kernels::Kernels& kernels = cpu_kernels::CPU_KERNELS_DRIVEN::kKernels;

// `run` with pools of several sizes, each into a result of its own: whether all have the same bits.
template <typename Run>
bool agree(int64_t size, Run run) {
  std::vector<float> first;
  for (int64_t helpers : {0, 1, 5}) {
    std::vector<float> y(static_cast<size_t>(size), -1);
    Threads threads;
    if (!run(threads.pool(helpers), y.data())) return false;
    if (first.empty()) first = y;
    if (size > 0 && std::memcmp(first.data(), y.data(), y.size() * sizeof(float)) != 0) return false;
  }
  return true;
}

bool linear(int64_t rows, int64_t outputs, int64_t inputs) {
  const auto x = bfloat16s(rows * inputs), w = bfloat16s(outputs * inputs);
  return agree(rows * outputs, [&](const Pool& pool, float* y) {
    return kernels.linear(pool, {{x.data(), true, rows, inputs}, w.data(), false, outputs, y});
  });
}

bool linear_int8(int64_t rows, int64_t outputs, int64_t inputs) {
  const auto x = bfloat16s(rows * inputs);
  const auto w = bytes(outputs * inputs);
  return agree(rows * outputs, [&](const Pool& pool, float* y) {
    return kernels.linear(pool, {{x.data(), true, rows, inputs}, w.data(), true, outputs, y});
  });
}

bool experts(bool is_bf16, int64_t rows, int64_t hidden, int64_t inner, int64_t experts, int64_t top_k) {
  const std::vector<float> wide_x(static_cast<size_t>(rows * hidden), 0.25f);
  const auto narrow_x = bfloat16s(rows * hidden);
  const void* x = is_bf16 ? static_cast<const void*>(narrow_x.data()) : wide_x.data();
  const std::vector<float> routing_weights(static_cast<size_t>(rows * top_k), 0.5f);
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < rows * top_k; ++i) ids.push_back(static_cast<int32_t>(random_bits() % (experts + 2)) - 1);
  const auto up = bytes(experts * inner * hidden), down = bytes(experts * hidden * inner / 2);
  const auto up_scales = scales(experts * 2 * inner * hidden / 32), down_scales = scales(experts * hidden * inner / 32);
  const auto up_bias = bfloat16s(experts * 2 * inner), down_bias = bfloat16s(experts * hidden);
  return agree(rows * hidden, [&](const Pool& pool, float* y) {
    return kernels.expert_mlp(pool, {{x, is_bf16, rows, hidden},
                                     ids.data(),
                                     routing_weights.data(),
                                     top_k,
                                     experts,
                                     {up.data(), up_scales.data(), up_bias.data(), 2 * inner, hidden / 32},
                                     {down.data(), down_scales.data(), down_bias.data(), hidden, inner / 32},
                                     7,
                                     y});
  });
}

struct Heads {
  int64_t heads, kv_heads, size;
};

// Attention of two sequences, the second of which ends in padding; over pages in order, or over a ring of `window`
// slots. Results lie one after the other, the log-sum-exp last.
bool attention(Heads heads, int64_t tokens, int32_t start, int64_t page, int64_t window) {
  const int64_t sequences = 2, pages = (start + tokens + page - 1) / page, token = heads.kv_heads * heads.size;
  const int64_t queries = sequences * tokens * heads.heads;
  std::vector<int32_t> positions, table, starts(sequences, start);
  for (int64_t i = 0; i < sequences * tokens; ++i)
    positions.push_back(i > tokens && i + 1 == sequences * tokens ? -1 : start + static_cast<int32_t>(i % tokens));
  for (int64_t i = 0; i < sequences * pages; ++i) table.push_back(static_cast<int32_t>(i));
  const auto q = bfloat16s(queries * heads.size), sinks = bfloat16s(heads.heads);
  const int64_t stored = (window ? sequences * window : sequences * pages * page) * token;
  const auto keys = bfloat16s(stored), values = bfloat16s(stored);
  const auto new_keys = bfloat16s(sequences * tokens * token), new_values = bfloat16s(sequences * tokens * token);
  return agree(queries * (heads.size + 1), [&](const Pool& pool, float* y) {
    cpu_kernels::AttentionCall call = {};
    call.q = {q.data(), true};
    call.sinks = {sinks.data(), true};
    call.positions = positions.data();
    call.out = y, call.lse = y + queries * heads.size;
    call.sequences = sequences, call.tokens = tokens;
    call.heads = heads.heads, call.kv_heads = heads.kv_heads, call.head_size = heads.size;
    call.bfloat16_keys = true;
    call.stored = {keys.data(), values.data()};
    call.slots = window ? window : page;
    if (window) {
      call.fresh = {new_keys.data(), new_values.data()};
      call.start = starts.data();
    } else {
      call.page_table = table.data();
      call.pages = sequences * pages, call.pages_per_sequence = pages;
    }
    return kernels.attention(pool, call);
  });
}

// Places of a row: a head of 3 tokens, parts of some tokens that continue it, one that does not, and padding.
struct PackedPlaces {
  std::vector<int32_t> position, first, head;

  PackedPlaces(int64_t rows, int64_t tokens, int32_t part) {
    for (int64_t i = 0; i < rows * tokens; ++i) {
      const int32_t token = static_cast<int32_t>(i % tokens), own = (token - 3) / part * part + 3;
      const bool in_head = token < 3, continues = own != 3, padding = token + 5 > tokens && token > 0;
      position.push_back(padding ? -1 : in_head ? token : token - own + (continues ? 3 : 0));
      first.push_back(padding || in_head ? 0 : own);
      head.push_back(padding || in_head || !continues ? 0 : 3);
    }
  }
};

// Attention over two packed rows, then its gradient: all results one after the other.
bool packed(Heads heads, int64_t tokens, int32_t part, int64_t window) {
  const int64_t rows = 2, queries = rows * tokens * heads.heads, keys = rows * tokens * heads.kv_heads * heads.size;
  const PackedPlaces places(rows, tokens, part);
  const auto q = bfloat16s(queries * heads.size), k = bfloat16s(keys), v = bfloat16s(keys);
  const auto sinks = bfloat16s(heads.heads);
  const std::vector<float> d_out(static_cast<size_t>(queries * heads.size), 0.25f);
  const int64_t out = queries * heads.size, size = 2 * out + queries + 2 * keys + heads.heads;
  return agree(size, [&](const Pool& pool, float* y) {
    cpu_kernels::PackedCall call = {};
    call.q = {q.data(), true}, call.k = {k.data(), true}, call.v = {v.data(), true};
    call.sinks = {sinks.data(), true};
    call.position = places.position.data(), call.first = places.first.data(), call.head = places.head.data();
    call.rows = rows, call.tokens = tokens, call.window = window;
    call.heads = heads.heads, call.kv_heads = heads.kv_heads, call.head_size = heads.size;
    float *lse = y + out, *dq = lse + queries, *dk = dq + out, *dv = dk + keys;
    return kernels.packed_attention(pool, call, {y, lse}) &&
           kernels.packed_attention_gradient(pool, call, {y, lse, d_out.data(), dq, dk, dv, dv + keys});
  });
}

// One look at logits, then top-k and top-p: what is left, as scores, and the look's own results.
bool sampling(int64_t rows, int64_t vocab, int32_t top_k) {
  const int64_t spans = (vocab + cpu_kernels::kSpanIds - 1) / cpu_kernels::kSpanIds, most = vocab < 100 ? vocab : 100;
  std::vector<float> logits(static_cast<size_t>(rows * vocab));
  for (float& logit : logits) logit = static_cast<float>(random_bits() % 1000) / 100;
  const std::vector<float> bias(logits.size(), 0.5f), penalty(static_cast<size_t>(rows), 1.25f);
  const std::vector<uint32_t> allowed(static_cast<size_t>(rows * ((vocab + 31) / 32)), 0xFFFFFFF7u);
  const auto prompted = std::unique_ptr<bool[]>(new bool[logits.size()]());
  const auto drawn = filled<int32_t>(rows * vocab, [](uint32_t bits) { return bits % 3; });
  const std::vector<int32_t> asked(static_cast<size_t>(rows), top_k);
  const std::vector<float> top_p(static_cast<size_t>(rows), 0.5f), weights(static_cast<size_t>(rows * most), 1);
  return agree(rows * (vocab + spans + 2 + 2 * most), [&](const Pool& pool, float* y) {
    float *span = y + rows * vocab, *largest = span + rows * spans, *total = largest + rows;
    float *tempered = total + rows, *left = tempered + rows * most;
    std::vector<int32_t> likeliest(static_cast<size_t>(rows)), counts(likeliest), ids(weights.size());
    const auto finite = std::unique_ptr<bool[]>(new bool[likeliest.size()]);
    cpu_kernels::SurveyCall call = {};
    call.logits = logits.data(), call.bias = bias.data(), call.allowed = allowed.data();
    call.prompted = prompted.get(), call.drawn = drawn.data();
    call.repetition = call.frequency = call.presence = penalty.data();
    call.rows = rows, call.vocab = vocab, call.num_ids = vocab;
    call.scores = y, call.largest_of_spans = span, call.likeliest = likeliest.data();
    call.largest_logit = largest, call.total = total, call.finite = finite.get();
    return kernels.survey(pool, call) &&
           kernels.likeliest(pool, {y, span, penalty.data(), asked.data(), rows, vocab, most, ids.data(), tempered,
                                    counts.data()}) &&
           kernels.nucleus(pool, {ids.data(), counts.data(), tempered, weights.data(), top_p.data(), rows, vocab, most,
                                  left});
  });
}

}  // namespace

int main() {
  bool same = true;
  for (int64_t rows : {0, 1, 2, 4, 5, 11})
    for (int64_t inputs : {1, 31, 32, 33, 95}) same = same && linear(rows, 37, inputs) && linear_int8(rows, 37, inputs);
  same = same && linear(6, 700, 200);  // enough that helpers are worth waking
  same = same && linear(13, 37, 1700) && linear_int8(13, 37, 1700);  // deep enough that sums wait in memory
  for (bool is_bf16 : {false, true})
    for (int64_t rows : {1, 9, 140}) same = same && experts(is_bf16, rows, 64, 96, 3, 2);
  same = same && experts(true, 41, 18 * 32, 64, 1, 1);  // tokens by themselves and side by side, two groups of blocks
  for (int64_t vocab : {1, 50, 64, 4097, 10000})
    for (int32_t top_k : {0, 1, 40, 5000}) same = same && sampling(3, vocab, top_k);
  for (Heads heads : {Heads{4, 2, 32}, Heads{3, 1, 33}, Heads{65, 1, 16}})
    for (int64_t tokens : {1, 20})
      for (int32_t start : {0, 70, 1100})
        for (int64_t window : {0, 12, 64}) same = same && attention(heads, tokens, start, 24, window);
  for (int64_t window : {0, 40}) {
    for (Heads heads : {Heads{4, 2, 32}, Heads{65, 1, 16}})
      for (int64_t tokens : {1, 67}) same = same && packed(heads, tokens, 20, window);
    same = same && packed({3, 1, 33}, 270, 150, window);  // two spans of keys
  }
  std::puts(same ? "same bits" : "different bits");
}
