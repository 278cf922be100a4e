// The experts' MLPs of bfloat16 activations: products in whole numbers, of few rows or of many (product_int16.h).
//
// Of each expert's tokens those that fill vectors lie transposed, and the last few by themselves. Which of the two a
// token is depends on its neighbours; its bits do not. A task of gate_up takes 64 rows, which make one block of inner
// activations, so that it can give that block its power of two.
#ifndef CPU_KERNELS_EXPERT_INT16_H_
#define CPU_KERNELS_EXPERT_INT16_H_

#include "expert_runs.h"
#include "product_tokens.h"

namespace cpu_kernels::CPU_KERNELS_ISA {

constexpr int64_t kGateUpRows = 2 * kBlockInputs, kDownRows = kBlockInputs;
constexpr int64_t kFewAtATime = 16;  // rows by themselves whose products wait for their epilogue

static_assert(kGateUpRows <= kMostPanelRows && kBlockInputs == 2 * kLanes);

inline PackedRows packed_rows(const ExpertMatrix& m, int64_t expert) {
  const int64_t first = expert * m.rows * m.blocks;
  return {m.codes + first * kCodeBytes, m.scales + first, m.blocks};
}

// Some rows of bfloat16 activations, each a few groups; zeros after the last block.
class GroupRows {
 public:
  GroupRows(int64_t rows, int64_t blocks)
      : blocks_(blocks), groups_(groups_of(blocks)), memory_(rows * groups_ * int64_t(sizeof(Group))) {
    if (ok() && blocks % kGroupBlocks)
      for (int64_t row = 1; row <= rows; ++row) memset(at(row) - 1, 0, sizeof(Group));
  }

  // All of x.
  GroupRows(const Pool& pool, const Activations& x) : GroupRows(x.rows, x.columns / kBlockInputs) {
    if (!ok()) return;
    auto row = [&](int64_t i, int64_t) {
      quantise_row(static_cast<const uint16_t*>(x.data) + i * x.columns, blocks_, at(i));
    };
    parallel_for(pool.for_work(x.rows * x.columns), x.rows, row);
  }

  bool ok() const { return memory_.data(); }
  Group* at(int64_t row) const { return static_cast<Group*>(memory_.data()) + row * groups_; }

 private:
  int64_t blocks_, groups_;
  Scratch memory_;
};

// A run's assignments from `begin` on that make vectors, of which `vector` is the first; those from `few` on do not.
struct Share {
  Run run;
  int64_t vector, vectors, few;
};

// What batches of a call write and read beside its arguments.
class Int16Memory {
 public:
  Int16Memory(const Pool& pool, const ExpertCall& call, int64_t assignments)
      : x(pool, call.x),
        inner(assignments, call.down.blocks),
        x_vectors(most_vectors(assignments), call.gate_up.blocks),
        inner_vectors(most_vectors(assignments), call.down.blocks),
        rooms_((pool.size + 1) * room_bytes(call)),
        room_bytes_(room_bytes(call)) {}

  bool ok() const { return x.ok() && inner.ok() && x_vectors.ok() && inner_vectors.ok() && rooms_.data(); }
  void* room(int64_t worker) const { return static_cast<char*>(rooms_.data()) + worker * room_bytes_; }

  GroupRows x, inner;  // by token; by assignment of the batch
  TokenRows x_vectors, inner_vectors;

 private:
  static int64_t room_bytes(const ExpertCall& call) {
    return vectors_room(call.gate_up.blocks > call.down.blocks ? call.gate_up.blocks : call.down.blocks);
  }

  Scratch rooms_;
  int64_t room_bytes_;
};

// Runs first to last of the sorted assignments: their inner activations, then what these add to y.
class Int16Batch {
 public:
  Int16Batch(const ExpertCall& call, const SortedAssignments& sorted, const Int16Memory& memory)
      : call_(call), sorted_(sorted), memory_(memory) {}

  void run(const Pool& pool, int64_t first, int64_t last) {
    begin_ = sorted_.run(first).begin;
    const int64_t vectors = share(first, last), panels = call_.gate_up.rows / kGateUpRows;
    const int64_t assignments = sorted_.run(last - 1).end - begin_;
    const int64_t products = assignments * call_.gate_up.rows * call_.down.rows;
    auto gather = [&](int64_t vector, int64_t) { gather_vector(vector); };
    parallel_for(pool.for_work(vectors * kTokens * call_.x.columns), vectors, gather);
    auto gate_up = [&](int64_t task, int64_t worker) {
      gate_up_panel(shares_[task / panels], task % panels, memory_.room(worker));
    };
    parallel_for(pool.for_work(products), (last - first) * panels, gate_up);
    auto down = [&](int64_t panel, int64_t worker) {
      for (int64_t i = 0; i < last - first; ++i) {
        const bool is_last = i + 1 == last - first;
        const PackedRows next = packed_rows(call_.down, shares_[is_last ? 0 : i + 1].run.expert);
        down_panel(shares_[i], panel, next.codes_of((panel + is_last) * kDownRows), memory_.room(worker));
      }
    };
    parallel_for(pool.for_work(products / 2), call_.down.rows / kDownRows, down);
  }

