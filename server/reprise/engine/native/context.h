// What outlives a step: the threads and the memory that steps work in. One step runs at a time.
#pragma once

#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#include "threads.h"

struct Context {
  explicit Context(int num_threads) : pool(num_threads) {}
  Pool pool;
  std::unique_ptr<char[]> memory;
  size_t size = 0;

  // Memory of at least so many bytes; what was in it is lost.
  char* reserve(size_t wanted) {
    if (size < wanted) {
      size = 0;
      memory.reset();
      memory.reset(new char[wanted]);
      size = wanted;
    }
    return memory.get();
  }
};

// What calls from outside return: no exception may leave this library.
enum Outcome { DONE = 0, NO_MEMORY = 1, FAILED = 2, OUT_OF_RANGE = 3 };

template <class F> int guarded(const F& f) {
  try {
    f();
    return DONE;
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  } catch (const std::out_of_range&) {
    return OUT_OF_RANGE;
  } catch (...) {
    return FAILED;
  }
}

constexpr size_t ALIGNMENT = 64;

// Hands out a step's memory; over no memory at all it only counts.
struct Workspace {
  explicit Workspace(char* memory) : start(((uintptr_t)memory + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT) {}
  uintptr_t start;
  size_t used = 0;
  template <class E> E* take(size_t count) {
    uintptr_t at = start + used;
    used += (count * sizeof(E) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return reinterpret_cast<E*>(at);
  }
};
