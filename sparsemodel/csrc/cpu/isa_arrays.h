// Steps over plain arrays: pooling, scaling, transposition, optimiser updates, sums of integers.
#pragma once

#include "kernels.h"
#include "simd.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

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

// Elements 0, n, 1, n + 1, ... of two vectors, from their lower or their upper halves.
#if defined(__clang__)
#define SPC_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef std::int32_t Places __attribute__((vector_size(4 * kWidth)));
#define SPC_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Places{__VA_ARGS__})
#endif
#if defined(SPC_AVX512)
inline vec interleave_low(vec a, vec b) {
    return SPC_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
inline vec interleave_high(vec a, vec b) {
    return SPC_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#elif defined(SPC_AVX2)
inline vec interleave_low(vec a, vec b) { return SPC_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
inline vec interleave_high(vec a, vec b) { return SPC_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#else
inline vec interleave_low(vec a, vec b) { return SPC_SHUFFLE(a, b, 0, 4, 1, 5); }
inline vec interleave_high(vec a, vec b) { return SPC_SHUFFLE(a, b, 2, 6, 3, 7); }
#endif

// A square of vectors in registers: each line of either side is touched once. Interleaving the
// halves of the list log2(kWidth) times transposes it.
inline void transpose_square(const float* x, float* y, std::int64_t xs, std::int64_t ys) {
    vec rows[kWidth], next[kWidth];
    SPC_UNROLL
    for (int k = 0; k < kWidth; ++k) rows[k] = load(x + k * xs);
    SPC_UNROLL
    for (int step = 1; step < kWidth; step *= 2) {
        SPC_UNROLL
        for (int k = 0; k < kWidth / 2; ++k) {
            next[2 * k] = interleave_low(rows[k], rows[k + kWidth / 2]);
            next[2 * k + 1] = interleave_high(rows[k], rows[k + kWidth / 2]);
        }
        SPC_UNROLL
        for (int k = 0; k < kWidth; ++k) rows[k] = next[k];
    }
    SPC_UNROLL
    for (int k = 0; k < kWidth; ++k) store(y + k * ys, rows[k]);
}

// 16 x 16 elements, where there are so many: whole cache lines on both sides.
inline void transpose_block(const float* x, float* y, std::int64_t rows, std::int64_t cols,
                            std::int64_t xs, std::int64_t ys) {
    for (std::int64_t r = 0; r < rows; r += kWidth)
        for (std::int64_t c = 0; c < cols; c += kWidth)
            transpose_square(x + r * xs + c, y + c * ys + r, xs, ys);
}

// The side whose lines lie further apart is gone through 16 lines at a time, along them: so few
// streams the processor reads ahead.
void transpose(const float* x, float* y, std::int64_t rows, std::int64_t cols, std::int64_t xs,
               std::int64_t ys) {
    const std::int64_t whole_rows = rows - rows % kWidth, whole_cols = cols - cols % kWidth;
    const bool by_rows = xs > ys;
    const std::int64_t outer = by_rows ? whole_rows : whole_cols;
    const std::int64_t inner = by_rows ? whole_cols : whole_rows;
    for (std::int64_t i = 0; i < outer; i += kBlock) {
        const std::int64_t high = outer - i < kBlock ? outer - i : kBlock;
        for (std::int64_t j = 0; j < inner; j += kBlock) {
            const std::int64_t wide = inner - j < kBlock ? inner - j : kBlock;
            if (by_rows)
                transpose_block(x + i * xs + j, y + j * ys + i, high, wide, xs, ys);
            else
                transpose_block(x + j * xs + i, y + i * ys + j, wide, high, xs, ys);
        }
    }
    for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t c = r < whole_rows ? whole_cols : 0; c < cols; ++c)
            y[c * ys + r] = x[r * xs + c];
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

// Vectors of numbers of eight bytes.
constexpr int kLong = kWidth / 2;
typedef double Doubles __attribute__((vector_size(8 * kLong)));
typedef std::uint64_t Words __attribute__((vector_size(8 * kLong)));
typedef float Halves __attribute__((vector_size(4 * kLong)));

template <class Vector, class Number>
inline Vector loaded(const Number* p) {
    Vector a;
    std::memcpy(&a, p, sizeof a);
    return a;
}

// Of the lower halves of the elements.
inline Words product(Words a, Words b) {
#if defined(SPC_AVX512)
    return (Words)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(SPC_AVX2)
    return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(SPC_NEON)
    return (Words)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#elif defined(__SSE2__)
    return (Words)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

// A whole number |a| < 2^51 as an integer: the last bits of a + 1.5 * 2^52, less those of the
// latter; any a is rounded to the nearest, ties to even.
constexpr double kMagic = 6755399441055744.0;
constexpr std::uint64_t kMagicBits = 0x4338000000000000, kOneBits = 0x3ff0000000000000;
inline Words whole_number(Doubles a) { return (Words)(a + kMagic) - kMagicBits; }

struct FixedFactor {
    Words size, sign;  // |weight|, and all ones where it is negative
};

inline Words scaled(Words a, const FixedFactor& factor) {  // modulo 2^64
    const Words sum = product(a, factor.size) + (product(a >> 32, factor.size) << 32);
    return (sum ^ factor.sign) - factor.sign;
}

// Lanes of ones where a value was left out.
inline Words fixed_vec(Doubles x, const FixedFactor& factor, std::int64_t* high,
                       std::int64_t* low) {
    const Words fits = (Words)((x > -1048576.0) & (x < 1048576.0));  // zeros for NaN
    x = (Doubles)((Words)x & fits) * 65536.0;
    const Doubles nearest = (x + kMagic) - kMagic;
    const Doubles whole = nearest - (Doubles)((Words)(nearest > x) & kOneBits);
    const Words up = loaded<Words>(high) + scaled(whole_number(whole), factor);
    const Words down =
        loaded<Words>(low) + scaled(whole_number((x - whole) * 68719476736.0), factor);
    std::memcpy(high, &up, sizeof up);
    std::memcpy(low, &down, sizeof down);
    return ~fits;
}

std::int64_t fixed_add(const float* values, const float* means, std::int64_t weight,
                       std::int64_t* high, std::int64_t* low, std::int64_t count) {
    const std::uint64_t sign = weight < 0 ? ~std::uint64_t{0} : 0;
    const Words none = {};
    const FixedFactor factor{none + ((static_cast<std::uint64_t>(weight) ^ sign) - sign),
                             none + sign};
    const auto sum = [&](const float* value, const float* mean) {
        const Doubles x = __builtin_convertvector(loaded<Halves>(value), Doubles);
        if (!mean) return x;
        const Doubles m = __builtin_convertvector(loaded<Halves>(mean), Doubles);
        return x + m * m;
    };
    Words refused = none;
    std::int64_t i = 0;
    for (; i + kLong <= count; i += kLong)
        refused -= fixed_vec(sum(values + i, means ? means + i : means), factor, high + i, low + i);
    const std::size_t rest = static_cast<std::size_t>(count - i);
    if (rest) {
        float value[kLong] = {}, mean[kLong] = {};
        std::int64_t parts[2][kLong] = {};
        std::memcpy(value, values + i, sizeof(float) * rest);
        if (means) std::memcpy(mean, means + i, sizeof(float) * rest);
        std::memcpy(parts[0], high + i, sizeof(std::int64_t) * rest);
        std::memcpy(parts[1], low + i, sizeof(std::int64_t) * rest);
        refused -= fixed_vec(sum(value, mean), factor, parts[0], parts[1]);
        std::memcpy(high + i, parts[0], sizeof(std::int64_t) * rest);
        std::memcpy(low + i, parts[1], sizeof(std::int64_t) * rest);
    }
    std::uint64_t total = 0;
    for (int lane = 0; lane < kLong; ++lane) total += refused[lane];
    return static_cast<std::int64_t>(total);
}

}  // namespace
}  // namespace spc::SPC_ISA