 private:
  // Shares out the runs; gives how many vectors they make.
  int64_t share(int64_t first, int64_t last) {
    int64_t vectors = 0;
    for (int64_t i = first; i < last; ++i) {
      const Run& run = sorted_.run(i);
      const int64_t count = run.end - run.begin, here = vectors_of(count);
      shares_[i - first] = {run, vectors, here, run.begin + (here * kTokens < count ? here * kTokens : count)};
      for (int64_t v = 0; v < here; ++v) vector_begins_[vectors + v] = run.begin + v * kTokens;
      for (int64_t v = 0; v < here; ++v) vector_ends_[vectors + v] = shares_[i - first].few;
      vectors += here;
    }
    return vectors;
  }

  // The activations of a vector's tokens; zeros where it has fewer.
  void gather_vector(int64_t vector) const {
    const int64_t begin = vector_begins_[vector], rows = vector_ends_[vector] - begin;
    if (rows < kTokens) memory_.x_vectors.clear(vector), memory_.inner_vectors.clear(vector);
    for (int64_t i = 0; i < rows && i < kTokens; ++i)
      put_row(memory_.x.at(sorted_.assignment(begin + i) / call_.top_k), call_.gate_up.blocks, int(i),
              memory_.x_vectors.at(vector));
  }

  // The inner activations that an expert's products with 64 rows of gate_up make, as the words of a block.
  float activate_block(int64_t expert, int64_t panel, const float* products,
                       int16_t (&words)[kParts][kPartWords]) const {
    float values[kBlockInputs];
    for (int i = 0; i < kBlockInputs; i += kLanes)
      store(values + i, round_bf16(activate(call_, expert, panel * kGateUpRows + 2 * i, products + 2 * i)));
    return quantise(values, words);
  }

  void gate_up_panel(const Share& share, int64_t panel, void* room) const {
    const PackedRows w = packed_rows(call_.gate_up, share.run.expert);
    int16_t words[kParts][kPartWords];
    const auto to_vector = [&](int64_t token, const float* products) {
      const float scale = activate_block(share.run.expert, panel, products, words);
      put_block(words, scale, panel, int(token % kTokens), memory_.inner_vectors.at(share.vector + token / kTokens));
    };
    const uint8_t* next = w.codes_of((panel + 1) * kGateUpRows);
    multiply_vectors(w, panel * kGateUpRows, kGateUpRows, next, memory_.x_vectors.at(share.vector), share.vectors,
                     share.few - share.run.begin, room, to_vector);
    float products[kFewAtATime * kGateUpRows];
    const Group* rows[kFewAtATime];
    for (int64_t at = share.few; at < share.run.end; at += kFewAtATime) {
      const int64_t count = share.run.end - at < kFewAtATime ? share.run.end - at : kFewAtATime;
      for (int64_t i = 0; i < count; ++i) rows[i] = memory_.x.at(sorted_.assignment(at + i) / call_.top_k);
      multiply_few_rows(w, panel * kGateUpRows, kGateUpRows, next, rows, count, products, kGateUpRows);
      for (int64_t i = 0; i < count; ++i) {
        const float scale = activate_block(share.run.expert, panel, products + i * kGateUpRows, words);
        put_block(words, scale, panel, memory_.inner.at(at + i - begin_));
      }
    }
  }

  void down_panel(const Share& share, int64_t panel, const uint8_t* next, void* room) const {
    const PackedRows w = packed_rows(call_.down, share.run.expert);
    const int64_t first = panel * kDownRows;
    Vec biases[2];
    down_biases(call_, share.run.expert, first, biases);
    const auto to_token = [&](int64_t token, const float* products) {
      add_to_token(call_, sorted_.assignment(share.run.begin + token), first, products, biases);
    };
    multiply_vectors(w, first, kDownRows, next, memory_.inner_vectors.at(share.vector), share.vectors,
                     share.few - share.run.begin, room, to_token);
    float products[kFewAtATime * kDownRows];
    const Group* rows[kFewAtATime];
    for (int64_t at = share.few; at < share.run.end; at += kFewAtATime) {
      const int64_t count = share.run.end - at < kFewAtATime ? share.run.end - at : kFewAtATime;
      for (int64_t i = 0; i < count; ++i) rows[i] = memory_.inner.at(at + i - begin_);
      multiply_few_rows(w, first, kDownRows, next, rows, count, products, kDownRows);
      for (int64_t i = 0; i < count; ++i)
        to_token(at + i - share.run.begin, products + i * kDownRows);
    }
  }

  const ExpertCall& call_;
  const SortedAssignments& sorted_;
  const Int16Memory& memory_;
  int64_t begin_ = 0;  // of the batch
  Share shares_[kBatchAssignments];
  int64_t vector_begins_[kBatchAssignments], vector_ends_[kBatchAssignments];  // assignments of each vector
};

inline bool expert_mlp_int16(const Pool& pool, const ExpertCall& call, const SortedAssignments& sorted) {
  const Int16Memory memory(pool, call, sorted.size() < kBatchAssignments ? sorted.size() : kBatchAssignments);
  if (!memory.ok()) return false;
  Int16Batch batch(call, sorted, memory);
  run_batches(pool, sorted, batch);
  return true;
}

}  // namespace cpu_kernels::CPU_KERNELS_ISA

#endif  // CPU_KERNELS_EXPERT_INT16_H_
