// The exported functions that make a plan: its nodes, their arrays, its programs.
#include "guard.h"
#include "plan.h"

using namespace spc;

namespace {

constexpr int32_t kNone = -1;

// Why a node cannot be added, or SPC_OK.
int32_t check_open(const char* where, const spc_plan* plan) {
    if (!plan) return fail(SPC_NULL_POINTER, "%s: plan is null", where);
    if (plan->built) return fail(SPC_BAD_ARGUMENT, "%s: the plan is built already", where);
    return SPC_OK;
}

int32_t check_shapes(const char* where, const Node& node, int64_t channels, int64_t height,
                     int64_t width) {
    if (node.channels == channels && node.height == height && node.width == width) return SPC_OK;
    return fail(SPC_BAD_GEOMETRY,
                "%s: expected a source of %lld x %lld x %lld, got one of %lld x %lld x %lld", where,
                static_cast<long long>(channels), static_cast<long long>(height),
                static_cast<long long>(width), static_cast<long long>(node.channels),
                static_cast<long long>(node.height), static_cast<long long>(node.width));
}

// Adds a node that reads `source` and has its shape, changed by fill(node, source's node), which
// returns a status. Returns the node's number or -1.
template <class Fill>
int32_t add_node(const char* where, spc_plan* plan, Kind kind, int32_t source, Fill&& fill) {
    if (check_open(where, plan) || check_source(where, plan, source)) return kNone;
    int32_t number = kNone;
    const int32_t code = guarded(where, [&]() -> int32_t {
        const Node& from = plan->nodes[static_cast<size_t>(source)];
        Node node;
        node.kind = kind;
        node.source = source;
        node.channels = from.channels;
        node.height = from.height;
        node.width = from.width;
        if (int32_t status = fill(&node, from)) return status;
        node.bound = kind != Kind::conv && kind != Kind::norm;
        plan->nodes.push_back(node);
        number = static_cast<int32_t>(plan->nodes.size()) - 1;
        return SPC_OK;
    });
    return code ? kNone : number;
}

int32_t check_other(const char* where, const spc_plan* plan, int32_t other, const Node& from) {
    if (int32_t code = check_source(where, plan, other)) return code;
    return check_shapes(where, plan->nodes[static_cast<size_t>(other)], from.channels, from.height,
                        from.width);
}

int32_t add_pool(const char* where, spc_plan* plan, Kind kind, int32_t source,
                 const spc_pool_geometry* g, bool include_pad) {
    return add_node(where, plan, kind, source, [&](Node* node, const Node& from) -> int32_t {
        if (!g) return fail(SPC_NULL_POINTER, "%s: the geometry is null", where);
        if (int32_t code = check_shapes(where, from, g->channels, g->in_h, g->in_w)) return code;
        const bool fits =
            g->kernel_h > 0 && g->kernel_w > 0 && g->stride_h > 0 && g->stride_w > 0 &&
            g->pad_h >= 0 && g->pad_w >= 0 && g->pad_h <= g->kernel_h / 2 &&
            g->pad_w <= g->kernel_w / 2 && g->kernel_h <= 256 / g->kernel_w && g->out_h > 0 &&
            g->out_w > 0 && g->out_h == (g->in_h + 2 * g->pad_h - g->kernel_h) / g->stride_h + 1 &&
            g->out_w == (g->in_w + 2 * g->pad_w - g->kernel_w) / g->stride_w + 1;
        if (!fits)
            return fail(SPC_BAD_GEOMETRY,
                        "%s: window (at most 256 places), stride, padding and sizes do not fit",
                        where);
        node->pool = *g;
        node->height = g->out_h;
        node->width = g->out_w;
        node->include_pad = include_pad;
        return SPC_OK;
    });
}

// Whether a parameter may be bound: frozen or not as it was when the plan was built.
bool same_freeze(const spc_plan* plan, const spc_parameter& before, const spc_parameter& now) {
    return !plan->built || !before.gradient == !now.gradient;
}

int32_t freeze_changed(const char* where, int32_t node) {
    return fail(SPC_BAD_ARGUMENT,
                "%s: a parameter of node %d is frozen now and was not when the plan was built, or "
                "the reverse; build a new plan",
                where, node);
}

Node* bindable(const char* where, spc_plan* plan, int32_t number, Kind kind, const void* arrays) {
    if (check_pointers(where, {plan, arrays}) || check_source(where, plan, number)) return nullptr;
    Node& node = plan->nodes[static_cast<size_t>(number)];
    if (node.kind == kind) return &node;
    fail(SPC_BAD_ARGUMENT, "%s: node %d is of another kind", where, number);
    return nullptr;
}

int32_t check_complete(const char* where, const spc_plan* plan, int32_t output) {
    std::vector<char> used(plan->nodes.size(), 0);
    used[static_cast<size_t>(output)] = 1;
    for (const Node& node : plan->nodes)
        for (int read : {node.source, node.other})
            if (read >= 0) used[static_cast<size_t>(read)] = 1;
    for (size_t i = 0; i < used.size(); ++i) {
        if (!plan->nodes[i].bound)
            return fail(SPC_BAD_ARGUMENT, "%s: no arrays are bound to node %d", where,
                        static_cast<int>(i));
        if (!used[i])
            return fail(SPC_BAD_ARGUMENT, "%s: the result of node %d is not used", where,
                        static_cast<int>(i));
    }
    return SPC_OK;
}

}  // namespace

