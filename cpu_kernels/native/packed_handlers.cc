// XLA's way into attention over packed rows and into its gradient: checked shapes and dtypes become one PackedCall.
#include <string>

#include "handlers.h"

namespace cpu_kernels {
namespace {

using Ints2 = ffi::BufferR2<ffi::S32>;
using Floats3 = ffi::BufferR3<ffi::F32>;
using Floats4 = ffi::BufferR4<ffi::F32>;

struct Places {
  Ints2 position, first, head;
};

// The call, which is empty of rows where nothing is to be done; or what is wrong.
std::string call_of(const ffi::AnyBuffer& q, const ffi::AnyBuffer& k, const ffi::AnyBuffer& v, const Places& places,
                    const ffi::AnyBuffer& sinks, int64_t window, PackedCall* call) {
  if (q.dimensions().size() != 4 || !is_float(q)) return "expected q [B, T, N, H] of float32 or bfloat16";
  if (k.dimensions().size() != 4 || !is_float(k)) return "expected keys [B, T, K, H] of float32 or bfloat16";
  const auto of_q = q.dimensions(), of_k = k.dimensions();
  const int64_t rows = of_q[0], tokens = of_q[1], heads = of_q[2], size = of_q[3], kv_heads = of_k[2];
  if (!has_shape(k, {rows, tokens, kv_heads, size}) || kv_heads == 0 || size == 0 || heads % kv_heads != 0)
    return "expected keys [B, T, K, H] with q's B, T and H, and K that divides N";
  if (!is_float(v) || !has_shape(v, {rows, tokens, kv_heads, size})) return "expected values like the keys";
  for (const Ints2* ints : {&places.position, &places.first, &places.head})
    if (!has_shape(*ints, {rows, tokens})) return "expected places [B, T]";
  if (!has_shape(sinks, {heads}) || !is_float(sinks)) return "expected sinks [N] of float32 or bfloat16";
  if (window < 0) return "expected a window of at least 1, or 0 for none";
  call->q = numbers(q), call->k = numbers(k), call->v = numbers(v), call->sinks = numbers(sinks);
  call->position = places.position.typed_data();
  call->first = places.first.typed_data();
  call->head = places.head.typed_data();
  call->rows = tokens == 0 || heads == 0 ? 0 : rows, call->tokens = tokens;
  call->heads = heads, call->kv_heads = kv_heads, call->head_size = size;
  call->window = window;
  return "";
}

template <typename Like, typename Buffer>
bool alike(const Like& like, Buffer& buffer) {
  const auto shape = like.dimensions();
  return has_shape(buffer, {shape[0], shape[1], shape[2], shape[3]});
}

ffi::Error attention(ffi::ThreadPool threads, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, Ints2 position,
                     Ints2 first, Ints2 head, ffi::AnyBuffer sinks, ffi::Result<Floats4> out, ffi::Result<Floats3> lse,
                     int64_t window) {
  PackedCall call = {};
  const std::string wrong = call_of(q, k, v, {position, first, head}, sinks, window, &call);
  if (!wrong.empty()) return invalid("packed_attention: " + wrong);
  const auto shape = q.dimensions();
  if (!alike(q, *out) || !has_shape(*lse, {shape[0], shape[1], shape[2]}))
    return invalid("packed_attention: expected results [B, T, N, H] and [B, T, N]");
  if (call.rows == 0) return ffi::Error::Success();
  return finished(kernels().packed_attention(pool_of(threads), call, {out->typed_data(), lse->typed_data()}));
}

ffi::Error gradient(ffi::ThreadPool threads, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, Ints2 position,
                    Ints2 first, Ints2 head, ffi::AnyBuffer sinks, Floats4 out, Floats3 lse, Floats4 d_out,
                    ffi::Result<Floats4> dq, ffi::Result<Floats4> dk, ffi::Result<Floats4> dv,
                    ffi::ResultBufferR1<ffi::F32> d_sinks, int64_t window) {
  PackedCall call = {};
  const std::string wrong = call_of(q, k, v, {position, first, head}, sinks, window, &call);
  if (!wrong.empty()) return invalid("packed_attention_gradient: " + wrong);
  const auto shape = q.dimensions();
  if (!alike(q, out) || !alike(q, d_out) || !has_shape(lse, {shape[0], shape[1], shape[2]}))
    return invalid("packed_attention_gradient: expected outputs [B, T, N, H], their gradients, and lse [B, T, N]");
  if (!alike(q, *dq) || !alike(k, *dk) || !alike(v, *dv) || !has_shape(*d_sinks, {shape[2]}))
    return invalid("packed_attention_gradient: expected results like q, k, v and the sinks");
  for (int64_t i = 0; call.rows == 0 && i < shape[2]; ++i) d_sinks->typed_data()[i] = 0;
  if (call.rows == 0) return ffi::Error::Success();
  const PackedGradient to = {out.typed_data(), lse.typed_data(), d_out.typed_data(),   dq->typed_data(),
                             dk->typed_data(), dv->typed_data(), d_sinks->typed_data()};
  return finished(kernels().packed_attention_gradient(pool_of(threads), call, to));
}

}  // namespace
}  // namespace cpu_kernels

XLA_FFI_DEFINE_HANDLER_SYMBOL(cpu_kernels_packed_attention, cpu_kernels::attention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<cpu_kernels::Ints2>()
                                  .Arg<cpu_kernels::Ints2>()
                                  .Arg<cpu_kernels::Ints2>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<cpu_kernels::Floats4>()
                                  .Ret<cpu_kernels::Floats3>()
                                  .Attr<int64_t>("window"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(cpu_kernels_packed_attention_gradient, cpu_kernels::gradient,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<cpu_kernels::Ints2>()
                                  .Arg<cpu_kernels::Ints2>()
                                  .Arg<cpu_kernels::Ints2>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<cpu_kernels::Floats4>()
                                  .Arg<cpu_kernels::Floats3>()
                                  .Arg<cpu_kernels::Floats4>()
                                  .Ret<cpu_kernels::Floats4>()
                                  .Ret<cpu_kernels::Floats4>()
                                  .Ret<cpu_kernels::Floats4>()
                                  .Ret<xla::ffi::BufferR1<xla::ffi::F32>>()
                                  .Attr<int64_t>("window"));
