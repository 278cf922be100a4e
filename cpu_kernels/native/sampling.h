// Drawing a token: one look at the logits, and top-k and top-p among the few ids that are left.
//
// A row is cut into chunks, so that threads share it; what chunks find is put together in their order. Elementwise
// operations are plain loops, which the compiler turns into vectors: each rounds as XLA's does.
#ifndef CPU_KERNELS_SAMPLING_H_
#define CPU_KERNELS_SAMPLING_H_

#include "parallel.h"
#include "sampling_call.h"
#include "vec.h"

namespace cpu_kernels::CPU_KERNELS_ISA {

constexpr int64_t kChunkIds = 4096;
constexpr float kLargestFloat = 3.40282347e+38f;
static_assert(kChunkIds % kSpanIds == 0 && kSpanIds % 32 == 0);

// What is known of a chunk.
struct ChunkSurvey {
  float largest_score, largest_logit, total;
  int32_t likeliest;
  bool finite;
};

// The logits of n ids from `first` on, those that are no part of the distribution as -inf.
inline void named_logits(const SurveyCall& call, int64_t row, int64_t first, int64_t n, float* out) {
  const float* logits = call.logits + row * call.vocab + first;
  const int64_t named = call.num_ids - first;
  for (int64_t i = 0; i < n; ++i) out[i] = i < named ? logits[i] : -__builtin_inff();
}

// Scores of n ids from `first` on, from their named logits.
inline void adjust_ids(const SurveyCall& call, int64_t row, int64_t first, int64_t n, const float* logits,
                       float* scores) {
  const float repetition = call.repetition[row], frequency = call.frequency[row], presence = call.presence[row];
  const bool* prompted = call.prompted + row * call.vocab + first;
  const int32_t* drawn = call.drawn + row * call.vocab + first;
  const float* bias = call.bias + row * call.vocab + first;
  const uint32_t* allowed = call.allowed + row * ((call.vocab + 31) / 32) + first / 32;
  float penalised[kSpanIds];
  if (repetition == 1 && frequency == 0 && presence == 0) {
    memcpy(penalised, logits, size_t(n) * sizeof(float));
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const bool in_answer = drawn[i] > 0;
      const float penalty = in_answer | prompted[i] ? repetition : 1.0f;
      const float once = logits[i] > 0 ? logits[i] / penalty : logits[i] * penalty;
      penalised[i] = once - float(drawn[i]) * frequency - (in_answer ? presence : 0.0f);
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    float score = penalised[i] > -kLargestFloat ? penalised[i] : -kLargestFloat;
    score = score < kLargestFloat ? score : kLargestFloat;
    scores[i] = score + bias[i];
  }
  for (int64_t word = 0; word < (n + 31) / 32; ++word) {
    if (allowed[word] == ~0u) continue;  // nearly always
    const int64_t end = word * 32 + 32 < n ? word * 32 + 32 : n;
    for (int64_t i = word * 32; i < end; ++i)
      scores[i] = allowed[word] >> (i % 32) & 1 ? scores[i] : -__builtin_inff();
  }
}

// 0, or NaN if one of n numbers is not finite.
inline float nothing_of(const float* values, int64_t n) {
  Vec all = splat(0);
  float last[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) all = add(all, sub(load(values + i), load(values + i)));
  memcpy(last, values + i, size_t(n - i) * sizeof(float));
  return sum(add(all, sub(load(last), load(last))));
}

inline float largest_of(const float* values, int64_t n) {
  Vec most = splat(-__builtin_inff());
  float last[kLanes];
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) most = max(load(values + i), most);
  if (i < n) {
    store(last, most);
    memcpy(last, values + i, size_t(n - i) * sizeof(float));
    most = max(load(last), most);
  }
  return largest(most);
}

