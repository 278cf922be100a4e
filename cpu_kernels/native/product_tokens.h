// The sums of product_int16.h for many rows of activations, lanes being those rows: tokens.
//
// Weights of a panel's rows are unpacked into memory as words, the blocks of one lane at a time (b, b + 16, ...). They
// meet activations that lie transposed: of each block each pair of words of sixteen (or eight) tokens side by side, so
// that a lane adds up a whole block by itself, and the float32 sums of a lane of the other form are made one after the
// other. Lanes are taken in the order in which they can be added up at once as `sum` adds them: 0, 8, 4, 12, 2, ...
#ifndef CPU_KERNELS_PRODUCT_TOKENS_H_
#define CPU_KERNELS_PRODUCT_TOKENS_H_

#include "parallel.h"
#include "product_int16.h"
#include "tiles.h"

namespace cpu_kernels::CPU_KERNELS_ISA {

constexpr int64_t kMostPanelRows = 64;  // rows of weights that one task takes

#if defined(CPU_KERNELS_AVX512) || defined(CPU_KERNELS_AVX2)

#if defined(CPU_KERNELS_AVX512)

using Tokens = __m512;
using TokenInts = __m512i;
constexpr int kTokens = 16;

inline TokenInts load_pairs(const void* p) { return _mm512_loadu_si512(p); }
inline TokenInts splat_pair(int32_t pair) { return _mm512_set1_epi32(pair); }
inline TokenInts no_pairs() { return _mm512_setzero_si512(); }
inline Tokens to_floats(TokenInts a) { return _mm512_cvtepi32_ps(a); }
inline Tokens load_tokens(const float* p) { return _mm512_loadu_ps(p); }
inline void store_tokens(float* p, Tokens a) { _mm512_storeu_ps(p, a); }
inline Tokens splat_token(float a) { return _mm512_set1_ps(a); }
inline Tokens add_tokens(Tokens a, Tokens b) { return _mm512_add_ps(a, b); }
inline Tokens mul_tokens(Tokens a, Tokens b) { return _mm512_mul_ps(a, b); }
inline Tokens fma_tokens(Tokens a, Tokens b, Tokens c) { return _mm512_fmadd_ps(a, b, c); }
inline TokenInts kept(TokenInts a) {
  asm("" : "+v"(a));
  return a;
}

// How many tokens pay for unpacking, and vectors of them and rows of weights whose sums are in registers at a time. By
// trial.
constexpr int64_t kFewestTokens = 9;
constexpr int kTileVectors = 3;
template <int V>
constexpr int kRowsBeside = V == 1 ? 8 : 4;

#else

using Tokens = __m256;
using TokenInts = __m256i;
constexpr int kTokens = 8;

inline TokenInts load_pairs(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline TokenInts splat_pair(int32_t pair) { return _mm256_set1_epi32(pair); }
inline TokenInts no_pairs() { return _mm256_setzero_si256(); }
inline Tokens to_floats(TokenInts a) { return _mm256_cvtepi32_ps(a); }
inline Tokens load_tokens(const float* p) { return _mm256_loadu_ps(p); }
inline void store_tokens(float* p, Tokens a) { _mm256_storeu_ps(p, a); }
inline Tokens splat_token(float a) { return _mm256_set1_ps(a); }
inline Tokens add_tokens(Tokens a, Tokens b) { return _mm256_add_ps(a, b); }
inline Tokens mul_tokens(Tokens a, Tokens b) { return _mm256_mul_ps(a, b); }
inline Tokens fma_tokens(Tokens a, Tokens b, Tokens c) { return _mm256_fmadd_ps(a, b, c); }
inline TokenInts kept(TokenInts a) {
  asm("" : "+x"(a));
  return a;
}

constexpr int64_t kFewestTokens = 8;
constexpr int kTileVectors = 2;
template <int V>
constexpr int kRowsBeside = V == 1 ? 8 : 4;

#endif

constexpr int kBlockPairs = kBlockInputs / 2;
constexpr int64_t kVectorsAtATime = 96 / kTokens;  // whose sums stay in the second cache, five of each

// How many vectors of tokens so many rows make. The last few rows go by themselves, up to half a vector.
inline int64_t vectors_of(int64_t rows) {
  return rows < kFewestTokens ? 0 : rows / kTokens + (rows % kTokens > kTokens / 2);
}

// As many vectors as runs of so many rows together can make.
inline int64_t most_vectors(int64_t rows) { return rows / (kTokens / 2 + 1); }

// A block of a vector of tokens: pairs of words, part after part.
struct TokenBlock {
  int16_t pairs[kBlockPairs][kTokens][2];
  float scales[kTokens];
};

inline void put_block(const int16_t (&words)[kParts][kPartWords], float scale, int64_t block, int token,
                      TokenBlock* vector) {
  TokenBlock& to = vector[block];
  for (int pair = 0; pair < kBlockPairs; ++pair)
    memcpy(to.pairs[pair][token], words[pair / (kPartWords / 2)] + pair % (kPartWords / 2) * 2, 2 * sizeof(int16_t));
  to.scales[token] = scale;
}

// A row's blocks, one token of a vector.
inline void put_row(const Group* row, int64_t blocks, int token, TokenBlock* vector) {
  for (int64_t block = 0; block < blocks; ++block) {
    const Group& group = row[block / kGroupBlocks];
    const int at = int(block % kGroupBlocks);
    int16_t words[kParts][kPartWords];
    for (int part = 0; part < kParts; ++part)
      memcpy(words[part], group.words[at / kQuadBlocks][part][at % kQuadBlocks], sizeof words[part]);
    put_block(words, group.scales[lane_of(at)], block, token, vector);
  }
}

// Some vectors of tokens.
class TokenRows {
 public:
  TokenRows(int64_t vectors, int64_t blocks)
      : blocks_(blocks), memory_(vectors * blocks * int64_t(sizeof(TokenBlock))) {}

  bool ok() const { return memory_.data(); }
  TokenBlock* at(int64_t vector) const { return static_cast<TokenBlock*>(memory_.data()) + vector * blocks_; }
  void clear(int64_t vector) const { memset(at(vector), 0, size_t(blocks_) * sizeof(TokenBlock)); }

 private:
  int64_t blocks_;
  Scratch memory_;
};

// A block of weights as words, the codes doubled, part after part.
inline void unpack_words(const uint8_t* p, int16_t* to) {
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m256i nibbles = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(codes, 4), codes), _mm256_set1_epi8(15));
  const __m256i doubled = _mm256_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12,  //
                                           0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
  const __m256i bytes = _mm256_shuffle_epi8(doubled, nibbles);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + kBlockInputs / 2), _mm256_srai_epi16(bytes, 8));
}

