// Sparse rows times an unpacked source, and both gradients from one: every block of positions is
// read where the source has it, and no entry is in a list whose positions it would take off the
// plane.
#pragma once

#include "isa_backward.h"
#include "isa_spmm.h"
#include "kernels.h"
#include "simd.h"

namespace spc::SPC_ISA {
namespace {

// Sends the lines that the next step reads on their way to the second level, a few a group: many
// at once would hold up the loads behind them.
class Fetcher {
public:
    Fetcher(const Ahead& a, std::int64_t groups)
        : ahead_(a), channel_(a.source), left_(a.channels * a.num_lines),
          each_((left_ + groups - 1) / (groups ? groups : 1)) {}
    void operator()() {
        const std::int64_t count = each_ < left_ ? each_ : left_;
        left_ -= count;
        for (std::int64_t k = 0; k < count; ++k) {
            __builtin_prefetch(channel_ + ahead_.lines[line_], 0, 2);
            if (++line_ == ahead_.num_lines) {
                line_ = 0;
                channel_ += ahead_.channel_stride;
            }
        }
    }

private:
    const Ahead& ahead_;
    const float* channel_;
    std::int64_t left_, each_, line_ = 0;
};

inline std::int64_t count_groups(const DirectTile& t, std::int64_t blocks) {
    std::int64_t groups = 0;
    for (std::int64_t i = 0; i < t.num_pieces; ++i)
        groups += (t.pieces[i].blocks + blocks - 1) / blocks;
    return groups * t.rows;
}

template <int Blocks>
inline void direct_group(const Piece& p, const float* source, std::int64_t block,
                         const DirectEntry* e, const DirectEntry* end, vec start, float* out,
                         bool streams) {
    const float* from[Blocks];
    vec sums[Blocks * kBlockVecs];
    SPC_UNROLL
    for (int i = 0; i < Blocks; ++i) from[i] = source + p.sources[block + i];
    SPC_UNROLL
    for (int k = 0; k < Blocks * kBlockVecs; ++k) sums[k] = start;
    for (; e != end; ++e) {
        const std::int64_t offset = e->offset;
        const vec weight = splat(e->value);
        SPC_UNROLL
        for (int i = 0; i < Blocks; ++i)
            SPC_UNROLL
            for (int k = 0; k < kBlockVecs; ++k) {
                vec& sum = sums[i * kBlockVecs + k];
                sum = fma(weight, load(from[i] + offset + k * kWidth), sum);
            }
    }
    store_blocks<Blocks * kBlockVecs>(sums, p.targets + block, out, streams);
}

template <int Blocks>
inline void last_direct_group(const Piece& p, const float* source, std::int64_t block,
                              const DirectEntry* e, const DirectEntry* end, vec start, float* out,
                              bool streams) {
    if (p.blocks - block == Blocks) {
        direct_group<Blocks>(p, source, block, e, end, start, out, streams);
    } else if constexpr (Blocks > 1) {
        last_direct_group<Blocks - 1>(p, source, block, e, end, start, out, streams);
    }
}

void direct_spmm(const DirectTile& t) {
    constexpr int kBlocks = kGroupFloats / kBlock;
    Fetcher fetch(t.ahead, count_groups(t, kBlocks));
    for (std::int64_t row = 0; row < t.rows; ++row) {
        const std::int64_t first = t.row_ptr[row];
        const vec start = splat(t.bias ? t.bias[row] : 0.0f);
        float* out = t.out + row * t.stride;
        for (const Piece* p = t.pieces; p != t.pieces + t.num_pieces; ++p) {
            const DirectEntry *e = p->entries + first, *end = p->entries + p->ends[row];
            std::int64_t block = 0;
            for (; block + kBlocks <= p->blocks; block += kBlocks) {
                fetch();
                direct_group<kBlocks>(*p, t.source, block, e, end, start, out, t.streams);
            }
            if constexpr (kBlocks > 1) {
                fetch();
                last_direct_group<kBlocks - 1>(*p, t.source, block, e, end, start, out, t.streams);
            }
        }
    }
    if (t.streams) finish_streams();
}

template <int Blocks>
inline void direct_backward_group(const Piece& p, const float* source, std::int64_t block,
                                  const DirectEntry* e, const DirectEntry* end, const float* x,
                                  std::int64_t stride, float* dx, bool streams, float* lanes) {
    constexpr int kVecs = Blocks * kBlockVecs;
    const float* from[Blocks];
    vec inputs[kVecs], sums[kVecs];
    SPC_UNROLL
    for (int i = 0; i < Blocks; ++i) {
        from[i] = source + p.sources[block + i];
        __builtin_prefetch(x + stride + p.targets[block + i], 0, 3);
    }
    load_blocks<kVecs>(x, p.targets + block, inputs);
    SPC_UNROLL
    for (int k = 0; k < kVecs; ++k) sums[k] = splat(0.0f);
    for (; e != end; ++e) {
        const std::int64_t offset = e->offset;
        const vec weight = splat(e->value);
        float* at = lanes + static_cast<std::int64_t>(e->slot) * kBlock;
        vec parts[kBlockVecs];
        SPC_UNROLL
        for (int k = 0; k < kBlockVecs; ++k) parts[k] = load(at + k * kWidth);
        SPC_UNROLL
        for (int i = 0; i < Blocks; ++i)
            SPC_UNROLL
            for (int k = 0; k < kBlockVecs; ++k) {
                vec gradient = load(from[i] + offset + k * kWidth);
                hold(gradient);
                vec& sum = sums[i * kBlockVecs + k];
                sum = fma(weight, gradient, sum);
                parts[k] = fma(inputs[i * kBlockVecs + k], gradient, parts[k]);
            }
        SPC_UNROLL
        for (int k = 0; k < kBlockVecs; ++k) store(at + k * kWidth, parts[k]);
    }
    store_blocks<kVecs>(sums, p.targets + block, dx, streams);
}

template <int Blocks>
inline void last_direct_backward_group(const Piece& p, const float* source, std::int64_t block,
                                       const DirectEntry* e, const DirectEntry* end,
                                       const float* x, std::int64_t stride, float* dx,
                                       bool streams, float* lanes) {
    if (p.blocks - block == Blocks) {
        direct_backward_group<Blocks>(p, source, block, e, end, x, stride, dx, streams, lanes);
    } else if constexpr (Blocks > 1) {
        last_direct_backward_group<Blocks - 1>(p, source, block, e, end, x, stride, dx, streams,
                                               lanes);
    }
}

void direct_backward(const DirectTile& t) {
    constexpr int kBlocks = kBackFloats / kBlock;
    Fetcher fetch(t.ahead, count_groups(t, kBlocks));
    for (std::int64_t row = 0; row < t.rows; ++row) {
        const std::int64_t first = t.row_ptr[row], count = t.row_ptr[row + 1] - first;
        const float* x = t.x + row * t.stride;
        const std::int64_t stride = row + 1 < t.rows ? t.stride : 0;
        float* dx = t.out + row * t.stride;
        std::memset(t.lanes, 0, sizeof(float) * kBlock * static_cast<std::size_t>(count));
        for (const Piece* p = t.pieces; p != t.pieces + t.num_pieces; ++p) {
            const DirectEntry *e = p->entries + first, *end = p->entries + p->ends[row];
            std::int64_t block = 0;
            for (; block + kBlocks <= p->blocks; block += kBlocks) {
                fetch();
                direct_backward_group<kBlocks>(*p, t.source, block, e, end, x, stride, dx,
                                               t.streams, t.lanes);
            }
            if constexpr (kBlocks > 1) {
                fetch();
                last_direct_backward_group<kBlocks - 1>(*p, t.source, block, e, end, x, stride, dx,
                                                        t.streams, t.lanes);
            }
        }
        for (std::int64_t k = 0; k < count; ++k) {
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
