#include "stencil.h"

#include <algorithm>

namespace spc {
namespace {

// Measured on layers of 64 to 512 channels: long contiguous pieces of memory weigh more than a
// fit into the second-level cache, so tiles may take some of the third level.
constexpr std::int64_t kTileBytes = 6 * 1024 * 1024;
constexpr std::int64_t kStretchFloats = 1024;
constexpr std::int64_t kLargestOffset = (std::int64_t{1} << 31) - 1;
constexpr std::int64_t kSlack = kBlockFloats;  // whole blocks may reach behind the tile

std::int64_t floor_div(std::int64_t a, std::int64_t b) {
    return a / b - (a % b != 0 && (a % b < 0) != (b < 0));
}

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

void finish(Axis* axis) {
    axis->grid = ceil_div(axis->target, axis->target_step);
    axis->min_shift = axis->taps[0].shift;
    std::int64_t largest = axis->min_shift;
    for (const Tap& tap : axis->taps) {
        axis->min_shift = std::min(axis->min_shift, tap.shift);
        largest = std::max(largest, tap.shift);
    }
    axis->extent = largest - axis->min_shift;
}

Axis forward_axis(int in, int out, int kernel, int stride, int pad, int dilation) {
    Axis axis{{}, {}, in, out, stride, 1, 0, 0, 0};
    for (int k = 0; k < kernel; ++k) {
        const std::int64_t reach = static_cast<std::int64_t>(k) * dilation - pad;
        const std::int64_t shift = floor_div(reach, stride);
        const int phase = static_cast<int>(reach - shift * stride);
        auto& kept = axis.source_phases;
        const auto found = std::find(kept.begin(), kept.end(), phase);
        axis.taps.push_back({static_cast<int>(found - kept.begin()), 0, shift});
        if (found == kept.end()) kept.push_back(phase);
    }
    finish(&axis);
    return axis;
}

Axis input_grad_axis(int in, int out, int kernel, int stride, int pad, int dilation) {
    Axis axis{{}, {0}, out, in, 1, stride, 0, 0, 0};
    for (int k = 0; k < kernel; ++k) {
        const std::int64_t reach = static_cast<std::int64_t>(k) * dilation - pad;
        const std::int64_t down = floor_div(reach, stride);
        axis.taps.push_back({0, static_cast<int>(reach - down * stride), -down});
    }
    finish(&axis);
    return axis;
}

// Columns of zeros that the left end of every row and the right end of the row above share.
std::int64_t shared_zeros(const Axis& w) {
    std::int64_t shared = w.extent;
    for (int phase : w.source_phases) {
        const std::int64_t first = ceil_div(std::max<std::int64_t>(0, -phase), w.source_step);
        const std::int64_t inside = floor_div(w.source - 1 - phase, w.source_step) + 1;
        const std::int64_t left = std::max<std::int64_t>(0, first - w.min_shift);
        const std::int64_t right = w.grid + w.extent + w.min_shift - inside;
        shared = std::min({shared, left, std::max<std::int64_t>(0, right)});
    }
    return std::max<std::int64_t>(0, shared);
}

// Samples side by side in a packed pixel: many, in whole blocks where that pads the batch little,
// as long as the inputs of one group of results fit a tile.
int choose_lanes(const Stencil& s) {
    const std::int64_t batch = s.batch, pixels = s.h.grid * s.w.grid;
    for (std::int64_t most : {128, 64, 48, 32, 16}) {
        if (most > 64 && pixels > 1) continue;
        const std::int64_t even = ceil_div(batch, ceil_div(batch, most));
        const std::int64_t lanes = ceil_div(even, kBlockFloats) * kBlockFloats;
        const std::int64_t reach = (1 + s.h.extent) * (kMaxGroupFloats / lanes + s.w.extent);
        const std::int64_t bytes = reach * lanes * 4 * s.source_channels * s.source_slots();
        const bool fits = pixels == 1 || most == 16 || bytes <= kTileBytes;
        if (fits && ceil_div(batch, lanes) * lanes * 8 <= batch * 9)
            return static_cast<int>(lanes);
    }
    return static_cast<int>(ceil_div(batch, ceil_div(batch, kBlockFloats)));
}

// About kStretchFloats positions: even pieces of a row, or some rows.
void choose_stretch(const Stencil& s, Tiling* t) {
    const std::int64_t pieces = ceil_div(s.w.grid * t->lanes, kStretchFloats);
    t->stretch_cols = ceil_div(s.w.grid, pieces);
    if (t->lanes % kBlockFloats == 0) {
        const std::int64_t unit = std::max<std::int64_t>(1, kMaxGroupFloats / t->lanes);
        if (t->stretch_cols > unit)
            t->stretch_cols = std::min(s.w.grid, ceil_div(t->stretch_cols, unit) * unit);
    }
    t->joined = t->stretch_cols * t->lanes % kMaxGroupFloats != 0;
    if (t->joined) t->stretch_cols = s.w.grid;
    const std::int64_t row = t->stretch_cols * t->lanes;
    t->stretch_rows = std::clamp<std::int64_t>(kStretchFloats / row, 1, s.h.grid);
}

void set_layout(const Stencil& s, Tiling* t) {
    t->tiles_h = ceil_div(s.h.grid, t->tile_rows);
    t->tiles_w = ceil_div(s.w.grid, t->tile_cols);
    t->packed_rows = t->tile_rows + s.h.extent;
    t->packed_cols = t->tile_cols + s.w.extent;
    t->pitch = t->packed_cols - (t->tiles_w == 1 ? shared_zeros(s.w) : 0);
    t->plane = ((t->packed_rows - 1) * t->pitch + t->packed_cols) * t->lanes;
    // Channels in different cache sets, where they are packed. Only where results end with whole
    // blocks: otherwise the last block reaches into the gap, which is never written.
    if (!t->direct && t->lanes % kBlockFloats == 0 && t->plane % 1024 == 0)
        t->plane += kBlockFloats;
    t->packed_floats = s.source_channels * s.source_slots() * t->plane + kSlack;
}

}  // namespace

Stencil forward_stencil(const spc_geometry& g) {
    return {forward_axis(g.in_h, g.out_h, g.kernel_h, g.stride_h, g.pad_h, g.dilation_h),
            forward_axis(g.in_w, g.out_w, g.kernel_w, g.stride_w, g.pad_w, g.dilation_w),
            g.batch, g.groups, g.in_channels, g.out_channels};
}

Stencil input_grad_stencil(const spc_geometry& g) {
    return {input_grad_axis(g.in_h, g.out_h, g.kernel_h, g.stride_h, g.pad_h, g.dilation_h),
            input_grad_axis(g.in_w, g.out_w, g.kernel_w, g.stride_w, g.pad_w, g.dilation_w),
            g.batch, g.groups, g.out_channels, g.in_channels};
}

bool make_tiling(const Stencil& s, Tiling* t) {
    const bool pointwise = s.kernel() == 1 && s.h.source == 1 && s.w.source == 1 &&
                           s.h.target == 1 && s.w.target == 1 && s.h.taps[0].shift == 0 &&
                           s.w.taps[0].shift == 0;
    t->direct = pointwise && s.batch % kBlockFloats == 0;
    t->lanes = t->direct ? s.batch : choose_lanes(s);
    t->slices = ceil_div(s.batch, t->lanes);
    choose_stretch(s, t);
    const std::int64_t pixel_bytes = s.source_channels * s.source_slots() * t->lanes * 4;
    // Whole rows where some fit, for they are contiguous; halved until they do.
    std::int64_t rows = 0;
    for (std::int64_t pieces = 1;; pieces *= 2) {
        t->tile_cols = ceil_div(s.w.grid, pieces);
        rows = kTileBytes / (pixel_bytes * (t->tile_cols + s.w.extent)) - s.h.extent;
        if (rows >= std::min<std::int64_t>(s.h.grid, 2) || t->tile_cols <= 4) break;
    }
    rows = std::clamp<std::int64_t>(rows, 1, s.h.grid);
    t->tile_rows = ceil_div(s.h.grid, ceil_div(s.h.grid, rows));
    set_layout(s, t);
    return t->packed_floats <= kLargestOffset;
}

Tile tile_at(const Stencil& s, const Tiling& t, std::int64_t index) {
    // Slices innermost: they share cache lines and pages of the source.
    const std::int64_t slice = index % t.slices, place = index / t.slices;
    Tile tile;
    tile.row = place / t.tiles_w * t.tile_rows;
    tile.col = place % t.tiles_w * t.tile_cols;
    tile.rows = std::min(t.tile_rows, s.h.grid - tile.row);
    tile.cols = std::min(t.tile_cols, s.w.grid - tile.col);
    tile.first_lane = slice * t.lanes;
    tile.lanes = static_cast<int>(std::min<std::int64_t>(t.lanes, s.batch - tile.first_lane));
    return tile;
}

std::vector<Stretch> stretches(const Tiling& t, const Tile& tile, bool even) {
    std::vector<Stretch> list;
    const auto blocks_of = [](std::int64_t floats) { return ceil_div(floats, kBlockFloats); };
    if (!even) {
        // Runs are told by group from the tile's start: cut only between groups.
        const std::int64_t row = t.stretch_cols * t.lanes * t.stretch_rows;
        const std::int64_t step = ceil_div(row, kMaxGroupFloats) * kMaxGroupFloats;
        for (std::int64_t first = 0; first < t.span(tile); first += step)
            list.push_back({first, blocks_of(std::min(step, t.span(tile) - first)), 1, 0});
        return list;
    }
    for (std::int64_t i = 0; i < tile.rows; i += t.stretch_rows) {
        const std::int64_t rows = std::min(t.stretch_rows, tile.rows - i);
        const std::int64_t cols = t.joined ? tile.cols : t.stretch_cols;
        for (std::int64_t j = 0; j < tile.cols; j += cols) {
            const std::int64_t first = (i * t.pitch + j) * t.lanes;
            const std::int64_t wide = std::min(cols, tile.cols - j);
            if (t.joined) {
                list.push_back({first, blocks_of(((rows - 1) * t.pitch + wide) * t.lanes), 1, 0});
            } else {
                list.push_back({first, blocks_of(wide * t.lanes), rows, t.pitch * t.lanes});
            }
        }
    }
    return list;
}

const float* packed_tile(const Stencil& s, const Tiling& t, const Tile& tile, const float* source,
                         float* buffer) {
    if (t.direct) return source + tile.first_lane;
    // Packed index range that lies in the source, and the source index of its start.
    struct Inside {
        std::int64_t first, last, source;
    };
    const auto inside = [](const Axis& axis, int phase, std::int64_t start, std::int64_t count) {
        const std::int64_t origin = (start + axis.min_shift) * axis.source_step + phase;
        const std::int64_t step = axis.source_step;
        const std::int64_t first = std::clamp<std::int64_t>(ceil_div(-origin + 0, step), 0, count);
        const std::int64_t from = origin >= 0 ? 0 : first;
        const std::int64_t last =
            std::clamp<std::int64_t>(floor_div(axis.source - 1 - origin, step) + 1, from, count);
        return Inside{from, last, origin + from * step};
    };
    const std::int64_t wide = s.w.source_phases.size();
    for (std::size_t a = 0; a < s.h.source_phases.size(); ++a) {
        for (std::size_t b = 0; b < s.w.source_phases.size(); ++b) {
            const Inside rows = inside(s.h, s.h.source_phases[a], tile.row, t.packed_rows);
            const Inside cols = inside(s.w, s.w.source_phases[b], tile.col, t.packed_cols);
            PackTile p;
            p.source = source + tile.first_lane;
            p.packed = buffer + static_cast<std::int64_t>(a * wide + b) * t.plane;
            p.channel_stride = s.source_row();
            p.row_stride = static_cast<std::int64_t>(s.w.source) * s.batch * s.h.source_step;
            p.pixel_stride = static_cast<std::int64_t>(s.batch) * s.w.source_step;
            p.packed_channel = s.source_slots() * t.plane;
            p.packed_row = t.pitch * t.lanes;
            p.lanes = tile.lanes;
            p.lane_pitch = t.lanes;
            p.rows = static_cast<int>(t.packed_rows);
            p.cols = static_cast<int>(t.packed_cols);
            p.first_row = static_cast<int>(rows.first);
            p.last_row = static_cast<int>(rows.last);
            p.first_col = static_cast<int>(cols.first);
            p.last_col = static_cast<int>(cols.last);
            p.first_offset = (rows.source * s.w.source + cols.source) * s.batch;
            if (p.last_row == p.first_row || p.last_col == p.first_col) {
                p.first_row = p.last_row = p.rows;  // nothing inside: all zeros
                p.first_offset = 0;
            }
            kernels().pack(p, s.source_channels);
        }
    }
    std::fill(buffer + t.packed_floats - kSlack, buffer + t.packed_floats, 0.0f);
    return buffer;
}

void code_offsets(const Stencil& s, const Tiling& t, std::int32_t* offsets) {
    const std::int64_t channels = s.source_channels / s.groups;
    const std::int64_t wide = s.w.source_phases.size();
    for (std::int64_t c = 0; c < channels; ++c) {
        for (const Tap& h : s.h.taps) {
            for (const Tap& w : s.w.taps) {
                const std::int64_t slot = h.source_slot * wide + w.source_slot;
                const std::int64_t plane = (c * s.source_slots() + slot) * t.plane;
                const std::int64_t pixel =
                    (h.shift - s.h.min_shift) * t.pitch + (w.shift - s.w.min_shift);
                *offsets++ = static_cast<std::int32_t>(plane + pixel * t.lanes);
            }
        }
    }
}

std::int64_t group_pitch(const Stencil& s, const Tiling& t) {
    return s.source_channels / s.groups * s.source_slots() * t.plane;
}

std::int64_t make_runs(const Stencil& s, const Tiling& t, const Tile& tile, std::int64_t phase,
                       std::int64_t first, std::int64_t length, Run* runs) {
    const std::int64_t phase_h = phase / s.w.target_step, phase_w = phase % s.w.target_step;
    const std::int64_t row_floats = t.pitch * t.lanes;
    const bool joined = tile.lanes == t.lanes && t.lanes == s.batch && s.w.target_step == 1;
    std::int64_t count = 0;
    const auto add = [&](std::int64_t start, std::int64_t floats, std::int64_t target) {
        const std::int64_t from = std::max(start, first);
        const std::int64_t to = std::min(start + floats, first + length);
        if (from >= to) return;
        runs[count++] = {static_cast<std::int32_t>(from - first),
                         static_cast<std::int32_t>(to - from), target + from - start};
    };
    for (std::int64_t i = first / row_floats; i < tile.rows; ++i) {
        if (i * row_floats >= first + length) break;
        const std::int64_t row = (tile.row + i) * s.h.target_step + phase_h;
        if (row >= s.h.target) break;
        // Grid columns whose pixel of this phase exists.
        const std::int64_t existing = ceil_div(s.w.target - phase_w, s.w.target_step) - tile.col;
        const std::int64_t cols = std::min(tile.cols, existing);
        const std::int64_t target =
            (row * s.w.target + tile.col * s.w.target_step + phase_w) * s.batch + tile.first_lane;
        if (joined) {
            add(i * row_floats, cols * t.lanes, target);
            continue;
        }
        const std::int64_t skipped = (first - i * row_floats) / t.lanes;
        for (std::int64_t j = std::max<std::int64_t>(0, skipped); j < cols; ++j) {
            const std::int64_t start = i * row_floats + j * t.lanes;
            if (start >= first + length) break;
            add(start, tile.lanes, target + j * s.w.target_step * s.batch);
        }
    }
    return count;
}

}  // namespace spc
