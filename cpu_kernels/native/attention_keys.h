// Where attention's keys and values lie, who sees which of them, and how a block of them enters a product.
#ifndef CPU_KERNELS_ATTENTION_KEYS_H_
#define CPU_KERNELS_ATTENTION_KEYS_H_

#include "attention_call.h"
#include "attention_tiles.h"
#include "tiles.h"
#include "vec.h"

namespace cpu_kernels::CPU_KERNELS_ISA {
namespace attending {

// ---- who sees what ----

// Query tokens [first, end) of a sequence under some neighbouring key/value heads: they read each key once, for all
// query heads of its group, and a token's keys in the order in which they lie.
struct Queries {
  int64_t sequence, kv_head, kv_heads, first, end;
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

// ---- where keys lie ----

// Where each key of a block and its value lie: those of the first head, the others' follow.
struct Block {
  const char* rows[2 * kBlockKeys];

  const char** keys() { return rows; }
  const char** values() { return rows + kBlockKeys; }
  const char* const* keys() const { return rows; }
  const char* const* values() const { return rows + kBlockKeys; }
};

// Beside a vector of keys that are turned, and a row of logits that are weighed.
constexpr int kFetchesBeside = 2;

// Fetches a share of a block's rows into the cache while another block is computed with. Some lines at a time, as evenly
// as the work allows: a processor has only so many loads under way, and what is asked for at once queues, or is dropped.
// It goes into every cache, though a block is larger than the first: requests for the second alone are dropped sooner.
struct Ahead {
  const char* const* row;
  const char* const* end;
  int64_t row_bytes, lines;  // of a row, and at a time
  int64_t byte = 0;

  // Share `part` of `parts`, in `steps` calls of `fetch_some`.
  Ahead(const Block& block, int64_t row_bytes, int64_t part, int64_t parts, int64_t steps)
      : row(block.rows + 2 * kBlockKeys * part / parts), end(block.rows + 2 * kBlockKeys * (part + 1) / parts),
        row_bytes(row_bytes), lines(((end - row) * ((row_bytes + 63) / 64) + steps - 1) / steps) {}

  void fetch_some() {
    for (int64_t i = 0; i < lines && row != end; ++i) {
      __builtin_prefetch(*row + byte, 0, 3);
      if ((byte += 64) < row_bytes) continue;
      byte = 0;
      ++row;
    }
  }
};

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
    for (; i < end; ++i) block->keys()[i] = block->values()[i] = reinterpret_cast<const char*>(zeros);
  };
  const int64_t end = most(0, least(kBlockKeys, seen.end - first));
  blank(least(kBlockKeys, most(0, seen.first - first)));
  while (i < end) {
    const Tokens run = run_from(call, queries.sequence, first + i, end - i);
    const char* key = static_cast<const char*>(run.in->keys) + run.first * token_bytes + head;
    const char* value = static_cast<const char*>(run.in->values) + run.first * token_bytes + head;
    for (int64_t stop = i + run.count; i < stop; ++i, key += token_bytes, value += token_bytes)
      block->keys()[i] = key, block->values()[i] = value;
  }
  blank(kBlockKeys);
}

// A head's keys with lanes for keys: words of four bytes as they lie, [words of a key, 64]. Whole cache lines only.
inline void transpose_keys(const Block& block, int64_t head, int64_t head_bytes, float* tile, Ahead& ahead) {
  for (int key = 0; key < kBlockKeys; key += kLanes)
    for (int64_t byte = 0; byte < head_bytes; byte += 64) {
      for (int i = 0; i < kFetchesBeside; ++i) ahead.fetch_some();
      transpose(block.keys() + key, head * head_bytes + byte, tile + byte / 4 * kBlockKeys + key, kBlockKeys);
    }
}

// Elements of a head of a key or value.
template <typename Element>
inline const Element* of_head(const char* row, int64_t head, int64_t size) {
  return reinterpret_cast<const Element*>(row) + head * size;
}

// The same for keys of any size, as float32s: [H, 64].
template <typename Element>
inline void widen_keys(const Block& block, int64_t head, int64_t size, float* tile) {
  for (int64_t i = 0; i < size; ++i)
    for (int key = 0; key < kBlockKeys; ++key) *tile++ = widen(of_head<Element>(block.keys()[key], head, size)[i]);
}

// Values as [64, H], padded with zeros to whole vectors.
template <typename Element>
inline void widen_values(const Block& block, int64_t head, int64_t size, float* tile) {
  for (int key = 0; key < kBlockKeys; ++key) {
    const Element* value = of_head<Element>(block.values()[key], head, size);
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(tile + i, load_wide(value + i));
    for (; i < padded(size); ++i) tile[i] = i < size ? widen(value[i]) : 0;
    tile += padded(size);
  }
}

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

// A head's part of rows, wherever they lie.
template <typename Element>
struct Scattered {
  const char* const* rows;
  int64_t head, columns;

  Vec row(int64_t k, int64_t column) const { return load_wide(of_head<Element>(rows[k], head, columns) + column); }
  void two_rows(int64_t k, int64_t column, Vec& first, Vec& second) const {
    first = row(k, column);
    second = row(k + 1, column);
  }
};

}  // namespace attending
}  // namespace cpu_kernels::CPU_KERNELS_ISA

#endif  // CPU_KERNELS_ATTENTION_KEYS_H_