// The scores of a chunk, and all but its total.
inline ChunkSurvey survey_scores(const SurveyCall& call, int64_t row, int64_t chunk) {
  const int64_t first = chunk * kChunkIds, end = first + kChunkIds < call.vocab ? first + kChunkIds : call.vocab;
  float* scores = call.scores + row * call.vocab;
  float* spans = call.largest_of_spans + row * call.spans();
  ChunkSurvey found = {-__builtin_inff(), -__builtin_inff(), 0, int32_t(call.vocab - 1), true};
  float nothing = 0;  // unless a logit is not finite
  for (int64_t at = first; at < end; at += kSpanIds) {
    const int64_t n = end - at < kSpanIds ? end - at : kSpanIds;
    const float* raw = call.logits + row * call.vocab + at;
    float logits[kSpanIds];
    nothing += nothing_of(raw, n);
    named_logits(call, row, at, n, logits);
    adjust_ids(call, row, at, n, logits, scores + at);
    const float logit = largest_of(logits, n), score = largest_of(scores + at, n);
    spans[at / kSpanIds] = score;
    if (logit > found.largest_logit) found.largest_logit = logit;
    if (score > found.largest_score) {
      found.largest_score = score;
      for (int64_t i = n - 1; i >= 0; --i) found.likeliest = scores[at + i] == score ? int32_t(at + i) : found.likeliest;
    }
  }
  found.finite = nothing == 0;
  return found;
}

// A chunk's part of a row's total.
inline float total_of_chunk(const SurveyCall& call, int64_t row, int64_t chunk, float largest_logit) {
  const int64_t first = chunk * kChunkIds, end = first + kChunkIds < call.num_ids ? first + kChunkIds : call.num_ids;
  const float* logits = call.logits + row * call.vocab;
  Vec all = splat(0);
  for (int64_t at = first; at < end; at += kLanes) {
    float last[kLanes];
    const float* from = logits + at;
    if (end - at < kLanes) {
      for (float& each : last) each = -__builtin_inff();
      memcpy(last, from, size_t(end - at) * sizeof(float));
      from = last;
    }
    all = add(all, exp(sub(load(from), splat(largest_logit))));
  }
  return sum(all);
}

inline bool survey(const Pool& pool, const SurveyCall& call) {
  const int64_t chunks = (call.vocab + kChunkIds - 1) / kChunkIds, tasks = call.rows * chunks;
  const Scratch memory(tasks * int64_t(sizeof(ChunkSurvey)));
  if (!memory.data()) return false;
  ChunkSurvey* found = static_cast<ChunkSurvey*>(memory.data());
  const Pool useful = pool.for_work(tasks * kChunkIds);
  auto look = [&](int64_t task, int64_t) { found[task] = survey_scores(call, task / chunks, task % chunks); };
  parallel_for(useful, tasks, look);
  for (int64_t row = 0; row < call.rows; ++row) {
    ChunkSurvey all = found[row * chunks];
    for (int64_t i = row * chunks + 1; i < (row + 1) * chunks; ++i) {
      const ChunkSurvey& next = found[i];
      if (next.largest_score > all.largest_score)
        all.largest_score = next.largest_score, all.likeliest = next.likeliest;
      if (next.largest_logit > all.largest_logit) all.largest_logit = next.largest_logit;
      all.finite = all.finite && next.finite;
    }
    call.likeliest[row] = all.likeliest, call.largest_logit[row] = all.largest_logit, call.finite[row] = all.finite;
  }
  auto add_up = [&](int64_t task, int64_t) {
    const int64_t row = task / chunks;
    found[task].total = total_of_chunk(call, row, task % chunks, call.largest_logit[row]);
  };
  parallel_for(useful, tasks, add_up);
  for (int64_t row = 0; row < call.rows; ++row) {
    float total = 0;
    for (int64_t i = row * chunks; i < (row + 1) * chunks; ++i) total += found[i].total;
    call.total[row] = total;
  }
  return true;
}

// ---- top-k ----

// The bits of a number that is not positive: they grow as it falls, from 0 for 0.
inline uint32_t key_of(float tempered) {
  uint32_t bits;
  memcpy(&bits, &tempered, sizeof bits);
  return bits & 0x7FFFFFFF;
}

// The least key that at least k of n have; all are below 2^31.
inline uint32_t kth_key(const uint32_t* keys, int64_t n, int64_t k) {
  uint32_t least = 0;
  for (uint32_t bit = 1u << 30; bit; bit >>= 1) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += keys[i] < least + bit;
    if (count < k) least += bit;
  }
  return least;
}

