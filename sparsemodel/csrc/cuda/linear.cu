// A sparse matrix [rows, columns] times a dense one, and its gradients. Dense matrices are
// features first: [features, batch], the batch innermost.
#include "real.cuh"

#define COLUMNS 4  // batch entries of a lane, a warp apart
#define TILE (WARP * COLUMNS)
#define WARPS (BLOCK / WARP)
#define ENTRIES 4  // non-zeros of a warp in sddmm and sequence_norms

// y[r, b] = bias[r] + sum over the entries k of row r of values[k] x[cols[k], b].
//
// A warp has one row and TILE batch entries; rows run fastest, so that blocks at work at one
// time read the same columns of x. `order` (null: as it is) says where an entry's value stands.
KERNEL spmm(const int* row_ptr, const int* cols, const int* order, const Real* values,
            const Real* bias, const Real* x, Real* y, int rows, int batch) {
  int blocks_of_rows = (rows + WARPS - 1) / WARPS;
  int row = blockIdx.x % blocks_of_rows * WARPS + threadIdx.x / WARP;
  int lane = threadIdx.x % WARP;
  int start = blockIdx.x / blocks_of_rows * TILE + lane;
  if (row >= rows) return;
  float sum[COLUMNS];
  for (int j = 0; j < COLUMNS; ++j) sum[j] = bias ? load(bias[row]) : 0.0f;
  int end = row_ptr[row + 1];
  for (int first = row_ptr[row]; first < end; first += WARP) {
    int count = min(WARP, end - first), column = 0;
    float value = 0.0f;
    if (lane < count) {
      int k = first + lane;
      column = cols[k];
      value = load(values[order ? order[k] : k]);
    }
    for (int i = 0; i < count; ++i) {
      float v = __shfl_sync(FULL_WARP, value, i);
      const Real* line = x + (int64)__shfl_sync(FULL_WARP, column, i) * batch + start;
      for (int j = 0; j < COLUMNS; ++j)
        if (start + j * WARP < batch) sum[j] += v * load(line[j * WARP]);
    }
  }
  Real* out = y + (int64)row * batch + start;
  for (int j = 0; j < COLUMNS; ++j)
    if (start + j * WARP < batch) out[j * WARP] = store(sum[j]);
}

// gradient[k] = sum over b of dy[row of k, b] x[cols[k], b]: a warp for ENTRIES neighbours,
// which mostly share a row of dy.
KERNEL sddmm(const int* row_ptr, const int* cols, const Real* dy, const Real* x, Real* gradient,
             int rows, int nnz, int batch) {
  int lane = threadIdx.x % WARP;
  int64 first = global_thread() / WARP * ENTRIES;
  if (first >= nnz) return;
  int low = row_of(row_ptr, rows, first);
  int count = (int)min((int64)ENTRIES, nnz - first);
  const Real* from_dy[ENTRIES];
  const Real* from_x[ENTRIES];
  float sum[ENTRIES];
  for (int e = 0; e < ENTRIES; ++e) {
    int64 k = first + min(e, count - 1);
    while (row_ptr[low + 1] <= k) ++low;
    from_dy[e] = dy + (int64)low * batch;
    from_x[e] = x + (int64)cols[k] * batch;
    sum[e] = 0.0f;
  }
  for (int b = lane; b < batch; b += WARP)
    for (int e = 0; e < ENTRIES; ++e) sum[e] += load(from_dy[e][b]) * load(from_x[e][b]);
  for (int e = 0; e < ENTRIES; ++e) {
    float total = warp_sum(sum[e]);
    if (lane == 0 && e < count) gradient[first + e] = store(total);
  }
}

// norms[chunk, b] = sum over the rows of a chunk of dy[r, b]^2 (sum over k of x[cols[k], b]^2): the
// squared norm of each sample's gradient at the mask. A thread has one sample.
KERNEL square_norms(const int* row_ptr, const int* cols, const Real* dy, const Real* x,
                    float* norms, int rows, int batch, int rows_in_chunk) {
  int blocks_of_batch = (batch + BLOCK - 1) / BLOCK;
  int b = blockIdx.x % blocks_of_batch * BLOCK + threadIdx.x;
  int chunk = blockIdx.x / blocks_of_batch;
  if (b >= batch) return;
  int last = min(rows, (chunk + 1) * rows_in_chunk);
  float total = 0.0f;
  for (int row = chunk * rows_in_chunk; row < last; ++row) {
    float squares = 0.0f;
    for (int k = row_ptr[row]; k < row_ptr[row + 1]; ++k) {
      float v = load(x[(int64)cols[k] * batch + b]);
      squares += v * v;
    }
    float g = load(dy[(int64)row * batch + b]);
    total += g * g * squares;
  }
  norms[(int64)chunk * batch + b] = total;
}

// The same of samples with several positions t, dy [rows, positions, batch] and x alike: norms =
// sum over a chunk of non-zeros of (sum over t of dy[r, t, b] x[c, t, b])^2. A block has a chunk of
// WARPS * ENTRIES non-zeros and 32 samples, a warp ENTRIES neighbours, a lane one sample.
KERNEL sequence_norms(const int* row_ptr, const int* cols, const Real* dy, const Real* x,
                      float* norms, int rows, int nnz, int positions, int batch) {
  __shared__ float squares[WARPS][WARP];
  int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  int tiles = (batch + WARP - 1) / WARP, chunk = blockIdx.x / tiles;
  int b = blockIdx.x % tiles * WARP + lane;
  int64 first = ((int64)chunk * WARPS + warp) * ENTRIES, places = (int64)positions * batch;
  int count = (int)min((int64)ENTRIES, nnz - first);
  float total = 0.0f;
  if (count > 0 && b < batch) {
    int low = row_of(row_ptr, rows, first);
    const Real* from_dy[ENTRIES];
    const Real* from_x[ENTRIES];
    float sum[ENTRIES];
    for (int e = 0; e < ENTRIES; ++e) {
      int64 k = first + min(e, count - 1);
      while (row_ptr[low + 1] <= k) ++low;
      from_dy[e] = dy + low * places;
      from_x[e] = x + cols[k] * places;
      sum[e] = 0.0f;
    }
    for (int64 at = b; at < places; at += batch)
      for (int e = 0; e < ENTRIES; ++e) sum[e] += load(from_dy[e][at]) * load(from_x[e][at]);
    for (int e = 0; e < ENTRIES; ++e)
      if (e < count) total += sum[e] * sum[e];
  }
  squares[warp][lane] = total;
  __syncthreads();
  if (warp > 0 || b >= batch) return;
  for (int other = 1; other < WARPS; ++other) total += squares[other][lane];
  norms[(int64)chunk * batch + b] = total;
}
