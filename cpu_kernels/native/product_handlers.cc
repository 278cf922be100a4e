// XLA's way into the matrix products: each handler checks shapes and dtypes, and calls the kernel in use.
#include "handlers.h"

namespace cpu_kernels {
namespace {

using Bytes3 = ffi::BufferR3<ffi::U8>;
using Bytes4 = ffi::BufferR4<ffi::U8>;
using Bf16Matrix = ffi::BufferR2<ffi::BF16>;
using Result = ffi::ResultBufferR2<ffi::F32>;

Activations activations(const ffi::AnyBuffer& x) {
  return {x.untyped_data(), x.element_type() == ffi::BF16, x.dimensions()[0], x.dimensions()[1]};
}

ffi::Error linear(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w, Result y) {
  const bool is_int8 = w.element_type() == ffi::S8;
  if (x.dimensions().size() != 2 || !is_float(x)) return invalid("linear: expected x [T, I] of float32 or bfloat16");
  if (w.dimensions().size() != 2 || !(is_int8 || w.element_type() == ffi::BF16))
    return invalid("linear: expected w [O, I] of bfloat16 or int8");
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1], outputs = w.dimensions()[0];
  if (!has_shape(w, {outputs, inputs})) return invalid("linear: expected w [O, I]");
  if (!has_shape(*y, {rows, outputs})) return invalid("linear: expected a result [T, O]");
  return finished(kernels().linear(pool_of(threads), {activations(x), w.untyped_data(), is_int8, outputs, y->typed_data()}));
}

// An expert matrix from `inputs` to `outputs`; its codes are null where the shapes are of something else.
ExpertMatrix matrix(const Bytes4& codes, const Bytes3& scales, const Bf16Matrix& bias, int64_t outputs,
                    int64_t inputs) {
  const int64_t experts = codes.dimensions()[0], blocks = inputs / 32;
  const bool fits = inputs % 32 == 0 && has_shape(codes, {experts, outputs, blocks, 16}) &&
                    has_shape(scales, {experts, outputs, blocks}) && has_shape(bias, {experts, outputs});
  return {fits ? codes.typed_data() : nullptr, scales.typed_data(), bf16(bias), outputs, blocks};
}

ffi::Error expert_mlp(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::BufferR2<ffi::S32> ids,
                      ffi::BufferR2<ffi::F32> routing_weights, Bytes4 gate_up_blocks, Bytes3 gate_up_scales,
                      Bf16Matrix gate_up_bias, Bytes4 down_blocks, Bytes3 down_scales, Bf16Matrix down_bias, Result y,
                      float limit) {
  if (x.dimensions().size() != 2 || !is_float(x))
    return invalid("expert_mlp: expected x [T, D] of float32 or bfloat16");
  const int64_t rows = x.dimensions()[0], hidden = x.dimensions()[1], top_k = ids.dimensions()[1];
  const int64_t experts = gate_up_blocks.dimensions()[0], inner = down_blocks.dimensions()[2] * 32;
  if (!has_shape(ids, {rows, top_k}) || !has_shape(routing_weights, {rows, top_k}))
    return invalid("expert_mlp: expected expert_ids [T, X] and routing_weights [T, X]");
  if (!has_shape(*y, {rows, hidden})) return invalid("expert_mlp: expected a result [T, D]");
  const ExpertMatrix gate_up = matrix(gate_up_blocks, gate_up_scales, gate_up_bias, 2 * inner, hidden);
  const ExpertMatrix down = matrix(down_blocks, down_scales, down_bias, hidden, inner);
  if (!gate_up.codes || !down.codes || down_bias.dimensions()[0] != experts)
    return invalid(
        "expert_mlp: expected blocks [E, O, I / 32, 16], scales [E, O, I / 32] and bias [E, O]: D to 2 F, F to D");
  return finished(kernels().expert_mlp(
      pool_of(threads), {activations(x), ids.typed_data(), routing_weights.typed_data(), top_k, experts, gate_up, down,
                         limit, y->typed_data()}));
}

}  // namespace
}  // namespace cpu_kernels

XLA_FFI_DEFINE_HANDLER_SYMBOL(cpu_kernels_linear, cpu_kernels::linear,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::BufferR2<xla::ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(cpu_kernels_expert_mlp, cpu_kernels::expert_mlp,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::S32>>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Arg<xla::ffi::BufferR4<xla::ffi::U8>>()
                                  .Arg<xla::ffi::BufferR3<xla::ffi::U8>>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::BF16>>()
                                  .Arg<xla::ffi::BufferR4<xla::ffi::U8>>()
                                  .Arg<xla::ffi::BufferR3<xla::ffi::U8>>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::BF16>>()
                                  .Ret<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Attr<float>("limit"));
