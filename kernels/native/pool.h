// A small thread pool for work that comes in steps: threads spin for a moment, since the next step is near, then sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "native/isa.h"

namespace retinar {

class Pool {
 public:
  // ``threads`` at least 1, the caller of run being the first of them. ``pin``: each to a processor of its own.
  Pool(int threads, bool pin);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  RETINAR_INLINE int threads() const { return threads_; }

  // work(context, thread) on every thread; returns when all are done. One caller at a time.
  void run(void (*work)(void*, int), void* context);

  // Inside work: waits until every thread has come here, and makes what they wrote visible to all.
  void barrier();

 private:
  void loop(int thread);

  const int threads_;
  std::vector<std::thread> workers_;
  void (*work_)(void*, int) = nullptr;
  void* context_ = nullptr;
  // On lines of their own: a thread that spins on one must not be disturbed by writes to another.
  alignas(64) std::atomic<std::uint32_t> begun_{0};
  alignas(64) std::atomic<int> running_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<std::uint32_t> phase_{0};
};

// The share [first, last) of ``count`` things that belongs to a thread: contiguous, and equal but for one.
struct Share {
  std::int64_t first;
  std::int64_t last;
};

RETINAR_INLINE Share share(std::int64_t count, int thread, int threads) {
  return {count * thread / threads, count * (thread + 1) / threads};
}

}  // namespace retinar
