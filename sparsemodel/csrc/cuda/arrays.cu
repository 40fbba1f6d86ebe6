// Optimiser steps on active values, and exact sums of client updates.
#include "common.cuh"

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

// Adds weight * x in fixed point to high and low, where x = values[i] + means[i]^2 (`means` null:
// values[i]) is high / 2^16 + low / 2^52. It goes to positions[i], which ascend and are below
// `numel`, or to i where `positions` is null. What does not fit is left out and counted in
// refused: [0] values that are not finite or 2^20 and more, [1] positions. Every product and
// difference is exact in double, so fused or not the bits are those of plain torch. All adds are
// of integers: a call with -weight takes back what one with weight added.
KERNEL fixed_add(int64* high, int64* low, const float* values, const float* means,
                 const int64* positions, int64 n, int64 numel, int64 weight, uint64* refused) {
  int64 i = global_thread();
  if (i >= n) return;
  double x = (double)values[i];
  if (means) x += (double)means[i] * (double)means[i];
  bool fits = x > -1048576.0 && x < 1048576.0;  // false of NaN
  if (!fits) atomicAdd(&refused[0], (uint64)1);
  int64 at = i;
  if (positions) {
    at = positions[i];
    if (at < 0 || at >= numel || (i > 0 && positions[i - 1] >= at)) {
      atomicAdd(&refused[1], (uint64)1);
      return;
    }
  }
  if (!fits) return;
  double scaled = x * 65536.0;
  double whole = floor(scaled);
  int64 up = (int64)whole * weight;
  int64 down = (int64)rint((scaled - whole) * 68719476736.0) * weight;
  if (positions) {  // of 3 1 2 3 only 1 is refused, and 3 is met twice
    atomicAdd((uint64*)high + at, (uint64)up);
    atomicAdd((uint64*)low + at, (uint64)down);
  } else {
    high[at] += up;
    low[at] += down;
  }
}
