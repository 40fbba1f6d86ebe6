// Running a program: one kernel call after the other, each timed.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "kernels.h"
#include "plan.h"
#include "workers.h"

namespace spc {
namespace {

constexpr std::int64_t kPiece = 16384;  // floats of an addition at a time

// y = a + b; y may be either.
std::int32_t add(const float* a, const float* b, float* y, std::int64_t count, int threads) {
    const Kernels& kernel = kernels();
    if (y == b) std::swap(a, b);
    parallel((count + kPiece - 1) / kPiece,
             worthwhile_threads(threads, static_cast<double>(count) / 4.0),
             [&](std::int64_t piece) {
                 const std::int64_t i = piece * kPiece;
                 const std::int64_t n = count - i < kPiece ? count - i : kPiece;
                 if (y != a) kernel.copy(y + i, a + i, n);
                 kernel.add_scaled(b + i, y + i, 1.0f, n);
             });
    return SPC_OK;
}

class Runner {
public:
    Runner(spc_plan* plan, const Program& program, const Batch& batch, Score* score)
        : plan_(plan), program_(program), batch_(batch), score_(score),
          lanes_(lanes_of(batch.size)), training_(&program == &plan->train) {}

    std::int32_t run(const Step& step) {
        const Node& n = plan_->nodes[static_cast<std::size_t>(step.node)];
        const std::int64_t count = n.size() * lanes_;
        const int threads = batch_.threads;
        float *x = at(step.x), *y = at(step.y), *dy = at(step.dy), *dx = at(step.dx);
        switch (step.action) {
            case Action::load:
                return load_images(*batch_.images, batch_.size, lanes_, n.channels, n.pixels(), y,
                                   threads);
            case Action::conv: return conv(n, x, y);
            case Action::norm_train: return norm_train(n, step);
            case Action::norm_infer: return norm_infer(n, step);
            case Action::relu: return spc_relu_forward(count, x, y, threads);
            case Action::add: return add(x, at(step.residual), y, count, threads);
            case Action::loss: return loss(n, x, dy);
            case Action::conv_grads: return conv_grads(n, x, dy, dx);
            case Action::weight_grad: return weight_grad(n, x, dy);
            case Action::topk_grad: return topk_grad(step.node, x, dy);
            case Action::input_grad: return input_grad(n, dy, dx);
            case Action::norm_grad: return norm_grad(n, step);
            case Action::relu_grad: return spc_relu_backward(count, y, dy, dx, threads);
            case Action::copy:
                std::memcpy(dx, dy, sizeof(float) * static_cast<std::size_t>(count));
                return SPC_OK;
            case Action::compress:
                compress(x, reinterpret_cast<std::uint16_t*>(y), count, threads);
                return SPC_OK;
            case Action::expand:
                expand(reinterpret_cast<const std::uint16_t*>(x), y, count, threads);
                return SPC_OK;
            case Action::accumulate: return add(dx, x, dx, count, threads);
            default: return pool(n, step);
        }
    }

private:
    float* at(int buffer) const { return buffer_at(*plan_, program_, buffer); }

    spc_geometry geometry(const Node& n) const {
        spc_geometry g = n.conv;
        g.batch = lanes_;
        return g;
    }

    Plane plane(const Node& n) const { return {n.pixels(), lanes_, batch_.size}; }

    // Puts the zeros behind the samples back.
    void clear(const Node& n, float* y) const {
        if (lanes_ == batch_.size) return;
        const std::int64_t pixels = n.pixels();
        parallel(n.channels, worthwhile_threads(batch_.threads, static_cast<double>(n.size())),
                 [&](std::int64_t c) {
                     float* row = y + c * pixels * lanes_;
                     for (std::int64_t p = 0; p < pixels; ++p, row += lanes_)
                         std::fill(row + batch_.size, row + lanes_, 0.0f);
                 });
    }

