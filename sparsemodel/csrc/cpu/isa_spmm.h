// Sparse rows times a packed tile: one pass makes a group of results of every row.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace spc::SPC_ISA {
namespace {

// Vectors of results held in registers; the rest is left to the weight and the addressing.
constexpr int kGroupVecs = kRegisters == 32 ? (kWidth == 16 ? 8 : 16) : 8;
constexpr int kGroupFloats = kGroupVecs * kWidth;

inline void store_runs(const SpmmGroup& g, const float* staged, float* out) {
    for (int i = 0; i < g.num_runs; ++i) {
        const Run& run = g.runs[i];
        const float* from = staged + run.source;
        float* to = out + run.target;
        for (int k = 0; k < run.length; ++k) to[k] = from[k];
    }
}

template <int N>
void spmm_group(const SpmmGroup& g) {
    // Where each block goes, or -1 for positions between image rows, which are no pixels.
    std::int64_t target[N * kWidth / kBlock + 1];
    for (int i = 0; i < N / kBlockVecs; ++i) target[i] = -1;
    if (g.whole_blocks) {
        for (int i = 0; i < g.num_runs; ++i)
            for (int k = 0; k < g.runs[i].length; k += kBlock)
                target[(g.runs[i].source + k) / kBlock] = g.runs[i].target + k;
    }
    alignas(64) float staged[N * kWidth];
    float* out = g.out;
    for (std::int64_t row = 0; row < g.rows; ++row, out += g.out_stride) {
        vec sums[N];
        const vec start = splat(g.bias ? g.bias[row] : 0.0f);
        for (int k = 0; k < N; ++k) sums[k] = start;
        const Entry* end = g.entries + g.row_ptr[row + 1];
        for (const Entry* e = g.entries + g.row_ptr[row]; e != end; ++e) {
            const float* from = g.packed + e->offset;
            const vec weight = splat(e->value);
            for (int k = 0; k < N; ++k) sums[k] = fma(weight, load(from + k * kWidth), sums[k]);
        }
        if (g.whole_blocks) {
            for (int i = 0; i < N / kBlockVecs; ++i)
                if (target[i] >= 0)
                    for (int k = 0; k < kBlockVecs; ++k)
                        store(out + target[i] + k * kWidth, sums[i * kBlockVecs + k]);
        } else {
            for (int k = 0; k < N; ++k) store(staged + k * kWidth, sums[k]);
            store_runs(g, staged, out);
        }
    }
}

// Calls the instance for `blocks` blocks; one instance for each count, no padding to a power.
template <int Blocks>
void spmm_dispatch(const SpmmGroup& g) {
    if (g.blocks == Blocks) {
        spmm_group<Blocks * kBlockVecs>(g);
    } else if constexpr (Blocks > 1) {
        spmm_dispatch<Blocks - 1>(g);
    }
}

void spmm(const SpmmGroup& g) { spmm_dispatch<kGroupFloats / kBlock>(g); }

void pack(const PackTile& t, std::int64_t channels) {
    const std::size_t pixel = sizeof(float) * static_cast<std::size_t>(t.lane_pitch);
    for (std::int64_t c = 0; c < channels; ++c) {
        float* plane = t.packed + c * t.packed_channel;
        const float* source = t.source + c * t.channel_stride + t.first_offset;
        for (int r = 0; r < t.rows; ++r) {
            float* to = plane + r * t.packed_row;
            if (r < t.first_row || r >= t.last_row) {
                std::memset(to, 0, pixel * static_cast<std::size_t>(t.cols));
                continue;
            }
            std::memset(to, 0, pixel * static_cast<std::size_t>(t.first_col));
            to += static_cast<std::ptrdiff_t>(t.first_col) * t.lane_pitch;
            const int inside = t.last_col - t.first_col;
            if (t.pixel_stride == t.lanes && t.lanes == t.lane_pitch) {
                std::memcpy(to, source, pixel * static_cast<std::size_t>(inside));
                to += static_cast<std::ptrdiff_t>(inside) * t.lane_pitch;
            } else {
                const float* from = source;
                for (int q = 0; q < inside; ++q, from += t.pixel_stride, to += t.lane_pitch) {
                    int k = 0;
                    for (; k + kWidth <= t.lanes; k += kWidth) store(to + k, load(from + k));
                    for (; k < t.lanes; ++k) to[k] = from[k];
                    for (; k < t.lane_pitch; ++k) to[k] = 0.0f;
                }
            }
            std::memset(to, 0, pixel * static_cast<std::size_t>(t.cols - t.last_col));
            source += t.row_stride;
        }
    }
}

void copy(float* to, const float* from, std::int64_t count) {
    std::int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store(to + i, load(from + i));
    for (; i < count; ++i) to[i] = from[i];
}

}  // namespace
}  // namespace spc::SPC_ISA
