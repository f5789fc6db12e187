// Runs CUDA kernels on a CPU, unchanged: included before their source, compiled by a C++ compiler.
//
// Every CUDA thread is a fiber that runs until it meets a barrier. The order in which the threads
// run between two barriers is chosen by the caller, so that a race shows as a different result. A
// barrier that only some threads reach, or threads of a warp that meet different ones, abort.
// hopper.hpp adds clusters, and what runs beside the threads.
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

enum class State { ready, at_block_barrier, at_warp_barrier, waiting, done };

struct Thread {
  jmp_buf context;
  State state;
  bool started;
  int exchanges;  // shuffles so far: their slots alternate, so that one barrier each is enough
  double slots[2];
  std::function<bool()> until;  // of a thread that is waiting
};

static std::vector<Thread> threads;
static std::vector<char> stacks;
static std::function<void()> kernel;
static jmp_buf scheduler;
static int current;
static int first_block;                   // of those that run side by side
static std::function<bool()> background;  // does what runs beside the threads; false: nothing is left
static std::vector<int> laziness;         // of each warp: it runs in one round of so many
static std::mt19937 randomness;

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "block %d: %s\n", blockIdx.x, message);
  std::abort();
}

inline void wait(State state) {
  Thread& thread = threads[current];
  thread.state = state;
  if (_setjmp(thread.context) == 0) _longjmp(scheduler, 1);
}

inline void wait_until(std::function<bool()> until) {
  if (until()) return;
  threads[current].until = std::move(until);
  wait(State::waiting);
}

inline void enter() {
  kernel();
  threads[current].state = State::done;
  _longjmp(scheduler, 1);
}

// Lets one thread run until its next barrier.
inline void resume(int index) {
  current = index;
  threadIdx.x = index % blockDim.x;
  blockIdx.x = first_block + index / blockDim.x;
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
  for (Thread& thread : threads) {
    if (thread.state != State::waiting || !thread.until()) continue;
    thread.state = State::ready;
    opened = true;
  }
  if (opened) return true;
  if (!std::all_of(threads.begin(), threads.end(),
                   [](auto& t) { return t.state == State::at_block_barrier; })) {
    return false;
  }
  for (Thread& thread : threads) thread.state = State::ready;
  return true;
}

inline bool all_done(int first, int last) {
  return std::all_of(threads.begin() + first, threads.begin() + last,
                     [](auto& t) { return t.state == State::done; });
}

// Runs `count` threads to their ends. `order` 0: threads by number, 1: backwards, else: at random.
inline void run(int count, int order) {
  std::vector<int> queue(count);
  std::iota(queue.begin(), queue.end(), 0);
  if (order == 1) std::reverse(queue.begin(), queue.end());
  stacks.resize(kStackBytes * count);
  threads.assign(count, Thread{});
  for (;;) {
    if (order > 1) std::shuffle(queue.begin(), queue.end(), randomness);
    bool left_out = false;
    for (int index : queue) {
      if (threads[index].state != State::ready) continue;
      if (!laziness.empty() && randomness() % laziness[index / kLanes]) {
        left_out = true;
      } else {
        resume(index);
      }
    }
    if (all_done(0, count)) return;
    const bool beside = background && background();
    if (!release(count) && !beside && !left_out) fail("threads wait at different barriers");
  }
}

// Runs `body` as a grid of blocks, one after the other.
inline void launch(int blocks, int count, size_t shared_bytes, int order,
                   std::function<void()> body) {
  if (count % kLanes || count > 1024) fail("the block is no multiple of a warp, or too large");
  if (shared_bytes > kSharedBytes) fail("too much shared memory");
  kernel = std::move(body);
  blockDim.x = count;
  randomness.seed(order);
  for (first_block = 0; first_block < blocks; ++first_block) {
    std::memset(shared_memory, 0xff, kSharedBytes);  // NaN in float32 and float64
    run(count, order);
    for (size_t i = shared_bytes; i < kSharedBytes; ++i) {
      if (shared_memory[i] != 0xff) fail("a write beyond the shared memory that was asked for");
    }
  }
}

}  // namespace cuda_on_cpu

inline void __syncwarp() { cuda_on_cpu::wait(cuda_on_cpu::State::at_warp_barrier); }
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