    std::int32_t conv(const Node& n, const float* x, float* y) const {
        const spc_geometry g = geometry(n);
        const spc_conv_arrays& a = n.conv_arrays;
        const std::int32_t code = spc_conv_forward(&g, a.row_ptr, a.cols, a.weight.values,
                                                   a.bias.values, x, y, batch_.threads);
        if (a.bias.values) clear(n, y);
        return code;
    }

    std::int32_t conv_grads(const Node& n, const float* x, const float* dy, float* dx) const {
        const spc_geometry g = geometry(n);
        const spc_conv_arrays& a = n.conv_arrays;
        return spc_conv_backward(&g, a.t_row_ptr, a.t_cols, a.t_perm, a.weight.values, x, dy, dx,
                                 a.weight.gradient, a.bias.gradient, batch_.threads);
    }

    std::int32_t weight_grad(const Node& n, const float* x, const float* dy) const {
        const spc_geometry g = geometry(n);
        const spc_conv_arrays& a = n.conv_arrays;
        // Of frozen weights no gradient is made: the bias alone is seen to.
        const std::int32_t* rows = a.weight.gradient ? a.row_ptr : plan_->no_rows.data();
        return spc_conv_weight_grad(&g, rows, a.cols, x, dy, a.weight.gradient, a.bias.gradient,
                                    batch_.threads);
    }

    std::int32_t topk_grad(int node, const float* x, const float* dy) const {
        spc_plan_topk* top = batch_.topk;
        while (top->node != node) ++top;
        const Node& n = plan_->nodes[static_cast<std::size_t>(node)];
        const spc_geometry g = geometry(n);
        const std::int32_t code =
            spc_topk_grad(&g, n.conv_arrays.row_ptr, n.conv_arrays.cols, x, dy, top->k, 0,
                          top->indices, top->top, &top->count, batch_.threads);
        if (code == SPC_NOT_FINITE) top->count = -1;
        return code;
    }

    std::int32_t input_grad(const Node& n, const float* dy, float* dx) const {
        const spc_geometry g = geometry(n);
        const spc_conv_arrays& a = n.conv_arrays;
        return spc_conv_input_grad(&g, a.t_row_ptr, a.t_cols, a.t_perm, a.weight.values, dy, dx,
                                   batch_.threads);
    }

    std::int32_t norm_train(const Node& n, const Step& step) const {
        const spc_norm_arrays& a = n.norm_arrays;
        double momentum = n.momentum < 0.0 ? 0.0 : n.momentum;
        if (training_ && a.num_batches) {
            ++*a.num_batches;
            if (n.momentum < 0.0) momentum = 1.0 / static_cast<double>(*a.num_batches);
        }
        float* saved = at(step.saved);
        double *mean = nullptr, *variance = nullptr;
        for (int i = 0; i < batch_.num_moments; ++i) {
            spc_plan_moments& m = batch_.moments[i];
            if (m.node != step.node) continue;
            mean = m.mean;
            variance = m.variance;
            m.count = n.pixels() * batch_.size;
        }
        const std::int32_t code = batchnorm_train(
            n.channels, plane(n), at(step.x), at(step.residual), a.gamma.values, a.beta.values,
            n.eps, momentum, training_ ? a.running_mean : nullptr,
            training_ ? a.running_var : nullptr, n.relu, at(step.y), saved, saved + n.channels,
            mean, variance, batch_.threads);
        clear(n, at(step.y));
        return code;
    }

    std::int32_t norm_infer(const Node& n, const Step& step) const {
        const spc_norm_arrays& a = n.norm_arrays;
        const std::int32_t code = spc_batchnorm_infer(
            n.channels, plane(n).count(), at(step.x), at(step.residual), a.gamma.values,
            a.beta.values, n.eps, a.running_mean, a.running_var, n.relu, at(step.y),
            batch_.threads);
        clear(n, at(step.y));
        return code;
    }

