// Sparse convolution and its gradients in the batch-innermost layout [C, H, W, B]; the weight is
// CSR by output channel, its columns run over (input channel of the group, window row, column).
#include "geometry.cuh"
#include "real.cuh"

#define COLUMNS 4  // places of a lane, a warp apart
#define TILE (WARP * COLUMNS)
#define WARPS (BLOCK / WARP)
#define ENTRIES 4  // non-zeros of a warp in conv_weight

// y[o, places]: a warp has one output channel and TILE places (pixels and samples).
KERNEL conv_forward(const int* row_ptr, const int* cols, const Real* values, const Real* bias,
                    const Real* x, Real* y, const int* geometry) {
  Geometry g = read_geometry(geometry);
  int blocks_of_rows = (g.out_channels + WARPS - 1) / WARPS, outputs = g.outputs();
  int row = blockIdx.x % blocks_of_rows * WARPS + threadIdx.x / WARP;
  int lane = threadIdx.x % WARP;
  int start = blockIdx.x / blocks_of_rows * TILE + lane;
  if (row >= g.out_channels) return;
  float sum[COLUMNS];
  Window windows[COLUMNS];
  for (int j = 0; j < COLUMNS; ++j) {
    sum[j] = bias ? load(bias[row]) : 0.0f;
    windows[j] = window_of(g, min(start + j * WARP, outputs - 1));
  }
  int end = row_ptr[row + 1];
  for (int first = row_ptr[row]; first < end; first += WARP) {
    int count = min(WARP, end - first);
    Tap tap = {0, 0, 0};
    float value = 0.0f;
    if (lane < count) {
      tap = tap_of(g, cols[first + lane]);
      value = load(values[first + lane]);
    }
    for (int i = 0; i < count; ++i) {
      float v = __shfl_sync(FULL_WARP, value, i);
      int channel = g.first_channel(row) + __shfl_sync(FULL_WARP, tap.channel, i);
      int down = __shfl_sync(FULL_WARP, tap.down, i);
      int right = __shfl_sync(FULL_WARP, tap.right, i);
      for (int j = 0; j < COLUMNS; ++j) {
        int64 at = input_at(g, windows[j], channel, down, right);
        if (at >= 0) sum[j] += v * load(x[at]);
      }
    }
  }
  for (int j = 0; j < COLUMNS; ++j)
    if (start + j * WARP < outputs) y[(int64)row * outputs + start + j * WARP] = store(sum[j]);
}

// Which output sees input place `position` through window entry `entry`: -1 if none does.
__device__ inline int output_of(int position, int entry, int stride, int pad, int dilation,
                                int size) {
  int distance = position + pad - entry * dilation;
  if (distance < 0 || distance % stride != 0 || distance / stride >= size) return -1;
  return distance / stride;
}

// dx[c, places]: a warp has one input channel and TILE places. Row (c, i, j) of the transposed
// pattern has the output channels that read channel c through window entry (i, j).
KERNEL conv_input(const int* t_row_ptr, const int* t_cols, const int* order, const Real* values,
                  const Real* dy, Real* dx, const int* geometry) {
  Geometry g = read_geometry(geometry);
  int blocks_of_rows = (g.in_channels + WARPS - 1) / WARPS, inputs = g.inputs();
  int channel = blockIdx.x % blocks_of_rows * WARPS + threadIdx.x / WARP;
  int lane = threadIdx.x % WARP;
  int start = blockIdx.x / blocks_of_rows * TILE + lane;
  if (channel >= g.in_channels) return;
  float sum[COLUMNS] = {};
  for (int entry = 0; entry < g.kernel_h * g.kernel_w; ++entry) {
    int row = channel * g.kernel_h * g.kernel_w + entry, end = t_row_ptr[row + 1];
    int64 places[COLUMNS];  // inside an output channel
    for (int j = 0; j < COLUMNS; ++j) {
      int place = start + j * WARP, pixel = place / g.batch;
      int oh = output_of(pixel / g.in_w, entry / g.kernel_w, g.stride_h, g.pad_h, g.dilation_h,
                         g.out_h);
      int ow = output_of(pixel % g.in_w, entry % g.kernel_w, g.stride_w, g.pad_w, g.dilation_w,
                         g.out_w);
      bool seen = place < inputs && oh >= 0 && ow >= 0;
      places[j] = seen ? ((int64)oh * g.out_w + ow) * g.batch + place % g.batch : -1;
    }
    for (int first = t_row_ptr[row]; first < end; first += WARP) {
      int count = min(WARP, end - first), out = 0;
      float value = 0.0f;
      if (lane < count) {
        out = t_cols[first + lane];
        value = load(values[order[first + lane]]);
      }
      for (int i = 0; i < count; ++i) {
        float v = __shfl_sync(FULL_WARP, value, i);
        const Real* line = dy + (int64)__shfl_sync(FULL_WARP, out, i) * g.outputs();
        for (int j = 0; j < COLUMNS; ++j)
          if (places[j] >= 0) sum[j] += v * load(line[places[j]]);
      }
    }
  }
  for (int j = 0; j < COLUMNS; ++j)
    if (start + j * WARP < inputs) dx[(int64)channel * inputs + start + j * WARP] = store(sum[j]);
}

