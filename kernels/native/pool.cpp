#include "native/pool.h"

#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace retinar {
namespace {

// About 100 us: longer than Python takes between two steps, shorter than anyone would notice on a battery.
constexpr int patience = 4000;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until done() or out of patience; whether it was done.
template <typename Done>
bool spin(Done done) {
  for (int i = 0; i < patience; ++i) {
    if (done()) return true;
    pause();
  }
  return false;
}

void pin_to(int index) {
#ifdef __linux__
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed) || index-- > 0) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    pthread_setaffinity_np(pthread_self(), sizeof one, &one);
    return;
  }
#else
  static_cast<void>(index);
#endif
}

}  // namespace

Pool::Pool(int threads, bool pin) : threads_(threads) {
  for (int thread = 1; thread < threads_; ++thread) {
    workers_.emplace_back([this, thread, pin] {
      if (pin) pin_to(thread);
      loop(thread);
    });
  }
}

Pool::~Pool() {
  work_ = nullptr;
  begun_.fetch_add(1, std::memory_order_release);
  begun_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Pool::loop(int thread) {
  std::uint32_t seen = 0;
  for (;;) {
    if (!spin([&] { return begun_.load(std::memory_order_acquire) != seen; })) {
      begun_.wait(seen, std::memory_order_acquire);
    }
    ++seen;  // one run at a time: it cannot be further
    if (work_ == nullptr) return;
    work_(context_, thread);
    running_.fetch_sub(1, std::memory_order_release);
  }
}

void Pool::run(void (*work)(void*, int), void* context) {
  work_ = work;
  context_ = context;
  running_.store(threads_ - 1, std::memory_order_relaxed);
  begun_.fetch_add(1, std::memory_order_release);
  begun_.notify_all();
  work(context, 0);
  while (!spin([&] { return running_.load(std::memory_order_acquire) == 0; })) std::this_thread::yield();
}

void Pool::barrier() {
  if (threads_ == 1) return;
  const std::uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.fetch_add(1, std::memory_order_release);
    return;
  }
  // A thread that shares its processor with another must let it go on.
  while (!spin([&] { return phase_.load(std::memory_order_acquire) != phase; })) std::this_thread::yield();
}

}  // namespace retinar