// One row. At least k spans have an id as likely as the k-th likeliest span's: nothing below that can be left.
inline void likeliest_of_row(const LikeliestCall& call, int64_t row, int64_t spans, uint32_t* keys) {
  const float* scores = call.scores + row * call.vocab;
  const float* span = call.largest_of_spans + row * spans;
  const float coldness = 1 / call.temperature[row], largest = largest_of(span, spans);
  const auto tempered = [&](float score) { return (score - largest) * coldness; };  // as XLA divides by a row's number
  const int64_t k = call.top_k[row] > 0 && call.top_k[row] < call.vocab ? call.top_k[row] : call.vocab;
  int32_t* ids = call.ids + row * call.most;
  float* out = call.tempered + row * call.most;
  uint32_t bound = 0x7FFFFFFF;
  if (k <= spans) {
    for (int64_t i = 0; i < spans; ++i) keys[i] = key_of(tempered(span[i]));
    bound = kth_key(keys, spans, k);
  }
  int64_t count = 0;
  if (k <= call.most || call.vocab <= call.most) {
    for (int64_t i = 0; i < spans; ++i) {
      if (key_of(tempered(span[i])) > bound) continue;
      const int64_t first = i * kSpanIds, end = first + kSpanIds < call.vocab ? first + kSpanIds : call.vocab;
      for (int64_t id = first; id < end; ++id) {
        const uint32_t key = key_of(tempered(scores[id]));
        if (key <= bound) keys[count++] = key, keys[call.vocab + count - 1] = uint32_t(id);
      }
    }
    bound = kth_key(keys, count, k < count ? k : count);
  }
  int64_t left = 0, fits = count > 0;
  for (int64_t i = 0; i < count && fits; ++i) {
    if (keys[i] > bound) continue;
    if ((fits = left < call.most)) {
      const int32_t id = int32_t(keys[call.vocab + i]);
      ids[left] = id, out[left++] = tempered(scores[id]);
    }
  }
  call.counts[row] = fits ? int32_t(left) : -1;
  for (; left < call.most; ++left) ids[left] = int32_t(call.vocab - 1), out[left] = -__builtin_inff();
}

inline bool likeliest(const Pool& pool, const LikeliestCall& call) {
  const int64_t spans = (call.vocab + kSpanIds - 1) / kSpanIds, room = 2 * call.vocab;
  const Pool useful = pool.for_work(call.rows * spans * 32);
  const Scratch keys(useful.max_workers(call.rows) * room * int64_t(sizeof(uint32_t)));
  if (!keys.data()) return false;
  auto row = [&](int64_t i, int64_t worker) {
    likeliest_of_row(call, i, spans, static_cast<uint32_t*>(keys.data()) + worker * room);
  };
  parallel_for(useful, call.rows, row);
  return true;
}

// ---- top-p ----

constexpr int64_t kFold = 8;  // invariant_sum's

// An entry of a sum: where it stands, which weight or which earlier sum it is.
struct Entry {
  int64_t at;
  int32_t from;
};

inline void sort_entries(Entry* entries, int64_t n) {  // Shell's: there are few
  for (int64_t gap = n / 2; gap > 0; gap /= 2)
    for (int64_t i = gap; i < n; ++i) {
      const Entry entry = entries[i];
      int64_t j = i;
      for (; j >= gap && entries[j - gap].at > entry.at; j -= gap) entries[j] = entries[j - gap];
      entries[j] = entry;
    }
}

// How invariant_sum adds up n weights among zeros: steps, each of which adds one number to a sum or begins one.
class FoldedSum {
 public:
  static constexpr int kMostLevels = 16;

