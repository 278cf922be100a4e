// All kernels of one instruction set: setup.py compiles this file once for each.
#include "kernels.h"

#include "attention.h"
#include "dense_experts.h"
#include "dense_experts_gradient.h"
#include "expert_mlp.h"
#include "linear.h"
#include "packed_attention.h"
#include "packed_gradient.h"
#include "sampling.h"

#define CPU_KERNELS_STRING(name) CPU_KERNELS_STRING_OF(name)
#define CPU_KERNELS_STRING_OF(name) #name

namespace cpu_kernels::CPU_KERNELS_ISA {

extern const Kernels kKernels;
const Kernels kKernels = {CPU_KERNELS_STRING(CPU_KERNELS_ISA),
                          linear,
                          expert_mlp,
                          attention,
                          packed_attention,
                          packed_attention_gradient,
                          dense_experts,
                          dense_experts_gradient,
                          survey,
                          likeliest,
                          nucleus};

}  // namespace cpu_kernels::CPU_KERNELS_ISA
