// Rows of a weight in blocks of 16 places: a bit a place says which weights exist, and the
// values of a block are put in their places in a register (or taken from them) in one step.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace spc::SPC_ISA {
namespace {

// A block in registers.
struct Block {
    vec part[kBlockVecs];
};

inline Block load_block(const float* p) {
    Block block;
    for (int v = 0; v < kBlockVecs; ++v) block.part[v] = load(p + v * kWidth);
    return block;
}

inline void store_block(float* p, const Block& block) {
    for (int v = 0; v < kBlockVecs; ++v) store(p + v * kWidth, block.part[v]);
}

inline Block load_places(const float* p, int places) {
    float lanes[kBlock] = {};
    std::memcpy(lanes, p, sizeof(float) * static_cast<std::size_t>(places));
    return load_block(lanes);
}

inline void store_places(float* p, const Block& block, int places) {
    float lanes[kBlock];
    store_block(lanes, block);
    std::memcpy(p, lanes, sizeof(float) * static_cast<std::size_t>(places));
}

// The values at the set places of `bits`, zeros elsewhere; reads no more than there are bits.
inline Block spread_few(const float* values, unsigned bits) {
    float lanes[kBlock] = {};
    for (; bits; bits &= bits - 1u) lanes[__builtin_ctz(bits)] = *values++;
    return load_block(lanes);
}

// The way back; writes no more than there are bits.
inline void collect_few(float* values, const Block& block, unsigned bits) {
    float lanes[kBlock];
    store_block(lanes, block);
    for (; bits; bits &= bits - 1u) *values++ = lanes[__builtin_ctz(bits)];
}

#if defined(SPC_AVX512) || defined(SPC_AVX2)

// For each pattern of 8 places, a byte a lane: which of 8 values it takes (128: none), and the
// other way which lane a value comes from. Permutations by these take half the time of
// AVX-512's own expansion on Zen 4.
struct Lanes {
    std::uint64_t spread[256], collect[256];
};

constexpr Lanes make_lanes() {
    Lanes lanes{};
    for (unsigned bits = 0; bits < 256; ++bits) {
        unsigned count = 0;
        for (unsigned lane = 0; lane < 8; ++lane) {
            const bool set = (bits >> lane & 1u) != 0;
            lanes.spread[bits] |= static_cast<std::uint64_t>(set ? count : 128u) << 8 * lane;
            if (set) lanes.collect[bits] |= static_cast<std::uint64_t>(lane) << 8 * count++;
        }
    }
    return lanes;
}

constexpr Lanes kLanes = make_lanes();

inline __m256i lane_indices(const std::uint64_t* bytes) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
}

inline __m256 spread_half(const float* values, unsigned bits) {
    const __m256i from = lane_indices(&kLanes.spread[bits]);
    const __m256 placed = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), from);
    return _mm256_blendv_ps(placed, _mm256_setzero_ps(), _mm256_castsi256_ps(from));
}

inline void collect_half(float* values, __m256 lanes, unsigned bits) {
    const __m256i from = lane_indices(&kLanes.collect[bits]);
    _mm256_storeu_ps(values, _mm256_permutevar8x32_ps(lanes, from));
}

// `end` is that of the array: up to there may be read.
inline Block spread(const float* values, unsigned bits, const float* end) {
    if (__builtin_expect(end - values < kBlock, 0)) return spread_few(values, bits);
    const __m256 low = spread_half(values, bits & 255u);
    const __m256 high = spread_half(values + __builtin_popcount(bits & 255u), bits >> 8);
#if defined(SPC_AVX512)
    const __m512d wide = _mm512_castpd256_pd512(_mm256_castps_pd(low));
    return {{_mm512_castpd_ps(_mm512_insertf64x4(wide, _mm256_castps_pd(high), 1))}};
#else
    return {{low, high}};
#endif
}

// `end` is that of the row: up to there may be written, what comes after is written later.
inline void collect(float* values, const Block& block, unsigned bits, const float* end) {
    if (__builtin_expect(end - values < kBlock, 0)) {
        collect_few(values, block, bits);
        return;
    }
#if defined(SPC_AVX512)
    const __m512d wide = _mm512_castps_pd(block.part[0]);
    const __m256 low = _mm512_castps512_ps256(block.part[0]);
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(wide, 1));
#else
    const __m256 low = block.part[0], high = block.part[1];
