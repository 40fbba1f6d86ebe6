// Change of layout, optimiser steps and sums in fixed point.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "guard.h"
#include "kernels.h"
#include "workers.h"

namespace {

constexpr std::int64_t kPiece = 16384;    // elements of an optimiser step or a sum at a time
constexpr std::int64_t kTransposed = 512; // columns of a transposition at a time

bool in_unit(double a) { return a >= 0.0 && a < 1.0; }

}  // namespace

using namespace spc;

extern "C" int32_t spc_transpose(int64_t rows, int64_t cols, const float* x, float* y,
                                 int32_t threads) {
    return spc_transpose_planes(1, rows, cols, x, 0, cols, y, 0, rows, threads);
}

extern "C" int32_t spc_transpose_planes(int64_t planes, int64_t rows, int64_t cols,
                                        const float* x, int64_t x_plane, int64_t x_row, float* y,
                                        int64_t y_plane, int64_t y_row, int32_t threads) {
    const char* where = "transpose";
    if (planes < 1 || rows < 1 || cols < 1)
        return fail(SPC_BAD_GEOMETRY, "%s: expected planes, rows and cols >= 1, got %lld, %lld, %lld",
                    where, static_cast<long long>(planes), static_cast<long long>(rows),
                    static_cast<long long>(cols));
    if (int32_t code = check_threads(threads, where)) return code;
    if (int32_t code = check_pointers(where, {x, y})) return code;
    return guarded(where, [&] {
        // Pieces of a few hundred in both directions keep the lines of both sides cached.
        const int64_t wide = (cols + kTransposed - 1) / kTransposed;
        const int64_t high = (rows + kTransposed - 1) / kTransposed;
        const double work = static_cast<double>(planes) * static_cast<double>(rows) *
                            static_cast<double>(cols) / 4.0;
        parallel(planes * wide * high, worthwhile_threads(threads, work), [&](int64_t piece) {
            const int64_t plane = piece / (wide * high);
            const int64_t c = piece / high % wide * kTransposed, r = piece % high * kTransposed;
            kernels().transpose(x + plane * x_plane + r * x_row + c,
                                y + plane * y_plane + c * y_row + r,
                                std::min(kTransposed, rows - r), std::min(kTransposed, cols - c),
                                x_row, y_row);
        });
        return SPC_OK;
    });
}

extern "C" int32_t spc_sgd_step(int64_t n, float* values, const float* gradient,
                                float* momentum_buffer, double lr, double momentum,
                                double weight_decay, int32_t threads) {
    const char* where = "sgd_step";
    if (n < 0 || !(lr >= 0.0) || !in_unit(momentum) || !(weight_decay >= 0.0))
        return fail(SPC_BAD_ARGUMENT,
                    "%s: expected n, lr, weight_decay >= 0 and momentum in [0, 1), got %lld, %g, "
                    "%g and %g",
                    where, static_cast<long long>(n), lr, weight_decay, momentum);
    if (int32_t code = check_threads(threads, where)) return code;
    if (n == 0) return SPC_OK;
    if (int32_t code = check_pointers(where, {values, gradient})) return code;
    if (!momentum_buffer && momentum != 0.0)
        return fail(SPC_NULL_POINTER, "%s: momentum %g needs a buffer", where, momentum);
    return guarded(where, [&] {
        const Kernels& kernel = kernels();
        const int used = worthwhile_threads(threads, static_cast<double>(n) / 4.0);
        parallel((n + kPiece - 1) / kPiece, used, [&](int64_t piece) {
            const int64_t i = piece * kPiece;
            kernel.sgd(values + i, gradient + i, momentum_buffer ? momentum_buffer + i : nullptr,
                       static_cast<float>(lr), static_cast<float>(momentum),
                       static_cast<float>(weight_decay), std::min(kPiece, n - i));
        });
        return SPC_OK;
    });
}

extern "C" int32_t spc_adam_step(int64_t n, float* values, const float* gradient, float* mean,
                                 float* square, double lr, double beta1, double beta2, double eps,
                                 double weight_decay, int32_t decoupled, int64_t step,
                                 int32_t threads) {
    const char* where = "adam_step";
    if (n < 0 || !(lr >= 0.0) || !in_unit(beta1) || !in_unit(beta2) || !(eps >= 0.0) ||
        !(weight_decay >= 0.0) || step < 1)
        return fail(SPC_BAD_ARGUMENT,
                    "%s: expected n, lr, eps, weight_decay >= 0, betas in [0, 1) and step >= 1",
                    where);
    if (int32_t code = check_threads(threads, where)) return code;
    if (n == 0) return SPC_OK;
    if (int32_t code = check_pointers(where, {values, gradient, mean, square})) return code;
    return guarded(where, [&] {
        const double steps = static_cast<double>(step);
        const AdamFactors factors{static_cast<float>(1.0 - beta1),
                                  static_cast<float>(beta2),
                                  static_cast<float>(1.0 - beta2),
                                  static_cast<float>(weight_decay),
                                  static_cast<float>(1.0 - lr * weight_decay),
                                  static_cast<float>(eps),
                                  static_cast<float>(std::sqrt(1.0 - std::pow(beta2, steps))),
                                  static_cast<float>(lr / (1.0 - std::pow(beta1, steps))),
                                  decoupled != 0};
        const Kernels& kernel = kernels();
        const int used = worthwhile_threads(threads, static_cast<double>(n));
        parallel((n + kPiece - 1) / kPiece, used, [&](int64_t piece) {
            const int64_t i = piece * kPiece;
            kernel.adam(values + i, gradient + i, mean + i, square + i, factors,
                        std::min(kPiece, n - i));
        });
        return SPC_OK;
    });
}

extern "C" int32_t spc_fixed_add(int64_t arrays, const int64_t* sizes, const float* const* values,
                                 const float* const* means, int64_t weight, int64_t* const* high,
                                 int64_t* const* low, int64_t* refused, int32_t threads) {
    const char* where = "fixed_add";
    constexpr int64_t kMost = int64_t{1} << 31;
    if (arrays < 0 || weight <= -kMost || weight >= kMost)
        return fail(SPC_BAD_ARGUMENT,
                    "%s: expected arrays >= 0 and |weight| < 2^31, got %lld and %lld", where,
                    static_cast<long long>(arrays), static_cast<long long>(weight));
    if (int32_t code = check_threads(threads, where)) return code;
    if (arrays == 0) return SPC_OK;
    if (int32_t code = check_pointers(where, {sizes, values, means, high, low, refused}))
        return code;
    for (int64_t a = 0; a < arrays; ++a)
        if (sizes[a] < 0 || (sizes[a] && !(values[a] && high[a] && low[a])))
            return fail(SPC_BAD_ARGUMENT, "%s: array %lld has a negative size or a null pointer",
                        where, static_cast<long long>(a));
    return guarded(where, [&] {
        const Kernels& kernel = kernels();
        for (int64_t a = 0; a < arrays; ++a) {
            const int64_t n = sizes[a];
            const int used = worthwhile_threads(threads, static_cast<double>(n));
            std::atomic<int64_t> left_out{0};
            parallel((n + kPiece - 1) / kPiece, used, [&](int64_t piece) {
                const int64_t i = piece * kPiece;
                left_out += kernel.fixed_add(values[a] + i, means[a] ? means[a] + i : nullptr,
                                             weight, high[a] + i, low[a] + i,
                                             std::min(kPiece, n - i));
            });
            refused[a] = left_out;
        }
        return SPC_OK;
    });
}
