// Threads that share the tasks of one job after the other.
//
// A job is a number of tasks, and is over when its tasks are, not when every thread has seen it: on a busy machine a
// thread that has no time slice holds up nobody unless it sleeps in the midst of a task.
#pragma once

#include <stdint.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

class Pool {
 public:
  explicit Pool(int num_threads) {
    try {
      for (int i = 1; i < num_threads; i++) threads_.emplace_back([this, i] { work(i); });
    } catch (...) {
      stop();
      throw;
    }
  }
  ~Pool() { stop(); }
  int size() const { return (int)threads_.size() + 1; }

  // Calls f(task, thread) for every task below num_tasks, in any order on any thread. Throws what one of them did, when
  // all are over.
  template <class F> void run(long num_tasks, const F& f) {
    if (num_tasks <= 1 || threads_.empty() || num_tasks > MOST) {
      for (long i = 0; i < num_tasks; i++) f(i, 0);
      return;
    }
    call_ = [](const void* g, long task, int thread) { (*static_cast<const F*>(g))(task, thread); };
    context_ = &f;
    num_done_.store(0, std::memory_order_relaxed);
    job_.store((uint64_t)num_tasks << SHIFT, std::memory_order_seq_cst);
    if (num_sleeping_.load(std::memory_order_seq_cst)) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    while (take(0)) {}
    for (int spins = 0; num_done_.load(std::memory_order_acquire) < num_tasks;) pause(spins);
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

 private:
  static constexpr int SHIFT = 32;
  static constexpr long MOST = 1L << 30;
  static constexpr int SPINS = 4000;

  static void pause(int& spins) {
    if (spins >= SPINS) {
      std::this_thread::yield();
      return;
    }
    spins++;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  bool has_tasks() const {
    uint64_t job = job_.load(std::memory_order_seq_cst);
    return (uint32_t)job < job >> SHIFT;
  }

  // One task, if there is one. The job's number of tasks and the next one are one word, so that a thread that comes
  // late finds none, or one of the next job.
  bool take(int thread) {
    if (!has_tasks()) return false;
    uint64_t job = job_.fetch_add(1, std::memory_order_acq_rel);
    if ((uint32_t)job >= job >> SHIFT) return false;
    try {
      call_(context_, (long)(uint32_t)job, thread);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      failure_ = std::current_exception();
    }
    num_done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  void stop() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_.store(true);
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  void work(int thread) {
    while (!stopping_.load(std::memory_order_relaxed)) {
      for (int spins = 0; spins < SPINS;) {
        if (take(thread)) spins = 0;
        else pause(spins);
      }
      std::unique_lock<std::mutex> lock(mutex_);
      num_sleeping_.fetch_add(1, std::memory_order_seq_cst);
      wake_.wait(lock, [&] { return has_tasks() || stopping_.load(); });
      num_sleeping_.fetch_sub(1, std::memory_order_seq_cst);
    }
  }

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> job_{0};  // tasks of the job, and below SHIFT the next of them
  std::atomic<long> num_done_{0};
  std::atomic<int> num_sleeping_{0};
  std::atomic<bool> stopping_{false};
  std::exception_ptr failure_;  // of a task, read when all are done
  void (*call_)(const void*, long, int) = nullptr;
  const void* context_ = nullptr;
};
