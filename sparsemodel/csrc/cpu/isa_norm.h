// Batch norm, residual and ReLU over one channel, whose elements are contiguous.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace spc::SPC_ISA {
namespace {

// A long sum: 64 partial sums over pieces of 4096 elements, the pieces added in double.
constexpr std::int64_t kPiece = 4096;
constexpr int kChains = 4;

// `part` gives the vector of terms at an index, `one` a single term.
template <class Part, class One>
inline double reduce(std::int64_t count, Part part, One one) {
    double total = 0.0;
    const std::int64_t whole = count - count % kBlock;
    for (std::int64_t start = 0; start < whole; start += kPiece) {
        const std::int64_t stop = start + kPiece < whole ? start + kPiece : whole;
        vec parts[kChains][kBlockVecs];
        for (auto& chain : parts)
            for (vec& p : chain) p = splat(0.0f);
        std::int64_t i = start;
        for (; i + kChains * kBlock <= stop; i += kChains * kBlock)
            for (int c = 0; c < kChains; ++c)
                for (int k = 0; k < kBlockVecs; ++k)
                    parts[c][k] = parts[c][k] + part(i + c * kBlock + k * kWidth);
        for (; i < stop; i += kBlock)
            for (int k = 0; k < kBlockVecs; ++k)
                parts[0][k] = parts[0][k] + part(i + k * kWidth);
        for (auto& chain : parts) total += static_cast<double>(sum_block(chain));
    }
    for (std::int64_t i = whole; i < count; ++i) total += static_cast<double>(one(i));
    return total;
}

double channel_sum(const float* x, std::int64_t count) {
    return reduce(
        count, [x](std::int64_t i) { return load(x + i); }, [x](std::int64_t i) { return x[i]; });
}

double channel_square(const float* x, float mean, std::int64_t count) {
    const vec m = splat(mean);
    return reduce(
        count,
        [x, m](std::int64_t i) {
            const vec d = load(x + i) - m;
            return d * d;
        },
        [x, mean](std::int64_t i) { return (x[i] - mean) * (x[i] - mean); });
}

// y = relu((x - mean) * scale + shift + residual), element by element.
template <bool Residual, bool Relu>
void affine(const float* x, const float* residual, float* y, float mean, float scale, float shift,
            std::int64_t count) {
    const vec m = splat(mean), s = splat(scale), b = splat(shift);
    const auto at = [&](vec value, vec rest) {
        vec result = fma(value - m, s, b);
        if constexpr (Residual) result = result + rest;
        return Relu ? relu(result) : result;
    };
    std::int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth)
        store(y + i, at(load(x + i), Residual ? load(residual + i) : m));
    if (i < count) {
        const int rest = static_cast<int>(count - i);
        store_part(y + i,
                   at(load_part(x + i, rest), Residual ? load_part(residual + i, rest) : m), rest);
    }
}

void channel_affine(const float* x, const float* residual, float* y, float mean, float scale,
                    float shift, bool with_relu, std::int64_t count) {
    if (residual) {
        (with_relu ? affine<true, true> : affine<true, false>)(x, residual, y, mean, scale, shift,
                                                               count);
    } else {
        (with_relu ? affine<false, true> : affine<false, false>)(x, residual, y, mean, scale,
                                                                 shift, count);
    }
}

void channel_gradient_sums(const float* x, const float* y, const float* dy, float mean,
                           std::int64_t count, double* sum, double* product) {
    const vec m = splat(mean);
    const auto gated = [=](std::int64_t i) {
        return y ? gate(load(y + i), load(dy + i)) : load(dy + i);
    };
    const auto gated_one = [=](std::int64_t i) { return !y || y[i] > 0.0f ? dy[i] : 0.0f; };
    // Piece by piece, so that the second sum finds its data in the first-level cache.
    *sum = *product = 0.0;
    for (std::int64_t start = 0; start < count; start += kPiece) {
        const std::int64_t length = start + kPiece < count ? kPiece : count - start;
        *sum += reduce(
            length, [=](std::int64_t i) { return gated(start + i); },
            [=](std::int64_t i) { return gated_one(start + i); });
        *product += reduce(
            length,
            [=](std::int64_t i) { return gated(start + i) * (load(x + start + i) - m); },
            [=](std::int64_t i) { return gated_one(start + i) * (x[start + i] - mean); });
    }
}

void channel_gradient(const float* x, const float* y, const float* dy, float* dx, float* dresidual,
                      float mean, float scale, float mean_g, float slope, std::int64_t count) {
    const vec m = splat(mean), s = splat(scale), mg = splat(mean_g), k = splat(slope);
    std::int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) {
        const vec g = y ? gate(load(y + i), load(dy + i)) : load(dy + i);
        store(dx + i, s * ((g - mg) - (load(x + i) - m) * k));
        if (dresidual) store(dresidual + i, g);
    }
    for (; i < count; ++i) {
        const float g = !y || y[i] > 0.0f ? dy[i] : 0.0f;
        dx[i] = scale * ((g - mean_g) - (x[i] - mean) * slope);
        if (dresidual) dresidual[i] = g;
    }
}

void relu_array(const float* x, float* y, std::int64_t count) {
    std::int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store(y + i, relu(load(x + i)));
    const int rest = static_cast<int>(count - i);
    if (rest) store_part(y + i, relu(load_part(x + i, rest)), rest);
}

void relu_gradient(const float* y, const float* dy, float* dx, std::int64_t count) {
    std::int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store(dx + i, gate(load(y + i), load(dy + i)));
    const int rest = static_cast<int>(count - i);
    if (rest) store_part(dx + i, gate(load_part(y + i, rest), load_part(dy + i, rest)), rest);
}

}  // namespace
}  // namespace spc::SPC_ISA
