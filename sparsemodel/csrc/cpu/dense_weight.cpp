// The dense weight of a sparse layer, for one call, and the way back to its values.
#include <algorithm>
#include <initializer_list>

#include "blocks.h"
#include "guard.h"
#include "kernels.h"
#include "workers.h"

namespace spc {

std::int32_t check_rows(const char* where, std::int64_t rows, std::int64_t row_length,
                        const std::int32_t* row_ptr, std::int32_t threads) {
    constexpr std::int64_t kMost = (std::int64_t{1} << 31) - 1;
    if (rows < 1 || row_length < 1 || rows > kMost / row_length)
        return fail(SPC_BAD_GEOMETRY,
                    "%s: expected 1 to 2^31 - 1 weights in rows, got %lld x %lld", where,
                    static_cast<long long>(rows), static_cast<long long>(row_length));
    if (!row_ptr) return fail(SPC_NULL_POINTER, "%s: row_ptr is null", where);
    if (row_ptr[0] != 0 || row_ptr[rows] < 0 || row_ptr[rows] > rows * row_length)
        return fail(SPC_BAD_PATTERN,
                    "%s: row_ptr runs from %d to %d; expected from 0 to at most %lld", where,
                    row_ptr[0], row_ptr[rows], static_cast<long long>(rows * row_length));
    return check_threads(threads, where);
}

namespace {

// Calls body(row) for all rows, some at a time.
template <class Body>
void for_rows(std::int64_t rows, std::int64_t row_length, int threads, Body&& body) {
    const std::int64_t step = std::max<std::int64_t>(1, 16384 / row_length);
    const double work = static_cast<double>(rows) * static_cast<double>(row_length);
    parallel((rows + step - 1) / step, worthwhile_threads(threads, work), [&](std::int64_t item) {
        const std::int64_t end = std::min(rows, (item + 1) * step);
        for (std::int64_t row = item * step; row < end; ++row) body(row);
    });
}

// What the three calls check: `entries` is the array as long as the active weights.
std::int32_t check_call(const char* where, std::int64_t rows, std::int64_t row_length,
                        const std::int32_t* row_ptr, std::int32_t threads,
                        std::initializer_list<const void*> arrays, const void* entries,
                        const char* name) {
    if (std::int32_t code = check_rows(where, rows, row_length, row_ptr, threads)) return code;
    if (std::int32_t code = check_pointers(where, arrays)) return code;
    if (!entries && row_ptr[rows] > 0)
        return fail(SPC_NULL_POINTER, "%s: %s is null", where, name);
    return SPC_OK;
}

}  // namespace
}  // namespace spc

using namespace spc;

extern "C" int32_t spc_pattern_bits(int64_t rows, int64_t row_length, const int32_t* row_ptr,
                                    const int32_t* cols, uint16_t* bits, int32_t threads) {
    const char* where = "pattern_bits";
    if (int32_t code = check_call(where, rows, row_length, row_ptr, threads, {bits}, cols,
                                  "cols"))
        return code;
    return guarded(where, [&] {
        const int64_t words = words_of(row_length);
        for_rows(rows, row_length, threads, [&](int64_t row) {
            uint16_t* to = bits + row * words;
            std::fill(to, to + words, static_cast<uint16_t>(0));
            for (int32_t e = row_ptr[row]; e < row_ptr[row + 1]; ++e)
                to[cols[e] / kBlockFloats] = static_cast<uint16_t>(
                    to[cols[e] / kBlockFloats] | 1u << cols[e] % kBlockFloats);
        });
        return SPC_OK;
    });
}

extern "C" int32_t spc_dense_weight(int64_t rows, int64_t row_length, const int32_t* row_ptr,
                                    const uint16_t* bits, const float* values, float* weight,
                                    int32_t threads) {
    const char* where = "dense_weight";
    if (int32_t code = check_call(where, rows, row_length, row_ptr, threads, {bits, weight}, values,
                                  "values"))
        return code;
    return guarded(where, [&] {
        const Kernels& kernel = kernels();
        for_rows(rows, row_length, threads, [&](int64_t row) {
            const BlockRow places{values + row_ptr[row], values + row_ptr[rows],
                                  bits + row * words_of(row_length), row_length, 0};
            kernel.expand_row(places, weight + row * row_length);
        });
        return SPC_OK;
    });
}

extern "C" int32_t spc_active_values(int64_t rows, int64_t row_length, const int32_t* row_ptr,
                                     const uint16_t* bits, const float* weight, float* values,
                                     int32_t threads) {
    const char* where = "active_values";
    if (int32_t code = check_call(where, rows, row_length, row_ptr, threads, {bits, weight}, values,
                                  "values"))
        return code;
    return guarded(where, [&] {
        const Kernels& kernel = kernels();
        for_rows(rows, row_length, threads, [&](int64_t row) {
            const BlockRow places{nullptr, nullptr, bits + row * words_of(row_length), row_length,
                                  0};
            kernel.gather_row(places, weight + row * row_length, values + row_ptr[row],
                              values + row_ptr[row + 1]);
        });
        return SPC_OK;
    });
}
