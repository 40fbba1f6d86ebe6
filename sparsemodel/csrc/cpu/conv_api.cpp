// The exported functions of sparse convolution.
#include "conv.h"
#include "guard.h"

namespace {

using namespace spc;

int32_t too_large(const char* where) {
    return fail(SPC_BAD_GEOMETRY,
                "%s: one position of all channels exceeds 2^31 - 1 floats; use a smaller batch",
                where);
}

int64_t out_plane(const spc_geometry& g) {
    return static_cast<int64_t>(g.out_h) * g.out_w * g.batch;
}

int32_t check_call(const char* where, const spc_geometry* g, const int32_t* row_ptr,
                   const int32_t* cols, bool transposed, int32_t threads) {
    if (int32_t code = check_geometry(g, where)) return code;
    const int64_t rows = transposed
                             ? static_cast<int64_t>(g->stride_h) * g->stride_w * g->in_channels
                             : g->out_channels;
    if (int32_t code = check_row_ptr(g, row_ptr, rows, where)) return code;
    if (!cols && row_ptr[rows] > 0) return fail(SPC_NULL_POINTER, "%s: cols is null", where);
    return check_threads(threads, where);
}

}  // namespace

extern "C" int32_t spc_conv_forward(const spc_geometry* g, const int32_t* row_ptr,
                                    const int32_t* cols, const float* values, const float* bias,
                                    const float* x, float* y, int32_t threads) {
    const char* where = "conv_forward";
    if (int32_t code = check_call(where, g, row_ptr, cols, false, threads)) return code;
    if (int32_t code = check_pointers(where, {x, y})) return code;
    if (!values && row_ptr[g->out_channels] > 0)
        return fail(SPC_NULL_POINTER, "%s: values is null", where);
    return guarded(where, [&] {
        const Rows rows{row_ptr, cols, nullptr, values};
        return sparse_times_tiles(forward_stencil(*g), rows, bias, x, y, threads)
                   ? SPC_OK
                   : too_large(where);
    });
}

extern "C" int32_t spc_conv_input_grad(const spc_geometry* g, const int32_t* t_row_ptr,
                                       const int32_t* t_cols, const int32_t* t_perm,
                                       const float* values, const float* dy, float* dx,
                                       int32_t threads) {
    const char* where = "conv_input_grad";
    if (int32_t code = check_call(where, g, t_row_ptr, t_cols, true, threads)) return code;
    if (int32_t code = check_pointers(where, {dy, dx})) return code;
    const int64_t rows = static_cast<int64_t>(g->stride_h) * g->stride_w * g->in_channels;
    if ((!values || !t_perm) && t_row_ptr[rows] > 0)
        return fail(SPC_NULL_POINTER, "%s: values or t_perm is null", where);
    return guarded(where, [&] {
        const Rows transposed{t_row_ptr, t_cols, t_perm, values};
        return sparse_times_tiles(input_grad_stencil(*g), transposed, nullptr, dy, dx, threads)
                   ? SPC_OK
                   : too_large(where);
    });
}

extern "C" int32_t spc_conv_weight_grad(const spc_geometry* g, const int32_t* row_ptr,
                                        const int32_t* cols, const float* x, const float* dy,
                                        float* dvalues, float* dbias, int32_t threads) {
    const char* where = "conv_weight_grad";
    if (int32_t code = check_call(where, g, row_ptr, cols, false, threads)) return code;
    if (int32_t code = check_pointers(where, {x, dy})) return code;
    if (!dvalues && row_ptr[g->out_channels] > 0)
        return fail(SPC_NULL_POINTER, "%s: dvalues is null", where);
    return guarded(where, [&] {
        if (!weight_grad(forward_stencil(*g), row_ptr, cols, x, dy, dvalues, threads))
            return too_large(where);
        if (dbias) bias_grad(g->out_channels, out_plane(*g), dy, dbias, threads);
        return static_cast<int32_t>(SPC_OK);
    });
}

extern "C" int32_t spc_conv_backward(const spc_geometry* g, const int32_t* t_row_ptr,
                                     const int32_t* t_cols, const int32_t* t_perm,
                                     const float* values, const float* x, const float* dy,
                                     float* dx, float* dvalues, float* dbias, int32_t threads) {
    const char* where = "conv_backward";
    if (int32_t code = check_call(where, g, t_row_ptr, t_cols, true, threads)) return code;
    if (int32_t code = check_pointers(where, {x, dy, dx})) return code;
    const int64_t rows = static_cast<int64_t>(g->stride_h) * g->stride_w * g->in_channels;
    if ((!values || !t_perm || !dvalues) && t_row_ptr[rows] > 0)
        return fail(SPC_NULL_POINTER, "%s: values, t_perm or dvalues is null", where);
    return guarded(where, [&] {
        const Rows transposed{t_row_ptr, t_cols, t_perm, values};
        if (!backward(input_grad_stencil(*g), transposed, x, dy, dx, dvalues, threads))
            return too_large(where);
        if (dbias) bias_grad(g->out_channels, out_plane(*g), dy, dbias, threads);
        return static_cast<int32_t>(SPC_OK);
    });
}

extern "C" int32_t spc_topk_grad(const spc_geometry* g, const int32_t* row_ptr,
                                 const int32_t* cols, const float* x, const float* dy, int64_t k,
                                 int64_t tile_bytes, int64_t* indices, float* top, int64_t* count,
                                 int32_t threads) {
    const char* where = "topk_grad";
    if (int32_t code = check_call(where, g, row_ptr, cols, false, threads)) return code;
    if (int32_t code = check_pointers(where, {x, dy, count})) return code;
    if (k < 0 || tile_bytes < 0)
        return fail(SPC_BAD_ARGUMENT, "%s: expected k and tile_bytes >= 0, got %lld and %lld",
                    where, static_cast<long long>(k), static_cast<long long>(tile_bytes));
    if ((!indices || !top) && k > 0)
        return fail(SPC_NULL_POINTER, "%s: indices or top is null", where);
    return guarded(where, [&]() -> int32_t {
        TopK result{k, tile_bytes, indices, top, 0, false};
        if (!topk_grad(forward_stencil(*g), row_ptr, cols, x, dy, &result, threads))
            return too_large(where);
        *count = result.count;
        if (!result.not_finite) return SPC_OK;
        return fail(SPC_NOT_FINITE,
                    "%s: a gradient is NaN: no order can be made; has training diverged?", where);
    });
}
