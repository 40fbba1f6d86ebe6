// Steps over plain arrays: pooling, scaling, transposition and optimiser updates.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace spc::SPC_ISA {
namespace {

void max_step(const float* x, float* best, std::uint8_t* taps, std::uint8_t tap,
              std::int64_t count) {
    if (!taps) {
        for (std::int64_t i = 0; i < count; ++i)
            best[i] = x[i] > best[i] || x[i] != x[i] ? x[i] : best[i];
        return;
    }
    for (std::int64_t i = 0; i < count; ++i) {
        const bool wins = x[i] > best[i] || x[i] != x[i];
        best[i] = wins ? x[i] : best[i];
        taps[i] = wins ? tap : taps[i];
    }
}

void pick_step(const std::uint8_t* taps, const float* dy, float* dx, std::uint8_t tap,
               std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) dx[i] += taps[i] == tap ? dy[i] : 0.0f;
}

void add_scaled(const float* x, float* y, float factor, std::int64_t count) {
    const vec f = splat(factor);
    std::int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store(y + i, fma(f, load(x + i), load(y + i)));
    const int rest = static_cast<int>(count - i);
    if (rest) store_part(y + i, fma(f, load_part(x + i, rest), load_part(y + i, rest)), rest);
}

void scale_array(const float* x, float* y, float factor, std::int64_t count) {
    const vec f = splat(factor);
    std::int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store(y + i, f * load(x + i));
    const int rest = static_cast<int>(count - i);
    if (rest) store_part(y + i, f * load_part(x + i, rest), rest);
}

typedef float vec4 __attribute__((vector_size(16)));
typedef std::int32_t index4 __attribute__((vector_size(16)));

#if defined(__clang__)
#define SPC_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define SPC_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, index4{i, j, k, l})
#endif

inline vec4 load4(const float* p) {
    vec4 a;
    std::memcpy(&a, p, sizeof a);
    return a;
}

inline void transpose_4x4(const float* x, float* y, std::int64_t xs, std::int64_t ys) {
    const vec4 a = load4(x), b = load4(x + xs), c = load4(x + 2 * xs), d = load4(x + 3 * xs);
    const vec4 ab0 = SPC_SHUFFLE(a, b, 0, 4, 1, 5), ab1 = SPC_SHUFFLE(a, b, 2, 6, 3, 7);
    const vec4 cd0 = SPC_SHUFFLE(c, d, 0, 4, 1, 5), cd1 = SPC_SHUFFLE(c, d, 2, 6, 3, 7);
    const vec4 rows[4] = {
        SPC_SHUFFLE(ab0, cd0, 0, 1, 4, 5), SPC_SHUFFLE(ab0, cd0, 2, 3, 6, 7),
        SPC_SHUFFLE(ab1, cd1, 0, 1, 4, 5), SPC_SHUFFLE(ab1, cd1, 2, 3, 6, 7)};
    for (int k = 0; k < 4; ++k) std::memcpy(y + k * ys, &rows[k], sizeof(vec4));
}

// In 16 x 16 pieces, so that both sides move whole cache lines.
void transpose(const float* x, float* y, std::int64_t rows, std::int64_t cols, std::int64_t xs,
               std::int64_t ys) {
    for (std::int64_t c0 = 0; c0 < cols; c0 += kBlock) {
        const std::int64_t c1 = c0 + kBlock < cols ? c0 + kBlock : cols;
        for (std::int64_t r0 = 0; r0 < rows; r0 += kBlock) {
            const std::int64_t r1 = r0 + kBlock < rows ? r0 + kBlock : rows;
            const std::int64_t c4 = c1 - (c1 - c0) % 4, r4 = r1 - (r1 - r0) % 4;
            for (std::int64_t c = c0; c < c4; c += 4)
                for (std::int64_t r = r0; r < r4; r += 4)
                    transpose_4x4(x + r * xs + c, y + c * ys + r, xs, ys);
            for (std::int64_t c = c4; c < c1; ++c)
                for (std::int64_t r = r0; r < r1; ++r) y[c * ys + r] = x[r * xs + c];
            for (std::int64_t c = c0; c < c4; ++c)
                for (std::int64_t r = r4; r < r1; ++r) y[c * ys + r] = x[r * xs + c];
        }
    }
}

inline void sgd_vec(vec& value, vec gradient, vec& buffer, vec lr, vec momentum, vec decay,
                    bool decays, bool has_buffer) {
    if (decays) gradient = fma(decay, value, gradient);
    if (has_buffer) gradient = buffer = momentum * buffer + gradient;
    value = fma(lr, gradient, value);
}

void sgd(float* values, const float* gradient, float* buffer, float lr, float momentum,
         float decay, std::int64_t count) {
    const vec rate = splat(-lr), keep = splat(momentum), shrink = splat(decay);
    const bool decays = decay != 0.0f, has_buffer = buffer != nullptr;
    std::int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) {
        vec v = load(values + i), m = has_buffer ? load(buffer + i) : keep;
        sgd_vec(v, load(gradient + i), m, rate, keep, shrink, decays, has_buffer);
        store(values + i, v);
        if (has_buffer) store(buffer + i, m);
    }
    const int rest = static_cast<int>(count - i);
    if (!rest) return;
    vec v = load_part(values + i, rest), m = has_buffer ? load_part(buffer + i, rest) : keep;
    sgd_vec(v, load_part(gradient + i, rest), m, rate, keep, shrink, decays, has_buffer);
    store_part(values + i, v, rest);
    if (has_buffer) store_part(buffer + i, m, rest);
}

inline void adam_vec(vec& value, vec gradient, vec& mean, vec& square, const AdamFactors& f) {
    if (f.decoupled) {
        value = value * splat(f.shrink);
    } else if (f.decay != 0.0f) {
        gradient = fma(splat(f.decay), value, gradient);
    }
    mean = fma(splat(f.beta1_rest), gradient - mean, mean);
    square = fma(splat(f.beta2_rest) * gradient, gradient, square * splat(f.beta2));
    const vec bound = root(square) / splat(f.root_correction) + splat(f.eps);
    value = value - splat(f.step_size) * mean / bound;
}

void adam(float* values, const float* gradient, float* mean, float* square,
          const AdamFactors& factors, std::int64_t count) {
    std::int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) {
        vec v = load(values + i), m = load(mean + i), s = load(square + i);
        adam_vec(v, load(gradient + i), m, s, factors);
        store(values + i, v);
        store(mean + i, m);
        store(square + i, s);
    }
    const int rest = static_cast<int>(count - i);
    if (!rest) return;
    vec v = load_part(values + i, rest), m = load_part(mean + i, rest);
    vec s = load_part(square + i, rest);
    adam_vec(v, load_part(gradient + i, rest), m, s, factors);
    store_part(values + i, v, rest);
    store_part(mean + i, m, rest);
    store_part(square + i, s, rest);
}

}  // namespace
}  // namespace spc::SPC_ISA
