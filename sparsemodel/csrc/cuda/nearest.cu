// The nearest prototype of each point, without the matrix of distances.
#include "real.cuh"

#define SIDE 64   // points and prototypes of a tile
#define DEPTH 16  // coordinates in shared memory at one time
#define GRID 16   // threads along a side of a tile
#define OWN (SIDE / GRID)

// Whether a prototype is nearer than the best so far; the lower index wins a tie, and NaN wins
// over numbers, as in torch.argmin.
__device__ inline bool nearer(float distance, int index, float best, int best_index) {
  bool unknown = distance != distance, best_unknown = best != best;
  if (unknown || best_unknown) return unknown && (!best_unknown || index < best_index);
  return distance < best || (distance == best && index < best_index);
}

// Squared distances are sums of squared differences: no cancellation, and equal prototypes tie.
KERNEL nearest(const Real* points, const Real* prototypes, int64* index, float* distance,
               int num_points, int num_prototypes, int width) {
  __shared__ float tile_a[DEPTH][SIDE + 1], tile_b[DEPTH][SIDE + 1];
  __shared__ float distances[SIDE][GRID];
  __shared__ int indices[SIDE][GRID];
  int tx = threadIdx.x % GRID, ty = threadIdx.x / GRID;
  int first_point = blockIdx.x * SIDE;
  float best[OWN];
  int best_index[OWN];
  for (int i = 0; i < OWN; ++i) {
    best[i] = __uint_as_float(0x7f800000u);  // infinity
    best_index[i] = num_prototypes;
  }
  for (int first = 0; first < num_prototypes; first += SIDE) {
    float sum[OWN][OWN] = {};
    for (int start = 0; start < width; start += DEPTH) {
      for (int i = threadIdx.x; i < SIDE * DEPTH; i += BLOCK) {
        int row = i / DEPTH, column = i % DEPTH, d = start + column;
        int p = first_point + row, q = first + row;
        bool inside = d < width;
        tile_a[column][row] =
            inside && p < num_points ? load(points[(int64)p * width + d]) : 0.0f;
        tile_b[column][row] =
            inside && q < num_prototypes ? load(prototypes[(int64)q * width + d]) : 0.0f;
      }
      __syncthreads();
      for (int d = 0; d < DEPTH; ++d)
        for (int i = 0; i < OWN; ++i)
          for (int j = 0; j < OWN; ++j) {
            float difference = tile_a[d][ty + GRID * i] - tile_b[d][tx + GRID * j];
            sum[i][j] += difference * difference;
          }
      __syncthreads();
    }
    for (int j = 0; j < OWN; ++j) {
      int q = first + tx + GRID * j;
      if (q >= num_prototypes) break;
      for (int i = 0; i < OWN; ++i)
        if (nearer(sum[i][j], q, best[i], best_index[i])) {
          best[i] = sum[i][j];
          best_index[i] = q;
        }
    }
  }
  for (int i = 0; i < OWN; ++i) {
    distances[ty + GRID * i][tx] = best[i];
    indices[ty + GRID * i][tx] = best_index[i];
  }
  __syncthreads();
  int own = threadIdx.x, point = first_point + own;
  if (own >= SIDE || point >= num_points) return;
  float least = distances[own][0];
  int at = indices[own][0];
  for (int t = 1; t < GRID; ++t)
    if (nearer(distances[own][t], indices[own][t], least, at)) {
      least = distances[own][t];
      at = indices[own][t];
    }
  index[point] = at;
  distance[point] = least;
}
