// Max, average and global average pooling: channels in parallel, lanes in the inner loop.
#include <algorithm>
#include <cstring>

#include "guard.h"
#include "kernels.h"
#include "workers.h"

namespace spc {
namespace {

std::int32_t check_pool(const char* where, const spc_pool_geometry* g, std::int32_t threads) {
    if (!g) return fail(SPC_NULL_POINTER, "%s: the geometry is null", where);
    const std::int32_t sizes[] = {g->batch, g->channels, g->in_h,     g->in_w,
                                  g->kernel_h, g->kernel_w, g->stride_h, g->stride_w};
    for (std::int32_t size : sizes)
        if (size < 1)
            return fail(SPC_BAD_GEOMETRY, "%s: a size, kernel or stride is %d; expected >= 1",
                        where, size);
    if (g->pad_h < 0 || g->pad_w < 0 || g->pad_h > g->kernel_h / 2 || g->pad_w > g->kernel_w / 2)
        return fail(SPC_BAD_GEOMETRY, "%s: expected padding in [0, kernel / 2], got %d and %d",
                    where, g->pad_h, g->pad_w);
    const std::int64_t h = g->in_h + 2LL * g->pad_h - g->kernel_h;
    const std::int64_t w = g->in_w + 2LL * g->pad_w - g->kernel_w;
    if (h < 0 || w < 0 || h / g->stride_h + 1 != g->out_h || w / g->stride_w + 1 != g->out_w)
        return fail(SPC_BAD_GEOMETRY, "%s: the output size %d x %d does not follow from the input",
                    where, g->out_h, g->out_w);
    return check_threads(threads, where);
}

int pool_threads(const spc_pool_geometry& g, int threads) {
    return worthwhile_threads(threads, static_cast<double>(g.channels) * g.out_h * g.out_w *
                                           g.batch * g.kernel_h * g.kernel_w / kBlockFloats);
}

// One output pixel's window: input rows and columns that exist.
struct Window {
    int top, left;  // of the whole window, may lie outside
    int h0, h1, w0, w1;
};

Window window_at(const spc_pool_geometry& g, int i, int j) {
    Window w;
    w.top = i * g.stride_h - g.pad_h;
    w.left = j * g.stride_w - g.pad_w;
    w.h0 = std::max(0, w.top);
    w.h1 = std::min(g.in_h, w.top + g.kernel_h);
    w.w0 = std::max(0, w.left);
    w.w1 = std::min(g.in_w, w.left + g.kernel_w);
    return w;
}

// Calls body(i, j, tap) for every output pixel whose window holds input pixel (h, w).
template <class Body>
void for_windows(const spc_pool_geometry& g, int h, int w, Body&& body) {
    const auto first = [](int p, int kernel, int stride) {
        return p < kernel ? 0 : (p - kernel) / stride + 1;
    };
    const int ph = h + g.pad_h, pw = w + g.pad_w;
    for (int i = first(ph, g.kernel_h, g.stride_h); i <= std::min(ph / g.stride_h, g.out_h - 1);
         ++i)
        for (int j = first(pw, g.kernel_w, g.stride_w);
             j <= std::min(pw / g.stride_w, g.out_w - 1); ++j)
            body(i, j, (ph - i * g.stride_h) * g.kernel_w + (pw - j * g.stride_w));
}

float window_weight(const spc_pool_geometry& g, bool include_pad, int i, int j) {
    const Window w = window_at(g, i, j);
    const int count =
        include_pad ? g.kernel_h * g.kernel_w : (w.h1 - w.h0) * (w.w1 - w.w0);
    return 1.0f / static_cast<float>(count);
}

struct Planes {
    std::int64_t batch, in, out;  // floats of an input and an output plane
    explicit Planes(const spc_pool_geometry& g)
        : batch(g.batch), in(std::int64_t{g.in_h} * g.in_w * g.batch),
          out(std::int64_t{g.out_h} * g.out_w * g.batch) {}
};

void maxpool_plane(const spc_pool_geometry& g, const float* x, float* y, std::uint8_t* taps) {
    const Kernels& kernel = kernels();
    const auto batch = static_cast<std::size_t>(g.batch);
    for (int i = 0; i < g.out_h; ++i) {
        for (int j = 0; j < g.out_w; ++j, y += g.batch, taps = taps ? taps + g.batch : taps) {
            const Window w = window_at(g, i, j);
            bool started = false;
            for (int h = w.h0; h < w.h1; ++h) {
                for (int c = w.w0; c < w.w1; ++c) {
                    const float* from = x + (std::int64_t{h} * g.in_w + c) * g.batch;
                    const int tap = (h - w.top) * g.kernel_w + (c - w.left);
                    if (started) {
                        kernel.max_step(from, y, taps, static_cast<std::uint8_t>(tap), g.batch);
                        continue;
                    }
                    std::memcpy(y, from, sizeof(float) * batch);
                    if (taps) std::memset(taps, tap, batch);
                    started = true;
                }
            }
        }
    }
}

}  // namespace
}  // namespace spc

