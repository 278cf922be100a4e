// Calls the matrix products on arrays of exactly their size, with pools of several sizes whose results must be equal.
//
// For sanitizers: it knows no XLA, so nothing but the kernels is under test.
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "kernels.h"

namespace {

using cpu_kernels::Pool;

// Threads that are started for one call and joined after it, late ones too.
struct Threads {
  std::vector<std::thread> started;

  ~Threads() {
    for (std::thread& thread : started) thread.join();
  }
  Pool pool(int64_t size) {
    return {this, size, [](void* threads, void (*run)(void*), void* task) {
              static_cast<Threads*>(threads)->started.emplace_back(run, task);
            }};
  }
};

std::mt19937 random_bits(0);

template <typename T>
std::vector<T> filled(int64_t size, uint32_t (*make)(uint32_t)) {
  std::vector<T> result(static_cast<size_t>(size));
  for (T& value : result) value = static_cast<T>(make(static_cast<uint32_t>(random_bits())));
  return result;
}

std::vector<uint16_t> bfloat16s(int64_t size) {  // of either sign, from 1 to 2
  return filled<uint16_t>(size, [](uint32_t bits) { return (bits & 0x807F) | 0x3F80; });
}
std::vector<uint8_t> bytes(int64_t size) {
  return filled<uint8_t>(size, [](uint32_t bits) { return bits & 0xFF; });
}
std::vector<uint8_t> scales(int64_t size) {
  return filled<uint8_t>(size, [](uint32_t bits) { return 115 + bits % 5; });
}

const cpu_kernels::Kernels& kernels = cpu_kernels::CPU_KERNELS_DRIVEN::kKernels;

// `run` with pools of several sizes, each into a result of its own: whether all have the same bits.
template <typename Run>
bool agree(int64_t size, Run run) {
  std::vector<float> first;
  for (int64_t helpers : {0, 1, 5}) {
    std::vector<float> y(static_cast<size_t>(size), -1);
    Threads threads;
    if (!run(threads.pool(helpers), y.data())) return false;
    if (first.empty()) first = y;
    if (size > 0 && std::memcmp(first.data(), y.data(), y.size() * sizeof(float)) != 0) return false;
  }
  return true;
}

bool linear(int64_t rows, int64_t outputs, int64_t inputs) {
  const auto x = bfloat16s(rows * inputs), w = bfloat16s(outputs * inputs);
  return agree(rows * outputs, [&](const Pool& pool, float* y) {
    return kernels.linear(pool, {{x.data(), true, rows, inputs}, w.data(), outputs, y});
  });
}

bool experts(int64_t rows, int64_t hidden, int64_t inner, int64_t experts, int64_t choices) {
  std::vector<float> x(static_cast<size_t>(rows * hidden), 0.25f), shares(static_cast<size_t>(rows * choices), 0.5f);
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < rows * choices; ++i) ids.push_back(static_cast<int32_t>(random_bits() % (experts + 2)) - 1);
  const auto up = bytes(experts * inner * hidden), down = bytes(experts * hidden * inner / 2);
  const auto up_scales = scales(experts * 2 * inner * hidden / 32), down_scales = scales(experts * hidden * inner / 32);
  const auto up_bias = bfloat16s(experts * 2 * inner), down_bias = bfloat16s(experts * hidden);
  return agree(rows * hidden, [&](const Pool& pool, float* y) {
    return kernels.expert_mlp(pool, {{x.data(), false, rows, hidden},
                                     ids.data(),
                                     shares.data(),
                                     choices,
                                     experts,
                                     {up.data(), up_scales.data(), up_bias.data(), 2 * inner, hidden / 32},
                                     {down.data(), down_scales.data(), down_bias.data(), hidden, inner / 32},
                                     7,
                                     y});
  });
}

}  // namespace

int main() {
  bool same = true;
  for (int64_t rows : {0, 1, 2, 4, 5, 11})
    for (int64_t inputs : {1, 31, 32, 33, 95}) same = same && linear(rows, 37, inputs);
  for (int64_t rows : {1, 9, 140}) same = same && experts(rows, 64, 96, 3, 2);
  std::puts(same ? "same bits" : "different bits");
}
