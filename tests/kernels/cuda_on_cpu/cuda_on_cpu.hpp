// Runs CUDA kernels on a CPU, unchanged: included before their source, compiled by a C++ compiler.
//
// Every CUDA thread is a fiber that runs until it meets a barrier. The order in which the threads
// run between two barriers is chosen by the caller, so that a race shows as a different result. A
// barrier that only some threads reach, or threads of a warp that meet different ones, abort.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __forceinline__ inline
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

using std::copysign;
using std::fabs;
using std::fmax;
using std::fmin;
using std::frexp;
using std::hypot;
using std::ldexp;
using std::sqrt;

struct Index {
  int x;
};
static Index threadIdx, blockIdx, blockDim;

constexpr size_t kSharedBytes = 232448;  // of a Hopper block

namespace corda {  // where the kernels declare it
alignas(16) unsigned char shared_memory[kSharedBytes];
}
using corda::shared_memory;

namespace cuda_on_cpu {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 64 * 1024;

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Thread {
  jmp_buf context;
  State state;
  bool started;
  int exchanges;  // shuffles so far: their slots alternate, so that one barrier each is enough
  double slots[2];
};

static std::vector<Thread> threads;
static std::vector<char> stacks;
static std::function<void()> kernel;
static jmp_buf scheduler;
static int current;

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "block %d: %s\n", blockIdx.x, message);
  std::abort();
}

inline void wait(State state) {
  Thread& thread = threads[current];
  thread.state = state;
  if (_setjmp(thread.context) == 0) _longjmp(scheduler, 1);
}

inline void enter() {
  kernel();
  threads[current].state = State::done;
  _longjmp(scheduler, 1);
}

// Lets one thread run until its next barrier.
inline void resume(int index) {
  current = index;
  threadIdx.x = index;
  if (_setjmp(scheduler) != 0) return;
  Thread& thread = threads[index];
  thread.state = State::ready;
  if (thread.started) _longjmp(thread.context, 1);
  thread.started = true;
  ucontext_t first;
  getcontext(&first);
  first.uc_stack.ss_sp = &stacks[kStackBytes * index];
  first.uc_stack.ss_size = kStackBytes;
  first.uc_link = nullptr;
  makecontext(&first, enter, 0);
  setcontext(&first);
}

// Opens the barriers that are complete. False if none is.
inline bool release(int count) {
  bool opened = false;
  for (int warp = 0; warp < count; warp += kLanes) {
    const auto first = threads.begin() + warp, last = first + kLanes;
    if (std::all_of(first, last, [](auto& t) { return t.state == State::at_warp_barrier; })) {
      std::for_each(first, last, [](auto& t) { t.state = State::ready; });
      opened = true;
    }
  }
  if (opened) return true;
  if (!std::all_of(threads.begin(), threads.end(),
                   [](auto& t) { return t.state == State::at_block_barrier; })) {
    return false;
  }
  for (Thread& thread : threads) thread.state = State::ready;
  return true;
}

// Runs `body` as a grid of blocks. `order` 0: threads by number, 1: backwards, else: at random.
inline void launch(int blocks, int count, size_t shared_bytes, int order,
                   std::function<void()> body) {
  if (count % kLanes || count > 1024) fail("the block is no multiple of a warp, or too large");
  if (shared_bytes > kSharedBytes) fail("too much shared memory");
  kernel = std::move(body);
  stacks.resize(kStackBytes * count);
  blockDim.x = count;
  std::vector<int> queue(count);
  std::iota(queue.begin(), queue.end(), 0);
  if (order == 1) std::reverse(queue.begin(), queue.end());
  std::mt19937 random(order);
  for (int block = 0; block < blocks; ++block) {
    blockIdx.x = block;
    std::memset(shared_memory, 0xff, kSharedBytes);  // NaN in float32 and float64
    threads.assign(count, Thread{});
    for (;;) {
      if (order > 1) std::shuffle(queue.begin(), queue.end(), random);
      for (int index : queue) {
        if (threads[index].state == State::ready) resume(index);
      }
      if (std::all_of(threads.begin(), threads.end(),
                      [](auto& t) { return t.state == State::done; })) {
        break;
      }
      if (!release(count)) fail("threads wait at different barriers");
    }
    for (size_t i = shared_bytes; i < kSharedBytes; ++i) {
      if (shared_memory[i] != 0xff) fail("a write beyond the shared memory that was asked for");
    }
  }
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::State::at_block_barrier); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  using namespace cuda_on_cpu;
  const int me = current, slot = threads[me].exchanges++ % 2;
  std::memcpy(&threads[me].slots[slot], &value, sizeof value);
  wait(State::at_warp_barrier);
  std::memcpy(&value, &threads[me ^ mask].slots[slot], sizeof value);
  return value;
}
