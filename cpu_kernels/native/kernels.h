// What the kernels of every instruction set look like to XLA's handlers: plain arguments, one table of functions each.
#ifndef CPU_KERNELS_KERNELS_H_
#define CPU_KERNELS_KERNELS_H_

#include <stdint.h>

#include "attention_call.h"
#include "dense_experts_call.h"
#include "packed_call.h"
#include "parallel.h"
#include "sampling_call.h"

namespace cpu_kernels {

// Activations [rows, columns], float32 or bfloat16, row-major.
struct Activations {
  const void* data;
  bool is_bf16;
  int64_t rows, columns;
};

// y [rows, outputs] = x w^T, w [outputs, columns] bfloat16 or signed bytes.
struct LinearCall {
  Activations x;
  const void* w;
  bool is_int8;
  int64_t outputs;
  float* y;
};

// One matrix and bias per expert: codes [E, rows, blocks, 16] and scales [E, rows, blocks] MXFP4, bias [E, rows]
// bfloat16.
struct ExpertMatrix {
  const uint8_t *codes, *scales;
  const uint16_t* bias;
  int64_t rows, blocks;
};

// y [T, D] = the sum over a token's assignments [T, top_k] of routing_weight * (down(swiglu(gate_up(x))) + bias).
struct ExpertCall {
  Activations x;
  const int32_t* ids;  // those outside [0, experts) are skipped
  const float* routing_weights;
  int64_t top_k, experts;
  ExpertMatrix gate_up, down;  // rows of gate_up: even ones are the gate, odd ones the linear part
  float limit;
  float* y;
};

// One instruction set's kernels. Each gives false where memory for scratch is lacking.
struct Kernels {
  const char* name;
  bool (*linear)(const Pool&, const LinearCall&);
  bool (*expert_mlp)(const Pool&, const ExpertCall&);
  bool (*attention)(const Pool&, const AttentionCall&);
  bool (*packed_attention)(const Pool&, const PackedCall&, const PackedResult&);
  bool (*packed_attention_gradient)(const Pool&, const PackedCall&, const PackedGradient&);
  bool (*dense_experts)(const Pool&, const DenseExperts&, float* y);
  bool (*dense_experts_gradient)(const Pool&, const DenseExperts&, const DenseExpertsGradient&);
  bool (*survey)(const Pool&, const SurveyCall&);
  bool (*likeliest)(const Pool&, const LikeliestCall&);
  bool (*nucleus)(const Pool&, const NucleusCall&);
};

// Compiled in by setup.py, those of the machine's family that the compiler knows; dispatch.cc says which of them run.
#define CPU_KERNELS_OF(isa)       \
  namespace isa {                 \
  extern const Kernels kKernels;  \
  bool is_supported();            \
  }
CPU_KERNELS_OF(avx512bf16)
CPU_KERNELS_OF(avx512vnni)
CPU_KERNELS_OF(avx512)
CPU_KERNELS_OF(avxvnni)
CPU_KERNELS_OF(avx2)
CPU_KERNELS_OF(neon)
CPU_KERNELS_OF(portable)
#undef CPU_KERNELS_OF

// The kernels in use: the best that this machine can run, or what `cpu_kernels_select` asked for.
const Kernels& kernels();

}  // namespace cpu_kernels

#endif  // CPU_KERNELS_KERNELS_H_