// One lane's blocks of some rows of weights.
struct LaneWeights {
  int16_t* words;  // [rows, blocks, 32]
  float* powers;   // [rows, blocks]
  int64_t blocks;

  void unpack(const PackedRows& w, int64_t first, int64_t rows, int64_t first_block) {
    blocks = first_block < w.blocks ? groups_of(w.blocks - first_block) : 0;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t from = (first + r) * w.blocks + first_block + i * kGroupBlocks;
        unpack_words(w.codes + from * kCodeBytes, words + (r * blocks + i) * kBlockInputs);
        const uint32_t bits = uint32_t(w.scales[from]) << kMantissaBits;
        memcpy(powers + r * blocks + i, &bits, sizeof bits);
      }
  }
};

// What one task writes and reads meanwhile.
struct VectorsRoom {
  static constexpr int64_t kColumns = kVectorsAtATime * kTokens, kLevels = 5;

  LaneWeights weights;
  float* sums;  // [levels, rows, columns]: of 1, 2, 4, 8 and 16 lanes

  VectorsRoom(void* memory, int64_t blocks) : sums(static_cast<float*>(memory)) {
    weights = {reinterpret_cast<int16_t*>(sums + kLevels * kMostPanelRows * kColumns), nullptr, 0};
    weights.powers = reinterpret_cast<float*>(weights.words + kMostPanelRows * groups_of(blocks) * kBlockInputs);
  }
  float* level(int64_t i) const { return sums + i * kMostPanelRows * kColumns; }
};