using namespace spc;

extern "C" int32_t spc_maxpool_forward(const spc_pool_geometry* g, const float* x, float* y,
                                       uint8_t* taps, int32_t threads) {
    const char* where = "maxpool_forward";
    if (int32_t code = check_pool(where, g, threads)) return code;
    if (int32_t code = check_pointers(where, {x, y})) return code;
    if (taps && g->kernel_h > 256 / g->kernel_w)
        return fail(SPC_BAD_GEOMETRY, "%s: a window of %d x %d has more than 256 places", where,
                    g->kernel_h, g->kernel_w);
    return guarded(where, [&] {
        const Planes p(*g);
        parallel(g->channels, pool_threads(*g, threads), [&](int64_t c) {
            maxpool_plane(*g, x + c * p.in, y + c * p.out, taps ? taps + c * p.out : nullptr);
        });
        return SPC_OK;
    });
}

extern "C" int32_t spc_maxpool_backward(const spc_pool_geometry* g, const uint8_t* taps,
                                        const float* dy, float* dx, int32_t threads) {
    const char* where = "maxpool_backward";
    if (int32_t code = check_pool(where, g, threads)) return code;
    if (int32_t code = check_pointers(where, {taps, dy, dx})) return code;
    return guarded(where, [&] {
        const Kernels& kernel = kernels();
        const Planes p(*g);
        parallel(g->channels, pool_threads(*g, threads), [&](int64_t c) {
            float* to = dx + c * p.in;
            for (int h = 0; h < g->in_h; ++h) {
                for (int w = 0; w < g->in_w; ++w, to += g->batch) {
                    std::fill(to, to + g->batch, 0.0f);
                    for_windows(*g, h, w, [&](int i, int j, int tap) {
                        const int64_t from =
                            c * p.out + (int64_t{i} * g->out_w + j) * g->batch;
                        kernel.pick_step(taps + from, dy + from, to, static_cast<uint8_t>(tap),
                                         g->batch);
                    });
                }
            }
        });
        return SPC_OK;
    });
}

extern "C" int32_t spc_avgpool_forward(const spc_pool_geometry* g, int32_t include_pad,
                                       const float* x, float* y, int32_t threads) {
    const char* where = "avgpool_forward";
    if (int32_t code = check_pool(where, g, threads)) return code;
    if (int32_t code = check_pointers(where, {x, y})) return code;
    return guarded(where, [&] {
        const Kernels& kernel = kernels();
        const Planes p(*g);
        parallel(g->channels, pool_threads(*g, threads), [&](int64_t c) {
            float* to = y + c * p.out;
            for (int i = 0; i < g->out_h; ++i) {
                for (int j = 0; j < g->out_w; ++j, to += g->batch) {
                    const Window w = window_at(*g, i, j);
                    std::fill(to, to + g->batch, 0.0f);
                    for (int h = w.h0; h < w.h1; ++h)
                        for (int k = w.w0; k < w.w1; ++k)
                            kernel.add_scaled(
                                x + c * p.in + (int64_t{h} * g->in_w + k) * g->batch, to, 1.0f,
                                g->batch);
                    kernel.scale(to, to, window_weight(*g, include_pad != 0, i, j), g->batch);
                }
            }
        });
        return SPC_OK;
    });
}