int32_t spc::check_source(const char* where, const spc_plan* plan, int32_t source) {
    if (source >= 0 && source < static_cast<int32_t>(plan->nodes.size())) return SPC_OK;
    return fail(SPC_BAD_ARGUMENT, "%s: there is no node %d yet", where, source);
}

extern "C" spc_plan* spc_plan_new(int32_t batch, int32_t flags) {
    const char* where = "plan_new";
    if (batch < 1 || (flags & ~(SPC_PLAN_RECOMPUTE | SPC_PLAN_BFLOAT16)) != 0) {
        fail(SPC_BAD_ARGUMENT, "%s: expected batch >= 1 and known flags, got %d and %d", where,
             batch, flags);
        return nullptr;
    }
    spc_plan* plan = new (std::nothrow) spc_plan;
    if (!plan) {
        fail(SPC_NO_MEMORY, "%s: out of memory", where);
        return nullptr;
    }
    plan->batch = batch;
    plan->bfloat16 = (flags & SPC_PLAN_BFLOAT16) != 0;
    plan->recompute = (flags & SPC_PLAN_RECOMPUTE) != 0;
    return plan;
}

extern "C" void spc_plan_free(spc_plan* plan) { delete plan; }

extern "C" int32_t spc_plan_input(spc_plan* plan, int32_t channels, int32_t height,
                                  int32_t width) {
    const char* where = "plan_input";
    if (check_open(where, plan)) return kNone;
    if (!plan->nodes.empty() || channels < 1 || height < 1 || width < 1) {
        fail(SPC_BAD_ARGUMENT,
             "%s: expected the first node, of sizes >= 1, got node %d of %d x %d x %d", where,
             static_cast<int>(plan->nodes.size()), channels, height, width);
        return kNone;
    }
    const int32_t code = guarded(where, [&]() -> int32_t {
        Node node;
        node.kind = Kind::input;
        node.channels = channels;
        node.height = height;
        node.width = width;
        node.bound = true;
        plan->nodes.push_back(node);
        return SPC_OK;
    });
    return code ? kNone : 0;
}

extern "C" int32_t spc_plan_conv(spc_plan* plan, int32_t source, const spc_geometry* g) {
    const char* where = "plan_conv";
    return add_node(where, plan, Kind::conv, source, [&](Node* node, const Node& from) -> int32_t {
        if (!g) return fail(SPC_NULL_POINTER, "%s: the geometry is null", where);
        node->conv = *g;
        node->conv.batch = plan->batch;
        if (int32_t code = spc_check_geometry(&node->conv)) return code;
        if (int32_t code = check_shapes(where, from, g->in_channels, g->in_h, g->in_w))
            return code;
        node->channels = g->out_channels;
        node->height = g->out_h;
        node->width = g->out_w;
        return SPC_OK;
    });
}

extern "C" int32_t spc_plan_batchnorm(spc_plan* plan, int32_t source, int32_t residual,
                                      int32_t relu, double eps, double momentum) {
    const char* where = "plan_batchnorm";
    return add_node(where, plan, Kind::norm, source, [&](Node* node, const Node& from) -> int32_t {
        if (residual != kNone)
            if (int32_t code = check_other(where, plan, residual, from)) return code;
        if ((relu != 0 && relu != 1) || !(eps >= 0.0) || !(momentum <= 1.0))
            return fail(SPC_BAD_ARGUMENT,
                        "%s: expected relu 0 or 1, eps >= 0 and momentum <= 1, got %d, %g and %g",
                        where, relu, eps, momentum);
        node->other = residual;
        node->relu = relu == 1;
        node->eps = eps;
        node->momentum = momentum;
        return SPC_OK;
    });
}

extern "C" int32_t spc_plan_relu(spc_plan* plan, int32_t source) {
    return add_node("plan_relu", plan, Kind::relu, source,
                    [](Node*, const Node&) -> int32_t { return SPC_OK; });
}

extern "C" int32_t spc_plan_add(spc_plan* plan, int32_t left, int32_t right) {
    const char* where = "plan_add";
    return add_node(where, plan, Kind::add, left, [&](Node* node, const Node& from) -> int32_t {
        node->other = right;
        return check_other(where, plan, right, from);
    });
}

extern "C" int32_t spc_plan_maxpool(spc_plan* plan, int32_t source, const spc_pool_geometry* g) {
    return add_pool("plan_maxpool", plan, Kind::max_pool, source, g, false);
}

extern "C" int32_t spc_plan_avgpool(spc_plan* plan, int32_t source, const spc_pool_geometry* g,
                                    int32_t include_pad) {
    return add_pool("plan_avgpool", plan, Kind::avg_pool, source, g, include_pad != 0);
}

