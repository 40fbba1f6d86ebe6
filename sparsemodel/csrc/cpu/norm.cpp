// Batch norm, residual and ReLU: channels in parallel, each contiguous.
#include <cmath>

#include "guard.h"
#include "kernels.h"
#include "plan.h"
#include "workers.h"

namespace spc {
namespace {

std::int32_t check_norm(const char* where, std::int64_t channels, std::int64_t count, double eps,
                        std::int32_t relu, std::int32_t threads) {
    if (channels < 1 || count < 1)
        return fail(SPC_BAD_GEOMETRY, "%s: expected channels and count >= 1, got %lld and %lld",
                    where, static_cast<long long>(channels), static_cast<long long>(count));
    if (!(eps >= 0.0)) return fail(SPC_BAD_ARGUMENT, "%s: expected eps >= 0, got %g", where, eps);
    if (relu != 0 && relu != 1)
        return fail(SPC_BAD_ARGUMENT, "%s: expected relu 0 or 1, got %d", where, relu);
    return check_threads(threads, where);
}

// About how many operations an element of batch norm is worth against a multiply-add of vectors.
int norm_threads(std::int64_t channels, std::int64_t count, int threads) {
    return worthwhile_threads(
        threads, static_cast<double>(channels) * static_cast<double>(count) / 2.0);
}

const float* at(const float* p, std::int64_t offset) { return p ? p + offset : nullptr; }
float* at(float* p, std::int64_t offset) { return p ? p + offset : nullptr; }

struct Moments {
    double mean, variance;  // biased
};

Moments moments(const Kernels& kernel, const float* x, const Plane& plane) {
    const double n = static_cast<double>(plane.samples());
    const double mean = kernel.channel_sum(x, plane.count()) / n;
    const auto rounded = static_cast<float>(mean);
    const double shift = mean - static_cast<double>(rounded);
    // Of the squares each zero has the mean's; where those are most of the sum, they are kept out.
    const double center = rounded;
    const double zeros = static_cast<double>(plane.zeros()) * center * center;
    double squares = kernel.channel_square(x, rounded, plane.count()) - zeros;
    if (zeros > 64.0 * squares) {
        squares = 0.0;
        for (std::int64_t row = 0; row < plane.rows; ++row)
            squares += kernel.channel_square(x + row * plane.lanes, rounded, plane.batch);
    }
    const double variance = squares / n - shift * shift;
    return {mean, variance > 0.0 || std::isnan(variance) ? variance : 0.0};
}

}  // namespace

std::int32_t batchnorm_train(std::int64_t channels, const Plane& plane, const float* x,
                             const float* residual, const float* gamma, const float* beta,
                             double eps, double momentum, float* running_mean, float* running_var,
                             std::int32_t relu, float* y, float* saved_mean, float* saved_invstd,
                             double* mean, double* variance, std::int32_t threads) {
    const char* where = "batchnorm_train";
    const std::int64_t count = plane.count();
    if (int32_t code = check_norm(where, channels, count, eps, relu, threads)) return code;
    if (int32_t code = check_pointers(where, {x, y, saved_mean, saved_invstd})) return code;
    if (plane.samples() < 2)
        return fail(SPC_BAD_GEOMETRY, "%s: one value per channel has no variance", where);
    if (!running_mean != !running_var)
        return fail(SPC_NULL_POINTER, "%s: only one of running_mean and running_var is null",
                    where);
    if (!(momentum >= 0.0 && momentum <= 1.0))
        return fail(SPC_BAD_ARGUMENT, "%s: expected momentum in [0, 1], got %g", where, momentum);
    return guarded(where, [&] {
        const Kernels& kernel = kernels();
        parallel(channels, norm_threads(channels, count, threads), [&](std::int64_t c) {
            const float* in = x + c * count;
            const Moments m = moments(kernel, in, plane);
            if (mean) mean[c] = m.mean;
            if (variance) variance[c] = m.variance;
            const double invstd = 1.0 / std::sqrt(m.variance + eps);
            saved_mean[c] = static_cast<float>(m.mean);
            saved_invstd[c] = static_cast<float>(invstd);
            if (running_mean) {
                const double n = static_cast<double>(plane.samples()), keep = 1.0 - momentum;
                running_mean[c] = static_cast<float>(keep * running_mean[c] + momentum * m.mean);
                running_var[c] = static_cast<float>(keep * running_var[c] +
                                                    momentum * m.variance * (n / (n - 1.0)));
            }
            const double scale = invstd * (gamma ? gamma[c] : 1.0f);
            // The mean that the kernel subtracts is rounded; the rest goes into the shift.
            const double rest = static_cast<double>(saved_mean[c]) - m.mean;
            const double shift = (beta ? beta[c] : 0.0f) + rest * scale;
            kernel.channel_affine(in, at(residual, c * count), y + c * count, saved_mean[c],
                                  static_cast<float>(scale), static_cast<float>(shift), relu == 1,
                                  count);
        });
        return SPC_OK;
    });
}

std::int32_t batchnorm_backward(std::int64_t channels, const Plane& plane, const float* x,
                                const float* y, const float* dy, const float* gamma,
                                const float* saved_mean, const float* saved_invstd,
                                std::int32_t relu, float* dx, float* dgamma, float* dbeta,
                                float* dresidual, std::int32_t threads) {
    const char* where = "batchnorm_backward";
    const std::int64_t count = plane.count();
    if (std::int32_t code = check_norm(where, channels, count, 0.0, relu, threads)) return code;
    if (std::int32_t code = check_pointers(where, {x, dy, saved_mean, saved_invstd, dx})) return code;
    if (relu && !y) return fail(SPC_NULL_POINTER, "%s: relu needs y", where);
    if (dresidual == dx)
        return fail(SPC_BAD_ARGUMENT, "%s: dx and dresidual are one array", where);
    return guarded(where, [&] {
        const Kernels& kernel = kernels();
        parallel(channels, norm_threads(channels, count, threads), [&](std::int64_t c) {
            const std::int64_t start = c * count;
            const float* out = relu ? y + start : nullptr;
            double sum = 0.0, product = 0.0;
            kernel.channel_gradient_sums(x + start, out, dy + start, saved_mean[c], count, &sum,
                                         &product);
            const double invstd = saved_invstd[c], n = static_cast<double>(plane.samples());
            if (dgamma) dgamma[c] = static_cast<float>(product * invstd);
            if (dbeta) dbeta[c] = static_cast<float>(sum);
            kernel.channel_gradient(x + start, out, dy + start, dx + start, at(dresidual, start),
                                    saved_mean[c],
                                    static_cast<float>(invstd * (gamma ? gamma[c] : 1.0f)),
                                    static_cast<float>(sum / n),
                                    static_cast<float>(product / n * invstd * invstd), count);
        });
        return SPC_OK;
    });
}

}  // namespace spc