// Bytes of that memory.
inline int64_t vectors_room(int64_t blocks) {
  const int64_t sums = VectorsRoom::kLevels * kMostPanelRows * VectorsRoom::kColumns * int64_t(sizeof(float));
  const int64_t block_bytes = kBlockInputs * int64_t(sizeof(int16_t)) + int64_t(sizeof(float));
  return (sums + kMostPanelRows * groups_of(blocks) * block_bytes + 63) / 64 * 64;
}

// The exact sums of a block of R rows of weights and V vectors of tokens. Sums stay in their registers because the
// compiler may not reorder what is added to them: left to itself it brings products forward and has no room for them.
template <int R, int V>
inline __attribute__((always_inline)) void add_block(const int16_t* const (&words)[R], const TokenBlock* const (&x)[V],
                                                     TokenInts (&all)[R][V]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) all[r][v] = no_pairs();
#pragma GCC unroll 16
  for (int pair = 0; pair < kBlockPairs; ++pair) {
    TokenInts tokens[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) tokens[v] = load_pairs(x[v]->pairs[pair]);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t both;
      memcpy(&both, words[r] + 2 * pair, sizeof both);
      const TokenInts weights = splat_pair(both);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) all[r][v] = kept(add_pairs(all[r][v], weights, tokens[v]));
    }
  }
}

// One lane's sums of R rows of weights from row `row` on and V vectors of tokens.
template <int R, int V>
inline void add_lane(const LaneWeights& w, int64_t row, const TokenBlock* const (&x)[V], Tokens (&sums)[R][V]) {
  const int16_t* words[R];
  const TokenBlock* at[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) at[v] = x[v];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    words[r] = w.words + (row + r) * w.blocks * kBlockInputs;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[r][v] = splat_token(0);
  }
  const float* powers = w.powers + row * w.blocks;
  for (int64_t i = 0; i < w.blocks; ++i, ++powers) {
    TokenInts all[R][V];
    add_block(words, at, all);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Tokens scales = load_tokens(at[v]->scales);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Tokens scale = mul_tokens(splat_token(powers[r * w.blocks]), scales);
        sums[r][v] = fma_tokens(to_floats(all[r][v]), scale, sums[r][v]);
      }
      at[v] += kGroupBlocks;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) words[r] += kBlockInputs;
  }
}

// The same for `rows` rows and V vectors whose first column is `column`, added to what earlier lanes left: `turn` is
// how many there were, and each 1 at the end of its bits a sum that waits for this one. `ahead_bytes` a row are asked
// for from `ahead` meanwhile.
template <int V>
inline void add_lane_to_sums(const VectorsRoom& room, int turn, int64_t rows, const TokenBlock* const (&x)[V],
                             int64_t first_block, int64_t column, const uint8_t* ahead, int64_t ahead_bytes) {
  constexpr int R = kRowsBeside<V>;
  const TokenBlock* from[V];
  for (int v = 0; v < V; ++v) from[v] = x[v] + first_block;
  for (int64_t row = 0; row < rows; row += R) {
    fetch(ahead + row * ahead_bytes, R * ahead_bytes);
    Tokens sums[R][V];
    const TokenBlock* const(&blocks)[V] = from;
    add_lane<R, V>(room.weights, row, blocks, sums);
    int level = 0;
    for (; turn >> level & 1; ++level)
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) {
          const float* waiting = room.level(level) + (row + r) * VectorsRoom::kColumns + column + v * kTokens;
          sums[r][v] = add_tokens(load_tokens(waiting), sums[r][v]);
        }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v)
        store_tokens(room.level(level) + (row + r) * VectorsRoom::kColumns + column + v * kTokens, sums[r][v]);
  }
}

