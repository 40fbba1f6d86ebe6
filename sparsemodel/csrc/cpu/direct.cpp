#include "direct.h"

#include <algorithm>

#include "workers.h"

namespace spc {
namespace {

constexpr std::int64_t kLargestOffset = (std::int64_t{1} << 31) - 1;
constexpr std::int64_t kStepFloats = 1024;
constexpr std::int64_t kStepLanes = 64;
constexpr std::int64_t kMaxClasses = 32;
// Measured, in entries of one group: starting and storing a group, packing a group of the source,
// an entry's place in one list; and what an entry costs on a source whose channels share sets of
// the caches.
constexpr double kGroupCost = 1.5, kPackCost = 4.0, kListCost = 0.15, kDirectLoad = 1.05;
// Lists beyond this would drive the source out of the second and third level.
constexpr std::int64_t kListBytes = 4 * 1024 * 1024;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Gives every position the class of those with the same taps on the plane.
void classify(const Axis& axis, std::vector<int>* class_of, std::vector<std::uint64_t>* taps) {
    for (std::int64_t i = 0; i < axis.target; ++i) {
        std::uint64_t on_plane = 0;
        for (std::size_t k = 0; k < axis.taps.size(); ++k) {
            const std::int64_t at = i + axis.taps[k].shift;
            if (at >= 0 && at < axis.source) on_plane |= std::uint64_t{1} << k;
        }
        const auto found = std::find(taps->begin(), taps->end(), on_plane);
        class_of->push_back(static_cast<int>(found - taps->begin()));
        if (found == taps->end()) taps->push_back(on_plane);
    }
}

// As much of a row as holds kStepFloats, or some whole rows. Long pieces: measured, lanes or
// columns that fit more rows into the second level lose more than they gain.
void choose_step(const Stencil& s, DirectPlan* plan) {
    const std::int64_t blocks = s.batch / kBlockFloats;
    plan->lanes = ceil_div(blocks, ceil_div(s.batch, kStepLanes)) * kBlockFloats;
    const std::int64_t pixels = std::max<std::int64_t>(1, kStepFloats / plan->lanes);
    const std::int64_t cols = std::min<std::int64_t>(pixels, s.w.target);
    const std::int64_t rows = std::clamp<std::int64_t>(pixels / cols, 1, s.h.target);
    plan->slices = ceil_div(s.batch, plan->lanes);
    plan->steps_h = ceil_div(s.h.target, rows);
    plan->steps_w = ceil_div(s.w.target, cols);
    plan->rows = ceil_div(s.h.target, plan->steps_h);
    plan->cols = ceil_div(s.w.target, plan->steps_w);
}

// How many of positions [first, first + count) are of each class.
std::vector<std::int64_t> count_classes(const std::vector<int>& class_of, std::size_t classes,
                                        std::int64_t first, std::int64_t count) {
    std::vector<std::int64_t> counts(classes);
    const auto last = std::min<std::int64_t>(first + count, class_of.size());
    for (std::int64_t i = first; i < last; ++i) ++counts[class_of[i]];
    return counts;
}

double share(std::uint64_t taps, const Axis& axis) {
    return static_cast<double>(__builtin_popcountll(taps)) / static_cast<double>(axis.taps.size());
}

// What one row of the pattern with `entries` entries costs over all steps; the unit is one entry
// at one group of kMaxGroupFloats positions.
double direct_cost(const Stencil& s, const DirectPlan& plan, double entries) {
    double cost = kListCost * entries * static_cast<double>(plan.classes());
    for (std::int64_t h = 0; h < plan.steps_h; ++h) {
        const auto rows =
            count_classes(plan.row_class, plan.row_taps.size(), h * plan.rows, plan.rows);
        for (std::int64_t w = 0; w < plan.steps_w; ++w) {
            const auto cols =
                count_classes(plan.col_class, plan.col_taps.size(), w * plan.cols, plan.cols);
            for (std::size_t i = 0; i < rows.size(); ++i)
                for (std::size_t j = 0; j < cols.size(); ++j) {
                    const std::int64_t groups =
                        ceil_div(rows[i] * cols[j] * plan.lanes, kMaxGroupFloats);
                    const double kept = share(plan.row_taps[i], s.h) * share(plan.col_taps[j], s.w);
                    cost += static_cast<double>(plan.slices * groups) *
                            (kDirectLoad * kept * entries + kGroupCost);
                }
        }
    }
    return cost;
}

double packed_cost(const Stencil& s, const Tiling& t, double entries) {
    const std::int64_t positions =
        t.joined ? ((t.tile_rows - 1) * t.pitch + t.tile_cols) * t.lanes
                 : t.tile_rows * t.tile_cols * t.lanes;
    const double groups =
        static_cast<double>(t.tiles() * ceil_div(positions, kMaxGroupFloats));
    const double packed = static_cast<double>(s.source_channels * s.source_row()) /
                          static_cast<double>(s.target_channels * kMaxGroupFloats);
    return groups * (entries + kGroupCost) + (t.direct ? 0.0 : kPackCost * packed);
}

}  // namespace

bool plan_direct(const Stencil& s, const Tiling& t, std::int64_t nnz, DirectPlan* plan) {
    if (s.batch % kBlockFloats != 0 || s.target_phases() != 1) return false;
    if (s.h.source_step != 1 || s.w.source_step != 1) return false;
    if (s.h.taps.size() > 64 || s.w.taps.size() > 64) return false;
    if (s.source_channels * s.source_row() > kLargestOffset) return false;
    classify(s.h, &plan->row_class, &plan->row_taps);
    classify(s.w, &plan->col_class, &plan->col_taps);
    if (plan->classes() > kMaxClasses) return false;
    const auto entry_bytes = static_cast<std::int64_t>(sizeof(DirectEntry));
    if (nnz * plan->classes() * entry_bytes > kListBytes) return false;
    choose_step(s, plan);
    const double entries = static_cast<double>(nnz) / static_cast<double>(s.target_channels);
    return direct_cost(s, *plan, entries) < packed_cost(s, t, entries);
}

DirectLists list_entries(const Stencil& s, const DirectPlan& plan, const Rows& rows, int threads) {
    struct Code {
        std::int32_t offset;
        std::uint32_t classes;  // those that have its tap
    };
    const std::int64_t total = s.target_channels, nnz = rows.row_ptr[total];
    const std::int64_t channels = s.source_channels / s.groups, classes = plan.classes();
    const std::int64_t wide = static_cast<std::int64_t>(plan.col_taps.size());
    auto* codes = scratch_array<Code>(Slot::offsets, channels * s.kernel());
    Code* code = codes;
    for (std::int64_t c = 0; c < channels; ++c)
        for (std::size_t i = 0; i < s.h.taps.size(); ++i)
            for (std::size_t j = 0; j < s.w.taps.size(); ++j, ++code) {
                code->offset = static_cast<std::int32_t>(
                    c * s.source_row() +
                    (s.h.taps[i].shift * s.w.source + s.w.taps[j].shift) * s.batch);
                code->classes = 0;
                for (std::int64_t k = 0; k < classes; ++k)
                    code->classes |= static_cast<std::uint32_t>(plan.row_taps[k / wide] >> i &
                                                                plan.col_taps[k % wide] >> j & 1)
                                     << k;
            }
    auto* entries =
        scratch_array<DirectEntry>(Slot::entries, std::max<std::int64_t>(1, classes * nnz));
    auto* ends = scratch_array<std::int32_t>(Slot::targets, classes * total);
    const std::int64_t parts = std::min<std::int64_t>(total, threads * 4);
    parallel(parts, threads, [&](std::int64_t part) {
        const std::int64_t last = total * (part + 1) / parts;
        for (std::int64_t row = total * part / parts; row < last; ++row) {
            const auto base = static_cast<std::int32_t>(row / (total / s.groups) * channels *
                                                        s.source_row());
            const std::int32_t first = rows.row_ptr[row];
            DirectEntry* to[kMaxClasses];
            for (std::int64_t k = 0; k < classes; ++k) to[k] = entries + k * nnz + first;
            for (std::int32_t e = first; e < rows.row_ptr[row + 1]; ++e) {
                const Code& c = codes[rows.cols[e]];
                const DirectEntry entry{base + c.offset, rows.values[rows.perm ? rows.perm[e] : e],
                                        e - first};
                // Written to every list, and kept where the next one does not overwrite it.
                for (std::int64_t k = 0; k < classes; ++k) {
                    *to[k] = entry;
                    to[k] += c.classes >> k & 1;
                }
            }
            for (std::int64_t k = 0; k < classes; ++k)
                ends[k * total + row] = static_cast<std::int32_t>(to[k] - entries - k * nnz);
        }
    });
    return {entries, ends, nnz, total};
}

DirectSteps::DirectSteps(const Stencil& s, const DirectPlan& plan, const DirectLists& lists,
                         const float* source, const std::int64_t* range)
    : s_(s), plan_(plan), lists_(lists), source_(source), range_(range) {}

DirectSteps::Rectangle DirectSteps::rectangle(std::int64_t step) const {
    // Down the plane, so that a step finds most of its rows where the one before left them.
    const std::int64_t band = step % plan_.steps_h, place = step / plan_.steps_h;
    Rectangle r;
    r.slice = place / plan_.steps_w;
    r.lane = r.slice * plan_.lanes;
    r.lanes = std::min(plan_.lanes, s_.batch - r.lane);
    r.row = band * plan_.rows;
    r.rows = std::min(plan_.rows, s_.h.target - r.row);
    r.col = place % plan_.steps_w * plan_.cols;
    r.cols = std::min(plan_.cols, s_.w.target - r.col);
    return r;
}

Ahead DirectSteps::ahead(const Rectangle& now, std::int64_t step) {
    Ahead a{};
    if (step + 1 >= plan_.steps()) return a;
    const Rectangle next = rectangle(step + 1);
    const auto clip = [](std::int64_t at, std::int64_t size) {
        return std::clamp<std::int64_t>(at, 0, size);
    };
    std::int64_t top = clip(next.row + s_.h.min_shift, s_.h.source);
    const std::int64_t bottom =
        clip(next.row + next.rows + s_.h.min_shift + s_.h.extent, s_.h.source);
    const std::int64_t left = clip(next.col + s_.w.min_shift, s_.w.source);
    const std::int64_t right =
        clip(next.col + next.cols + s_.w.min_shift + s_.w.extent, s_.w.source);
    if (next.row > now.row)
        top = std::max(top, clip(now.row + now.rows + s_.h.min_shift + s_.h.extent, s_.h.source));
    if (top >= bottom || left >= right) return a;
    lines_.clear();
    for (std::int64_t i = top; i < bottom; ++i)
        for (std::int64_t j = left; j < right; ++j)
            for (std::int64_t lane = next.lane; lane < next.lane + next.lanes; lane += kBlockFloats)
                lines_.push_back((i * s_.w.source + j) * s_.batch + lane);
    a.source = source_;
    a.channels = s_.source_channels;
    a.channel_stride = s_.source_row();
    a.lines = lines_.data();
    a.num_lines = static_cast<std::int64_t>(lines_.size());
    return a;
}

DirectTile DirectSteps::tile(std::int64_t step) {
    const Rectangle r = rectangle(step);
    sources_.clear();
    targets_.clear();
    pieces_.clear();
    const std::size_t room = static_cast<std::size_t>(r.rows * r.cols * (r.lanes / kBlockFloats));
    sources_.reserve(room);
    targets_.reserve(room);
    const std::int64_t wide = static_cast<std::int64_t>(plan_.col_taps.size());
    for (std::int64_t k = 0; k < plan_.classes(); ++k) {
        const std::size_t first = sources_.size();
        for (std::int64_t i = r.row; i < r.row + r.rows; ++i) {
            if (plan_.row_class[i] != k / wide) continue;
            for (std::int64_t j = r.col; j < r.col + r.cols; ++j) {
                if (plan_.col_class[j] != k % wide) continue;
                for (std::int64_t lane = r.lane; lane < r.lane + r.lanes; lane += kBlockFloats) {
                    sources_.push_back((i * s_.w.source + j) * s_.batch + lane);
                    targets_.push_back((i * s_.w.target + j) * s_.batch + lane);
                }
            }
        }
        if (sources_.size() == first) continue;
        pieces_.push_back({lists_.entries + k * lists_.nnz,
                           lists_.ends + k * lists_.rows + range_[0],
                           static_cast<std::int64_t>(sources_.size() - first),
                           sources_.data() + first, targets_.data() + first});
    }
    DirectTile t{};
    t.pieces = pieces_.data();
    t.num_pieces = static_cast<std::int64_t>(pieces_.size());
    t.rows = range_[1] - range_[0];
    t.source = source_;
    t.stride = s_.target_row();
    t.ahead = ahead(r, step);
    return t;
}

}  // namespace spc