extern "C" int32_t spc_plan_global_avgpool(spc_plan* plan, int32_t source) {
    return add_node("plan_global_avgpool", plan, Kind::global_pool, source,
                    [](Node* node, const Node&) -> int32_t {
                        node->height = node->width = 1;
                        return SPC_OK;
                    });
}

extern "C" int32_t spc_plan_flatten(spc_plan* plan, int32_t source) {
    return add_node("plan_flatten", plan, Kind::flatten, source,
                    [](Node* node, const Node& from) -> int32_t {
                        node->channels = from.size();
                        node->height = node->width = 1;
                        return SPC_OK;
                    });
}

extern "C" int32_t spc_plan_bind_conv(spc_plan* plan, int32_t number,
                                      const spc_conv_arrays* arrays) {
    const char* where = "plan_bind_conv";
    Node* node = bindable(where, plan, number, Kind::conv, arrays);
    if (!node) return SPC_BAD_ARGUMENT;
    const spc_conv_arrays& a = *arrays;
    if (int32_t code = check_pointers(where, {a.row_ptr})) return code;
    const int32_t nnz = a.row_ptr[node->channels];
    if (nnz > 0)
        if (int32_t code = check_pointers(where, {a.cols, a.weight.values})) return code;
    if (nnz > 0 && a.t_row_ptr)
        if (int32_t code = check_pointers(where, {a.t_cols, a.t_perm})) return code;
    const int64_t rows = spc_transposed_rows(&node->conv);
    if (nnz < 0 || a.row_ptr[0] != 0 ||
        (a.t_row_ptr && (a.t_row_ptr[0] != 0 || a.t_row_ptr[rows] != nnz)))
        return fail(SPC_BAD_PATTERN,
                    "%s: node %d: the index by input is not of this pattern (%d entries)", where,
                    number, nnz);
    if (!same_freeze(plan, node->conv_arrays.weight, a.weight) ||
        !same_freeze(plan, node->conv_arrays.bias, a.bias))
        return freeze_changed(where, number);
    node->conv_arrays = a;
    node->bound = true;
    return SPC_OK;
}

extern "C" int32_t spc_plan_bind_norm(spc_plan* plan, int32_t number,
                                      const spc_norm_arrays* arrays) {
    const char* where = "plan_bind_norm";
    Node* node = bindable(where, plan, number, Kind::norm, arrays);
    if (!node) return SPC_BAD_ARGUMENT;
    const spc_norm_arrays& a = *arrays;
    if (!a.running_mean != !a.running_var)
        return fail(SPC_NULL_POINTER, "%s: only one of running_mean and running_var is null",
                    where);
    if (a.running_mean && node->momentum < 0.0 && !a.num_batches)
        return fail(SPC_NULL_POINTER, "%s: a mean over all batches needs num_batches", where);
    const bool kept = !node->norm_arrays.running_mean == !a.running_mean;
    if (plan->built && !kept)
        return fail(SPC_BAD_ARGUMENT,
                    "%s: node %d has running statistics now and had none when the plan was built, "
                    "or the reverse; build a new plan",
                    where, number);
    if (!same_freeze(plan, node->norm_arrays.gamma, a.gamma) ||
        !same_freeze(plan, node->norm_arrays.beta, a.beta))
        return freeze_changed(where, number);
    node->norm_arrays = a;
    node->bound = true;
    return SPC_OK;
}

extern "C" int32_t spc_plan_build(spc_plan* plan, int32_t output) {
    const char* where = "plan_build";
    if (int32_t code = check_open(where, plan)) return code;
    if (int32_t code = check_source(where, plan, output)) return code;
    const Node& last = plan->nodes[static_cast<size_t>(output)];
    if (output == 0 || last.pixels() != 1)
        return fail(SPC_BAD_GEOMETRY,
                    "%s: node %d gives %lld x %lld x %lld, expected logits of 1 x 1 pixel", where,
                    output, static_cast<long long>(last.channels),
                    static_cast<long long>(last.height), static_cast<long long>(last.width));
    return guarded(where, [&]() -> int32_t {
        if (int32_t code = check_complete(where, plan, output)) return code;
        plan->output = output;
        int64_t rows = 0;
        for (const Node& n : plan->nodes) rows = n.channels > rows ? n.channels : rows;
        plan->no_rows.assign(static_cast<size_t>(rows) + 1, 0);
        plan->train = training_program(*plan);
        plan->infer = inference_program(*plan);
        place_buffers(&plan->train, most_lanes(plan->batch));
        place_buffers(&plan->infer, most_lanes(plan->batch));
        plan->seconds.assign(2 * plan->nodes.size(), 0.0);
        plan->built = true;
        return SPC_OK;
    });
}

extern "C" int64_t spc_plan_arena_bytes(const spc_plan* plan) {
    if (!plan || !plan->built) return kNone;
    const size_t bytes =
        plan->train.bytes > plan->infer.bytes ? plan->train.bytes : plan->infer.bytes;
    return static_cast<int64_t>(bytes);
}
