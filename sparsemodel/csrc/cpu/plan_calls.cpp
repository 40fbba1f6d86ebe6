// The exported functions that run a plan: checks, then one of its programs.
#include "guard.h"
#include "plan.h"

using namespace spc;

namespace {

int32_t check_images(const char* where, const spc_images* images) {
    if (int32_t code = check_pointers(where, {images})) return code;
    if (!images->data) return fail(SPC_NULL_POINTER, "%s: images.data is null", where);
    if (images->type == SPC_FLOAT32) return SPC_OK;
    if (images->type != SPC_UINT8)
        return fail(SPC_BAD_ARGUMENT, "%s: images of unknown type %d", where, images->type);
    if (!images->scale || !images->shift)
        return fail(SPC_NULL_POINTER, "%s: bytes need scale and shift", where);
    return SPC_OK;
}

int32_t check_run(const char* where, const spc_plan* plan, const Batch& batch) {
    if (!plan) return fail(SPC_NULL_POINTER, "%s: plan is null", where);
    if (!plan->built) return fail(SPC_BAD_ARGUMENT, "%s: the plan is not built", where);
    if (batch.size < 1 || batch.size > plan->batch)
        return fail(SPC_BAD_ARGUMENT, "%s: expected a batch of 1 to %d, got %d", where,
                    plan->batch, batch.size);
    if (int32_t code = check_images(where, batch.images)) return code;
    if (int32_t code = check_threads(batch.threads, where)) return code;
    const int64_t classes = plan->nodes[static_cast<size_t>(plan->output)].channels;
    for (int64_t b = 0; batch.labels && b < batch.size; ++b)
        if (batch.labels[b] < 0 || batch.labels[b] >= classes)
            return fail(SPC_BAD_ARGUMENT, "%s: label %lld of sample %lld is not in [0, %lld)",
                        where, static_cast<long long>(batch.labels[b]), static_cast<long long>(b),
                        static_cast<long long>(classes));
    return SPC_OK;
}

// Batch norm by the batch's own statistics needs two values a channel.
int32_t check_variance(const char* where, const spc_plan* plan, int32_t batch, bool training) {
    for (size_t i = 0; i < plan->nodes.size(); ++i) {
        const Node& n = plan->nodes[i];
        const bool own = n.kind == Kind::norm && (training || !n.norm_arrays.running_mean);
        if (own && n.pixels() * batch < 2)
            return fail(SPC_BAD_ARGUMENT,
                        "%s: batch norm (node %d) has one value a channel and so no variance; "
                        "use a larger batch",
                        where, static_cast<int>(i));
    }
    return SPC_OK;
}

int32_t check_sgd(const char* where, const spc_plan* plan, const spc_sgd& sgd) {
    if (!(sgd.lr >= 0.0) || !(sgd.momentum >= 0.0 && sgd.momentum < 1.0) ||
        !(sgd.weight_decay >= 0.0))
        return fail(SPC_BAD_ARGUMENT,
                    "%s: expected lr, weight_decay >= 0 and momentum in [0, 1), got %g, %g and %g",
                    where, sgd.lr, sgd.weight_decay, sgd.momentum);
    if (sgd.momentum == 0.0) return SPC_OK;
    for (size_t i = 0; i < plan->nodes.size(); ++i) {
        const Node& n = plan->nodes[i];
        for (const spc_parameter& p : {n.conv_arrays.weight, n.conv_arrays.bias,
                                       n.norm_arrays.gamma, n.norm_arrays.beta})
            if (p.values && p.gradient && !p.momentum)
                return fail(SPC_NULL_POINTER, "%s: a parameter of node %d has no momentum array",
                            where, static_cast<int>(i));
    }
    return SPC_OK;
}

// The backward pass reads convolutions by input.
int32_t check_indexed(const char* where, const spc_plan* plan) {
    for (size_t i = 0; i < plan->nodes.size(); ++i)
        if (plan->nodes[i].kind == Kind::conv && !plan->nodes[i].conv_arrays.t_row_ptr)
            return fail(SPC_NULL_POINTER, "%s: node %d has no index by input", where,
                        static_cast<int>(i));
    return SPC_OK;
}

// Marks the convolutions whose gradients are asked for.
int32_t check_topk(const char* where, const spc_plan* plan, spc_plan_topk* topk, int32_t num,
                   std::vector<char>* asked) {
    asked->assign(plan->nodes.size(), 0);
    for (int32_t i = 0; i < num; ++i) {
        spc_plan_topk& top = topk[i];
        top.count = 0;
        if (int32_t code = check_source(where, plan, top.node)) return code;
        char& known = (*asked)[static_cast<size_t>(top.node)];
        if (plan->nodes[static_cast<size_t>(top.node)].kind != Kind::conv || known)
            return fail(SPC_BAD_ARGUMENT,
                        "%s: node %d is no convolution, or asked for a second time", where,
                        top.node);
        known = 1;
        if (top.k < 0)
            return fail(SPC_BAD_ARGUMENT, "%s: expected k >= 0 of node %d, got %lld", where,
                        top.node, static_cast<long long>(top.k));
        if ((!top.indices || !top.top) && top.k > 0)
            return fail(SPC_NULL_POINTER, "%s: indices or top of node %d is null", where,
                        top.node);
    }
    return SPC_OK;
}

// `last` becomes the last batch norm whose statistics are asked for.
int32_t check_moments(const char* where, const spc_plan* plan, const spc_plan_moments* moments,
                      int32_t num, int* last) {
    std::vector<char> known(plan->nodes.size(), 0);
    for (int32_t i = 0; i < num; ++i) {
        const spc_plan_moments& m = moments[i];
        if (int32_t code = check_source(where, plan, m.node)) return code;
        char& again = known[static_cast<size_t>(m.node)];
        if (plan->nodes[static_cast<size_t>(m.node)].kind != Kind::norm || again)
            return fail(SPC_BAD_ARGUMENT,
                        "%s: node %d is no batch norm, or asked for a second time", where, m.node);
        again = 1;
        if (!m.mean || !m.variance)
            return fail(SPC_NULL_POINTER, "%s: mean or variance of node %d is null", where, m.node);
        if (m.node > *last) *last = m.node;
    }
    return SPC_OK;
}

}  // namespace

