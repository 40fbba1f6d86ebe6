// Linear layers of few samples, where reading the weight is most of the work.
#include <algorithm>

#include "blocks.h"
#include "guard.h"
#include "kernels.h"
#include "workers.h"

namespace {

using namespace spc;

constexpr int64_t kRows = 64;            // rows of a forward piece
constexpr int64_t kStripeFloats = 3072;  // of x in a backward piece: it and dx stay in cache
constexpr int kMostRows = 4;             // gradients of so many rows are taken together at most

int32_t check_call(const char* where, int64_t batch, int64_t in, int64_t out,
                   const int32_t* row_ptr, int32_t threads) {
    if (batch < 1 || batch > (int64_t{1} << 31) - 1)
        return fail(SPC_BAD_GEOMETRY, "%s: expected a batch >= 1, got %lld", where,
                    static_cast<long long>(batch));
    return check_rows(where, out, in, row_ptr, threads);
}

double work_of(int64_t batch, int64_t in, int64_t out) {
    return static_cast<double>(batch + 2) * static_cast<double>(in) * static_cast<double>(out);
}

// Where stripes of whole blocks begin: small enough for the cache, enough for the threads.
int64_t stripe_length(int64_t batch, int64_t in, int threads) {
    const int64_t cached = std::max<int64_t>(1, kStripeFloats / (batch * kBlockFloats));
    const int64_t shared = (words_of(in) + threads - 1) / threads;
    return std::min(cached, shared) * kBlockFloats;
}

struct FewBackward {
    int64_t batch, in, out;
    const int32_t* row_ptr;
    const uint16_t* bits;
    const float *values, *x;
    float *dx, *dvalues;
    const float* dy;  // [out / rows, batch, rows], the rows of a group side by side
    int rows;
};

// Output gradients of rows that are taken together, side by side.
const float* grouped(const float* dy, int64_t batch, int64_t out, int rows) {
    const int64_t groups = (out + rows - 1) / rows;
    float* to = scratch_array<float>(Slot::gradient, groups * batch * rows);
    for (int64_t g = 0; g < groups; ++g)
        for (int64_t s = 0; s < batch; ++s)
            for (int64_t k = 0; k < rows; ++k)
                to[(g * batch + s) * rows + k] =
                    g * rows + k < out ? dy[s * out + g * rows + k] : 0.0f;
    return to;
}

// The gradients that meet `places` inputs from `first` on. Inputs and their gradients are copied
// side by side: where they lie, samples may be a power of two apart and drive each other out of
// the cache.
void backward_stripe(const FewBackward& c, int64_t first, int64_t places) {
    const Kernels& kernel = kernels();
    const int64_t stride = words_of(places) * kBlockFloats + kBlockFloats;
    float* x = c.dvalues ? scratch_array<float>(Slot::packed, c.batch * stride) : nullptr;
    float* dx = c.dx ? scratch_array<float>(Slot::staged, c.batch * stride) : nullptr;
    for (int64_t s = 0; s < c.batch && x; ++s)
        std::copy_n(c.x + s * c.in + first, places, x + s * stride);
    for (int64_t s = 0; s < c.batch && dx; ++s) std::fill_n(dx + s * stride, places, 0.0f);
    for (int64_t row = 0; row < c.out; row += c.rows) {
        const int num_rows = static_cast<int>(std::min<int64_t>(c.rows, c.out - row));
        GradientRow rows[kMostRows];
        for (int k = 0; k < num_rows; ++k) {
            const uint16_t* bits = c.bits + (row + k) * words_of(c.in);
            const int64_t skipped = first / kBlockFloats;
            const int64_t begin = c.row_ptr[row + k] + kernel.count_bits(bits, skipped);
            const int64_t end = begin + kernel.count_bits(bits + skipped, words_of(places));
            rows[k] = {c.values + begin, c.values + c.row_ptr[c.out], bits + skipped,
                       c.dvalues + begin, c.dvalues + end};
        }
        kernel.row_gradients(rows, num_rows,
                             {c.batch, places, stride, c.dy + row * c.batch, c.rows, x, dx});
    }
    for (int64_t s = 0; s < c.batch && dx; ++s)
        std::copy_n(dx + s * stride, places, c.dx + s * c.in + first);
}

}  // namespace

extern "C" int32_t spc_linear_few(int64_t batch, int64_t in, int64_t out, const int32_t* row_ptr,
                                  const uint16_t* bits, const float* values, const float* bias,
                                  const float* x, float* y, int32_t threads) {
    const char* where = "linear_few";
    if (int32_t code = check_call(where, batch, in, out, row_ptr, threads)) return code;
    if (int32_t code = check_pointers(where, {bits, x, y})) return code;
    if (!values && row_ptr[out] > 0) return fail(SPC_NULL_POINTER, "%s: values is null", where);
    return guarded(where, [&] {
        const Kernels& kernel = kernels();
        const int used = worthwhile_threads(threads, work_of(batch, in, out));
        parallel((out + kRows - 1) / kRows, used, [&](int64_t piece) {
            const int64_t first = piece * kRows, end = std::min(out, first + kRows);
            constexpr int64_t kSamples = 8;  // whose inputs stay in cache over the rows
            for (int64_t s = 0; s < batch; s += kSamples) {
                const int64_t samples = std::min(kSamples, batch - s);
                for (int64_t row = first; row < end; ++row) {
                    float sums[kSamples];
                    const BlockRow weights{values + row_ptr[row], values + row_ptr[out],
                                           bits + row * words_of(in), in, in};
                    kernel.row_dots(weights, x + s * in, samples, sums);
                    for (int64_t k = 0; k < samples; ++k)
                        y[(s + k) * out + row] = bias ? sums[k] + bias[row] : sums[k];
                }
            }
        });
        return SPC_OK;
    });
}

extern "C" int32_t spc_linear_few_backward(int64_t batch, int64_t in, int64_t out,
                                           const int32_t* row_ptr, const uint16_t* bits,
                                           const float* values, const float* x, const float* dy,
                                           float* dx, float* dvalues, float* dbias,
                                           int32_t threads) {
    const char* where = "linear_few_backward";
    if (int32_t code = check_call(where, batch, in, out, row_ptr, threads)) return code;
    if (int32_t code = check_pointers(where, {bits, dy})) return code;
    if ((dx && !values && row_ptr[out] > 0) || (dvalues && !x))
        return fail(SPC_NULL_POINTER, "%s: values or x is null", where);
    return guarded(where, [&] {
        const int used = worthwhile_threads(threads, 2.0 * work_of(batch, in, out));
        const int64_t length = stripe_length(batch, in, used);
        if (dx || dvalues) {
            const int rows = kernels().gradient_rows;
            const FewBackward call{batch, in, out, row_ptr, bits, values, x, dx, dvalues,
                                   grouped(dy, batch, out, rows), rows};
            parallel((in + length - 1) / length, used, [&](int64_t piece) {
                const int64_t first = piece * length;
                backward_stripe(call, first, std::min(length, in - first));
            });
        }
        for (int64_t row = 0; row < out && dbias; ++row) {
            float sum = 0.0f;
            for (int64_t s = 0; s < batch; ++s) sum += dy[s * out + row];
            dbias[row] = sum;
        }
        return SPC_OK;
    });
}
