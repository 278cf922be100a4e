// parallel_for and Scratch; see parallel.h.
#include "parallel.h"

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace cpu_kernels {
namespace {

// Rounding to nearest and subnormal numbers kept, for as long as it lives. XLA has its threads flush subnormals.
class FloatEnvironment {
 public:
#if defined(__x86_64__)
  FloatEnvironment() : before_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~FloatEnvironment() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  FloatEnvironment() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
  }
  ~FloatEnvironment() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
#else
  FloatEnvironment() {}
#endif
};

// One loop under way. Helpers may start after the loop has ended: they own it too, and find no task left.
struct Loop {
  void (*body)(void*, int64_t, int64_t);
  void* context;
  int64_t tasks, grain;
  std::atomic<int64_t> next{0}, done{0}, workers{0};

  void work() {
    if (next.load(std::memory_order_relaxed) >= tasks) return;
    const FloatEnvironment environment;
    const int64_t worker = workers.fetch_add(1, std::memory_order_relaxed);
    for (int64_t first; (first = next.fetch_add(grain, std::memory_order_relaxed)) < tasks;) {
      const int64_t end = first + grain < tasks ? first + grain : tasks;
      for (int64_t task = first; task < end; ++task) body(context, task, worker);
      done.fetch_add(end - first, std::memory_order_release);
    }
  }
};

void help(void* loop) {
  const std::unique_ptr<std::shared_ptr<Loop>> held(static_cast<std::shared_ptr<Loop>*>(loop));
  (*held)->work();
}

// Tasks that a worker takes at a time. Neighbours read what lies side by side, and fetch ahead for each other; but a
// worker that takes much at a time may end long after the others.
int64_t grain_of(int64_t tasks, int64_t workers) {
  constexpr int64_t kTurns = 8, kMost = 32;
  const int64_t grain = tasks / (workers * kTurns);
  return grain < 1 ? 1 : grain < kMost ? grain : kMost;
}

}  // namespace

Pool Pool::for_work(int64_t operations) const {
  constexpr int64_t kWorthWaking = 1 << 17;  // some 10 microseconds, about what it takes to wake a thread
  const int64_t useful = operations / kWorthWaking;
  return {threads, useful < size ? useful : size, schedule};
}

int64_t Pool::max_workers(int64_t tasks) const { return tasks <= size ? tasks : size + 1; }

void parallel_for(const Pool& pool, int64_t tasks, void (*body)(void*, int64_t, int64_t), void* context) {
  if (tasks <= 0) return;
  const auto loop = std::make_shared<Loop>();
  loop->body = body;
  loop->context = context;
  loop->tasks = tasks;
  loop->grain = grain_of(tasks, pool.max_workers(tasks));
  for (int64_t helper = 1; helper < pool.max_workers(tasks); ++helper)
    pool.schedule(pool.threads, help, new std::shared_ptr<Loop>(loop));
  loop->work();
  // What is left runs on threads of its own right now, and is short; a nap would cost more than the wait.
  for (int spins = 0; loop->done.load(std::memory_order_acquire) < tasks; ++spins)
    if (spins > 1000) std::this_thread::yield();
}

Scratch::Scratch(int64_t bytes) : data_(std::aligned_alloc(64, (size_t(bytes) + 127) / 64 * 64)) {}
Scratch::~Scratch() { std::free(data_); }

}  // namespace cpu_kernels