  FoldedSum(const int32_t* ids, int64_t n, int64_t vocab, Entry* entries, float* values)
      : n_(n), entries_(entries), values_(values) {
    int64_t count = n;
    for (int64_t i = 0; i < n; ++i) entries[i] = {ids[i], int32_t(i)};
    for (int64_t width = vocab; width > 1; ++levels_) {
      width = (width + kFold - 1) / kFold;
      Entry* level = entries_ + levels_ * n;
      // Side by side what one sum adds up, in its order: first by place in a slice, then by slice.
      for (int64_t i = 0; i < count; ++i) level[i].at = level[i].at % width * kFold + level[i].at / width;
      sort_entries(level, count);
      counts_[levels_] = count;
      int64_t sums = 0;
      for (int64_t i = 0; i < count; ++i)
        if (i == 0 || level[i].at / kFold != level[i - 1].at / kFold)
          level[n + sums] = {level[i].at / kFold, int32_t(sums)}, ++sums;
      count = sums;
    }
  }

  // The sum of the weights whose key is at most `most`.
  float of(const float* weights, const uint32_t* keys, uint32_t most) const {
    float* now = values_;
    for (int64_t i = 0; i < n_; ++i) now[i] = keys[i] <= most ? weights[i] : 0.0f;
    for (int level = 0; level < levels_; ++level) {
      const Entry* entries = entries_ + level * n_;
      float* sums = now == values_ ? values_ + n_ : values_;
      int64_t sum = -1;
      for (int64_t i = 0; i < counts_[level]; ++i) {
        if (i == 0 || entries[i].at / kFold != entries[i - 1].at / kFold)
          sums[++sum] = now[entries[i].from];
        else
          sums[sum] += now[entries[i].from];
      }
      now = sums;
    }
    return now[0];
  }

 private:
  int64_t n_, counts_[kMostLevels] = {};
  int levels_ = 0;
  Entry* entries_;  // [levels + 1, n]
  float* values_;   // [2, n]
};

// What one row needs beside its arrays.
struct NucleusRoom {
  Entry* entries;
  uint32_t *keys, *sorted;
  float* values;

  static int64_t bytes(int64_t most) {
    return most * ((FoldedSum::kMostLevels + 1) * int64_t(sizeof(Entry)) + 4 * int64_t(sizeof(float)));
  }
  NucleusRoom(char* memory, int64_t most) : entries(reinterpret_cast<Entry*>(memory)) {
    keys = reinterpret_cast<uint32_t*>(entries + (FoldedSum::kMostLevels + 1) * most);
    sorted = keys + most;
    values = reinterpret_cast<float*>(sorted + most);
  }
};

inline void nucleus_of_row(const NucleusCall& call, int64_t row, const NucleusRoom& room) {
  const float *tempered = call.tempered + row * call.most, *weights = call.weights + row * call.most;
  float* left = call.left + row * call.most;
  memcpy(left, tempered, size_t(call.most) * sizeof(float));
  const int64_t n = call.counts[row];
  if (n <= 0 || !(call.top_p[row] < 1)) return;
  const FoldedSum sum(call.ids + row * call.most, n, call.vocab, room.entries, room.values);
  for (int64_t i = 0; i < n; ++i) room.keys[i] = key_of(tempered[i]);
  const float enough = call.top_p[row] * sum.of(weights, room.keys, 0x7FFFFFFF);
  // The least key with which the sum reaches `enough`; a sum over more of the same weights is never smaller.
  uint32_t least = 0;
  for (uint32_t bit = 1u << 30; bit; bit >>= 1)
    if (sum.of(weights, room.keys, least + bit - 1) < enough) least += bit;
  for (int64_t i = 0; i < n; ++i) left[i] = room.keys[i] <= least ? tempered[i] : -__builtin_inff();
}

inline bool nucleus(const Pool& pool, const NucleusCall& call) {
  const int64_t bytes = NucleusRoom::bytes(call.most);
  const Pool useful = pool.for_work(call.rows * call.most * 256);
  const Scratch rooms(useful.max_workers(call.rows) * bytes);
  if (!rooms.data()) return false;
  auto row = [&](int64_t i, int64_t worker) {
    nucleus_of_row(call, i, NucleusRoom(static_cast<char*>(rooms.data()) + worker * bytes, call.most));
  };
  parallel_for(useful, call.rows, row);
  return true;
}

}  // namespace cpu_kernels::CPU_KERNELS_ISA

#endif  // CPU_KERNELS_SAMPLING_H_