#endif
    collect_half(values, low, bits & 255u);
    collect_half(values + __builtin_popcount(bits & 255u), high, bits >> 8);
}

#else

inline Block spread(const float* values, unsigned bits, const float*) {
    return spread_few(values, bits);
}

inline void collect(float* values, const Block& block, unsigned bits, const float*) {
    collect_few(values, block, bits);
}

#endif

// Calls body(place, word) for whole blocks of a row, then rest(place, word, places) for what is
// left of it.
template <class Body, class Rest>
inline void for_blocks(const BlockRow& row, Body&& body, Rest&& rest) {
    const std::int64_t whole = row.length / kBlock;
    for (std::int64_t i = 0; i < whole; ++i) body(i * kBlock, row.bits[i]);
    const int places = static_cast<int>(row.length % kBlock);
    if (places) rest(whole * kBlock, row.bits[whole], places);
}

std::int64_t count_bits(const std::uint16_t* bits, std::int64_t words) {
    std::int64_t count = 0, i = 0;
    for (; i + 4 <= words; i += 4) {
        std::uint64_t four;
        std::memcpy(&four, bits + i, sizeof four);
        count += __builtin_popcountll(four);
    }
    for (; i < words; ++i) count += __builtin_popcount(bits[i]);
    return count;
}

void expand_row(const BlockRow& row, float* weight) {
    const float* values = row.values;
    const auto next = [&](unsigned word) {
        const Block block = spread(values, word, row.values_end);
        values += __builtin_popcount(word);
        return block;
    };
    for_blocks(
        row, [&](std::int64_t place, unsigned word) { store_block(weight + place, next(word)); },
        [&](std::int64_t place, unsigned word, int places) {
            store_places(weight + place, next(word), places);
        });
}

void gather_row(const BlockRow& row, const float* weight, float* values, const float* end) {
    const auto next = [&](const Block& block, unsigned word) {
        collect(values, block, word, end);
        values += __builtin_popcount(word);
    };
    for_blocks(
        row, [&](std::int64_t place, unsigned word) { next(load_block(weight + place), word); },
        [&](std::int64_t place, unsigned word, int places) {
            next(load_places(weight + place, places), word);
        });
}

// sums[s] = row * sample s for kSamples samples; each keeps 16 partial sums.
template <int kSamples>
inline void dot_samples(const BlockRow& row, const float* x, float* sums) {
    Block total[kSamples];
    SPC_UNROLL for (int s = 0; s < kSamples; ++s)
        SPC_UNROLL for (int v = 0; v < kBlockVecs; ++v) total[s].part[v] = splat(0.0f);
    const float *values = row.values, *const end = row.values_end;
    const auto add = [&](unsigned word, auto&& input_of) {
        const Block weights = spread(values, word, end);
        values += __builtin_popcount(word);
        SPC_UNROLL for (int s = 0; s < kSamples; ++s) {
            const Block input = input_of(x + s * row.stride);
            SPC_UNROLL for (int v = 0; v < kBlockVecs; ++v)
                total[s].part[v] = fma(weights.part[v], input.part[v], total[s].part[v]);
        }
    };
    for_blocks(
        row,
        [&](std::int64_t place, unsigned word) {
            add(word, [&](const float* sample) { return load_block(sample + place); });
        },
        [&](std::int64_t place, unsigned word, int places) {
            add(word, [&](const float* sample) { return load_places(sample + place, places); });
        });
    for (int s = 0; s < kSamples; ++s) sums[s] = sum_block(total[s].part);
}

void row_dots(const BlockRow& row, const float* x, std::int64_t samples, float* sums) {
    const auto at = [&](std::int64_t s) { return x + s * row.stride; };
    std::int64_t s = 0;
    if constexpr (kBlockVecs == 1)  // more than 4 samples of it need more registers
        for (; s + 8 <= samples; s += 8) dot_samples<8>(row, at(s), sums + s);
    for (; s + 4 <= samples; s += 4) dot_samples<4>(row, at(s), sums + s);
    for (; s + 2 <= samples; s += 2) dot_samples<2>(row, at(s), sums + s);
    if (s < samples) dot_samples<1>(row, at(s), sums + s);
}