extern "C" int32_t spc_avgpool_backward(const spc_pool_geometry* g, int32_t include_pad,
                                        const float* dy, float* dx, int32_t threads) {
    const char* where = "avgpool_backward";
    if (int32_t code = check_pool(where, g, threads)) return code;
    if (int32_t code = check_pointers(where, {dy, dx})) return code;
    return guarded(where, [&] {
        const Kernels& kernel = kernels();
        const Planes p(*g);
        parallel(g->channels, pool_threads(*g, threads), [&](int64_t c) {
            float* to = dx + c * p.in;
            for (int h = 0; h < g->in_h; ++h) {
                for (int w = 0; w < g->in_w; ++w, to += g->batch) {
                    std::fill(to, to + g->batch, 0.0f);
                    for_windows(*g, h, w, [&](int i, int j, int) {
                        kernel.add_scaled(
                            dy + c * p.out + (int64_t{i} * g->out_w + j) * g->batch, to,
                            window_weight(*g, include_pad != 0, i, j), g->batch);
                    });
                }
            }
        });
        return SPC_OK;
    });
}

namespace {

int32_t check_global(const char* where, int64_t channels, int64_t pixels, int64_t batch,
                     int32_t threads) {
    if (channels < 1 || pixels < 1 || batch < 1)
        return fail(SPC_BAD_GEOMETRY, "%s: expected channels, pixels and batch >= 1", where);
    return check_threads(threads, where);
}

int global_threads(int64_t channels, int64_t pixels, int64_t batch, int threads) {
    return worthwhile_threads(threads, static_cast<double>(channels) *
                                           static_cast<double>(pixels) *
                                           static_cast<double>(batch) / 4.0);
}

}  // namespace

extern "C" int32_t spc_global_avgpool_forward(int64_t channels, int64_t pixels, int64_t batch,
                                              const float* x, float* y, int32_t threads) {
    const char* where = "global_avgpool_forward";
    if (int32_t code = check_global(where, channels, pixels, batch, threads)) return code;
    if (int32_t code = check_pointers(where, {x, y})) return code;
    return guarded(where, [&] {
        const Kernels& kernel = kernels();
        const float weight = 1.0f / static_cast<float>(pixels);
        parallel(channels, global_threads(channels, pixels, batch, threads), [&](int64_t c) {
            float* to = y + c * batch;
            std::fill(to, to + batch, 0.0f);
            for (int64_t i = 0; i < pixels; ++i)
                kernel.add_scaled(x + (c * pixels + i) * batch, to, 1.0f, batch);
            kernel.scale(to, to, weight, batch);
        });
        return SPC_OK;
    });
}

extern "C" int32_t spc_global_avgpool_backward(int64_t channels, int64_t pixels, int64_t batch,
                                               const float* dy, float* dx, int32_t threads) {
    const char* where = "global_avgpool_backward";
    if (int32_t code = check_global(where, channels, pixels, batch, threads)) return code;
    if (int32_t code = check_pointers(where, {dy, dx})) return code;
    return guarded(where, [&] {
        const Kernels& kernel = kernels();
        const float weight = 1.0f / static_cast<float>(pixels);
        parallel(channels, global_threads(channels, pixels, batch, threads), [&](int64_t c) {
            for (int64_t i = 0; i < pixels; ++i)
                kernel.scale(dy + c * batch, dx + (c * pixels + i) * batch, weight, batch);
        });
        return SPC_OK;
    });
}
