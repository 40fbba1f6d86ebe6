// A plan's nodes, and the programs (training, inference, growth, statistics) that they are
// compiled into.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "pages.h"
#include "sparse_plan.h"

namespace spc {

enum class Kind { input, conv, norm, relu, add, max_pool, avg_pool, global_pool, flatten };

struct Node {
    Kind kind;
    int source = -1;
    int other = -1;  // residual, or the second addend
    std::int64_t channels = 0, height = 0, width = 0;  // of the result
    spc_geometry conv{};
    spc_pool_geometry pool{};
    bool relu = false, include_pad = false, bound = false;
    double eps = 0.0, momentum = 0.0;
    spc_conv_arrays conv_arrays{};
    spc_norm_arrays norm_arrays{};

    std::int64_t pixels() const { return height * width; }
    std::int64_t size() const { return channels * height * width; }
};

// A stretch of the arena, in use from step `first` to step `last`.
struct Buffer {
    std::size_t sample_bytes, fixed_bytes;
    int first = -1, last = -1;
    std::size_t offset = 0;
};

enum class Action {
    load, conv, norm_train, norm_infer, relu, add, max_pool, avg_pool, global_pool,
    loss, conv_grads, weight_grad, topk_grad, input_grad, norm_grad, relu_grad, max_pool_grad, avg_pool_grad,
    global_pool_grad, copy, accumulate, compress, expand
};

constexpr int kOperands = 7;

// One kernel call; operands are numbers of buffers, -1 for none.
struct Step {
    Action action;
    int node;
    bool backward = false;
    int x = -1, y = -1, dy = -1, dx = -1;
    int residual = -1;  // or the second addend
    int dresidual = -1;
    int saved = -1;     // mean and inverse deviation of batch norm, winners of max pooling

    void operands(int (&all)[kOperands]) const {
        const int these[kOperands] = {x, y, dy, dx, residual, dresidual, saved};
        for (int i = 0; i < kOperands; ++i) all[i] = these[i];
    }
};

struct Program {
    std::vector<Buffer> buffers;
    std::vector<Step> steps;
    int logits = -1;
    std::size_t bytes = 0;
};

}  // namespace spc

struct spc_plan {
    std::int32_t batch = 0;
    bool recompute = false, bfloat16 = false, built = false;
    int output = -1;
    std::vector<spc::Node> nodes;
    spc::Program train, infer;
    spc::Pages arena;  // nothing in it outlives a run
    std::vector<double> seconds;  // [2 * nodes]
    std::vector<std::int32_t> no_rows;  // zeros: the row_ptr of a pattern without entries
};

namespace spc {

Program training_program(const spc_plan& plan);
Program inference_program(const spc_plan& plan);
// Of the loss's largest gradients at the pruned weights of nodes [asked], and nothing else.
Program growth_program(const spc_plan& plan, const std::vector<char>& asked);

// The forward pass in training mode as far as node `last`, nothing kept.
Program statistics_program(const spc_plan& plan, int last);

// Samples that a batch takes in memory. Rows that are no whole number of vectors begin inside of
// cache lines, and kernels take up to twice the time on them; so a batch is padded with samples of
// zeros where at most a third is added. Nothing reads what the padding holds but as zeros: layers
// with an addend put them back (Runner::clear).
std::int32_t lanes_of(std::int32_t batch);

// Of the batch up to `batch` that takes the most.
std::int32_t most_lanes(std::int32_t batch);

// Gives buffers that are in use at the same time different places.
void place_buffers(Program* program, std::int32_t batch);

struct Batch {
    std::int32_t size;
    const spc_images* images;
    const std::int64_t* labels;  // or null
    int threads;
    spc_plan_topk* topk = nullptr;  // of a growth program, one for each node asked
    int num_topk = 0;
    spc_plan_moments* moments = nullptr;  // of a statistics program, for the norms asked
    int num_moments = 0;
};

struct Score {
    double loss = 0.0;
    std::int64_t correct = 0;
};

// Whether there is such a node.
std::int32_t check_source(const char* where, const spc_plan* plan, std::int32_t source);

std::int32_t run_program(spc_plan* plan, const Program& program, const Batch& batch, Score* score);
std::int32_t sgd_step(spc_plan* plan, const spc_sgd& sgd, int threads);
float* buffer_at(const spc_plan& plan, const Program& program, int buffer);

// images [B, C, pixels] -> x [C, pixels, lanes], zeros from B on.
std::int32_t load_images(const spc_images& images, std::int64_t batch, std::int64_t lanes,
                         std::int64_t channels, std::int64_t pixels, float* x, int threads);

// A channel: rows of `lanes` values, of which the first `batch` are samples and the others zeros.
struct Plane {
    std::int64_t rows, lanes, batch;
    std::int64_t count() const { return rows * lanes; }
    std::int64_t samples() const { return rows * batch; }
    std::int64_t zeros() const { return rows * (lanes - batch); }
};

// spc_batchnorm_train, and each channel's mean and population variance into arrays that are null
// where they are not wanted.
std::int32_t batchnorm_train(std::int64_t channels, const Plane& plane, const float* x,
                             const float* residual, const float* gamma, const float* beta,
                             double eps, double momentum, float* running_mean, float* running_var,
                             std::int32_t relu, float* y, float* saved_mean, float* saved_invstd,
                             double* mean, double* variance, std::int32_t threads);

// spc_batchnorm_backward; dy is zero where x is no sample.
std::int32_t batchnorm_backward(std::int64_t channels, const Plane& plane, const float* x,
                                const float* y, const float* dy, const float* gamma,
                                const float* saved_mean, const float* saved_invstd,
                                std::int32_t relu, float* dx, float* dgamma, float* dbeta,
                                float* dresidual, std::int32_t threads);

// Between float32 and bfloat16, to the nearest, ties to even.
void compress(const float* x, std::uint16_t* y, std::int64_t count, int threads);
void expand(const std::uint16_t* x, float* y, std::int64_t count, int threads);

// Mean cross-entropy of softmax(logits [classes, lanes]) over the first `batch` lanes; its
// gradient, zeros in the others, unless `dlogits` is null.
Score softmax_cross_entropy(const float* logits, const std::int64_t* labels, std::int64_t classes,
                            std::int64_t batch, std::int64_t lanes, float* dlogits);

}  // namespace spc
