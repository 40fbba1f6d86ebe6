// Inner products of output gradients with shifted inputs: the weight gradient at given places.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace spc::SPC_ISA {
namespace {

// Entries of one row that share the loads of its gradient, within the registers.
constexpr int kShare = (kRegisters - 4) / kBlockVecs >= 8 ? 8 : (kRegisters - 4) / kBlockVecs;

template <int N>
void sddmm_entries(const SddmmBlock& b, const std::int32_t* offsets, float* sums) {
    vec parts[N][kBlockVecs];
    const float* from[N];
    SPC_UNROLL
    for (int e = 0; e < N; ++e) {
        from[e] = b.packed + offsets[e];
        SPC_UNROLL
        for (int k = 0; k < kBlockVecs; ++k) parts[e][k] = splat(0.0f);
    }
    const std::int64_t floats = static_cast<std::int64_t>(b.blocks) * kBlock;
    for (std::int64_t i = 0; i < floats; i += kBlock)
        SPC_UNROLL
        for (int k = 0; k < kBlockVecs; ++k) {
            vec gradient = load(b.dy + i + k * kWidth);
            hold(gradient);
            SPC_UNROLL
            for (int e = 0; e < N; ++e)
                parts[e][k] = fma(gradient, load(from[e] + i + k * kWidth), parts[e][k]);
        }
    SPC_UNROLL
    for (int e = 0; e < N; ++e) sums[e] += sum_block(parts[e]);
}

template <int N>
void sddmm_rest(const SddmmBlock& b, const std::int32_t* offsets, std::int64_t count, float* sums) {
    if (count == N) {
        sddmm_entries<N>(b, offsets, sums);
    } else if constexpr (N > 1) {
        sddmm_rest<N - 1>(b, offsets, count, sums);
    }
}

void sddmm(const SddmmBlock& b, const std::int32_t* offsets, std::int64_t count, float* sums) {
    std::int64_t e = 0;
    for (; e + kShare <= count; e += kShare) sddmm_entries<kShare>(b, offsets + e, sums + e);
    sddmm_rest<kShare - 1>(b, offsets + e, count - e, sums + e);
}

// Dense pieces: a rectangle of rows and columns shares the loads of both sides.
constexpr int kTileRows = kRegisters == 32 && kWidth == 16 ? 4 : 2;
constexpr int kTileCols = kRegisters == 32 && kWidth == 16 ? 5 : (kRegisters == 32 ? 3 : 2);

template <int R, int C>
void sddmm_tile(const SddmmBlock& b, const float* dy, const std::int32_t* offsets, float* sums,
                std::int64_t stride) {
    vec parts[R][C][kBlockVecs];
    const float* from[C];
    SPC_UNROLL
    for (int c = 0; c < C; ++c) from[c] = b.packed + offsets[c];
    SPC_UNROLL
    for (int r = 0; r < R; ++r)
        SPC_UNROLL
        for (int c = 0; c < C; ++c)
            SPC_UNROLL
            for (int k = 0; k < kBlockVecs; ++k) parts[r][c][k] = splat(0.0f);
    const std::int64_t floats = static_cast<std::int64_t>(b.blocks) * kBlock;
    for (std::int64_t i = 0; i < floats; i += kBlock)
        SPC_UNROLL
        for (int k = 0; k < kBlockVecs; ++k) {
            vec gradient[R];
            SPC_UNROLL
            for (int r = 0; r < R; ++r) gradient[r] = load(dy + r * b.dy_stride + i + k * kWidth);
            SPC_UNROLL
            for (int c = 0; c < C; ++c) {
                vec input = load(from[c] + i + k * kWidth);
                hold(input);
                SPC_UNROLL
                for (int r = 0; r < R; ++r)
                    parts[r][c][k] = fma(gradient[r], input, parts[r][c][k]);
            }
        }
    SPC_UNROLL
    for (int r = 0; r < R; ++r)
        SPC_UNROLL
        for (int c = 0; c < C; ++c) sums[r * stride + c] += sum_block(parts[r][c]);
}

void sddmm_rows(const SddmmBlock& b, int rows, const std::int32_t* offsets, std::int64_t count,
                float* sums, std::int64_t stride) {
    int r = 0;
    for (; r + kTileRows <= rows; r += kTileRows) {
        const float* dy = b.dy + r * b.dy_stride;
        float* to = sums + r * stride;
        std::int64_t c = 0;
        for (; c + kTileCols <= count; c += kTileCols)
            sddmm_tile<kTileRows, kTileCols>(b, dy, offsets + c, to + c, stride);
        for (; c < count; ++c) sddmm_tile<kTileRows, 1>(b, dy, offsets + c, to + c, stride);
    }
    for (; r < rows; ++r) {
        SddmmBlock row = b;
        row.dy = b.dy + r * b.dy_stride;
        sddmm(row, offsets, count, sums + r * stride);
    }
}

void stage(const Run* runs, std::int64_t num_runs, const float* row, float* staged) {
    for (std::int64_t i = 0; i < num_runs; ++i) {
        const float* from = row + runs[i].target;
        float* to = staged + runs[i].source;
        const int length = runs[i].length;
        int k = 0;
        for (; k + kWidth <= length; k += kWidth) store(to + k, load(from + k));
        for (; k < length; ++k) to[k] = from[k];
    }
}

}  // namespace
}  // namespace spc::SPC_ISA
