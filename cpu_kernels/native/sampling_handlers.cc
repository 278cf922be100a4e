// XLA's way into drawing a token: each handler checks shapes, and calls the kernel in use.
#include "handlers.h"

namespace cpu_kernels {
namespace {

using Floats = ffi::BufferR1<ffi::F32>;
using FloatRows = ffi::BufferR2<ffi::F32>;
using IntRows = ffi::BufferR2<ffi::S32>;

template <typename Buffer>
bool all_have_shape(std::initializer_list<const Buffer*> arrays, std::initializer_list<int64_t> shape) {
  for (const Buffer* array : arrays)
    if (!has_shape(*array, shape)) return false;
  return true;
}

int64_t spans_of(int64_t vocab) { return (vocab + kSpanIds - 1) / kSpanIds; }

ffi::Error survey(ffi::ThreadPool threads, FloatRows logits, FloatRows bias, ffi::BufferR2<ffi::U32> allowed,
                  ffi::BufferR2<ffi::PRED> prompted, IntRows drawn, Floats repetition, Floats frequency,
                  Floats presence, ffi::ResultBufferR2<ffi::F32> scores, ffi::ResultBufferR2<ffi::F32> spans,
                  ffi::ResultBufferR1<ffi::S32> likeliest, ffi::ResultBufferR1<ffi::F32> largest_logit,
                  ffi::ResultBufferR1<ffi::F32> total, ffi::ResultBufferR1<ffi::PRED> finite, int32_t num_ids) {
  const int64_t rows = logits.dimensions()[0], vocab = logits.dimensions()[1];
  if (vocab < 1 || num_ids < 1 || num_ids > vocab) return invalid("survey: expected logits [B, V] and 1 to V ids");
  if (!has_shape(bias, {rows, vocab}) || !has_shape(allowed, {rows, (vocab + 31) / 32}) ||
      !has_shape(prompted, {rows, vocab}) || !has_shape(drawn, {rows, vocab}) ||
      !all_have_shape<Floats>({&repetition, &frequency, &presence}, {rows}))
    return invalid("survey: expected bias, prompted, drawn [B, V], allowed [B, V / 32] and penalties [B]");
  if (!has_shape(*scores, {rows, vocab}) || !has_shape(*spans, {rows, spans_of(vocab)}) ||
      !has_shape(*likeliest, {rows}) || !has_shape(*largest_logit, {rows}) || !has_shape(*total, {rows}) ||
      !has_shape(*finite, {rows}))
    return invalid("survey: expected results [B, V], [B, V / 64] and [B]");
  SurveyCall call = {};
  call.logits = logits.typed_data(), call.bias = bias.typed_data(), call.allowed = allowed.typed_data();
  call.prompted = prompted.typed_data(), call.drawn = drawn.typed_data();
  call.repetition = repetition.typed_data(), call.frequency = frequency.typed_data();
  call.presence = presence.typed_data();
  call.rows = rows, call.vocab = vocab, call.num_ids = num_ids;
  call.scores = scores->typed_data(), call.largest_of_spans = spans->typed_data();
  call.likeliest = likeliest->typed_data(), call.largest_logit = largest_logit->typed_data();
  call.total = total->typed_data(), call.finite = finite->typed_data();
  return finished(kernels().survey(pool_of(threads), call));
}

ffi::Error likeliest(ffi::ThreadPool threads, FloatRows scores, FloatRows spans, Floats temperature,
                     ffi::BufferR1<ffi::S32> top_k, ffi::ResultBufferR2<ffi::S32> ids,
                     ffi::ResultBufferR2<ffi::F32> tempered, ffi::ResultBufferR1<ffi::S32> counts) {
  const int64_t rows = scores.dimensions()[0], vocab = scores.dimensions()[1], most = ids->dimensions()[1];
  if (vocab < 1 || !has_shape(spans, {rows, spans_of(vocab)}) || !has_shape(temperature, {rows}) ||
      !has_shape(top_k, {rows}))
    return invalid("likeliest: expected scores [B, V], spans [B, V / 64], temperature and top_k [B]");
  if (!has_shape(*ids, {rows, most}) || !has_shape(*tempered, {rows, most}) || !has_shape(*counts, {rows}))
    return invalid("likeliest: expected results [B, C], [B, C] and [B]");
  return finished(kernels().likeliest(
      pool_of(threads), {scores.typed_data(), spans.typed_data(), temperature.typed_data(), top_k.typed_data(), rows,
                         vocab, most, ids->typed_data(), tempered->typed_data(), counts->typed_data()}));
}

ffi::Error nucleus(ffi::ThreadPool threads, IntRows ids, ffi::BufferR1<ffi::S32> counts, FloatRows tempered,
                   FloatRows weights, Floats top_p, ffi::ResultBufferR2<ffi::F32> left, int32_t vocab) {
  const int64_t rows = ids.dimensions()[0], most = ids.dimensions()[1];
  if (!all_have_shape<FloatRows>({&tempered, &weights}, {rows, most}) || !has_shape(counts, {rows}) ||
      !has_shape(top_p, {rows}) || !has_shape(*left, {rows, most}))
    return invalid("nucleus: expected ids, tempered, weights and a result [B, C], counts and top_p [B]");
  return finished(kernels().nucleus(pool_of(threads),
                                    {ids.typed_data(), counts.typed_data(), tempered.typed_data(),
                                     weights.typed_data(), top_p.typed_data(), rows, vocab, most, left->typed_data()}));
}

}  // namespace
}  // namespace cpu_kernels

XLA_FFI_DEFINE_HANDLER_SYMBOL(cpu_kernels_survey, cpu_kernels::survey,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::U32>>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::PRED>>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::S32>>()
                                  .Arg<xla::ffi::BufferR1<xla::ffi::F32>>()
                                  .Arg<xla::ffi::BufferR1<xla::ffi::F32>>()
                                  .Arg<xla::ffi::BufferR1<xla::ffi::F32>>()
                                  .Ret<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Ret<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Ret<xla::ffi::BufferR1<xla::ffi::S32>>()
                                  .Ret<xla::ffi::BufferR1<xla::ffi::F32>>()
                                  .Ret<xla::ffi::BufferR1<xla::ffi::F32>>()
                                  .Ret<xla::ffi::BufferR1<xla::ffi::PRED>>()
                                  .Attr<int32_t>("num_ids"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(cpu_kernels_likeliest, cpu_kernels::likeliest,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Arg<xla::ffi::BufferR1<xla::ffi::F32>>()
                                  .Arg<xla::ffi::BufferR1<xla::ffi::S32>>()
                                  .Ret<xla::ffi::BufferR2<xla::ffi::S32>>()
                                  .Ret<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Ret<xla::ffi::BufferR1<xla::ffi::S32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(cpu_kernels_nucleus, cpu_kernels::nucleus,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::S32>>()
                                  .Arg<xla::ffi::BufferR1<xla::ffi::S32>>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Arg<xla::ffi::BufferR1<xla::ffi::F32>>()
                                  .Ret<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Attr<int32_t>("vocab"));
