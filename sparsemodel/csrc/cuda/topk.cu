// The largest weight gradients outside the mask, without the dense gradient: tiles of it are
// computed, looked at and forgotten, once for each digit of a radix selection and once to write
// down what was selected.
#define RESIDENT 3

#include "geometry.cuh"
#include "real.cuh"

#define SIDE 64   // output channels and columns of a tile
#define DEPTH 16  // outputs in shared memory at one time
#define GRID 16   // threads along a side of a tile
#define OWN (SIDE / GRID)
#define BINS 4096
#define MAX_POSITION 0x7fffffffu

// Larger magnitude first, then lower position: no two keys are equal.
__device__ inline uint64 key_of(float gradient, uint32 position) {
  uint32 magnitude = __float_as_uint(gradient) & 0x7fffffffu;
  return (uint64)magnitude << 31 | (MAX_POSITION - position);
}

// Which of the columns first, first + 1, ... of a row are active, a bit each.
__device__ inline uint64 active_columns(const int* row_ptr, const int* cols, int row, int first) {
  int low = row_ptr[row], end = row_ptr[row + 1], high = end;
  while (low < high) {
    int middle = low + (high - low) / 2;
    if (cols[middle] < first) low = middle + 1; else high = middle;
  }
  uint64 bits = 0;
  for (; low < end && cols[low] < first + SIDE; ++low) bits |= (uint64)1 << (cols[low] - first);
  return bits;
}

// A block has a tile of the gradient of the weight [out, row_length] of one group.
//
// emit == 0: counts into histogram[digit] the pruned places whose key begins with `prefix`,
// digit being the `width` bits above `shift`; into histogram[BINS] those that are NaN.
// emit == 1: writes down key and gradient of the places with key >> shift >= prefix; histogram[0]
// counts them, and no more than `capacity` are written.
KERNEL topk_grad(const Real* x, const Real* dy, const int* row_ptr, const int* cols,
                 const int* geometry, int shift, int width, uint64 prefix, int emit,
                 int* histogram, int64* keys, float* gradients, int capacity) {
  __shared__ float tile_a[DEPTH][SIDE + 1], tile_b[DEPTH][SIDE + 1];
  __shared__ uint64 active[SIDE];
  __shared__ int counts[BINS];
  Geometry g = read_geometry(geometry);
  int length = g.row_length(), out_width = g.out_channels / g.groups;
  int tiles_across = (length + SIDE - 1) / SIDE, tiles_down = (out_width + SIDE - 1) / SIDE;
  int first_column = blockIdx.x % tiles_across * SIDE;
  int group = blockIdx.x / tiles_across / tiles_down;
  int first_row = group * out_width + blockIdx.x / tiles_across % tiles_down * SIDE;
  int last_row = (group + 1) * out_width;
  int tx = threadIdx.x % GRID, ty = threadIdx.x / GRID;
  for (int i = threadIdx.x; i < BINS; i += BLOCK) counts[i] = 0;
  if (threadIdx.x < SIDE && first_row + (int)threadIdx.x < last_row)
    active[threadIdx.x] =
        active_columns(row_ptr, cols, first_row + threadIdx.x, first_column);
  // A thread brings the same output, tx, of the rows and columns ty, ty + GRID, ...
  Tap taps[OWN];
  for (int i = 0; i < OWN; ++i) taps[i] = tap_of(g, min(first_column + ty + GRID * i, length - 1));
  float sum[OWN][OWN] = {};
  int outputs = g.outputs();
  for (int start = 0; start < outputs; start += DEPTH) {
    int output = start + tx;
    Window w = window_of(g, output);
    for (int i = 0; i < OWN; ++i) {
      int row = first_row + ty + GRID * i;
      tile_a[tx][ty + GRID * i] = output < outputs && row < last_row
                                      ? load(dy[(int64)row * outputs + output]) : 0.0f;
      int64 at = input_at(g, w, group * g.in_width() + taps[i].channel, taps[i].down,
                          taps[i].right);
      tile_b[tx][ty + GRID * i] = output < outputs && at >= 0 ? load(x[at]) : 0.0f;
    }
    __syncthreads();
    for (int d = 0; d < DEPTH; ++d)
      for (int i = 0; i < OWN; ++i)
        for (int j = 0; j < OWN; ++j)
          sum[i][j] += tile_a[d][ty + GRID * i] * tile_b[d][tx + GRID * j];
    __syncthreads();
  }
  __syncthreads();  // `active` and `counts` are there, too, where there are no outputs
  for (int i = 0; i < OWN; ++i)
    for (int j = 0; j < OWN; ++j) {
      int row = first_row + ty + GRID * i, column = tx + GRID * j;
      if (row >= last_row || first_column + column >= length) continue;
      if (active[ty + GRID * i] >> column & 1) continue;
      float gradient = sum[i][j];
      uint64 key = key_of(gradient, (uint32)row * (uint32)length + first_column + column);
      if (emit) {
        if (key >> shift < prefix) continue;
        int place = atomicAdd(histogram, 1);
        if (place >= capacity) continue;  // the inputs have changed since they were counted
        keys[place] = (int64)key;
        gradients[place] = gradient;
      } else {
        if (gradient != gradient) atomicAdd(histogram + BINS, 1);
        if (key >> (shift + width) == prefix)
          atomicAdd(counts + (int)(key >> shift & (((uint64)1 << width) - 1)), 1);
      }
    }
  if (emit) return;
  __syncthreads();
  for (int i = threadIdx.x; i < BINS; i += BLOCK)
    if (counts[i]) atomicAdd(histogram + i, counts[i]);
}