    std::int32_t norm_grad(const Node& n, const Step& step) const {
        const spc_norm_arrays& a = n.norm_arrays;
        const float* saved = at(step.saved);
        const std::int32_t code = batchnorm_backward(
            n.channels, plane(n), at(step.x), at(step.y), at(step.dy), a.gamma.values, saved,
            saved + n.channels, n.relu, at(step.dx), training_ ? a.gamma.gradient : nullptr,
            training_ ? a.beta.gradient : nullptr, at(step.dresidual), batch_.threads);
        clear(n, at(step.dx));
        return code;
    }

    std::int32_t pool(const Node& n, const Step& step) const {
        spc_pool_geometry g = n.pool;
        g.batch = lanes_;
        float *x = at(step.x), *y = at(step.y), *dy = at(step.dy), *dx = at(step.dx);
        auto* taps = reinterpret_cast<std::uint8_t*>(at(step.saved));
        const std::int64_t pixels = plan_->nodes[static_cast<std::size_t>(n.source)].pixels();
        const int threads = batch_.threads;
        switch (step.action) {
            case Action::max_pool: return spc_maxpool_forward(&g, x, y, taps, threads);
            case Action::max_pool_grad: return spc_maxpool_backward(&g, taps, dy, dx, threads);
            case Action::avg_pool: return spc_avgpool_forward(&g, n.include_pad, x, y, threads);
            case Action::avg_pool_grad:
                return spc_avgpool_backward(&g, n.include_pad, dy, dx, threads);
            case Action::global_pool:
                return spc_global_avgpool_forward(n.channels, pixels, lanes_, x, y, threads);
            default:
                return spc_global_avgpool_backward(n.channels, pixels, lanes_, dy, dx,
                                                   threads);
        }
    }

    std::int32_t loss(const Node& n, const float* logits, float* dlogits) const {
        if (batch_.labels)
            *score_ = softmax_cross_entropy(logits, batch_.labels, n.channels, batch_.size, lanes_,
                                            dlogits);
        return SPC_OK;
    }

    spc_plan* plan_;
    const Program& program_;
    const Batch& batch_;
    Score* score_;
    const std::int32_t lanes_;  // samples and zeros behind them
    const bool training_;  // whether parameters get gradients and running statistics move
};

}  // namespace

std::int32_t run_program(spc_plan* plan, const Program& program, const Batch& batch,
                         Score* score) {
    using Clock = std::chrono::steady_clock;
    Runner runner(plan, program, batch, score);
    plan->seconds.assign(2 * plan->nodes.size(), 0.0);
    Clock::time_point start = Clock::now();
    for (const Step& step : program.steps) {
        if (std::int32_t code = runner.run(step)) return code;
        const Clock::time_point end = Clock::now();
        const auto place = static_cast<std::size_t>(step.node);
        plan->seconds[step.backward ? plan->nodes.size() + place : place] +=
            std::chrono::duration<double>(end - start).count();
        start = end;
    }
    return SPC_OK;
}

std::int32_t sgd_step(spc_plan* plan, const spc_sgd& sgd, int threads) {
    const auto update = [&](const spc_parameter& p, std::int64_t count) {
        if (!p.values || !p.gradient) return static_cast<std::int32_t>(SPC_OK);
        return spc_sgd_step(count, p.values, p.gradient, sgd.momentum != 0.0 ? p.momentum : nullptr,
                            sgd.lr, sgd.momentum, sgd.weight_decay, threads);
    };
    for (const Node& n : plan->nodes) {
        std::int32_t code = SPC_OK;
        if (n.kind == Kind::conv) {
            const spc_conv_arrays& a = n.conv_arrays;
            code = update(a.weight, a.row_ptr[n.channels]);
            if (!code) code = update(a.bias, n.channels);
        } else if (n.kind == Kind::norm) {
            code = update(n.norm_arrays.gamma, n.channels);
            if (!code) code = update(n.norm_arrays.beta, n.channels);
        }
        if (code) return code;
    }
    return SPC_OK;
}

}  // namespace spc
