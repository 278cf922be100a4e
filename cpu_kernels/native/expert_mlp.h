// The top_k experts' MLPs from packed MXFP4: assignments sorted by expert, so that each expert's weights are read once.
//
// Sorted assignments go in batches whose inner activations fit into cache. Of each batch first every panel of gate_up
// of every expert is a task (products, bias, SwiGLU), then every panel of down: it adds to y, expert after expert, what
// they make of their tokens. So a token's sum runs over its assignments in the order of their experts, whatever other
// tokens there are.
//
// Float32 activations are multiplied as they are, here; bfloat16 ones as whole numbers, in expert_int16.h.
#ifndef CPU_KERNELS_EXPERT_MLP_H_
#define CPU_KERNELS_EXPERT_MLP_H_

#include "expert_int16.h"
#include "expert_runs.h"
#include "product.h"

namespace cpu_kernels::CPU_KERNELS_ISA {

// Rows whose products wait for their epilogue at a time.
constexpr int64_t kChunkRows = kUnpacksOnce ? kBatchAssignments : 8 * Floats::kTileRows;

static_assert(kPanelRows == 2 * kLanes && kBlock == 2 * kLanes);

inline Mxfp4Weights of_expert(const ExpertMatrix& m, int64_t expert) {
  const int64_t first = expert * m.rows * m.blocks;
  return {m.codes + first * (kBlock / 2), m.scales + first, m.blocks};
}

// Runs first to last of the sorted assignments: their inner activations, then what these add to y.
class Batch {
 public:
  Batch(const ExpertCall& call, const SortedAssignments& sorted, const float* const* x, float* const* inner,
        float* rooms)
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
    const int64_t first = panel * kPanelRows;
    float products[kChunkRows * kPanelRows];
    const float* rows[kChunkRows];
    for (int64_t at = run.begin; at < run.end; at += kChunkRows) {
      const int64_t count = run.end - at < kChunkRows ? run.end - at : kChunkRows;
      for (int64_t i = 0; i < count; ++i) rows[i] = x_[sorted_.assignment(at + i) / call_.top_k];
      multiply(w, first, kPanelRows, rows, count, products, kPanelRows, room);
      for (int64_t i = 0; i < count; ++i)
        lay_out(activate(call_, run.expert, first, products + i * kPanelRows), panel * kLanes,
                inner_[at + i - batch_begin]);
    }
  }

  void down_panel(const Run& run, int64_t batch_begin, int64_t panel, float* room) const {
    const Mxfp4Weights w = of_expert(call_.down, run.expert);
    const int64_t first = panel * kPanelRows;
    Vec biases[2];
    down_biases(call_, run.expert, first, biases);
    float products[kChunkRows * kPanelRows];
    for (int64_t at = run.begin; at < run.end; at += kChunkRows) {
      const int64_t count = run.end - at < kChunkRows ? run.end - at : kChunkRows;
      multiply(w, first, kPanelRows, inner_ + at - batch_begin, count, products, kPanelRows, room);
      for (int64_t i = 0; i < count; ++i)
        add_to_token(call_, sorted_.assignment(at + i), first, products + i * kPanelRows, biases);
    }
  }

  const ExpertCall& call_;
  const SortedAssignments& sorted_;
  const float* const* x_;  // by token
  float* const* inner_;    // by assignment of the batch
  float* rooms_;           // by worker
};

inline bool expert_mlp_float32(const Pool& pool, const ExpertCall& call, const SortedAssignments& sorted) {
  const Rows<float> x(pool, call.x);
  const int64_t inner_rows = sorted.size() < kBatchAssignments ? sorted.size() : kBatchAssignments;
  const Rows<float> inner(inner_rows, call.down.blocks * kBlock);
  const Scratch rooms((pool.size + 1) * Batch::room(call) * int64_t(sizeof(float)));
  if (!x.ok() || !inner.ok() || !rooms.data()) return false;
  Batch batch(call, sorted, x.all(), inner.all(), rooms.floats());
  run_batches(pool, sorted, batch);
  return true;
}

inline bool expert_mlp(const Pool& pool, const ExpertCall& call) {
  memset(call.y, 0, sizeof(float) * size_t(call.x.rows * call.down.rows));
  const SortedAssignments sorted(call);
  if (!sorted.ok()) return false;
  return call.x.is_bf16 ? expert_mlp_int16(pool, call, sorted) : expert_mlp_float32(pool, call, sorted);
}

}  // namespace cpu_kernels::CPU_KERNELS_ISA

#endif  // CPU_KERNELS_EXPERT_MLP_H_
