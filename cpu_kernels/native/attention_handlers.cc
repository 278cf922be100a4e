// XLA's way into attention, over pages and over a sliding window: checked shapes and dtypes become one AttentionCall.
#include <string>

#include "handlers.h"

namespace cpu_kernels {
namespace {

using Ints1 = ffi::BufferR1<ffi::S32>;
using Ints2 = ffi::BufferR2<ffi::S32>;
using Out = ffi::ResultBufferR4<ffi::F32>;
using Lse = ffi::ResultBufferR3<ffi::F32>;

ffi::Error run(ffi::ThreadPool& threads, const AttentionCall& call) {
  if (call.sequences == 0 || call.tokens == 0 || call.heads == 0) return ffi::Error::Success();
  return finished(kernels().attention(pool_of(threads), call));
}

KeysAndValues keys_and_values(const ffi::AnyBuffer& keys, const ffi::AnyBuffer& values) {
  return {keys.untyped_data(), values.untyped_data()};
}

// What both forms have in common; empty, or what is wrong.
std::string common(const ffi::AnyBuffer& q, const ffi::AnyBuffer& k, const ffi::AnyBuffer& v, const Ints2& positions,
                   const ffi::AnyBuffer& sinks, Out& out, Lse& lse, AttentionCall* call) {
  if (q.dimensions().size() != 4 || !is_float(q)) return "expected q [B, T, N, H] of float32 or bfloat16";
  if (k.dimensions().size() != 4 || !is_float(k)) return "expected keys [., ., K, H] of float32 or bfloat16";
  const auto queries = q.dimensions(), keys = k.dimensions();
  if (keys[1] == 0 || keys[2] == 0 || keys[3] == 0 || keys[3] != queries[3] || queries[2] % keys[2] != 0)
    return "expected keys [., ., K, H] with q's H, and K that divides N";
  if (v.element_type() != k.element_type() || !has_shape(v, {keys[0], keys[1], keys[2], keys[3]}))
    return "expected values like the keys";
  if (!has_shape(positions, {queries[0], queries[1]})) return "expected positions [B, T]";
  if (!has_shape(sinks, {queries[2]}) || !is_float(sinks)) return "expected sinks [N] of float32 or bfloat16";
  if (!has_shape(*out, {queries[0], queries[1], queries[2], queries[3]}) ||
      !has_shape(*lse, {queries[0], queries[1], queries[2]}))
    return "expected results [B, T, N, H] and [B, T, N]";
  call->q = numbers(q);
  call->sinks = numbers(sinks);
  call->positions = positions.typed_data();
  call->out = out->typed_data();
  call->lse = lse->typed_data();
  call->sequences = queries[0];
  call->tokens = queries[1];
  call->heads = queries[2];
  call->head_size = queries[3];
  call->kv_heads = keys[2];
  call->bfloat16_keys = k.element_type() == ffi::BF16;
  call->stored = keys_and_values(k, v);
  call->slots = keys[1];
  return "";
}

ffi::Error paged(ffi::ThreadPool threads, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, Ints2 page_table,
                 Ints2 positions, ffi::AnyBuffer sinks, Out out, Lse lse) {
  AttentionCall call = {};
  const std::string wrong = common(q, k, v, positions, sinks, out, lse, &call);
  if (!wrong.empty()) return invalid("paged_attention: " + wrong);
  call.page_table = page_table.typed_data();
  call.pages = k.dimensions()[0];
  call.pages_per_sequence = page_table.dimensions()[1];
  if (page_table.dimensions()[0] != call.sequences || call.pages == 0)
    return invalid("paged_attention: expected page_table [B, M], and pages");
  return run(threads, call);
}

ffi::Error sliding_window(ffi::ThreadPool threads, ffi::AnyBuffer q, ffi::AnyBuffer k_ring, ffi::AnyBuffer v_ring,
                          ffi::AnyBuffer k_new, ffi::AnyBuffer v_new, Ints1 start, Ints2 positions,
                          ffi::AnyBuffer sinks, Out out, Lse lse) {
  AttentionCall call = {};
  const std::string wrong = common(q, k_ring, v_ring, positions, sinks, out, lse, &call);
  if (!wrong.empty()) return invalid("sliding_window_attention: " + wrong);
  for (const ffi::AnyBuffer* fresh : {&k_new, &v_new})
    if (fresh->element_type() != k_ring.element_type() ||
        !has_shape(*fresh, {call.sequences, call.tokens, call.kv_heads, call.head_size}))
      return invalid("sliding_window_attention: expected new keys and values [B, T, K, H] of the ring's dtype");
  if (k_ring.dimensions()[0] != call.sequences || !has_shape(start, {call.sequences}))
    return invalid("sliding_window_attention: expected rings [B, W, K, H] and start [B]");
  call.fresh = keys_and_values(k_new, v_new);
  call.start = start.typed_data();
  return run(threads, call);
}

}  // namespace
}  // namespace cpu_kernels

XLA_FFI_DEFINE_HANDLER_SYMBOL(cpu_kernels_paged_attention, cpu_kernels::paged,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<cpu_kernels::Ints2>()
                                  .Arg<cpu_kernels::Ints2>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::BufferR4<xla::ffi::F32>>()
                                  .Ret<xla::ffi::BufferR3<xla::ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(cpu_kernels_sliding_window_attention, cpu_kernels::sliding_window,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<cpu_kernels::Ints1>()
                                  .Arg<cpu_kernels::Ints2>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::BufferR4<xla::ffi::F32>>()
                                  .Ret<xla::ffi::BufferR3<xla::ffi::F32>>());
