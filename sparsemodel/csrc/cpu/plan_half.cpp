// Activations kept in bfloat16: float32 without its lower 16 bits, so that no range is lost.
#include <cstring>

#include "plan.h"
#include "workers.h"

namespace spc {
namespace {

constexpr std::int64_t kPiece = 16384;

std::uint16_t rounded(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    // Rounding up must not turn a NaN into infinity.
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const std::uint32_t up = 0x7fffu + ((bits >> 16) & 1u);
    return static_cast<std::uint16_t>((nan ? bits | 0x400000u : bits + up) >> 16);
}

template <class Body>
void pieces(std::int64_t count, int threads, Body&& body) {
    parallel((count + kPiece - 1) / kPiece,
             worthwhile_threads(threads, static_cast<double>(count) / 4.0),
             [&](std::int64_t piece) {
                 const std::int64_t start = piece * kPiece;
                 body(start, count - start < kPiece ? count : start + kPiece);
             });
}

}  // namespace

void compress(const float* x, std::uint16_t* y, std::int64_t count, int threads) {
    pieces(count, threads, [=](std::int64_t start, std::int64_t stop) {
        for (std::int64_t i = start; i < stop; ++i) y[i] = rounded(x[i]);
    });
}

void expand(const std::uint16_t* x, float* y, std::int64_t count, int threads) {
    pieces(count, threads, [=](std::int64_t start, std::int64_t stop) {
        for (std::int64_t i = start; i < stop; ++i) {
            const std::uint32_t bits = static_cast<std::uint32_t>(x[i]) << 16;
            std::memcpy(y + i, &bits, sizeof bits);
        }
    });
}

}  // namespace spc