// The same for `vectors` vectors from x on, of `x_blocks` blocks each, V and fewer at a time; the first ones ask.
template <int V = kTileVectors>
inline void add_lane_to_all(const VectorsRoom& room, int turn, int64_t rows, const TokenBlock* x, int64_t x_blocks,
                            int64_t vectors, int64_t first_block, const uint8_t* ahead, int64_t ahead_bytes,
                            int64_t column = 0) {
  for (; vectors >= V; vectors -= V, x += V * x_blocks, column += V * kTokens) {
    const TokenBlock* each[V];
    for (int v = 0; v < V; ++v) each[v] = x + v * x_blocks;
    const TokenBlock* const(&all)[V] = each;
    add_lane_to_sums<V>(room, turn, rows, all, first_block, column, ahead, column ? 0 : ahead_bytes);
  }
  if constexpr (V > 1)
    add_lane_to_all<V - 1>(room, turn, rows, x, x_blocks, vectors, first_block, ahead, ahead_bytes, column);
}

// epilogue(token, products) for the first `tokens` columns, each with the products of all rows.
template <class Epilogue>
inline void give_columns(const float* sums, int64_t rows, int64_t tokens, int64_t first_token,
                         const Epilogue& epilogue) {
  float columns[kLanes * kMostPanelRows];
  for (int64_t token = 0; token < tokens; token += kLanes) {
    for (int64_t row = 0; row < rows; row += kLanes) {
      const char* from[kLanes];
      for (int i = 0; i < kLanes; ++i)
        from[i] = reinterpret_cast<const char*>(sums + (row + i) * VectorsRoom::kColumns + token);
      transpose(from, 0, columns + row, rows);
    }
    for (int64_t i = 0; i < kLanes && token + i < tokens; ++i) epilogue(first_token + token + i, columns + i * rows);
  }
}

// epilogue(token, products) for each of the first `tokens` of `vectors` vectors: the products with `rows` rows of
// weights, 32 or 64, from row `first` on. `next` are the codes that are multiplied after these; `memory` is as
// vectors_room says.
template <class Epilogue>
inline void multiply_vectors(const PackedRows& w, int64_t first, int64_t rows, const uint8_t* next, const TokenBlock* x,
                             int64_t vectors, int64_t tokens, void* memory, const Epilogue& epilogue) {
  static_assert(kLanes == 16 && VectorsRoom::kLevels == 5 && VectorsRoom::kColumns % kLanes == 0);
  VectorsRoom room(memory, w.blocks);
  for (int64_t done = 0; done < vectors; done += kVectorsAtATime, x += kVectorsAtATime * w.blocks) {
    const int64_t some = vectors - done < kVectorsAtATime ? vectors - done : kVectorsAtATime;
    for (int turn = 0; turn < kLanes; ++turn) {
      const int lane = (turn & 1) << 3 | (turn & 2) << 1 | (turn & 4) >> 1 | turn >> 3;
      const int64_t first_block = lane / kQuads + lane % kQuads * kQuadBlocks;
      room.weights.unpack(w, first, rows, first_block);
      static_assert(kCodeBytes == kLanes);  // so that a lane asks for a byte of each block
      add_lane_to_all(room, turn, rows, x, w.blocks, some, first_block, next + turn * rows * w.blocks, w.blocks);
    }
    const int64_t rest = tokens - done * kTokens, here = rest < some * kTokens ? rest : some * kTokens;
    give_columns(room.level(4), rows, here, done * kTokens, epilogue);
  }
}

#else

// Other instruction sets have no sums of pairs of words, and take all rows as few.
constexpr int kTokens = 1;

struct TokenBlock {};

inline int64_t vectors_of(int64_t) { return 0; }
inline int64_t most_vectors(int64_t) { return 0; }
inline int64_t vectors_room(int64_t) { return 0; }
inline void put_block(const int16_t (&)[kParts][kPartWords], float, int64_t, int, TokenBlock*) {}
inline void put_row(const Group*, int64_t, int, TokenBlock*) {}

struct TokenRows {
  TokenRows(int64_t, int64_t) {}
  bool ok() const { return true; }
  TokenBlock* at(int64_t) const { return nullptr; }
  void clear(int64_t) const {}
};

template <class Epilogue>
inline void multiply_vectors(const PackedRows&, int64_t, int64_t, const uint8_t*, const TokenBlock*, int64_t, int64_t,
                             void*, const Epilogue&) {}

#endif

}  // namespace cpu_kernels::CPU_KERNELS_ISA

#endif  // CPU_KERNELS_PRODUCT_TOKENS_H_
