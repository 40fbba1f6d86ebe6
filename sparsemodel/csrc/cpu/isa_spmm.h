// Sparse rows times a packed tile: one pass makes a group of results of every row.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace spc::SPC_ISA {
namespace {

// Vectors of results held in registers; the rest is left to the weight and the addressing.
constexpr int kGroupVecs = kRegisters == 32 ? (kWidth == 16 ? 8 : 16) : 8;
constexpr int kGroupFloats = kGroupVecs * kWidth;

// One row's results at one group of N vectors.
template <int N>
inline void multiply(const Entry* e, const Entry* end, const float* packed, vec start, vec* sums) {
    SPC_UNROLL
    for (int k = 0; k < N; ++k) sums[k] = start;
    for (; e != end; ++e) {
        const float* from = packed + e->offset;
        const vec weight = splat(e->value);
        SPC_UNROLL
        for (int k = 0; k < N; ++k) sums[k] = fma(weight, load(from + k * kWidth), sums[k]);
    }
}

template <int N>
inline void store_blocks(const vec* sums, const std::int64_t* targets, float* out, bool streams) {
    SPC_UNROLL
    for (int i = 0; i < N / kBlockVecs; ++i) {
        if (targets[i] < 0) continue;
        float* to = out + targets[i];
        SPC_UNROLL
        for (int k = 0; k < kBlockVecs; ++k) {
            if (streams) {
                stream(to + k * kWidth, sums[i * kBlockVecs + k]);
            } else {
                store(to + k * kWidth, sums[i * kBlockVecs + k]);
            }
        }
    }
}

template <int N>
inline void store_runs(const vec* sums, const Run* run, const Run* end, float* out) {
    alignas(64) float staged[N * kWidth];
    SPC_UNROLL
    for (int k = 0; k < N; ++k) store(staged + k * kWidth, sums[k]);
    for (; run != end; ++run) {
        const float* from = staged + run->source;
        float* to = out + run->target;
        for (int k = 0; k < run->length; ++k) to[k] = from[k];
    }
}

template <int N>
inline void group(const SpmmTile& t, std::int64_t position, const Entry* e, const Entry* end,
                  vec start, float* out) {
    vec sums[N];
    multiply<N>(e, end, t.packed + position, start, sums);
    if (t.targets) {
        store_blocks<N>(sums, t.targets + position / kBlock, out, t.streams);
    } else {
        store_runs<N>(sums, t.runs + t.run_starts[position / kGroupFloats], t.runs + t.run_starts[position / kGroupFloats + 1], out);
    }
}

// The last group, of `blocks` < a whole group's.
template <int Blocks>
inline void last_group(const SpmmTile& t, std::int64_t position, std::int64_t blocks, const Entry* e,
                       const Entry* end, vec start, float* out) {
    if (blocks == Blocks) {
        group<Blocks * kBlockVecs>(t, position, e, end, start, out);
    } else if constexpr (Blocks > 1) {
        last_group<Blocks - 1>(t, position, blocks, e, end, start, out);
    }
}

// Row by row, so that a row's entries stay at hand, its loop's length is predicted and its
// results are written one behind the other.
void spmm(const SpmmTile& t) {
    constexpr int kGroupBlocks = kGroupFloats / kBlock;
    const std::int64_t whole = t.blocks / kGroupBlocks, rest = t.blocks % kGroupBlocks;
    float* out = t.out;
    for (std::int64_t row = 0; row < t.rows; ++row, out += t.out_stride) {
        const Entry *e = t.entries + t.row_ptr[row], *end = t.entries + t.row_ptr[row + 1];
        const vec start = splat(t.bias ? t.bias[row] : 0.0f);
        for (std::int64_t segment = 0; segment < t.segments; ++segment) {
            std::int64_t at = segment * t.segment_floats;
            for (std::int64_t i = 0; i < whole; ++i, at += kGroupFloats)
                group<kGroupVecs>(t, at, e, end, start, out);
            if constexpr (kGroupBlocks > 1)
                if (rest) last_group<kGroupBlocks - 1>(t, at, rest, e, end, start, out);
        }
    }
    if (t.streams) finish_streams();
}

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
