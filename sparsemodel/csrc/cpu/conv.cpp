// Forward and input gradient: sparse rows times packed tiles, or times the source as it is.
#include "conv.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "direct.h"
#include "workers.h"

namespace spc {

void expand(const Stencil& s, const Tiling& t, const Rows& rows, Entry* entries, int threads) {
    const std::int64_t codes = s.source_channels / s.groups * s.kernel();
    auto* offsets = scratch_array<std::int32_t>(Slot::offsets, codes);
    code_offsets(s, t, offsets);
    const std::int64_t per_group = s.target_channels / s.groups, pitch = group_pitch(s, t);
    const std::int64_t total = s.target_phases() * s.target_channels;
    const std::int64_t parts = std::min<std::int64_t>(total, threads * 4);
    parallel(parts, threads, [&](std::int64_t part) {
        const std::int64_t last = total * (part + 1) / parts;
        for (std::int64_t row = total * part / parts; row < last; ++row) {
            const std::int64_t group = row % s.target_channels / per_group;
            const auto base = static_cast<std::int32_t>(group * pitch);
            for (std::int32_t e = rows.row_ptr[row]; e < rows.row_ptr[row + 1]; ++e)
                entries[e] = {base + offsets[rows.cols[e]],
                              rows.values[rows.perm ? rows.perm[e] : e]};
        }
    });
}

Aim aim(const Stencil& s, const Tiling& t, const Tile& tile, std::int64_t phase,
        int group_floats) {
    const std::int64_t span = t.span(tile);
    Aim a{(span + kBlockFloats - 1) / kBlockFloats, nullptr, nullptr, nullptr};
    auto* runs = scratch_array<Run>(Slot::runs, span);
    if (tile.lanes % kBlockFloats == 0) {
        auto* targets = scratch_array<std::int64_t>(Slot::targets, a.blocks);
        std::fill(targets, targets + a.blocks, -1);
        const std::int64_t count = make_runs(s, t, tile, phase, 0, span, runs);
        for (const Run* run = runs; run != runs + count; ++run)
            for (std::int32_t k = 0; k < run->length; k += kBlockFloats)
                targets[(run->source + k) / kBlockFloats] = run->target + k;
        a.targets = targets;
        return a;
    }
    const std::int64_t groups = (span + group_floats - 1) / group_floats;
    auto* starts = scratch_array<std::int32_t>(Slot::targets, groups + 1);
    std::int64_t count = 0;
    for (std::int64_t i = 0; i < groups; ++i) {
        starts[i] = static_cast<std::int32_t>(count);
        const std::int64_t first = i * group_floats;
        const std::int64_t length = std::min<std::int64_t>(group_floats, span - first);
        count += make_runs(s, t, tile, phase, first, length, runs + count);
    }
    starts[groups] = static_cast<std::int32_t>(count);
    a.runs = runs;
    a.run_starts = starts;
    return a;
}

bool streams(const Stencil& s, const float* target) {
    constexpr std::int64_t kCachedFloats = 1 << 20;
    return s.batch % kBlockFloats == 0 && reinterpret_cast<std::uintptr_t>(target) % 64 == 0 &&
           s.target_channels * s.target_row() > kCachedFloats;
}

double pass_work(const Stencil& s, const Tiling& t, std::int64_t nnz) {
    return static_cast<double>(nnz + s.target_channels) * static_cast<double>(t.tiles()) *
           static_cast<double>(t.tile_rows * t.tile_cols * t.lanes) / kBlockFloats;
}

double direct_work(const Stencil& s, std::int64_t nnz) {
    return static_cast<double>(nnz + s.target_channels) * static_cast<double>(s.target_row()) /
           kBlockFloats;
}

void split_rows(const std::int32_t* row_ptr, std::int64_t rows, std::int64_t parts,
                std::int64_t* bounds) {
    // A row costs about four entries by itself: its results are stored.
    const auto before = [&](std::int64_t row) {
        return static_cast<std::int64_t>(row_ptr[row]) + 4 * row;
    };
    std::int64_t row = 0;
    for (std::int64_t part = 0; part < parts; ++part) {
        while (row < rows && before(row) * parts < before(rows) * part) ++row;
        bounds[part] = row;
    }
    bounds[parts] = rows;
}

std::uint64_t next_call() {
    static std::atomic<std::uint64_t> calls{0};
    return ++calls;
}

const float* own_tile(const Stencil& s, const Tiling& t, std::uint64_t call, std::int64_t index,
                      const float* source) {
    thread_local std::uint64_t packed_call = 0;
    thread_local std::int64_t packed_index = 0;
    const Tile tile = tile_at(s, t, index);
    if (t.direct) return packed_tile(s, t, tile, source, nullptr);
    auto* buffer = scratch_array<float>(Slot::packed, t.packed_floats);
    if (packed_call != call || packed_index != index) {
        packed_tile(s, t, tile, source, buffer);
        packed_call = call;
        packed_index = index;
    }
    return buffer;
}

namespace {

// target = rows * source + bias, the source read where it is.
void direct_times(const Stencil& s, const DirectPlan& plan, const Rows& rows, const float* bias,
                  const float* source, float* target, int threads) {
    const std::int64_t channels = s.target_channels;
    threads = worthwhile_threads(threads, direct_work(s, rows.row_ptr[channels]));
    const DirectLists lists = list_entries(s, plan, rows, threads);
    const std::int64_t steps = plan.steps(), wanted = threads == 1 ? 1 : 4 * threads;
    const std::int64_t chunks = std::min(steps, wanted);
    const std::int64_t parts = std::clamp<std::int64_t>((wanted + steps - 1) / steps, 1, channels);
    std::vector<std::int64_t> bounds(static_cast<std::size_t>(parts + 1));
    split_rows(rows.row_ptr, channels, parts, bounds.data());
    parallel(chunks * parts, threads, [&](std::int64_t item) {
        const std::int64_t chunk = item / parts;
        const std::int64_t* range = bounds.data() + item % parts;
        DirectSteps all(s, plan, lists, source, range);
        for (std::int64_t i = steps * chunk / chunks; i < steps * (chunk + 1) / chunks; ++i) {
            DirectTile work = all.tile(i);
            work.row_ptr = rows.row_ptr + range[0];
            work.bias = bias ? bias + range[0] : nullptr;
            work.out = target + range[0] * work.stride;
            work.streams = streams(s, target);
            kernels().direct_spmm(work);
        }
    });
}

}  // namespace

bool sparse_times_tiles(const Stencil& s, const Rows& rows, const float* bias,
                        const float* source, float* target, int threads) {
    Tiling t;
    if (!make_tiling(s, &t)) return false;
    const std::int64_t phases = s.target_phases(), channels = s.target_channels;
    const std::int64_t nnz = rows.row_ptr[phases * channels];
    DirectPlan plan;
    if (plan_direct(s, t, nnz, &plan)) {
        direct_times(s, plan, rows, bias, source, target, threads);
        return true;
    }
    threads = worthwhile_threads(threads, pass_work(s, t, nnz));
    auto* entries = scratch_array<Entry>(Slot::entries, std::max<std::int64_t>(nnz, 1));
    expand(s, t, rows, entries, threads);

    const std::int64_t wanted = threads == 1 ? 1 : 4 * threads;
    const std::int64_t parts =
        std::clamp<std::int64_t>((wanted + t.tiles() - 1) / t.tiles(), 1, channels);
    std::vector<std::int64_t> bounds(static_cast<std::size_t>(phases * (parts + 1)));
    for (std::int64_t phase = 0; phase < phases; ++phase)
        split_rows(rows.row_ptr + phase * channels, channels, parts,
                   bounds.data() + phase * (parts + 1));

    const Kernels& kernel = kernels();
    const std::uint64_t call = next_call();
    parallel(t.tiles() * parts, threads, [&](std::int64_t item) {
        const std::int64_t index = item / parts, part = item % parts;
        const Tile tile = tile_at(s, t, index);
        const float* packed = own_tile(s, t, call, index, source);
        SpmmTile work;
        work.entries = entries;
        work.out_stride = s.target_row();
        work.streams = streams(s, target);
        for (std::int64_t phase = 0; phase < phases; ++phase) {
            const std::int64_t* range = bounds.data() + phase * (parts + 1) + part;
            work.row_ptr = rows.row_ptr + phase * channels + range[0];
            work.bias = bias ? bias + range[0] : nullptr;
            work.rows = range[1] - range[0];
            work.out = target + range[0] * work.out_stride;
            const Aim a = aim(s, t, tile, phase, kernel.group_floats);
            work.runs = a.runs;
            for (const Stretch& stretch : stretches(t, tile, a.targets != nullptr)) {
                work.packed = packed + stretch.first;
                work.blocks = stretch.blocks;
                work.segments = stretch.segments;
                work.segment_floats = stretch.segment_floats;
                work.targets = a.targets ? a.targets + stretch.first / kBlockFloats : nullptr;
                work.run_starts =
                    a.targets ? nullptr : a.run_starts + stretch.first / kernel.group_floats;
                kernel.spmm(work);
            }
        }
    });
    return true;
}

}  // namespace spc
