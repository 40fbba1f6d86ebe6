// What every kernel file starts from. No header of the toolkit is needed: run-time compilation
// has none, and csrc/cuda/host/cuda_host.h runs the same text on a CPU.
#pragma once

#define BLOCK 256  // threads of every block
#define WARP 32
#define FULL_WARP 0xffffffffu
// So many blocks fit on a multiprocessor by their registers; the most at which nothing spills.
#ifndef RESIDENT
#define RESIDENT 4
#endif
#define KERNEL extern "C" __global__ void __launch_bounds__(BLOCK, RESIDENT)

typedef unsigned int uint32;
typedef long long int64;
typedef unsigned long long uint64;

__device__ inline int64 global_thread() { return (int64)blockIdx.x * BLOCK + threadIdx.x; }

// The sum over a warp, in every lane; always added in the same order.
__device__ inline float warp_sum(float value) {
  for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(FULL_WARP, value, step);
  return value;
}

// The last row that begins at `entry` or before, so the one that holds it unless rows are empty.
__device__ inline int row_of(const int* row_ptr, int rows, int64 entry) {
  int low = 0, high = rows;
  while (high - low > 1) {
    int middle = (low + high) / 2;
    if (row_ptr[middle] <= entry) low = middle; else high = middle;
  }
  return low;
}
