// Input and weight gradient together: the output gradient is packed once, or not at all, and
// read once.
#include <algorithm>
#include <vector>

#include "conv.h"
#include "direct.h"
#include "workers.h"

namespace spc {
namespace {

// Groups of tiles with partial sums of their own, a fixed number so that sums do not depend on
// the number of threads.
constexpr std::int64_t kChunks = 8;

struct Work {
    const Stencil& s;
    const Tiling& t;
    const Rows& rows;
    const Entry* entries;
    const float* x;
    const float* dy;
    float* dx;
    std::int64_t longest;  // entries of the longest row
    std::uint64_t call;
};

// One tile, target channels [range[0], range[1]) of one phase; adds to sums [nnz].
void add_tile(const Work& w, std::int64_t index, std::int64_t phase, const std::int64_t* range,
              float* sums) {
    const Kernels& kernel = kernels();
    const Tile tile = tile_at(w.s, w.t, index);
    const float* packed = own_tile(w.s, w.t, w.call, index, w.dy);
    const Aim a = aim(w.s, w.t, tile, phase, kernel.backward_floats);
    BackwardTile work;
    work.entries = w.entries;
    work.row_ptr = w.rows.row_ptr + phase * w.s.target_channels + range[0];
    work.rows = range[1] - range[0];
    work.stride = w.s.target_row();
    work.x = w.x + range[0] * work.stride;
    work.dx = w.dx + range[0] * work.stride;
    work.streams = streams(w.s, w.dx);
    work.runs = a.runs;
    work.sums = sums;
    work.lanes = scratch_array<float>(Slot::staged, kBlockFloats * (w.longest + 1));
    for (const Stretch& stretch : stretches(w.t, tile, a.targets != nullptr)) {
        work.packed = packed + stretch.first;
        work.blocks = stretch.blocks;
        work.segments = stretch.segments;
        work.segment_floats = stretch.segment_floats;
        work.targets = a.targets ? a.targets + stretch.first / kBlockFloats : nullptr;
        work.run_starts =
            a.targets ? nullptr : a.run_starts + stretch.first / kernel.backward_floats;
        kernel.backward(work);
    }
}

}  // namespace

void bias_grad(std::int64_t channels, std::int64_t count, const float* dy, float* dbias,
               int threads) {
    const double work = static_cast<double>(channels) * static_cast<double>(count) / kBlockFloats;
    parallel(channels, worthwhile_threads(threads, work), [&](std::int64_t c) {
        dbias[c] = static_cast<float>(kernels().channel_sum(dy + c * count, count));
    });
}

namespace {

// Sums over positions: `add(chunk, part, sums)` for every chunk of tiles or steps, merged in the
// order of chunks.
template <class Add>
void add_chunks(std::int64_t chunks, std::int64_t parts, std::int64_t nnz, const Rows& rows,
                float* dvalues, int threads, Add&& add) {
    const std::int64_t buffers = threads == 1 ? 1 : chunks;
    auto* partial = scratch_array<float>(Slot::partial, buffers * nnz + 1);
    parallel(chunks * parts, threads, [&](std::int64_t item) {
        const std::int64_t chunk = item / parts;
        float* sums = partial + (buffers == 1 ? 0 : chunk * nnz);
        add(chunk, item % parts, sums);
        if (buffers > 1) return;
        for (std::int64_t e = 0; e < nnz; ++e) {
            float& value = dvalues[rows.perm[e]];
            value = chunk ? value + sums[e] : sums[e];
        }
    });
    if (buffers == 1) return;
    const std::int64_t ranges = std::min<std::int64_t>(nnz, 4 * threads);
    parallel(ranges, threads, [&](std::int64_t range) {
        const std::int64_t last = nnz * (range + 1) / ranges;
        for (std::int64_t e = nnz * range / ranges; e < last; ++e) {
            float value = partial[e];
            for (std::int64_t chunk = 1; chunk < chunks; ++chunk) value += partial[chunk * nnz + e];
            dvalues[rows.perm[e]] = value;
        }
    });
}

// Merging moves every partial sum from one processor's cache to another's and costs about as much
// as 32 blocks of products: little work a weight (a linear layer of few samples) runs alone.
int merging_threads(int threads, double work, std::int64_t partial_sums) {
    return worthwhile_threads(work < 32.0 * static_cast<double>(partial_sums) ? 1 : threads, work);
}

std::int64_t count_parts(std::int64_t chunks, std::int64_t channels, int threads) {
    if (threads == 1) return 1;
    return std::clamp<std::int64_t>((4 * threads + chunks - 1) / chunks, 1, channels);
}

std::int64_t longest_row(const std::int32_t* row_ptr, std::int64_t rows) {
    std::int64_t longest = 0;
    for (std::int64_t row = 0; row < rows; ++row)
        longest = std::max<std::int64_t>(longest, row_ptr[row + 1] - row_ptr[row]);
    return longest;
}

void direct_backward(const Stencil& s, const DirectPlan& plan, const Rows& rows, const float* x,
                     const float* dy, float* dx, float* dvalues, int threads) {
    const std::int64_t channels = s.target_channels, nnz = rows.row_ptr[channels];
    const std::int64_t steps = plan.steps(), chunks = std::min(steps, kChunks);
    threads = merging_threads(threads, 2.0 * direct_work(s, nnz), chunks * nnz);
    const DirectLists lists = list_entries(s, plan, rows, threads);
    const std::int64_t longest = longest_row(rows.row_ptr, channels);
    const std::int64_t parts = count_parts(chunks, channels, threads);
    std::vector<std::int64_t> bounds(static_cast<std::size_t>(parts + 1));
    split_rows(rows.row_ptr, channels, parts, bounds.data());
    const auto add = [&](std::int64_t chunk, std::int64_t part, float* sums) {
        const std::int64_t* range = bounds.data() + part;
        std::fill(sums + rows.row_ptr[range[0]], sums + rows.row_ptr[range[1]], 0.0f);
        DirectSteps all(s, plan, lists, dy, range);
        auto* lanes = scratch_array<float>(Slot::staged, kBlockFloats * (longest + 1));
        for (std::int64_t i = steps * chunk / chunks; i < steps * (chunk + 1) / chunks; ++i) {
            DirectTile work = all.tile(i);
            work.row_ptr = rows.row_ptr + range[0];
            work.x = x + range[0] * work.stride;
            work.out = dx + range[0] * work.stride;
            work.streams = streams(s, dx);
            work.sums = sums;
            work.lanes = lanes;
            kernels().direct_backward(work);
        }
    };
    add_chunks(chunks, parts, nnz, rows, dvalues, threads, add);
}

}  // namespace

bool backward(const Stencil& s, const Rows& rows, const float* x, const float* dy, float* dx,
              float* dvalues, int threads) {
    const std::int64_t phases = s.target_phases(), channels = s.target_channels;
    const std::int64_t total = phases * channels, nnz = rows.row_ptr[total];
    Tiling t;
    if (!make_tiling(s, &t)) return false;
    DirectPlan plan;
    if (plan_direct(s, t, nnz, &plan)) {
        direct_backward(s, plan, rows, x, dy, dx, dvalues, threads);
        return true;
    }
    const std::int64_t chunks = std::min(t.tiles(), kChunks);
    threads = merging_threads(threads, 2.0 * pass_work(s, t, nnz), chunks * nnz);
    auto* entries = scratch_array<Entry>(Slot::entries, std::max<std::int64_t>(nnz, 1));
    expand(s, t, rows, entries, threads);
    const std::int64_t longest = longest_row(rows.row_ptr, total);
    const std::int64_t parts = count_parts(chunks, channels, threads);
    std::vector<std::int64_t> bounds(static_cast<std::size_t>(phases * (parts + 1)));
    for (std::int64_t phase = 0; phase < phases; ++phase)
        split_rows(rows.row_ptr + phase * channels, channels, parts,
                   bounds.data() + phase * (parts + 1));

    const Work w{s, t, rows, entries, x, dy, dx, longest, next_call()};
    const auto add = [&](std::int64_t chunk, std::int64_t part, float* sums) {
        for (std::int64_t phase = 0; phase < phases; ++phase) {
            const std::int64_t* range = bounds.data() + phase * (parts + 1) + part;
            const std::int32_t* row_ptr = rows.row_ptr + phase * channels;
            std::fill(sums + row_ptr[range[0]], sums + row_ptr[range[1]], 0.0f);
        }
        const std::int64_t last = t.tiles() * (chunk + 1) / chunks;
        for (std::int64_t index = t.tiles() * chunk / chunks; index < last; ++index)
            for (std::int64_t phase = 0; phase < phases; ++phase)
                add_tile(w, index, phase, bounds.data() + phase * (parts + 1) + part, sums);
    };
    add_chunks(chunks, parts, nnz, rows, dvalues, threads, add);
    return true;
}

}  // namespace spc
