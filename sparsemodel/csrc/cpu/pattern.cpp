// Checks of geometries and patterns, and the index by input channel.
#include <algorithm>
#include <initializer_list>
#include <vector>

#include "conv.h"
#include "errors.h"
#include "workers.h"

namespace spc {
namespace {

struct Side {
    const char* name;
    std::int32_t in, out, kernel, stride, pad, dilation;
};

std::int32_t check_side(const Side& side, const char* where) {
    if (side.in < 1 || side.kernel < 1 || side.stride < 1 || side.dilation < 1 || side.pad < 0)
        return fail(SPC_BAD_GEOMETRY,
                    "%s: %s: expected size, kernel, stride, dilation >= 1 and padding >= 0, got "
                    "%d, %d, %d, %d and %d",
                    where, side.name, side.in, side.kernel, side.stride, side.dilation, side.pad);
    const std::int64_t reach = static_cast<std::int64_t>(side.dilation) * (side.kernel - 1) + 1;
    const std::int64_t padded = side.in + 2 * static_cast<std::int64_t>(side.pad);
    const std::int64_t out = padded < reach ? 0 : (padded - reach) / side.stride + 1;
    if (out < 1 || out != side.out)
        return fail(SPC_BAD_GEOMETRY,
                    "%s: %s: an input of %d with this kernel has an output of %lld, got %d", where,
                    side.name, side.in, static_cast<long long>(out), side.out);
    return SPC_OK;
}

bool fits(std::initializer_list<std::int64_t> factors, std::int64_t limit) {
    std::int64_t product = 1;
    for (std::int64_t factor : factors) {
        if (product > limit / factor) return false;
        product *= factor;
    }
    return true;
}

}  // namespace

std::int32_t check_geometry(const spc_geometry* g, const char* where) {
    if (!g) return fail(SPC_NULL_POINTER, "%s: the geometry is null", where);
    if (g->batch < 1 || g->in_channels < 1 || g->out_channels < 1 || g->groups < 1)
        return fail(SPC_BAD_GEOMETRY,
                    "%s: expected batch, channels and groups >= 1, got %d, %d, %d and %d", where,
                    g->batch, g->in_channels, g->out_channels, g->groups);
    if (g->in_channels % g->groups || g->out_channels % g->groups)
        return fail(SPC_BAD_GEOMETRY, "%s: %d groups do not divide %d and %d channels", where,
                    g->groups, g->in_channels, g->out_channels);
    const Side h{"height", g->in_h, g->out_h, g->kernel_h, g->stride_h, g->pad_h, g->dilation_h};
    const Side w{"width", g->in_w, g->out_w, g->kernel_w, g->stride_w, g->pad_w, g->dilation_w};
    if (std::int32_t code = check_side(h, where)) return code;
    if (std::int32_t code = check_side(w, where)) return code;
    constexpr std::int64_t kInt32 = (std::int64_t{1} << 31) - 1, kBytes = std::int64_t{1} << 48;
    if (!fits({g->in_channels / g->groups, g->kernel_h, g->kernel_w}, kInt32) ||
        !fits({g->stride_h, g->stride_w, g->in_channels}, kInt32))
        return fail(SPC_BAD_GEOMETRY, "%s: a weight row has more than 2^31 - 1 places", where);
    if (!fits({g->batch, g->in_channels, g->in_h, g->in_w}, kBytes) ||
        !fits({g->batch, g->out_channels, g->out_h, g->out_w}, kBytes) ||
        !fits({g->batch, g->in_channels, g->in_h + 2LL * g->pad_h, g->in_w + 2LL * g->pad_w},
              kBytes))
        return fail(SPC_BAD_GEOMETRY, "%s: the activations are too large", where);
    return SPC_OK;
}

std::int32_t check_row_ptr(const spc_geometry* g, const std::int32_t* row_ptr, std::int64_t rows,
                           const char* where) {
    if (!row_ptr) return fail(SPC_NULL_POINTER, "%s: row_ptr is null", where);
    const std::int64_t places = static_cast<std::int64_t>(g->out_channels) *
                                (g->in_channels / g->groups) * g->kernel_h * g->kernel_w;
    if (row_ptr[0] != 0 || row_ptr[rows] < 0 || row_ptr[rows] > places)
        return fail(SPC_BAD_PATTERN,
                    "%s: row_ptr runs from %d to %d; expected from 0 to at most %lld", where,
                    row_ptr[0], row_ptr[rows], static_cast<long long>(places));
    return SPC_OK;
}

namespace {

std::int32_t check_pattern(const spc_geometry* g, const std::int32_t* row_ptr,
                           const std::int32_t* cols, const char* where) {
    if (std::int32_t code = check_geometry(g, where)) return code;
    if (std::int32_t code = check_row_ptr(g, row_ptr, g->out_channels, where)) return code;
    if (!cols && row_ptr[g->out_channels] > 0)
        return fail(SPC_NULL_POINTER, "%s: cols is null", where);
    const std::int32_t places = g->in_channels / g->groups * g->kernel_h * g->kernel_w;
    for (std::int32_t row = 0; row < g->out_channels; ++row) {
        if (row_ptr[row + 1] < row_ptr[row] || row_ptr[row + 1] > row_ptr[g->out_channels])
            return fail(SPC_BAD_PATTERN, "%s: row_ptr falls from %d to %d at row %d", where,
                        row_ptr[row], row_ptr[row + 1], row);
        std::int32_t last = -1;
        for (std::int32_t e = row_ptr[row]; e < row_ptr[row + 1]; last = cols[e++])
            if (cols[e] <= last || cols[e] >= places)
                return fail(SPC_BAD_PATTERN,
                            "%s: row %d has column %d after %d; expected rising columns in "
                            "[0, %d)",
                            where, row, cols[e], last, places);
    }
    return SPC_OK;
}

}  // namespace
}  // namespace spc