// Rows whose gradients are taken together: as many as registers hold.
constexpr int kGradientRows = kBlockVecs == 1 ? 4 : 2;

// dx += dy * weights, sums = sum of dy * x, for one block of kRows rows.
template <int kRows, bool kInput, bool kWeights, class Load, class Store>
inline void block_gradients(const Block* weights, std::int64_t place, const BlockSamples& samples,
                            Block* sums, Load&& load_at, Store&& store_at) {
    SPC_UNROLL for (int k = 0; k < kRows; ++k)
        SPC_UNROLL for (int v = 0; v < kBlockVecs; ++v) sums[k].part[v] = splat(0.0f);
    for (std::int64_t s = 0; s < samples.count; ++s) {
        const std::int64_t at = s * samples.stride + place;
        const float* gradient = samples.dy + s * samples.dy_stride;
        Block dx, x;
        if constexpr (kInput) dx = load_at(samples.dx + at);
        if constexpr (kWeights) x = load_at(samples.x + at);
        SPC_UNROLL for (int k = 0; k < kRows; ++k) {
            const vec dy = splat(gradient[k]);
            SPC_UNROLL for (int v = 0; v < kBlockVecs; ++v) {
                if constexpr (kInput) dx.part[v] = fma(weights[k].part[v], dy, dx.part[v]);
                if constexpr (kWeights) sums[k].part[v] = fma(x.part[v], dy, sums[k].part[v]);
            }
        }
        if constexpr (kInput) store_at(samples.dx + at, dx);
    }
}

template <int kRows, bool kInput, bool kWeights>
inline void gradients(const GradientRow* rows, const BlockSamples& samples) {
    const float* values[kRows];
    float* dvalues[kRows];
    for (int k = 0; k < kRows; ++k) {
        values[k] = rows[k].values;
        dvalues[k] = rows[k].dvalues;
    }
    const auto block = [&](std::int64_t place, auto&& load_at, auto&& store_at) {
        Block weights[kRows], sums[kRows];
        unsigned words[kRows];
        SPC_UNROLL for (int k = 0; k < kRows; ++k) {
            words[k] = rows[k].bits[place / kBlock];
            if constexpr (kInput) {
                weights[k] = spread(values[k], words[k], rows[k].values_end);
                values[k] += __builtin_popcount(words[k]);
            }
        }
        block_gradients<kRows, kInput, kWeights>(weights, place, samples, sums, load_at, store_at);
        SPC_UNROLL for (int k = 0; k < kRows && kWeights; ++k) {
            collect(dvalues[k], sums[k], words[k], rows[k].dvalues_end);
            dvalues[k] += __builtin_popcount(words[k]);
        }
    };
    const std::int64_t whole = samples.places / kBlock * kBlock;
    for (std::int64_t place = 0; place < whole; place += kBlock)
        block(place, [](const float* p) { return load_block(p); },
              [](float* p, const Block& b) { store_block(p, b); });
    const int rest = static_cast<int>(samples.places - whole);
    if (rest)
        block(whole, [&](const float* p) { return load_places(p, rest); },
              [&](float* p, const Block& b) { store_places(p, b, rest); });
}

template <int kRows>
inline void some_gradients(const GradientRow* rows, const BlockSamples& samples) {
    if (samples.dx && samples.x)
        gradients<kRows, true, true>(rows, samples);
    else if (samples.dx)
        gradients<kRows, true, false>(rows, samples);
    else
        gradients<kRows, false, true>(rows, samples);
}

void row_gradients(const GradientRow* rows, int num_rows, const BlockSamples& samples) {
    if (num_rows == kGradientRows) {
        some_gradients<kGradientRows>(rows, samples);
        return;
    }
    BlockSamples one = samples;
    for (int k = 0; k < num_rows; ++k, ++one.dy) some_gradients<1>(rows + k, one);
}

}  // namespace
}  // namespace spc::SPC_ISA