// gradient[k] = sum over places of dy[row of k, place] x[what it sees]: a warp for ENTRIES
// neighbours, which share the arithmetic of places.
KERNEL conv_weight(const int* row_ptr, const int* cols, const Real* dy, const Real* x,
                   Real* gradient, int nnz, const int* geometry) {
  Geometry g = read_geometry(geometry);
  int lane = threadIdx.x % WARP, outputs = g.outputs();
  int64 first = global_thread() / WARP * ENTRIES;
  if (first >= nnz) return;
  int low = row_of(row_ptr, g.out_channels, first);
  int count = (int)min((int64)ENTRIES, nnz - first);
  const Real* lines[ENTRIES];
  Tap taps[ENTRIES];
  float sum[ENTRIES];
  for (int e = 0; e < ENTRIES; ++e) {
    int64 k = first + min(e, count - 1);
    while (row_ptr[low + 1] <= k) ++low;
    lines[e] = dy + (int64)low * outputs;
    taps[e] = tap_of(g, cols[k]);
    taps[e].channel += g.first_channel(low);
    sum[e] = 0.0f;
  }
  for (int output = lane; output < outputs; output += WARP) {
    Window w = window_of(g, output);
    for (int e = 0; e < ENTRIES; ++e) {
      int64 at = input_at(g, w, taps[e].channel, taps[e].down, taps[e].right);
      if (at >= 0) sum[e] += load(lines[e][output]) * load(x[at]);
    }
  }
  for (int e = 0; e < ENTRIES; ++e) {
    float total = warp_sum(sum[e]);
    if (lane == 0 && e < count) gradient[first + e] = store(total);
  }
}

// norms[chunk, b] = sum over a chunk of non-zeros of (sum over pixels of dy x)^2: the squared norm
// of each sample's gradient at the mask. A block has a chunk of WARPS * ENTRIES non-zeros and 32
// samples, a warp ENTRIES neighbours, a lane one sample.
KERNEL conv_square_norms(const int* row_ptr, const int* cols, const Real* dy, const Real* x,
                         float* norms, int nnz, const int* geometry) {
  __shared__ float squares[WARPS][WARP];
  Geometry g = read_geometry(geometry);
  int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  int tiles = (g.batch + WARP - 1) / WARP, chunk = blockIdx.x / tiles, outputs = g.outputs();
  int b = blockIdx.x % tiles * WARP + lane;
  int64 first = ((int64)chunk * WARPS + warp) * ENTRIES;
  int count = (int)min((int64)ENTRIES, nnz - first);
  float total = 0.0f;
  if (count > 0 && b < g.batch) {
    int low = row_of(row_ptr, g.out_channels, first);
    const Real* lines[ENTRIES];
    Tap taps[ENTRIES];
    float sum[ENTRIES];
    for (int e = 0; e < ENTRIES; ++e) {
      int64 k = first + min(e, count - 1);
      while (row_ptr[low + 1] <= k) ++low;
      lines[e] = dy + (int64)low * outputs;
      taps[e] = tap_of(g, cols[k]);
      taps[e].channel += g.first_channel(low);
      sum[e] = 0.0f;
    }
    for (uint32 output = b; output < outputs; output += g.batch) {  // past 2^31 at its end
      Window w = window_of(g, (int)output);
      for (int e = 0; e < ENTRIES; ++e) {
        int64 at = input_at(g, w, taps[e].channel, taps[e].down, taps[e].right);
        if (at >= 0) sum[e] += load(lines[e][output]) * load(x[at]);
      }
    }
    for (int e = 0; e < ENTRIES; ++e)
      if (e < count) total += sum[e] * sum[e];
  }
  squares[warp][lane] = total;
  __syncthreads();
  if (warp > 0 || b >= g.batch) return;
  for (int other = 1; other < WARPS; ++other) total += squares[other][lane];
  norms[(int64)chunk * g.batch + b] = total;
}
