// One loop, its iterations shared among the threads of XLA's own pool; compiled once, so that every kernel may use it.
#ifndef CPU_KERNELS_PARALLEL_H_
#define CPU_KERNELS_PARALLEL_H_

#include <stddef.h>
#include <stdint.h>

namespace cpu_kernels {

// Who can help: XLA's intra-operation pool, as a pointer and a function, so that kernels need not know XLA.
struct Pool {
  void* threads;
  int64_t size;                                                     // threads beside the caller that may help
  void (*schedule)(void* threads, void (*run)(void*), void* task);  // runs run(task) some time, on some thread

  // The same pool, of no more threads than `operations` (multiplications, numbers converted) are worth waking.
  Pool for_work(int64_t operations) const;

  // Workers that `parallel_for` may number: scratch for each of them is allocated by its caller.
  int64_t max_workers(int64_t tasks) const;
};

// body(context, task, worker) for each task in [0, tasks), in any order, on the caller and on threads of the pool.
//
// Tasks are taken from a counter, a few neighbours at a time, so a slow thread holds up nobody. The caller works too and, once no task
// is left, waits only for those that have begun: a pool that is busy or has a single thread cannot stop it. A worker,
// numbered below `max_workers`, runs one task at a time. Every task sees the same floating-point environment (nearest,
// subnormals kept), so that results do not depend on who ran it.
void parallel_for(const Pool& pool, int64_t tasks, void (*body)(void*, int64_t task, int64_t worker), void* context);

// The same for a function object.
template <typename Body>
void parallel_for(const Pool& pool, int64_t tasks, Body& body) {
  parallel_for(
      pool, tasks, [](void* f, int64_t task, int64_t worker) { (*static_cast<Body*>(f))(task, worker); }, &body);
}

// Uninitialised memory, aligned to a cache line, for the length of one call.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* data() const { return data_; }  // null: there was not enough memory
  float* floats() const { return static_cast<float*>(data_); }

 private:
  void* data_;
};

}  // namespace cpu_kernels

#endif  // CPU_KERNELS_PARALLEL_H_
