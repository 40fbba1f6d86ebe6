// Input and weight gradient in one pass over the packed output gradient.
#pragma once

#include "isa_spmm.h"
#include "kernels.h"
#include "simd.h"

namespace spc::SPC_ISA {
namespace {

// Vectors of inputs and as many of input gradients in registers.
constexpr int kBackVecs = kRegisters == 32 ? 8 : 4;
constexpr int kBackFloats = kBackVecs * kWidth;

// One row at one group of N vectors: `sums` gains the input gradient, each entry's 16 lanes the
// products of `inputs` with what the entry reads.
template <int N>
inline void multiply_both(const Entry* e, const Entry* end, const float* packed,
                          const vec* inputs, vec* sums, float* lanes) {
    SPC_UNROLL
    for (int k = 0; k < N; ++k) sums[k] = splat(0.0f);
    for (; e != end; ++e, lanes += kBlock) {
        const float* from = packed + e->offset;
        const vec weight = splat(e->value);
        vec parts[kBlockVecs];
        SPC_UNROLL
        for (int k = 0; k < kBlockVecs; ++k) parts[k] = load(lanes + k * kWidth);
        SPC_UNROLL
        for (int k = 0; k < N; ++k) {
            vec gradient = load(from + k * kWidth);
            hold(gradient);
            sums[k] = fma(weight, gradient, sums[k]);
            parts[k % kBlockVecs] = fma(inputs[k], gradient, parts[k % kBlockVecs]);
        }
        SPC_UNROLL
        for (int k = 0; k < kBlockVecs; ++k) store(lanes + k * kWidth, parts[k]);
    }
}

template <int N>
inline void load_blocks(const float* x, const std::int64_t* targets, vec* inputs) {
    SPC_UNROLL
    for (int i = 0; i < N / kBlockVecs; ++i)
        SPC_UNROLL
        for (int k = 0; k < kBlockVecs; ++k)
            inputs[i * kBlockVecs + k] =
                targets[i] >= 0 ? load(x + targets[i] + k * kWidth) : splat(0.0f);
}

template <int N>
inline void load_runs(const float* x, const Run* run, const Run* end, vec* inputs) {
    alignas(64) float staged[N * kWidth] = {};
    for (; run != end; ++run)
        for (int k = 0; k < run->length; ++k) staged[run->source + k] = x[run->target + k];
    SPC_UNROLL
    for (int k = 0; k < N; ++k) inputs[k] = load(staged + k * kWidth);
}

template <int N>
inline void backward_group(const BackwardTile& t, std::int64_t position, const Entry* e,
                           const Entry* end, const float* x, float* dx) {
    vec inputs[N], sums[N];
    const float* packed = t.packed + position;
    if (t.targets) {
        const std::int64_t* targets = t.targets + position / kBlock;
        load_blocks<N>(x, targets, inputs);
        multiply_both<N>(e, end, packed, inputs, sums, t.lanes);
        store_blocks<N>(sums, targets, dx, t.streams);
    } else {
        const Run* run = t.runs + t.run_starts[position / kBackFloats];
        const Run* last = t.runs + t.run_starts[position / kBackFloats + 1];
        load_runs<N>(x, run, last, inputs);
        multiply_both<N>(e, end, packed, inputs, sums, t.lanes);
        store_runs<N>(sums, run, last, dx);
    }
}

template <int Blocks>
inline void last_backward_group(const BackwardTile& t, std::int64_t position, std::int64_t blocks,
                                const Entry* e, const Entry* end, const float* x, float* dx) {
    if (blocks == Blocks) {
        backward_group<Blocks * kBlockVecs>(t, position, e, end, x, dx);
    } else if constexpr (Blocks > 1) {
        last_backward_group<Blocks - 1>(t, position, blocks, e, end, x, dx);
    }
}

void backward(const BackwardTile& t) {
    constexpr int kGroupBlocks = kBackFloats / kBlock;
    const std::int64_t whole = t.blocks / kGroupBlocks, rest = t.blocks % kGroupBlocks;
    for (std::int64_t row = 0; row < t.rows; ++row) {
        const std::int32_t first = t.row_ptr[row], count = t.row_ptr[row + 1] - first;
        const Entry *e = t.entries + first, *end = e + count;
        const float* x = t.x + row * t.stride;
        float* dx = t.dx + row * t.stride;
        std::memset(t.lanes, 0, sizeof(float) * kBlock * static_cast<std::size_t>(count));
        for (std::int64_t segment = 0; segment < t.segments; ++segment) {
            std::int64_t at = segment * t.segment_floats;
            for (std::int64_t i = 0; i < whole; ++i, at += kBackFloats)
                backward_group<kBackVecs>(t, at, e, end, x, dx);
            if constexpr (kGroupBlocks > 1)
                if (rest) last_backward_group<kGroupBlocks - 1>(t, at, rest, e, end, x, dx);
        }
        for (std::int32_t k = 0; k < count; ++k) {
            vec parts[kBlockVecs];
            for (int j = 0; j < kBlockVecs; ++j)
                parts[j] = load(t.lanes + k * kBlock + j * kWidth);
            t.sums[first + k] += sum_block(parts);
        }
    }
    if (t.streams) finish_streams();
}

}  // namespace
}  // namespace spc::SPC_ISA
