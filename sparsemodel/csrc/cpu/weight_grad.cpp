// Weight gradient at the mask, and the largest gradients outside it.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

#include "conv.h"
#include "workers.h"

namespace spc {
namespace {

// Positions whose output gradient is staged at a time: 8 KiB, which stay in the first level.
constexpr std::int64_t kStaged = 2048;
// Groups of tiles with partial sums of their own, a fixed number so that sums do not depend on
// the number of threads.
constexpr std::int64_t kChunks = 8;

std::int64_t round_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b * b; }

// A part of a tile's positions, with the runs by which target rows are staged.
struct Staged {
    const float* packed;
    const Run* runs;
    std::int64_t num_runs;
    int blocks;
};

// Calls body(staged) for all stretches of a tile; `staged_rows` rows of staging are cleared, so
// that positions between pixels stay zero.
template <class Body>
void for_stretches(const Stencil& s, const Tiling& t, std::uint64_t call, std::int64_t index,
                   const float* x, float* staged, std::int64_t staged_rows, Body&& body) {
    const Tile tile = tile_at(s, t, index);
    const float* packed = own_tile(s, t, call, index, x);
    const std::int64_t span = t.span(tile);
    auto* runs = scratch_array<Run>(Slot::runs, kStaged);
    for (std::int64_t first = 0; first < span; first += kStaged) {
        const std::int64_t length = std::min(kStaged, span - first);
        std::fill(staged, staged + staged_rows * kStaged, 0.0f);
        const std::int64_t num = make_runs(s, t, tile, 0, first, length, runs);
        body(Staged{packed + first, runs, num,
                     static_cast<int>(round_up(length, kBlockFloats) / kBlockFloats)});
    }
}

struct WeightGrad {
    const Stencil& s;
    const Tiling& t;
    const std::int32_t* row_ptr;
    const std::int32_t* offsets;
    const float* x;
    const float* dy;
    std::uint64_t call;
};

// Adds one tile's gradients of rows [first, last) to sums [nnz].
void add_tile(const WeightGrad& w, std::int64_t index, std::int64_t first, std::int64_t last,
              float* sums) {
    const Kernels& kernel = kernels();
    auto* staged = scratch_array<float>(Slot::staged, kStaged);
    for_stretches(w.s, w.t, w.call, index, w.x, staged, 1, [&](const Staged& stretch) {
        const SddmmBlock block{stretch.packed, staged, 0, stretch.blocks};
        for (std::int64_t row = first; row < last; ++row) {
            const std::int64_t begin = w.row_ptr[row], count = w.row_ptr[row + 1] - begin;
            if (count == 0) continue;
            kernel.stage(stretch.runs, stretch.num_runs, w.dy + row * w.s.target_row(), staged);
            kernel.sddmm(block, w.offsets + begin, count, sums + begin);
        }
    });
}

}  // namespace

bool weight_grad(const Stencil& s, const std::int32_t* row_ptr, const std::int32_t* cols,
                 const float* x, const float* dy, float* dvalues, int threads) {
    Tiling t;
    if (!make_tiling(s, &t)) return false;
    const std::int64_t rows = s.target_channels, nnz = row_ptr[rows];
    threads = worthwhile_threads(threads, pass_work(s, t, nnz));
    const std::int64_t codes = s.source_channels / s.groups * s.kernel();
    auto* by_code = scratch_array<std::int32_t>(Slot::offsets, codes);
    code_offsets(s, t, by_code);
    auto* offsets = scratch_array<std::int32_t>(Slot::entries, std::max<std::int64_t>(nnz, 1));
    for (std::int64_t row = 0; row < rows; ++row) {
        const std::int64_t base = row / (rows / s.groups) * group_pitch(s, t);
        for (std::int32_t e = row_ptr[row]; e < row_ptr[row + 1]; ++e)
            offsets[e] = static_cast<std::int32_t>(base) + by_code[cols[e]];
    }

    const std::int64_t chunks = std::min(t.tiles(), kChunks);
    const std::int64_t parts =
        threads == 1 ? 1 : std::clamp<std::int64_t>((2 * threads + chunks - 1) / chunks, 1, rows);
    std::vector<std::int64_t> bounds(static_cast<std::size_t>(parts + 1));
    split_rows(row_ptr, rows, parts, bounds.data());

    const WeightGrad w{s, t, row_ptr, offsets, x, dy, next_call()};
    const std::int64_t buffers = threads == 1 ? 1 : chunks;
    auto* partial = scratch_array<float>(Slot::partial, buffers * nnz + 1);
    const auto merge = [&](std::int64_t chunk, const float* from) {
        for (std::int64_t e = 0; e < nnz; ++e)
            dvalues[e] = chunk ? dvalues[e] + from[e] : from[e];
    };
    const auto run = [&](std::int64_t item) {
        const std::int64_t chunk = item / parts, part = item % parts;
        float* sums = partial + (buffers == 1 ? 0 : chunk * nnz);
        const std::int64_t first = bounds[part], last = bounds[part + 1];
        std::fill(sums + row_ptr[first], sums + row_ptr[last], 0.0f);
        for (std::int64_t i = t.tiles() * chunk / chunks; i < t.tiles() * (chunk + 1) / chunks; ++i)
            add_tile(w, i, first, last, sums);
        if (buffers == 1) merge(chunk, sums);
    };
    parallel(chunks * parts, threads, run);
    for (std::int64_t chunk = 0; buffers > 1 && chunk < chunks; ++chunk)
        merge(chunk, partial + chunk * nnz);
    return true;
}