extern "C" int32_t spc_check_geometry(const spc_geometry* g) {
    return spc::check_geometry(g, "geometry");
}

extern "C" int32_t spc_check_pattern(const spc_geometry* g, const int32_t* row_ptr,
                                     const int32_t* cols) {
    return spc::check_pattern(g, row_ptr, cols, "pattern");
}

extern "C" int64_t spc_transposed_rows(const spc_geometry* g) {
    if (spc::check_geometry(g, "transposed_rows")) return -1;
    return static_cast<int64_t>(g->stride_h) * g->stride_w * g->in_channels;
}

extern "C" int32_t spc_transpose_pattern(const spc_geometry* g, const int32_t* row_ptr,
                                         const int32_t* cols, int32_t* t_row_ptr, int32_t* t_cols,
                                         int32_t* t_perm) {
    const char* where = "transpose_pattern";
    // The whole pattern: a column out of range would write outside the arrays.
    if (int32_t code = spc::check_pattern(g, row_ptr, cols, where)) return code;
    if (!t_row_ptr || ((!t_cols || !t_perm) && row_ptr[g->out_channels] > 0))
        return spc::fail(SPC_NULL_POINTER, "%s: an output array is null", where);
    const spc::Stencil s = spc::input_grad_stencil(*g);
    const int64_t rows = s.target_phases() * s.target_channels, taps = s.kernel();
    const int64_t channels = g->in_channels / g->groups, outs = g->out_channels / g->groups;
    // Row of a code in its group: the tap's target phase, then the channel.
    const auto row_of = [&](int64_t group, int32_t code) {
        const int64_t c = code / taps, tap = code % taps;
        const auto wide = static_cast<int64_t>(s.w.taps.size());
        const spc::Tap& h = s.h.taps[static_cast<std::size_t>(tap / wide)];
        const spc::Tap& w = s.w.taps[static_cast<std::size_t>(tap % wide)];
        const int64_t phase = static_cast<int64_t>(h.target_phase) * s.w.target_step + w.target_phase;
        return phase * s.target_channels + group * channels + c;
    };
    const auto for_entries = [&](auto&& body) {
        for (int64_t row = 0; row < g->out_channels; ++row)
            for (int32_t e = row_ptr[row]; e < row_ptr[row + 1]; ++e)
                body(row_of(row / outs, cols[e]), row % outs, e);
    };
    // Counting sort; t_row_ptr[r] serves as the place of row r's next entry and so ends one row
    // further, which the last loop takes back.
    std::fill(t_row_ptr, t_row_ptr + rows + 1, 0);
    for_entries([&](int64_t row, int64_t, int32_t) { ++t_row_ptr[row + 1]; });
    for (int64_t row = 0; row < rows; ++row) t_row_ptr[row + 1] += t_row_ptr[row];
    for_entries([&](int64_t row, int64_t out, int32_t e) {
        const int32_t place = t_row_ptr[row]++;
        t_cols[place] = static_cast<int32_t>(out * taps + cols[e] % taps);
        t_perm[place] = e;
    });
    for (int64_t row = rows; row > 0; --row) t_row_ptr[row] = t_row_ptr[row - 1];
    t_row_ptr[0] = 0;
    return SPC_OK;
}
