// What drawing a token asks of the kernels: arguments and results as plain arrays, one row a slot.
#ifndef CPU_KERNELS_SAMPLING_CALL_H_
#define CPU_KERNELS_SAMPLING_CALL_H_

#include <stdint.h>

namespace cpu_kernels {

constexpr int64_t kSpanIds = 64;  // ids of which `survey` gives the largest score

// Scores [rows, vocab] of logits [rows, vocab] under penalties, bias and bans, and what is known of each row after one
// look at it.
struct SurveyCall {
  const float *logits, *bias;
  const uint32_t* allowed;  // [rows, ceil(vocab / 32)], a bit per id
  const bool* prompted;
  const int32_t* drawn;                             // how often an answer holds each id
  const float *repetition, *frequency, *presence;  // penalties, [rows]
  int64_t rows, vocab;
  int64_t num_ids;  // ids from here on are no part of the distribution
  float* scores;
  float* largest_of_spans;  // [rows, spans]: of each kSpanIds scores
  int32_t* likeliest;       // the first id with the largest score
  float* largest_logit;
  float* total;  // the sum of exp(logit - largest_logit)
  bool* finite;  // whether all logits are

  int64_t spans() const { return (vocab + kSpanIds - 1) / kSpanIds; }
};

// The ids that top-k leaves, in their order, at most `most` of them, with their tempered scores: the score less the
// row's largest, times one over the temperature. Ids as likely as the last one are left too.
struct LikeliestCall {
  const float *scores, *largest_of_spans;  // as SurveyCall has them
  const float* temperature;                // [rows], above 0
  const int32_t* top_k;                    // [rows]; 0: all
  int64_t rows, vocab, most;
  int32_t* ids;     // [rows, most], the last id beyond their count
  float* tempered;  // [rows, most], -inf beyond their count
  int32_t* counts;  // [rows]; -1: there are more than `most`
};

// Which of a few ids top-p leaves: tempered scores become -inf for the others. Sums are taken in the order in which
// invariant_sum would add up all `vocab` weights, those of other ids being 0.
struct NucleusCall {
  const int32_t *ids, *counts;  // as LikeliestCall gives them
  const float *tempered, *weights;
  const float* top_p;  // [rows]; 1: all
  int64_t rows, vocab, most;
  float* left;  // [rows, most]
};

}  // namespace cpu_kernels

#endif  // CPU_KERNELS_SAMPLING_CALL_H_
