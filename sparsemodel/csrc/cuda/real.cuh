// The type of activations and weights, chosen by -DREAL_FLOAT16, -DREAL_BFLOAT16 or neither
// (float32). Sums are always float32.
#pragma once

#include "common.cuh"

#if defined(REAL_BFLOAT16)
struct Real { unsigned short bits; };
__device__ inline float load(Real r) { return __uint_as_float((uint32)r.bits << 16); }
__device__ inline Real store(float f) {
  uint32 bits = __float_as_uint(f);
  // A GPU's NaN is 0x7fffffff, which rounding would carry over into the sign of a zero.
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {(unsigned short)0x7fc0};
  return {(unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};  // ties to even
}
#elif defined(REAL_FLOAT16)
struct Real { unsigned short bits; };
#ifdef CUDA_ON_HOST
__device__ inline float load(Real r) { return host_half_to_float(r.bits); }
__device__ inline Real store(float f) { return {host_float_to_half(f)}; }
#else
__device__ inline float load(Real r) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(r.bits));
  return f;
}
__device__ inline Real store(float f) {
  Real r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(f));
  return r;
}
#endif
#else
typedef float Real;
__device__ inline float load(Real r) { return r; }
__device__ inline Real store(float f) { return f; }
#endif
