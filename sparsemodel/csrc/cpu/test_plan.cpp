// A plan of a small residual network from C: its gradients against finite differences, its memory
// under the sanitizers that this program is built with. Exits with the number of failed checks.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "sparse_plan.h"

namespace {

int failures = 0;

void check(bool good, const char* what) {
    if (good) return;
    ++failures;
    std::printf("FAILED: %s (last error: %s)\n", what, spc_last_error());
}

std::mt19937 generator(1);

std::vector<float> normal(std::size_t count) {
    std::normal_distribution<float> draw;
    std::vector<float> values(count);
    for (float& v : values) v = draw(generator);
    return values;
}

struct Parameter {
    explicit Parameter(std::size_t count)
        : values(normal(count)), gradient(count), momentum(count) {}
    spc_parameter arrays() { return {values.data(), gradient.data(), momentum.data()}; }
    std::vector<float> values, gradient, momentum;
};

spc_geometry geometry(int in, int out, int size, int kernel, int stride) {
    const int pad = kernel / 2, result = (size + 2 * pad - kernel) / stride + 1;
    return {1, in, out, size, size, result, result, kernel, kernel, stride, stride, pad, pad,
            1, 1, 1};
}

struct Layer {
    Layer(spc_plan* plan, int source, const spc_geometry& g, double density)
        : node(spc_plan_conv(plan, source, &g)),
          length(g.in_channels * g.kernel_h * g.kernel_w),
          row_ptr(1, 0),
          bias(g.out_channels),
          weight(0) {
        std::bernoulli_distribution active(density);
        for (int o = 0; o < g.out_channels; ++o) {
            for (int c = 0; c < length; ++c)
                if (active(generator)) cols.push_back(c);
            row_ptr.push_back(static_cast<int>(cols.size()));
        }
        weight = Parameter(cols.size());
        t_row_ptr.resize(static_cast<std::size_t>(spc_transposed_rows(&g)) + 1);
        t_cols.resize(cols.size());
        t_perm.resize(cols.size());
        check(!spc_check_pattern(&g, row_ptr.data(), cols.data()), "pattern");
        check(!spc_transpose_pattern(&g, row_ptr.data(), cols.data(), t_row_ptr.data(),
                                     t_cols.data(), t_perm.data()),
              "transpose");
        const spc_conv_arrays arrays{row_ptr.data(), cols.data(),     t_row_ptr.data(),
                                     t_cols.data(),  t_perm.data(),   weight.arrays(),
                                     bias.arrays()};
        check(!spc_plan_bind_conv(plan, node, &arrays), "bind_conv");
    }
    int node, length;  // of a row of the weight
    std::vector<int> row_ptr, cols, t_row_ptr, t_cols, t_perm;
    Parameter bias, weight;
};

struct Norm {
    Norm(spc_plan* plan, int source, int residual, int channels)
        : node(spc_plan_batchnorm(plan, source, residual, 1, 1e-5, 0.1)),
          gamma(static_cast<std::size_t>(channels)),
          beta(static_cast<std::size_t>(channels)),
          mean(static_cast<std::size_t>(channels)),
          var(static_cast<std::size_t>(channels), 1.0f) {
        const spc_norm_arrays arrays{gamma.arrays(), beta.arrays(), mean.data(), var.data(),
                                     nullptr};
        check(!spc_plan_bind_norm(plan, node, &arrays), "bind_norm");
    }
    int node;
    Parameter gamma, beta;
    std::vector<float> mean, var;
};

// All pruned gradients of two layers: at the places that the patterns lack, in order, with
// gradients and statistics left alone.
void test_topk(spc_plan* plan, int batch, const spc_images* images, const std::int64_t* labels,
               const std::vector<const Layer*>& layers, const Norm& norm, int threads) {
    std::vector<spc_plan_topk> asked;
    std::vector<std::vector<std::int64_t>> indices, pruned;
    std::vector<std::vector<float>> top, gradients;
    for (const Layer* layer : layers) {
        pruned.emplace_back();
        const auto rows = static_cast<int>(layer->row_ptr.size()) - 1;
        for (int row = 0; row < rows; ++row)
            for (int c = 0; c < layer->length; ++c)
                if (!std::binary_search(layer->cols.begin() + layer->row_ptr[row],
                                        layer->cols.begin() + layer->row_ptr[row + 1], c))
                    pruned.back().push_back(static_cast<std::int64_t>(row) * layer->length + c);
        indices.emplace_back(pruned.back().size() + 9);
        top.emplace_back(indices.back().size());
        gradients.push_back(layer->weight.gradient);
        asked.push_back({static_cast<std::int64_t>(indices.back().size()), indices.back().data(),
                         top.back().data(), 0, layer->node});
    }
    const std::vector<float> mean = norm.mean, var = norm.var, beta = norm.beta.gradient;
    const auto call = [&](std::size_t num) {
        return spc_plan_topk_grads(plan, batch, images, labels, asked.data(),
                                   static_cast<std::int32_t>(num), threads);
    };
    check(!call(asked.size()), "topk_grads");
    for (std::size_t i = 0; i < asked.size(); ++i) {
        const auto count = static_cast<std::size_t>(asked[i].count);
        check(count == pruned[i].size() &&
                  std::equal(pruned[i].begin(), pruned[i].end(), indices[i].begin()),
              "all pruned places");
        check(std::any_of(top[i].begin(), top[i].begin() + asked[i].count,
                          [](float g) { return g != 0.0f; }),
              "gradients of pruned weights");
        check(gradients[i] == layers[i]->weight.gradient, "gradients are left alone");
    }
    check(mean == norm.mean && var == norm.var && beta == norm.beta.gradient,
          "statistics are left alone");
    asked.push_back(asked[0]);
    check(call(asked.size()) == SPC_BAD_ARGUMENT, "a node asked for twice");
    asked.pop_back();
    asked[0].k = -1;
    check(call(1) == SPC_BAD_ARGUMENT, "negative k");
    asked[0].k = 1;
    for (std::int32_t node : {-1, norm.node, 1000}) {
        asked[0].node = node;
        check(call(1) == SPC_BAD_ARGUMENT, "no convolution");
    }
}

// Of every batch norm, against the running statistics that a training step then moves (by .1).
void test_statistics(spc_plan* plan, int batch, const spc_images* images,
                     const std::int64_t* labels, const std::vector<const Norm*>& norms,
                     const std::vector<int>& pixels, int threads) {
    std::vector<spc_plan_moments> asked;
    std::vector<std::vector<double>> means, variances;
    std::vector<Norm> before;
    for (const Norm* norm : norms) {
        before.push_back(*norm);
        means.emplace_back(norm->mean.size());
        variances.emplace_back(norm->mean.size());
        asked.push_back({means.back().data(), variances.back().data(), 0, norm->node});
    }
    const auto call = [&] {
        return spc_plan_statistics(plan, batch, images, asked.data(),
                                   static_cast<std::int32_t>(asked.size()), threads);
    };
    check(!call(), "statistics");
    for (std::size_t i = 0; i < norms.size(); ++i)
        check(norms[i]->mean == before[i].mean && norms[i]->var == before[i].var &&
                  norms[i]->gamma.gradient == before[i].gamma.gradient,
              "statistics leave all arrays alone");
    double loss = 0.0;
    std::int64_t correct = 0;
    check(!spc_plan_train(plan, batch, images, labels, nullptr, threads, &loss, &correct),
          "train after statistics");
    for (std::size_t i = 0; i < norms.size(); ++i) {
        const double n = static_cast<double>(asked[i].count);
        check(asked[i].count == static_cast<std::int64_t>(batch) * pixels[i], "count");
        for (std::size_t c = 0; c < means[i].size(); ++c) {
            const double mean = (norms[i]->mean[c] - 0.9 * before[i].mean[c]) / 0.1;
            const double var = (norms[i]->var[c] - 0.9 * before[i].var[c]) / 0.1 * (n - 1.0) / n;
            check(std::abs(mean - means[i][c]) < 1e-4 * (1.0 + std::abs(mean)), "mean");
            check(std::abs(var - variances[i][c]) < 1e-4 * (1.0 + var), "variance");
        }
    }
    asked.push_back(asked[0]);
    check(call() == SPC_BAD_ARGUMENT, "a batch norm asked for twice");
    asked.pop_back();
    asked[0].mean = nullptr;
    check(call() == SPC_NULL_POINTER, "no mean");
    asked[0].node = 0;
    check(call() == SPC_BAD_ARGUMENT, "no batch norm");
}

void test_network(int batch, int flags, int threads) {
    spc_plan* plan = spc_plan_new(batch, flags);
    const int x = spc_plan_input(plan, 3, 8, 8);
    Layer stem(plan, x, geometry(3, 8, 8, 3, 1), 1.0);
    Norm norm0(plan, stem.node, -1, 8);
    Layer conv1(plan, norm0.node, geometry(8, 16, 8, 3, 2), 0.2);
    Norm norm1(plan, conv1.node, -1, 16);
    Layer conv2(plan, norm1.node, geometry(16, 16, 4, 3, 1), 0.2);
    Layer side(plan, norm0.node, geometry(8, 16, 8, 1, 2), 0.5);
    Norm norm2(plan, conv2.node, side.node, 16);
    const int relu = spc_plan_relu(plan, norm2.node);
    const int sum = spc_plan_add(plan, relu, norm2.node);
    Layer fc(plan, spc_plan_flatten(plan, spc_plan_global_avgpool(plan, sum)),
             geometry(16, 4, 1, 1, 1), 0.6);
    check(!spc_plan_build(plan, fc.node), "build");
    check(spc_plan_arena_bytes(plan) > 0, "arena_bytes");

    const std::vector<float> pixels = normal(static_cast<std::size_t>(batch) * 3 * 64);
    std::vector<std::int64_t> labels;
    for (int b = 0; b < batch; ++b) labels.push_back(b % 4);
    const spc_images images{pixels.data(), SPC_FLOAT32, nullptr, nullptr};
    double loss = 0.0;
    std::int64_t correct = 0;
    const auto step = [&](const spc_sgd* sgd) {
        check(!spc_plan_train(plan, batch, &images, labels.data(), sgd, threads, &loss, &correct),
              "train");
        return loss;
    };
    check(spc_plan_allocated_bytes(plan) == 0, "nothing is allocated before the first run");
    step(nullptr);
    check(spc_plan_allocated_bytes(plan) >= spc_plan_arena_bytes(plan), "allocated_bytes");
    test_statistics(plan, batch, &images, labels.data(), {&norm0, &norm1, &norm2}, {64, 16, 16},
                    threads);
    test_topk(plan, batch, &images, labels.data(), {&fc, &conv1, &side}, norm1, threads);
    test_topk(plan, batch, &images, labels.data(), {&conv2}, norm2, threads);
    for (Parameter* p : {&stem.weight, &norm0.gamma, &conv1.weight, &norm1.beta, &conv2.weight,
                         &side.weight, &side.bias, &norm2.gamma, &fc.weight, &fc.bias}) {
        const std::vector<float> before = p->values, gradient = p->gradient;
        const std::vector<float> direction = normal(before.size());
        double slope = 0.0, scale = 0.0;
        for (std::size_t i = 0; i < before.size(); ++i) {
            slope += static_cast<double>(gradient[i]) * direction[i];
            scale += std::abs(static_cast<double>(gradient[i]) * direction[i]);
        }
        // Where a ReLU bends nearby, the slopes of the two sides differ and one is the gradient's.
        const double middle = step(nullptr);
        double error = 1e9;
        for (float width : {5e-4f, -5e-4f}) {
            for (std::size_t i = 0; i < before.size(); ++i)
                p->values[i] = before[i] + width * direction[i];
            error = std::min(error, std::abs((step(nullptr) - middle) / width - slope));
        }
        p->values = before;
        check(error < 0.05 * scale + 1e-2, "gradient");
    }
    const spc_sgd sgd{0.05, 0.9, 1e-4};
    const double first = step(&sgd);
    for (int i = 0; i < 20; ++i) step(&sgd);
    check(loss < first, "training lowers the loss");
    std::vector<float> logits(static_cast<std::size_t>(batch) * 4);
    check(!spc_plan_infer(plan, 1, &images, logits.data(), nullptr, threads, nullptr, nullptr),
          "infer one");
    check(!spc_plan_infer(plan, batch, &images, nullptr, labels.data(), threads, &loss, &correct),
          "infer all");
    std::vector<double> seconds(64);
    check(spc_plan_seconds(plan, seconds.data()) == fc.node + 1, "seconds");
    spc_plan_free(plan);
}

// Without an index by input a plan infers and measures in the smaller arena, and does not train.
void test_forward_alone() {
    const int batch = 32;
    spc_plan* plan = spc_plan_new(batch, 0);
    spc_geometry g = geometry(3, 8, 8, 3, 1);
    Layer first(plan, spc_plan_input(plan, 3, 8, 8), g, 0.5);
    Norm norm(plan, first.node, -1, 8);
    g = geometry(8, 8, 8, 3, 1);
    Layer second(plan, norm.node, g, 0.5);
    Norm last(plan, second.node, -1, 8);
    const int logits = spc_plan_flatten(plan, spc_plan_global_avgpool(plan, last.node));
    for (Layer* layer : {&first, &second}) {
        const spc_conv_arrays arrays{layer->row_ptr.data(), layer->cols.data(), nullptr, nullptr,
                                     nullptr, layer->weight.arrays(), layer->bias.arrays()};
        check(!spc_plan_bind_conv(plan, layer->node, &arrays), "bind without an index");
    }
    check(!spc_plan_build(plan, logits), "build without an index");
    const std::vector<float> pixels = normal(static_cast<std::size_t>(batch) * 3 * 64);
    const std::vector<std::int64_t> labels(static_cast<std::size_t>(batch), 1);
    const spc_images images{pixels.data(), SPC_FLOAT32, nullptr, nullptr};
    double loss = 0.0, moments[2][8];
    std::int64_t correct = 0;
    spc_plan_moments asked{moments[0], moments[1], 0, last.node};
    check(!spc_plan_statistics(plan, batch, &images, &asked, 1, 1), "statistics alone");
    check(!spc_plan_infer(plan, batch, &images, nullptr, labels.data(), 1, &loss, &correct),
          "infer alone");
    check(spc_plan_allocated_bytes(plan) < spc_plan_arena_bytes(plan) * 3 / 4, "a smaller arena");
    check(spc_plan_train(plan, batch, &images, labels.data(), nullptr, 1, &loss, &correct) ==
              SPC_NULL_POINTER,
          "no training without an index");
    spc_plan_free(plan);
}

}  // namespace

int main() {
    test_forward_alone();
    for (int batch : {2, 7, 30, 64})
        for (int flags : {0, SPC_PLAN_RECOMPUTE + 0, SPC_PLAN_RECOMPUTE + SPC_PLAN_BFLOAT16})
            for (int threads : {1, 2}) test_network(batch, flags, threads);
    std::printf("%d failed\n", failures);
    return failures;
}
