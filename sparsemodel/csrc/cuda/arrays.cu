// Masks as bits, optimiser steps on active values, and sums of sparse client updates.
#include "common.cuh"

// A bit an entry, the first in the highest bit of the first byte.
KERNEL pack_mask(const uint8* mask, int64 n, uint8* bytes) {
  int64 i = global_thread();
  uint32 ballot = __ballot_sync(FULL_WARP, i < n && mask[i] != 0);
  int lane = threadIdx.x % WARP;
  int64 byte = (i - lane) / 8 + lane;
  if (lane < WARP / 8 && byte * 8 < n)
    bytes[byte] = (uint8)(__brev(ballot) >> (WARP - 8 - 8 * lane));
}

KERNEL unpack_mask(const uint8* bytes, int64 n, uint8* mask) {
  int64 i = global_thread();
  if (i < n) mask[i] = (bytes[i / 8] >> (7 - i % 8)) & 1;
}

// Adds to `total`; integers, so the order of the atomics does not show.
KERNEL popcount(const uint8* bytes, int64 num_bytes, uint64* total) {
  uint32 count = 0;
  for (int64 i = global_thread(); i < num_bytes; i += (int64)gridDim.x * BLOCK)
    count += (uint32)__popc(bytes[i]);
  for (int step = WARP / 2; step > 0; step /= 2) count += __shfl_xor_sync(FULL_WARP, count, step);
  if (threadIdx.x % WARP == 0 && count) atomicAdd(total, (uint64)count);
}

// One step of SGD; `momentum` is null where there is none.
KERNEL sgd_step(float* values, const float* gradient, float* momentum, int64 n, float lr,
                float decay_of_momentum, float weight_decay) {
  int64 i = global_thread();
  if (i >= n) return;
  float step = gradient[i] + weight_decay * values[i];
  if (momentum) {
    step += decay_of_momentum * momentum[i];
    momentum[i] = step;
  }
  values[i] -= lr * step;
}

// One step of Adam, or of AdamW where `decoupled`. `rest1` is 1 - beta1, `rest2` 1 - beta2,
// which float32 would round off; `scale1` is lr / (1 - beta1^t), `scale2` sqrt(1 - beta2^t).
KERNEL adam_step(float* values, const float* gradient, float* mean, float* square, int64 n,
                 float lr, float rest1, float beta2, float rest2, float eps, float weight_decay,
                 int decoupled, float scale1, float scale2) {
  int64 i = global_thread();
  if (i >= n) return;
  float value = values[i], g = gradient[i];
  if (decoupled)
    value -= lr * weight_decay * value;
  else
    g += weight_decay * value;
  float m = mean[i] + rest1 * (g - mean[i]);
  float v = beta2 * square[i] + rest2 * g * g;
  mean[i] = m;
  square[i] = v;
  values[i] = value - scale1 * m / (sqrtf(v) / scale2 + eps);
}

// Counts into `refused` the positions that are out of range or not above the one before.
KERNEL check_positions(const int64* positions, int64 n, int64 numel, int* refused) {
  int64 i = global_thread();
  if (i >= n) return;
  int64 position = positions[i];
  bool good = position >= 0 && position < numel && (i == 0 || positions[i - 1] < position);
  if (!good) atomicAdd(refused, 1);
}

// total[positions] += weight * values. Checked positions are distinct: no atomics are needed.
KERNEL scatter_add(float* total, const int64* positions, const float* values, int64 n,
                   float weight) {
  int64 i = global_thread();
  if (i < n) total[positions[i]] += weight * values[i];
}
