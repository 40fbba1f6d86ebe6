// Vectors of one instruction set. Included only by the isa_*.cpp files, which are compiled once
// per instruction set with SPC_ISA naming it; everything here has internal linkage, so that code
// for a wide set never ends up where a narrow one runs. For the same reason those files use no
// templates of the standard library.
//
// A "block" is 16 floats whatever the register width. Sums over many elements keep 16 partial
// sums, one a lane of the block, and end in one fixed tree: results are the same bits for every
// set that has a fused multiply-add.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(SPC_AVX512) || defined(SPC_AVX2)
#include <immintrin.h>
#elif defined(SPC_NEON)
#include <arm_neon.h>
#endif

namespace spc::SPC_ISA {
namespace {

#if defined(SPC_AVX512)

using vec = __m512;
constexpr int kWidth = 16;
constexpr int kRegisters = 32;
inline vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, vec a) { _mm512_storeu_ps(p, a); }
inline void stream(float* p, vec a) { _mm512_stream_ps(p, a); }
inline void finish_streams() { _mm_sfence(); }
inline vec splat(float a) { return _mm512_set1_ps(a); }
inline vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
inline vec root(vec a) { return _mm512_sqrt_ps(a); }
// In both, NaN comes through: max returns its second operand where one is NaN.
inline vec relu(vec a) { return _mm512_max_ps(_mm512_setzero_ps(), a); }
inline vec gate(vec y, vec g) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_GT_OQ), g);
}
inline float sum_lanes(__m128 a) {
    a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps(a, a, 1)));
}
inline float sum_block(const vec* a) {
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(*a), 1));
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(*a), high);
    return sum_lanes(_mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)));
}

#elif defined(SPC_AVX2)

using vec = __m256;
constexpr int kWidth = 8;
constexpr int kRegisters = 16;
inline vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, vec a) { _mm256_storeu_ps(p, a); }
inline void stream(float* p, vec a) { _mm256_stream_ps(p, a); }
inline void finish_streams() { _mm_sfence(); }
inline vec splat(float a) { return _mm256_set1_ps(a); }
inline vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
inline vec root(vec a) { return _mm256_sqrt_ps(a); }
inline vec relu(vec a) { return _mm256_max_ps(_mm256_setzero_ps(), a); }
inline vec gate(vec y, vec g) {
    return _mm256_and_ps(_mm256_cmp_ps(y, _mm256_setzero_ps(), _CMP_GT_OQ), g);
}
inline float sum_lanes(__m128 a) {
    a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps(a, a, 1)));
}
inline float sum_block(const vec* a) {
    const __m256 eight = _mm256_add_ps(a[0], a[1]);
    return sum_lanes(_mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)));
}

#elif defined(SPC_NEON)

using vec = float32x4_t;
constexpr int kWidth = 4;
constexpr int kRegisters = 32;
inline vec load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, vec a) { vst1q_f32(p, a); }
inline vec splat(float a) { return vdupq_n_f32(a); }
inline vec fma(vec a, vec b, vec c) { return vfmaq_f32(c, a, b); }
inline vec root(vec a) { return vsqrtq_f32(a); }
inline vec relu(vec a) { return vmaxq_f32(a, vdupq_n_f32(0)); }
inline vec gate(vec y, vec g) {
    return vreinterpretq_f32_u32(
        vandq_u32(vcgtq_f32(y, vdupq_n_f32(0)), vreinterpretq_u32_f32(g)));
}
inline float sum_lanes(vec a) {
    const float32x2_t two = vadd_f32(vget_low_f32(a), vget_high_f32(a));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
inline float sum_block(const vec* a) {
    return sum_lanes(vaddq_f32(vaddq_f32(a[0], a[2]), vaddq_f32(a[1], a[3])));
}

#else  // any processor: the compiler's own vectors of four

typedef float vec __attribute__((vector_size(16)));
constexpr int kWidth = 4;
constexpr int kRegisters = 16;
inline vec load(const float* p) {
    vec a;
    std::memcpy(&a, p, sizeof a);
    return a;
}
inline void store(float* p, vec a) { std::memcpy(p, &a, sizeof a); }
inline vec splat(float a) { return vec{a, a, a, a}; }
inline vec fma(vec a, vec b, vec c) { return a * b + c; }
inline vec root(vec a) {
    for (int i = 0; i < 4; ++i) a[i] = __builtin_sqrtf(a[i]);
    return a;
}
inline vec relu(vec a) { return a < 0.0f ? splat(0.0f) : a; }
inline vec gate(vec y, vec g) { return y > 0.0f ? g : splat(0.0f); }
inline float sum_lanes(vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }
inline float sum_block(const vec* a) { return sum_lanes((a[0] + a[2]) + (a[1] + a[3])); }

#endif

#if !defined(SPC_AVX512) && !defined(SPC_AVX2)
inline void stream(float* p, vec a) { store(p, a); }
inline void finish_streams() {}
#endif

// Keeps a loaded vector in its register: a compiler would rather load it again for a second use.
inline void hold(vec& a) {
#if defined(SPC_AVX512) || defined(SPC_AVX2)
    asm("" : "+v"(a));
#elif defined(SPC_NEON)
    asm("" : "+w"(a));
#else
    (void)a;
#endif
}

// Loops over the vectors of a group are unrolled before arrays are given registers; unrolled
// later they would live on the stack.
#define SPC_UNROLL _Pragma("GCC unroll 32")

constexpr int kBlock = 16;
constexpr int kBlockVecs = kBlock / kWidth;

// The last `count` < kWidth elements of an array, without reading or writing beyond them.
inline vec load_part(const float* p, int count) {
    float lanes[kWidth] = {};
    std::memcpy(lanes, p, sizeof(float) * static_cast<std::size_t>(count));
    return load(lanes);
}
inline void store_part(float* p, vec a, int count) {
    float lanes[kWidth];
    store(lanes, a);
    std::memcpy(p, lanes, sizeof(float) * static_cast<std::size_t>(count));
}

}  // namespace
}  // namespace spc::SPC_ISA