using namespace spc;

extern "C" int32_t spc_batchnorm_train(int64_t channels, int64_t count, const float* x,
                                       const float* residual, const float* gamma,
                                       const float* beta, double eps, double momentum,
                                       float* running_mean, float* running_var, int32_t relu,
                                       float* y, float* saved_mean, float* saved_invstd,
                                       int32_t threads) {
    return batchnorm_train(channels, Plane{1, count, count}, x, residual, gamma, beta, eps, momentum, running_mean,
                           running_var, relu, y, saved_mean, saved_invstd, nullptr, nullptr,
                           threads);
}

extern "C" int32_t spc_batchnorm_infer(int64_t channels, int64_t count, const float* x,
                                       const float* residual, const float* gamma,
                                       const float* beta, double eps, const float* running_mean,
                                       const float* running_var, int32_t relu, float* y,
                                       int32_t threads) {
    const char* where = "batchnorm_infer";
    if (int32_t code = check_norm(where, channels, count, eps, relu, threads)) return code;
    if (int32_t code = check_pointers(where, {x, y, running_mean, running_var})) return code;
    return guarded(where, [&] {
        const Kernels& kernel = kernels();
        parallel(channels, norm_threads(channels, count, threads), [&](int64_t c) {
            const double scale = (gamma ? gamma[c] : 1.0f) / std::sqrt(running_var[c] + eps);
            kernel.channel_affine(x + c * count, at(residual, c * count), y + c * count,
                                  running_mean[c], static_cast<float>(scale),
                                  beta ? beta[c] : 0.0f, relu == 1, count);
        });
        return SPC_OK;
    });
}

extern "C" int32_t spc_batchnorm_backward(int64_t channels, int64_t count, const float* x,
                                          const float* y, const float* dy, const float* gamma,
                                          const float* saved_mean, const float* saved_invstd,
                                          int32_t relu, float* dx, float* dgamma, float* dbeta,
                                          float* dresidual, int32_t threads) {
    return batchnorm_backward(channels, Plane{1, count, count}, x, y, dy, gamma, saved_mean,
                              saved_invstd, relu, dx, dgamma, dbeta, dresidual, threads);
}

namespace {

constexpr int64_t kPieceFloats = 16384;

// Calls body(start, length) on pieces of an array, in parallel.
template <class Body>
void pieces(int64_t count, int threads, Body&& body) {
    parallel((count + kPieceFloats - 1) / kPieceFloats,
             worthwhile_threads(threads, static_cast<double>(count) / 4.0), [&](int64_t piece) {
                 const int64_t start = piece * kPieceFloats;
                 body(start, count - start < kPieceFloats ? count - start : kPieceFloats);
             });
}

int32_t check_count(const char* where, int64_t count, int32_t threads) {
    if (count < 0)
        return fail(SPC_BAD_GEOMETRY, "%s: expected count >= 0, got %lld", where,
                    static_cast<long long>(count));
    return check_threads(threads, where);
}

}  // namespace

extern "C" int32_t spc_relu_forward(int64_t count, const float* x, float* y, int32_t threads) {
    const char* where = "relu_forward";
    if (int32_t code = check_count(where, count, threads)) return code;
    if (int32_t code = check_pointers(where, {x, y})) return code;
    return guarded(where, [&] {
        pieces(count, threads, [&](int64_t i, int64_t n) { kernels().relu(x + i, y + i, n); });
        return SPC_OK;
    });
}

extern "C" int32_t spc_relu_backward(int64_t count, const float* y, const float* dy, float* dx,
                                     int32_t threads) {
    const char* where = "relu_backward";
    if (int32_t code = check_count(where, count, threads)) return code;
    if (int32_t code = check_pointers(where, {y, dy, dx})) return code;
    return guarded(where, [&] {
        pieces(count, threads,
               [&](int64_t i, int64_t n) { kernels().relu_gradient(y + i, dy + i, dx + i, n); });
        return SPC_OK;
    });
}