extern "C" int64_t spc_plan_allocated_bytes(const spc_plan* plan) {
    return plan ? static_cast<int64_t>(plan->arena.size()) : 0;
}

extern "C" int32_t spc_plan_train(spc_plan* plan, int32_t batch, const spc_images* images,
                                  const int64_t* labels, const spc_sgd* sgd, int32_t threads,
                                  double* loss, int64_t* correct) {
    const char* where = "plan_train";
    const Batch run{batch, images, labels, threads};
    if (int32_t code = check_pointers(where, {plan, images, labels, loss, correct})) return code;
    if (int32_t code = check_run(where, plan, run)) return code;
    if (int32_t code = check_variance(where, plan, batch, true)) return code;
    if (int32_t code = check_indexed(where, plan)) return code;
    if (sgd)
        if (int32_t code = check_sgd(where, plan, *sgd)) return code;
    return guarded(where, [&]() -> int32_t {
        plan->arena.reserve(plan->train.bytes);
        Score score;
        if (int32_t code = run_program(plan, plan->train, run, &score)) return code;
        *loss = score.loss;
        *correct = score.correct;
        return sgd ? sgd_step(plan, *sgd, threads) : static_cast<int32_t>(SPC_OK);
    });
}

extern "C" int32_t spc_plan_topk_grads(spc_plan* plan, int32_t batch, const spc_images* images,
                                       const int64_t* labels, spc_plan_topk* topk, int32_t num,
                                       int32_t threads) {
    const char* where = "plan_topk_grads";
    const Batch run{batch, images, labels, threads, topk, num};
    if (int32_t code = check_pointers(where, {plan, images, labels, topk})) return code;
    if (int32_t code = check_run(where, plan, run)) return code;
    if (int32_t code = check_variance(where, plan, batch, true)) return code;
    if (int32_t code = check_indexed(where, plan)) return code;
    return guarded(where, [&]() -> int32_t {
        std::vector<char> asked;
        if (int32_t code = check_topk(where, plan, topk, num, &asked)) return code;
        Program program = growth_program(*plan, asked);
        place_buffers(&program, most_lanes(plan->batch));
        plan->arena.reserve(program.bytes);
        Score score;
        return run_program(plan, program, run, &score);
    });
}

extern "C" int32_t spc_plan_infer(spc_plan* plan, int32_t batch, const spc_images* images,
                                  float* logits, const int64_t* labels, int32_t threads,
                                  double* loss, int64_t* correct) {
    const char* where = "plan_infer";
    const Batch run{batch, images, labels, threads};
    if (labels)
        if (int32_t code = check_pointers(where, {loss, correct})) return code;
    if (int32_t code = check_run(where, plan, run)) return code;
    if (int32_t code = check_variance(where, plan, batch, false)) return code;
    return guarded(where, [&]() -> int32_t {
        plan->arena.reserve(plan->infer.bytes);
        Score score;
        if (int32_t code = run_program(plan, plan->infer, run, &score)) return code;
        if (labels) {
            *loss = score.loss;
            *correct = score.correct;
        }
        if (!logits) return SPC_OK;
        const int64_t classes = plan->nodes[static_cast<size_t>(plan->output)].channels;
        const float* z = buffer_at(*plan, plan->infer, plan->infer.logits);
        const int64_t lanes = lanes_of(batch);
        for (int64_t b = 0; b < batch; ++b)
            for (int64_t k = 0; k < classes; ++k) logits[b * classes + k] = z[k * lanes + b];
        return SPC_OK;
    });
}

extern "C" int32_t spc_plan_statistics(spc_plan* plan, int32_t batch, const spc_images* images,
                                       spc_plan_moments* moments, int32_t num, int32_t threads) {
    const char* where = "plan_statistics";
    Batch run{batch, images, nullptr, threads};
    run.moments = moments;
    run.num_moments = num;
    if (int32_t code = check_pointers(where, {plan, images, moments})) return code;
    if (int32_t code = check_run(where, plan, run)) return code;
    if (int32_t code = check_variance(where, plan, batch, true)) return code;
    return guarded(where, [&]() -> int32_t {
        int last = 0;
        if (int32_t code = check_moments(where, plan, moments, num, &last)) return code;
        Program program = statistics_program(*plan, last);
        place_buffers(&program, most_lanes(plan->batch));
        plan->arena.reserve(program.bytes);
        Score score;
        return run_program(plan, program, run, &score);
    });
}

extern "C" int32_t spc_plan_seconds(const spc_plan* plan, double* seconds) {
    const char* where = "plan_seconds";
    if (check_pointers(where, {plan, seconds})) return -1;
    for (size_t i = 0; i < plan->seconds.size(); ++i) seconds[i] = plan->seconds[i];
    return static_cast<int32_t>(plan->nodes.size());
}
