// XLA's way into experts with dense weights and their gradient: checked shapes become one call of the kernel in use.
#include "handlers.h"

namespace cpu_kernels {
namespace {

using Ints = ffi::BufferR2<ffi::S32>;
using Floats2 = ffi::BufferR2<ffi::F32>;
using Floats3 = ffi::BufferR3<ffi::F32>;
using Result2 = ffi::ResultBufferR2<ffi::F32>;
using Result3 = ffi::ResultBufferR3<ffi::F32>;

struct Arguments {
  const Floats2& x;
  const Ints& ids;
  const Floats2& routing;
  const Floats3& gate_up;
  const Floats2& gate_up_bias;
  const Floats3& down;
  const Floats2& down_bias;
};

// Whether the arguments fit together; `call` then says what they are.
bool fit(const Arguments& of, float limit, DenseExperts* call) {
  const int64_t tokens = of.x.dimensions()[0], hidden = of.x.dimensions()[1], top_k = of.ids.dimensions()[1];
  const int64_t experts = of.down.dimensions()[0], inner = of.down.dimensions()[2];
  *call = {of.x.typed_data(),       of.ids.typed_data(),          of.routing.typed_data(),
           of.gate_up.typed_data(), of.gate_up_bias.typed_data(), of.down.typed_data(),
           of.down_bias.typed_data(), limit, tokens, top_k, experts, hidden, inner};
  return has_shape(of.ids, {tokens, top_k}) && has_shape(of.routing, {tokens, top_k}) &&
         has_shape(of.gate_up, {experts, 2 * inner, hidden}) && has_shape(of.gate_up_bias, {experts, 2 * inner}) &&
         has_shape(of.down, {experts, hidden, inner}) && has_shape(of.down_bias, {experts, hidden}) && hidden > 0 &&
         inner > 0;
}

ffi::Error misfit() {
  return invalid(
      "dense_experts: expected x [T, D], expert_ids and routing_weights [T, X], gate_up [E, 2 F, D], down [E, D, F] "
      "and their biases, D and F at least 1");
}

ffi::Error forward(ffi::ThreadPool threads, Floats2 x, Ints ids, Floats2 routing, Floats3 gate_up, Floats2 gate_up_bias,
                   Floats3 down, Floats2 down_bias, Result2 y, float limit) {
  DenseExperts call;
  if (!fit({x, ids, routing, gate_up, gate_up_bias, down, down_bias}, limit, &call)) return misfit();
  if (!has_shape(*y, {call.tokens, call.hidden})) return invalid("dense_experts: expected a result [T, D]");
  return finished(kernels().dense_experts(pool_of(threads), call, y->typed_data()));
}

template <typename Result, typename Argument>
bool is_like(Result& result, const Argument& argument) {
  const auto a = result->dimensions(), b = argument.dimensions();
  for (size_t i = 0; i < b.size(); ++i)
    if (a[i] != b[i]) return false;
  return true;
}

ffi::Error backward(ffi::ThreadPool threads, Floats2 x, Ints ids, Floats2 routing, Floats3 gate_up,
                    Floats2 gate_up_bias, Floats3 down, Floats2 down_bias, Floats2 by_y, Result2 by_x,
                    Result2 by_routing, Result3 by_gate_up, Result2 by_gate_up_bias, Result3 by_down,
                    Result2 by_down_bias, float limit) {
  DenseExperts call;
  if (!fit({x, ids, routing, gate_up, gate_up_bias, down, down_bias}, limit, &call)) return misfit();
  if (!has_shape(by_y, {call.tokens, call.hidden}) || !is_like(by_x, x) || !is_like(by_routing, routing) ||
      !is_like(by_gate_up, gate_up) || !is_like(by_gate_up_bias, gate_up_bias) || !is_like(by_down, down) ||
      !is_like(by_down_bias, down_bias))
    return invalid("dense_experts_gradient: expected y's gradient [T, D], and results like the arguments");
  const DenseExpertsGradient gradient = {by_y.typed_data(),
                                         by_x->typed_data(),
                                         by_routing->typed_data(),
                                         by_gate_up->typed_data(),
                                         by_gate_up_bias->typed_data(),
                                         by_down->typed_data(),
                                         by_down_bias->typed_data()};
  return finished(kernels().dense_experts_gradient(pool_of(threads), call, gradient));
}

}  // namespace
}  // namespace cpu_kernels

XLA_FFI_DEFINE_HANDLER_SYMBOL(cpu_kernels_dense_experts, cpu_kernels::forward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<cpu_kernels::Floats2>()
                                  .Arg<cpu_kernels::Ints>()
                                  .Arg<cpu_kernels::Floats2>()
                                  .Arg<cpu_kernels::Floats3>()
                                  .Arg<cpu_kernels::Floats2>()
                                  .Arg<cpu_kernels::Floats3>()
                                  .Arg<cpu_kernels::Floats2>()
                                  .Ret<cpu_kernels::Floats2>()
                                  .Attr<float>("limit"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(cpu_kernels_dense_experts_gradient, cpu_kernels::backward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<cpu_kernels::Floats2>()
                                  .Arg<cpu_kernels::Ints>()
                                  .Arg<cpu_kernels::Floats2>()
                                  .Arg<cpu_kernels::Floats3>()
                                  .Arg<cpu_kernels::Floats2>()
                                  .Arg<cpu_kernels::Floats3>()
                                  .Arg<cpu_kernels::Floats2>()
                                  .Arg<cpu_kernels::Floats2>()
                                  .Ret<cpu_kernels::Floats2>()
                                  .Ret<cpu_kernels::Floats2>()
                                  .Ret<cpu_kernels::Floats3>()
                                  .Ret<cpu_kernels::Floats2>()
                                  .Ret<cpu_kernels::Floats3>()
                                  .Ret<cpu_kernels::Floats2>()
                                  .Attr<float>("limit"));
