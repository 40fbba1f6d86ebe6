// Distillation: cross entropy and the divergence from a teacher in one pass over a vocabulary,
// with no softmax stored.
#include "real.cuh"

#define LOWEST (-3.4028234e38f)
#define IGNORED (-100)

// factor * value, and 0 where the factor is: infinity times 0 is no part of a sum.
__device__ inline float part(float value, float factor) {
  return factor == 0.0f ? 0.0f : value * factor;
}

// The largest value seen, and the sum of exp(v - most): kept apart, since the logarithm of the
// sum has digits that are lost where the largest value is large.
struct Softmax {
  float most, sum;

  __device__ void add(float v) {
    if (v > most) {
      sum *= expf(most - v);
      most = v;
    }
    sum += expf(v - most);
  }

  __device__ void merge(const Softmax& other) {
    float top = max(most, other.most);
    sum = sum * expf(most - top) + other.sum * expf(other.most - top);
    most = top;
  }
};

// Two of them, and gap: the sum of exp(w - guide.most) ((w - guide.most) - (v - own.most)).
struct Divergence {
  Softmax own, guide;
  float gap;

  __device__ void add(float v, float w) {
    Divergence one = {{v, 1.0f}, {w, 1.0f}, 0.0f};
    if (v < LOWEST) one.own = {LOWEST, 0.0f};
    if (w < LOWEST) one.guide = {LOWEST, 0.0f};
    if (v < LOWEST && w >= LOWEST) one.gap = __uint_as_float(0x7f800000u);  // infinity
    merge(one);
  }

  __device__ void merge(const Divergence& other) {
    gap = moved(other) + other.moved(*this);
    own.merge(other.own);
    guide.merge(other.guide);
  }

  // `gap` after the largest values have become the larger ones of this and another.
  __device__ float moved(const Divergence& other) const {
    float up_own = max(own.most, other.own.most) - own.most;
    float up_guide = max(guide.most, other.guide.most) - guide.most;
    return part(gap + guide.sum * (up_own - up_guide), expf(-up_guide));
  }

  __device__ float value() const {
    return gap / guide.sum - logf(guide.sum) + logf(own.sum);
  }
};

// Leaves in thread 0 the merge of all threads' parts.
template <class Part>
__device__ inline void merge_block(Part* parts) {
  for (int half = BLOCK / 2; half > 0; half /= 2) {
    __syncthreads();
    if ((int)threadIdx.x < half) parts[threadIdx.x].merge(parts[threadIdx.x + half]);
  }
}

// A block has one row. loss = (1 - alpha) CE + alpha t^2 KL(teacher || student) at temperature t;
// `logs` [rows, 6] gets the largest value and the logarithm of the sum of exp(value - largest) of
// z, z / t and the teacher's z / t.
KERNEL kd_forward(const Real* student, const Real* teacher, const int64* labels, float* loss,
                  float* logs, int classes, float alpha, float temperature) {
  __shared__ Softmax hard[BLOCK];
  __shared__ Divergence soft[BLOCK];
  int row = blockIdx.x, own = threadIdx.x;
  const Real* z = student + (int64)row * classes;
  const Real* target = teacher + (int64)row * classes;
  Softmax none = {LOWEST, 0.0f}, own_hard = none;
  Divergence own_soft = {none, none, 0.0f};
  for (int c = own; c < classes; c += BLOCK) {
    float v = load(z[c]);
    own_hard.add(v);
    own_soft.add(v / temperature, load(target[c]) / temperature);
  }
  hard[own] = own_hard;
  soft[own] = own_soft;
  merge_block(hard);
  merge_block(soft);
  if (own != 0) return;
  float log_sum = logf(hard[0].sum);
  int64 label = labels[row];
  float cross = __uint_as_float(0x7fc00000u);  // NaN: a label out of range shows
  if (label >= 0 && label < classes) cross = (hard[0].most - load(z[label])) + log_sum;
  float guided = alpha * temperature * temperature * soft[0].value();
  loss[row] = label == IGNORED ? 0.0f : (1.0f - alpha) * cross + guided;
  float* kept = logs + row * 6LL;
  kept[0] = hard[0].most;
  kept[1] = log_sum;
  kept[2] = soft[0].own.most;
  kept[3] = logf(soft[0].own.sum);
  kept[4] = soft[0].guide.most;
  kept[5] = logf(soft[0].guide.sum);
}

// gradient = scale[row] ((1 - alpha)(p - label) + alpha t (p_t - teacher_t)).
KERNEL kd_backward(const Real* student, const Real* teacher, const int64* labels,
                   const float* scale, const float* logs, Real* gradient, int classes,
                   float alpha, float temperature) {
  int row = blockIdx.x;
  int64 base = (int64)row * classes, label = labels[row];
  const float* kept = logs + row * 6LL;
  float factor = scale[row];
  float hard_part = 1.0f - alpha, soft_part = alpha * temperature;
  for (int c = threadIdx.x; c < classes; c += BLOCK) {
    float v = load(student[base + c]), w = load(teacher[base + c]) / temperature;
    float hard = expf(v - kept[0] - kept[1]) - (c == label ? 1.0f : 0.0f);
    float soft = expf(v / temperature - kept[2] - kept[3]) - expf(w - kept[4] - kept[5]);
    float sum = label == IGNORED ? 0.0f : hard_part * hard + soft_part * soft;
    gradient[base + c] = store(factor * sum);
  }
}
