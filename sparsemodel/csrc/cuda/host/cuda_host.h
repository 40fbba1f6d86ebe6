// Runs a .cu file on a CPU, so that its arithmetic is checked where there is no GPU.
//
// Every CUDA thread of a block is a fibre. A fibre runs until it meets a barrier or a warp
// exchange, so a kernel that forgets one reads what other threads have not written yet. Blocks
// run one after the other. In which order fibres (and blocks) run is drawn from a seed:
// 0 is in order, anything else a shuffle for each round.
//
// What this cannot show: races inside one barrier-free stretch of different warps that only
// true parallelism meets, memory ordering, alignment faults, and how fast anything is.
#pragma once
#define CUDA_ON_HOST

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

struct Dim { unsigned x = 1, y = 1, z = 1; };
static Dim blockIdx, threadIdx, blockDim, gridDim;

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define __forceinline__ inline

namespace host {

enum class State { ready, at_barrier, at_exchange, done };

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state;
};

constexpr size_t STACK = 64 * 1024;
constexpr unsigned LANES = 32;
static std::vector<Fibre> fibres;
static std::vector<uint64_t> slots;  // what each thread offers its warp
static ucontext_t scheduler;
static unsigned current;
static void (*body)(void**);
static void** arguments;
static std::mt19937 order;
static bool shuffled;

inline void wait(State state) {
  fibres[current].state = state;
  swapcontext(&fibres[current].context, &scheduler);
}

inline void entry() {
  body(arguments);
  wait(State::done);
}

inline bool all_are(unsigned first, unsigned last, State state) {
  for (unsigned t = first; t < last; ++t)
    if (fibres[t].state != state) return false;
  return true;
}

inline void free_those(unsigned first, unsigned last) {
  for (unsigned t = first; t < last; ++t) fibres[t].state = State::ready;
}

// A block is through, or its barriers and exchanges are met by all who must meet them.
inline bool release(unsigned threads) {
  if (all_are(0, threads, State::done)) return false;
  bool progress = false;
  for (unsigned first = 0; first < threads; first += LANES) {
    unsigned last = std::min(first + LANES, threads);
    if (!all_are(first, last, State::at_exchange)) continue;
    free_those(first, last);
    progress = true;
  }
  if (all_are(0, threads, State::at_barrier)) {
    free_those(0, threads);
    progress = true;
  }
  if (!progress) {
    std::fprintf(stderr, "block %u: threads wait for threads that never come\n", blockIdx.x);
    std::abort();
  }
  return true;
}

inline void run_block(unsigned threads) {
  fibres.resize(threads);
  slots.assign(threads, 0);
  for (auto& f : fibres) {
    if (!f.stack) f.stack = std::make_unique<char[]>(STACK);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = STACK;
    f.context.uc_link = nullptr;
    makecontext(&f.context, entry, 0);
    f.state = State::ready;
  }
  std::vector<unsigned> turn(threads);
  for (unsigned t = 0; t < threads; ++t) turn[t] = t;
  do {
    if (shuffled) std::shuffle(turn.begin(), turn.end(), order);
    for (unsigned t : turn) {
      if (fibres[t].state != State::ready) continue;
      current = t;
      threadIdx.x = t;
      swapcontext(&scheduler, &fibres[t].context);
    }
  } while (release(threads));
}

inline void run(void (*kernel)(void**), unsigned blocks, unsigned threads, void** args,
                unsigned seed) {
  body = kernel;
  arguments = args;
  gridDim.x = blocks;
  blockDim.x = threads;
  order.seed(seed);
  shuffled = seed != 0;
  std::vector<unsigned> turn(blocks);
  for (unsigned b = 0; b < blocks; ++b) turn[b] = b;
  if (shuffled) std::shuffle(turn.begin(), turn.end(), order);
  for (unsigned b : turn) {
    blockIdx.x = b;
    run_block(threads);
  }
}

template <int I, class First, class... Rest>
struct Nth : Nth<I - 1, Rest...> {};
template <class First, class... Rest>
struct Nth<0, First, Rest...> { using type = First; };

// Every lane of the warp gives a value and reads that of lane `source`.
template <class T>
T exchange(T value, unsigned source_lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a slot holds eight bytes");
  unsigned first = current / LANES * LANES;
  std::memcpy(&slots[current], &value, sizeof(T));
  wait(State::at_exchange);
  T found;
  std::memcpy(&found, &slots[first + source_lane % LANES], sizeof(T));
  wait(State::at_exchange);
  return found;
}

}  // namespace host

// Argument I of a kernel, which lies where arguments[I] points.
template <int I, class... Types>
auto host_argument(void (*)(Types...), void** arguments) {
  return *(typename host::Nth<I, Types...>::type*)arguments[I];
}

inline void __syncthreads() { host::wait(host::State::at_barrier); }
inline void __syncwarp(unsigned = 0xffffffffu) { host::wait(host::State::at_exchange); }
template <class T>
T __shfl_sync(unsigned, T value, int lane) { return host::exchange(value, lane); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int step) {
  return host::exchange(value, (host::current % host::LANES) ^ step);
}
template <class T>
T atomicAdd(T* address, T value) { T old = *address; *address += value; return old; }

inline unsigned __float_as_uint(float f) { unsigned u; std::memcpy(&u, &f, 4); return u; }
inline float __uint_as_float(unsigned u) { float f; std::memcpy(&f, &u, 4); return f; }
using std::max;
using std::min;

inline float host_half_to_float(unsigned short bits) {
  _Float16 h;
  std::memcpy(&h, &bits, 2);
  return (float)h;
}
inline unsigned short host_float_to_half(float f) {
  _Float16 h = (_Float16)f;
  unsigned short bits;
  std::memcpy(&bits, &h, 2);
  return bits;
}