namespace {

struct Candidate {
    std::int64_t index;
    float value;
};

bool better(const Candidate& a, const Candidate& b) {
    const float x = std::fabs(a.value), y = std::fabs(b.value);
    return x > y || (x == y && a.index < b.index);
}

// The k best of all that was offered, in memory of 2 k; the order of offers does not matter.
class Best {
public:
    explicit Best(std::int64_t k) : k_(static_cast<std::size_t>(k)) {}

    void offer(const Candidate& c) {
        if (full_ && !better(c, worst_)) return;
        kept_.push_back(c);
        if (kept_.size() >= 2 * k_ + 64) shrink();
    }

    void shrink() {
        if (kept_.size() <= k_) return;
        std::nth_element(kept_.begin(), kept_.begin() + static_cast<std::ptrdiff_t>(k_) - 1,
                         kept_.end(), better);
        kept_.resize(k_);
        worst_ = kept_[k_ - 1];
        full_ = true;
    }

    std::vector<Candidate>& kept() { return kept_; }

private:
    std::size_t k_;
    std::vector<Candidate> kept_;
    Candidate worst_{};
    bool full_ = false;
};

constexpr int kStrip = 8;  // rows staged at a time for a dense piece of the gradient

}  // namespace

bool topk_grad(const Stencil& s, const std::int32_t* row_ptr, const std::int32_t* cols,
               const float* x, const float* dy, TopK* top, int threads) {
    Tiling t;
    if (!make_tiling(s, &t)) return false;
    const std::int64_t rows = s.target_channels, per_group = rows / s.groups;
    const std::int64_t codes = s.source_channels / s.groups * s.kernel();
    top->count = 0;
    top->not_finite = false;
    if (top->k == 0) return true;
    threads = worthwhile_threads(threads, static_cast<double>(codes) * static_cast<double>(rows) *
                                              static_cast<double>(s.target_row()) / kBlockFloats);
    auto* by_code = scratch_array<std::int32_t>(Slot::offsets, codes);
    code_offsets(s, t, by_code);

    // Blocks of rows of one group, small enough for the tile and for every thread to have some.
    const std::int64_t bytes = top->tile_bytes ? top->tile_bytes : 1 << 20;
    const std::int64_t fit = std::clamp<std::int64_t>(bytes / 4 / codes, 1, per_group);
    const std::int64_t share = std::max<std::int64_t>(1, (rows + threads - 1) / threads);
    const std::int64_t block = std::min(fit, share);
    const std::int64_t blocks_per_group = (per_group + block - 1) / block;

    const Kernels& kernel = kernels();
    const std::uint64_t call = next_call();
    Best best(top->k);
    bool not_finite = false;
    std::mutex mutex;
    parallel(blocks_per_group * s.groups, threads, [&](std::int64_t item) {
        const std::int64_t group = item / blocks_per_group;
        const std::int64_t first = group * per_group + item % blocks_per_group * block;
        const std::int64_t last = std::min(first + block, (group + 1) * per_group);
        auto* gradient = scratch_array<float>(Slot::gradient, (last - first) * codes);
        auto* staged = scratch_array<float>(Slot::staged, kStrip * kStaged);
        std::fill(gradient, gradient + (last - first) * codes, 0.0f);
        for (std::int64_t index = 0; index < t.tiles(); ++index) {
            for_stretches(s, t, call, index, x, staged, kStrip, [&](const Staged& stretch) {
                const SddmmBlock b{stretch.packed + group * group_pitch(s, t), staged, kStaged,
                                   stretch.blocks};
                for (std::int64_t row = first; row < last; row += kStrip) {
                    const int strip = static_cast<int>(std::min<std::int64_t>(kStrip, last - row));
                    for (int r = 0; r < strip; ++r)
                        kernel.stage(stretch.runs, stretch.num_runs,
                                     dy + (row + r) * s.target_row(), staged + r * kStaged);
                    kernel.sddmm_rows(b, strip, by_code, codes, gradient + (row - first) * codes,
                                      codes);
                }
            });
        }
        const std::lock_guard<std::mutex> lock(mutex);
        for (std::int64_t row = first; row < last; ++row) {
            const float* g = gradient + (row - first) * codes;
            const std::int32_t* active = cols + row_ptr[row];
            const std::int32_t* end = cols + row_ptr[row + 1];
            for (std::int64_t c = 0; c < codes; ++c) {
                if (active != end && *active == c) {
                    ++active;
                    continue;
                }
                if (std::isnan(g[c])) {
                    not_finite = true;
                } else {
                    best.offer({row * codes + c, g[c]});
                }
            }
        }
    });
    top->not_finite = not_finite;
    best.shrink();
    auto& kept = best.kept();
    std::sort(kept.begin(), kept.end(),
              [](const Candidate& a, const Candidate& b) { return a.index < b.index; });
    top->count = static_cast<std::int64_t>(kept.size());
    for (std::size_t i = 0; i < kept.size(); ++i) {
        top->indices[i] = kept[i].index;
        top->values[i] = kept[i].value;
    }
    return true;
}

}  // namespace spc
