// Places of buffers in the arena, from their lifetimes.
#include <algorithm>
#include <numeric>

#include "plan.h"

namespace spc {
namespace {

constexpr std::size_t kAlignment = 64;

std::size_t bytes_of(const Buffer& b, std::int32_t batch) {
    const std::size_t bytes = b.sample_bytes * static_cast<std::size_t>(batch) + b.fixed_bytes;
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace

std::int32_t lanes_of(std::int32_t batch) {
    constexpr std::int32_t kVector = 16;  // floats of the widest registers, and of a cache line
    const std::int32_t padded = (batch + kVector - 1) / kVector * kVector;
    return padded - batch <= batch / 3 ? padded : batch;
}

std::int32_t most_lanes(std::int32_t batch) {
    std::int32_t most = batch;
    for (std::int32_t b = batch; b > 0 && b > batch - 16; --b) most = std::max(most, lanes_of(b));
    return most;
}

// The largest first, each at the lowest place that is free during its whole life.
void place_buffers(Program* program, std::int32_t batch) {
    std::vector<Buffer>& buffers = program->buffers;
    std::vector<std::size_t> order(buffers.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
        return bytes_of(buffers[a], batch) > bytes_of(buffers[b], batch);
    });
    std::vector<std::size_t> placed;  // by offset
    for (std::size_t index : order) {
        Buffer& buffer = buffers[index];
        const std::size_t bytes = bytes_of(buffer, batch);
        std::size_t offset = 0;
        for (std::size_t other : placed) {
            const Buffer& taken = buffers[other];
            if (taken.last < buffer.first || buffer.last < taken.first) continue;
            if (offset + bytes <= taken.offset) break;
            offset = std::max(offset, taken.offset + bytes_of(taken, batch));
        }
        buffer.offset = offset;
        program->bytes = std::max(program->bytes, offset + bytes);
        const auto after = [&](std::size_t, std::size_t other) {
            return offset < buffers[other].offset;
        };
        placed.insert(std::upper_bound(placed.begin(), placed.end(), index, after), index);
    }
}

float* buffer_at(const spc_plan& plan, const Program& program, int buffer) {
    if (buffer < 0) return nullptr;
    char* start = plan.arena.get() + program.buffers[static_cast<std::size_t>(buffer)].offset;
    return reinterpret_cast<float*>(start);
}

}  // namespace spc
