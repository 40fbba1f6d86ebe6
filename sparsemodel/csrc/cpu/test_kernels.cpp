// Every exported function against plain loops in double, on random shapes, for every instruction
// set of this processor and for one and two threads. Meant for sanitizers and for emulators;
// tests/sparsemodel/kernels has the same from Python.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "sparse_cpu.h"

namespace {

using Floats = std::vector<float>;
using Ints = std::vector<int32_t>;

std::mt19937 engine(1);
int failures = 0;
std::string what;  // the case at hand

int uniform(int low, int high) { return std::uniform_int_distribution<int>(low, high)(engine); }

int one_of(std::initializer_list<int> list) { return list.begin()[uniform(0, int(list.size()) - 1)]; }

Floats normals(std::size_t count) {
    std::normal_distribution<float> normal;
    Floats a(count);
    for (float& v : a) v = normal(engine);
    return a;
}

void fail(const char* name, double got, double want) {
    std::printf("FAIL %s [%s]: got %.9g, want %.9g\n", name, what.c_str(), got, want);
    if (++failures > 20) std::exit(1);
}

void expect(bool condition, const char* name) {
    if (!condition) fail(name, 0, 1);
}

void ok(int32_t code, const char* name) {
    if (code == SPC_OK) return;
    std::printf("FAIL %s [%s]: %s\n", name, what.c_str(), spc_last_error());
    ++failures;
}

template <class A, class B>
void close(const A& got, const B& want, const char* name, double tolerance = 1e-4) {
    for (std::size_t i = 0; i < want.size(); ++i)
        if (!(std::fabs(double(got[i]) - double(want[i])) <= tolerance * (1 + std::fabs(want[i])))) {
            fail(name, got[i], want[i]);
            return;
        }
}

// A layer, its data and its gradients in double.
struct Layer {
    spc_geometry g;
    int places;
    Ints row_ptr, cols;
    Floats values, bias, x, dy;
    std::vector<double> y, dx, dw, db;  // dw dense

    int64_t x_at(int c, int h, int w, int b) const {
        return ((int64_t(c) * g.in_h + h) * g.in_w + w) * g.batch + b;
    }
    int64_t y_at(int o, int h, int w, int b) const {
        return ((int64_t(o) * g.out_h + h) * g.out_w + w) * g.batch + b;
    }
    int64_t nnz() const { return row_ptr.back(); }
};

int out_size(int in, int kernel, int stride, int pad, int dilation) {
    const int rest = in + 2 * pad - dilation * (kernel - 1) - 1;
    return rest < 0 ? 0 : rest / stride + 1;
}

Layer random_layer() {
    Layer l;
    spc_geometry& g = l.g;
    bool large = false, wide = false;
    do {
        g.groups = one_of({1, 1, 1, 2, 3});
        g.in_channels = g.groups * uniform(1, 4);
        g.out_channels = g.groups * uniform(1, 5);
        if (uniform(0, 7) == 0) g.in_channels = g.out_channels = g.groups = uniform(1, 9);
        g.batch = one_of({1, 1, 2, 3, 7, 8, 16, 17, 32, 40, 64, 70, 128});
        g.in_h = uniform(1, 9), g.in_w = uniform(1, 12);
        g.kernel_h = uniform(1, 3), g.kernel_w = uniform(1, 3);
        g.stride_h = uniform(1, 3), g.stride_w = uniform(1, 3);
        g.pad_h = uniform(0, 2), g.pad_w = uniform(0, 2);
        g.dilation_h = uniform(1, 2), g.dilation_w = uniform(1, 2);
        large = uniform(0, 15) == 0, wide = false;
        if (large) {  // enough work for two threads
            g = {one_of({48, 64, 66}), 18, 16, 12, 13, 0, 0, 3, 3, uniform(1, 2), 1, 1, 1, 1, 1, 1};
            g.in_h *= g.stride_h;
        } else if (uniform(0, 7) == 0) {  // few entries on a plane that is read unpacked
            wide = true;
            const int groups = uniform(1, 2), side = uniform(2, 3);
            g = {one_of({16, 48, 80}), 6 * groups, 4 * groups, uniform(11, 17), uniform(15, 21),
                 0, 0, side, uniform(2, 3), 1, 1, uniform(1, 2), uniform(1, 2), 1, uniform(1, 2),
                 groups};
        } else if (uniform(0, 5) == 0) {  // linear
            const int rows = uniform(0, 3) ? g.batch : 1024;
            g = {rows, uniform(1, 40), uniform(1, 30), 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1};
        }
        g.out_h = out_size(g.in_h, g.kernel_h, g.stride_h, g.pad_h, g.dilation_h);
        g.out_w = out_size(g.in_w, g.kernel_w, g.stride_w, g.pad_w, g.dilation_w);
    } while (g.out_h < 1 || g.out_w < 1);
    l.places = g.in_channels / g.groups * g.kernel_h * g.kernel_w;
    const double densities[] = {0.0, 0.05, 0.3, 0.7, 1.0};
    const double density = densities[large ? uniform(3, 4) : wide ? 1 : uniform(0, 4)];
    std::bernoulli_distribution active(density);
    l.row_ptr.push_back(0);
    for (int o = 0; o < g.out_channels; ++o) {
        const bool empty = uniform(0, 5) == 0;
        for (int p = 0; p < l.places; ++p)
            if (!empty && active(engine)) l.cols.push_back(p);
        l.row_ptr.push_back(int32_t(l.cols.size()));
    }
    l.values = normals(l.cols.size());
    l.bias = normals(std::size_t(g.out_channels));
    l.x = normals(std::size_t(l.x_at(g.in_channels, 0, 0, 0)));
    l.dy = normals(std::size_t(l.y_at(g.out_channels, 0, 0, 0)));
    what = "B " + std::to_string(g.batch) + " C " + std::to_string(g.in_channels) + ">" +
           std::to_string(g.out_channels) + "/" + std::to_string(g.groups) + " in " +
           std::to_string(g.in_h) + "x" + std::to_string(g.in_w) + " k " +
           std::to_string(g.kernel_h) + "x" + std::to_string(g.kernel_w) + " s " +
           std::to_string(g.stride_h) + "x" + std::to_string(g.stride_w) + " p " +
           std::to_string(g.pad_h) + "x" + std::to_string(g.pad_w) + " d " +
           std::to_string(g.dilation_h) + "x" + std::to_string(g.dilation_w) + " nnz " +
           std::to_string(l.cols.size()) + " " + spc_isa();
    return l;
}

void reference(Layer* l) {
    const spc_geometry& g = l->g;
    l->y.assign(l->dy.size(), 0);
    l->dx.assign(l->x.size(), 0);
    l->dw.assign(std::size_t(g.out_channels) * std::size_t(l->places), 0);
    l->db.assign(std::size_t(g.out_channels), 0);
    const int channels = g.in_channels / g.groups, outs = g.out_channels / g.groups;
    std::vector<double> dense(l->dw.size());
    for (int o = 0; o < g.out_channels; ++o)
        for (int e = l->row_ptr[o]; e < l->row_ptr[o + 1]; ++e)
            dense[std::size_t(o * l->places + l->cols[e])] = l->values[e];
    for (int o = 0; o < g.out_channels; ++o)
        for (int i = 0; i < g.out_h; ++i)
            for (int j = 0; j < g.out_w; ++j)
                for (int b = 0; b < g.batch; ++b) {
                    const int64_t at = l->y_at(o, i, j, b);
                    l->y[at] += l->bias[o];
                    l->db[o] += l->dy[at];
                    for (int p = 0; p < l->places; ++p) {
                        const int kw = p % g.kernel_w, kh = p / g.kernel_w % g.kernel_h;
                        const int c = p / (g.kernel_w * g.kernel_h) + o / outs * channels;
                        const int h = i * g.stride_h - g.pad_h + kh * g.dilation_h;
                        const int w = j * g.stride_w - g.pad_w + kw * g.dilation_w;
                        if (h < 0 || h >= g.in_h || w < 0 || w >= g.in_w) continue;
                        const int64_t from = l->x_at(c, h, w, b);
                        const std::size_t weight = std::size_t(o * l->places + p);
                        l->y[at] += dense[weight] * l->x[from];
                        l->dx[from] += dense[weight] * l->dy[at];
                        l->dw[weight] += double(l->x[from]) * l->dy[at];
                    }
                }
}

struct Results {
    Floats y, dx, dvalues, dbias, dx2, dvalues2, dbias2, top;
    std::vector<int64_t> indices;
    bool operator==(const Results& o) const {
        return y == o.y && dx == o.dx && dvalues == o.dvalues && dbias == o.dbias &&
               dx2 == o.dx2 && dvalues2 == o.dvalues2 && dbias2 == o.dbias2 && top == o.top &&
               indices == o.indices;
    }
};

Results run(const Layer& l, int64_t k, int threads) {
    const spc_geometry* g = &l.g;
    Results r;
    r.y.assign(l.dy.size(), NAN), r.dx.assign(l.x.size(), NAN);
    r.dvalues.assign(l.values.size(), NAN), r.dbias.assign(l.bias.size(), NAN);
    r.dx2 = r.dx, r.dvalues2 = r.dvalues, r.dbias2 = r.dbias;
    ok(spc_check_pattern(g, l.row_ptr.data(), l.cols.data()), "check_pattern");
    Ints t_row_ptr(std::size_t(spc_transposed_rows(g) + 1)), t_cols(l.cols.size());
    Ints t_perm(l.cols.size());
    ok(spc_transpose_pattern(g, l.row_ptr.data(), l.cols.data(), t_row_ptr.data(), t_cols.data(),
                             t_perm.data()),
       "transpose_pattern");
    ok(spc_conv_forward(g, l.row_ptr.data(), l.cols.data(), l.values.data(), l.bias.data(),
                        l.x.data(), r.y.data(), threads),
       "conv_forward");
    ok(spc_conv_input_grad(g, t_row_ptr.data(), t_cols.data(), t_perm.data(), l.values.data(),
                           l.dy.data(), r.dx.data(), threads),
       "conv_input_grad");
    ok(spc_conv_weight_grad(g, l.row_ptr.data(), l.cols.data(), l.x.data(), l.dy.data(),
                            r.dvalues.data(), r.dbias.data(), threads),
       "conv_weight_grad");
    ok(spc_conv_backward(g, t_row_ptr.data(), t_cols.data(), t_perm.data(), l.values.data(),
                         l.x.data(), l.dy.data(), r.dx2.data(), r.dvalues2.data(),
                         r.dbias2.data(), threads),
       "conv_backward");
    r.indices.resize(std::size_t(k) + 1), r.top.resize(std::size_t(k) + 1);
    int64_t count = -1;
    ok(spc_topk_grad(g, l.row_ptr.data(), l.cols.data(), l.x.data(), l.dy.data(), k,
                     one_of({0, 1, 200}), r.indices.data(), r.top.data(), &count, threads),
       "topk_grad");
    r.indices.resize(std::size_t(count)), r.top.resize(std::size_t(count));
    return r;
}

void check_top(const Layer& l, const Results& r, int64_t k) {
    std::vector<std::pair<double, int64_t>> pruned;
    for (int o = 0; o < l.g.out_channels; ++o)
        for (int p = 0; p < l.places; ++p)
            if (!std::binary_search(l.cols.begin() + l.row_ptr[o],
                                    l.cols.begin() + l.row_ptr[o + 1], p))
                pruned.push_back({-std::fabs(l.dw[std::size_t(o * l.places + p)]),
                                  int64_t(o) * l.places + p});
    std::sort(pruned.begin(), pruned.end());
    const auto want = std::min<std::size_t>(std::size_t(k), pruned.size());
    expect(r.indices.size() == want, "topk count");
    if (r.indices.size() != want || want == 0) return;
    // Gradients that differ by rounding alone may change places: compare magnitudes.
    for (std::size_t i = 0; i < want; ++i) {
        expect(i == 0 || r.indices[i - 1] < r.indices[i], "topk order");
        const double exact = l.dw[std::size_t(r.indices[i])];
        if (std::fabs(exact - r.top[i]) > 1e-4 * (1 + std::fabs(exact))) fail("topk", r.top[i], exact);
        expect(-pruned[want - 1].first <= std::fabs(exact) * (1 + 1e-4) + 1e-4, "topk choice");
    }
}

void test_layers(int rounds, const std::vector<const char*>& isas) {
    for (int round = 0; round < rounds; ++round) {
        Layer l = random_layer();
        reference(&l);
        std::vector<double> masked;
        for (int o = 0; o < l.g.out_channels; ++o)
            for (int e = l.row_ptr[o]; e < l.row_ptr[o + 1]; ++e)
                masked.push_back(l.dw[std::size_t(o * l.places + l.cols[e])]);
        const int64_t k = uniform(0, 12);
        Results fused_first;
        bool has_fused = false;
        for (const char* isa : isas) {
            ok(spc_set_isa(isa), "set_isa");
            const Results one = run(l, k, 1), two = run(l, k, 2);
            close(one.y, l.y, "forward");
            close(one.dx, l.dx, "input gradient");
            close(one.dvalues, masked, "weight gradient");
            close(one.dbias, l.db, "bias gradient");
            close(one.dvalues2, masked, "weight gradient of backward");
            expect(one.dx == one.dx2 && one.dbias == one.dbias2, "backward equals input_grad");
            check_top(l, one, k);
            expect(one == two, "threads change bits");
            if (std::strcmp(isa, "scalar") == 0) continue;
            if (has_fused) expect(one == fused_first, "instruction sets differ in bits");
            fused_first = one, has_fused = true;
        }
    }
}

void test_norm(int rounds) {
    for (int round = 0; round < rounds; ++round) {
        const int channels = uniform(1, 5), count = one_of({2, 3, 15, 17, 64, 200, 5003});
        const bool relu = uniform(0, 1), with_residual = uniform(0, 1), in_place = uniform(0, 1);
        what = "norm " + std::to_string(channels) + " x " + std::to_string(count) + " " + spc_isa();
        const auto size = std::size_t(channels) * std::size_t(count), cs = std::size_t(channels);
        Floats x = normals(size), residual = normals(size), dy = normals(size);
        const float offset = float(one_of({0, 100}));
        for (float& v : x) v += offset;
        const Floats gamma = normals(cs), beta = normals(cs);
        Floats rm = normals(cs), rv(cs, 0.5f), y(size), mean(cs), invstd(cs);
        const Floats rm0 = rm, rv0 = rv;
        const float* r = with_residual ? residual.data() : nullptr;
        Floats target = with_residual && in_place ? residual : y;
        const Floats residual0 = residual;
        float* out = with_residual && in_place ? residual.data() : y.data();
        ok(spc_batchnorm_train(channels, count, x.data(), r, gamma.data(), beta.data(), 1e-5, 0.1,
                               rm.data(), rv.data(), relu, out, mean.data(), invstd.data(), 2),
           "batchnorm_train");
        Floats dx(size), dgamma(cs), dbeta(cs), dres(size);
        ok(spc_batchnorm_backward(channels, count, x.data(), relu ? out : nullptr, dy.data(),
                                  gamma.data(), mean.data(), invstd.data(), relu, dx.data(),
                                  dgamma.data(), dbeta.data(), dres.data(), 1),
           "batchnorm_backward");
        Floats infer(size);
        ok(spc_batchnorm_infer(channels, count, x.data(), with_residual ? residual0.data() : nullptr,
                               gamma.data(), beta.data(), 1e-5, rm0.data(), rv0.data(), relu,
                               infer.data(), 1),
           "batchnorm_infer");
        std::vector<double> wy(size), wdx(size), wdg(cs), wdb(cs), wres(size), wi(size), wm(cs), wv(cs);
        for (int c = 0; c < channels; ++c) {
            double m = 0, v = 0, sg = 0, sp = 0;
            const std::size_t s = std::size_t(c) * std::size_t(count);
            for (int i = 0; i < count; ++i) m += x[s + std::size_t(i)];
            m /= count;
            for (int i = 0; i < count; ++i) v += std::pow(x[s + std::size_t(i)] - m, 2);
            wm[std::size_t(c)] = 0.9 * rm0[std::size_t(c)] + 0.1 * m;
            wv[std::size_t(c)] = 0.9 * rv0[std::size_t(c)] + 0.1 * v / (count - 1);
            v /= count;
            const double inv = 1 / std::sqrt(v + 1e-5), ga = gamma[std::size_t(c)];
            const double inv_run = 1 / std::sqrt(double(rv0[std::size_t(c)]) + 1e-5);
            for (int i = 0; i < count; ++i) {
                const std::size_t at = s + std::size_t(i);
                const double rest = beta[std::size_t(c)] + (with_residual ? residual0[at] : 0.0);
                wy[at] = (x[at] - m) * inv * ga + rest;
                wi[at] = (x[at] - rm0[std::size_t(c)]) * inv_run * ga + rest;
                if (relu) wy[at] = std::max(wy[at], 0.0), wi[at] = std::max(wi[at], 0.0);
                wres[at] = !relu || out[at] > 0 ? dy[at] : 0.0;
                sg += wres[at], sp += wres[at] * (x[at] - m) * inv;
            }
            wdg[std::size_t(c)] = sp, wdb[std::size_t(c)] = sg;
            for (int i = 0; i < count; ++i) {
                const std::size_t at = s + std::size_t(i);
                wdx[at] = ga * inv * (wres[at] - sg / count - (x[at] - m) * inv * sp / count);
            }
        }
        const Floats got(out, out + size);
        close(got, wy, "norm forward", 3e-4);
        close(infer, wi, "norm inference", 3e-4);
        close(rm, wm, "running mean"), close(rv, wv, "running variance");
        if (count > 3) {  // two values a channel make a 0 / 0-like gradient
            close(dx, wdx, "norm input gradient", 3e-3);
            close(dgamma, wdg, "norm gamma gradient", 3e-3);
        }
        close(dbeta, wdb, "norm beta gradient", 1e-3);
        close(dres, wres, "norm residual gradient");
    }
}

void test_pool(int rounds) {
    for (int round = 0; round < rounds; ++round) {
        spc_pool_geometry g;
        do {
            g = {one_of({1, 5, 16, 33}), uniform(1, 4), uniform(1, 9), uniform(1, 9), 0, 0,
                 uniform(1, 3), uniform(1, 3), uniform(1, 3), uniform(1, 3), 0, 0};
            g.pad_h = uniform(0, g.kernel_h / 2), g.pad_w = uniform(0, g.kernel_w / 2);
            g.out_h = out_size(g.in_h, g.kernel_h, g.stride_h, g.pad_h, 1);
            g.out_w = out_size(g.in_w, g.kernel_w, g.stride_w, g.pad_w, 1);
        } while (g.out_h < 1 || g.out_w < 1);
        what = std::string("pool ") + spc_isa();
        const std::size_t in = std::size_t(g.channels * g.in_h * g.in_w * g.batch);
        const std::size_t out = std::size_t(g.channels * g.out_h * g.out_w * g.batch);
        const Floats x = normals(in), dy = normals(out);
        Floats y(out), dx(in), ay(out), adx(in);
        std::vector<uint8_t> taps(out);
        const int include = uniform(0, 1);
        ok(spc_maxpool_forward(&g, x.data(), y.data(), taps.data(), 2), "maxpool_forward");
        ok(spc_maxpool_backward(&g, taps.data(), dy.data(), dx.data(), 1), "maxpool_backward");
        ok(spc_avgpool_forward(&g, include, x.data(), ay.data(), 1), "avgpool_forward");
        ok(spc_avgpool_backward(&g, include, dy.data(), adx.data(), 2), "avgpool_backward");
        std::vector<double> wy(out), wdx(in), way(out), wadx(in);
        std::size_t at = 0;
        for (int c = 0; c < g.channels; ++c)
            for (int i = 0; i < g.out_h; ++i)
                for (int j = 0; j < g.out_w; ++j)
                    for (int b = 0; b < g.batch; ++b, ++at) {
                        std::vector<std::size_t> inside;
                        for (int u = 0; u < g.kernel_h; ++u)
                            for (int v = 0; v < g.kernel_w; ++v) {
                                const int h = i * g.stride_h - g.pad_h + u;
                                const int w = j * g.stride_w - g.pad_w + v;
                                if (h >= 0 && h < g.in_h && w >= 0 && w < g.in_w)
                                    inside.push_back(
                                        std::size_t(((c * g.in_h + h) * g.in_w + w) * g.batch + b));
                            }
                        std::size_t best = inside[0];
                        const double n =
                            include ? g.kernel_h * g.kernel_w : double(inside.size());
                        for (std::size_t p : inside) {
                            if (x[p] > x[best]) best = p;
                            way[at] += x[p] / n, wadx[p] += dy[at] / n;
                        }
                        wy[at] = x[best], wdx[best] += dy[at];
                    }
        close(y, wy, "max pool", 0), close(dx, wdx, "max pool gradient");
        close(ay, way, "average pool"), close(adx, wadx, "average pool gradient");
        const int64_t pixels = int64_t{g.in_h} * g.in_w;
        Floats gy(std::size_t(g.channels * g.batch)), gdx(in);
        ok(spc_global_avgpool_forward(g.channels, pixels, g.batch, x.data(), gy.data(), 1), "global");
        ok(spc_global_avgpool_backward(g.channels, pixels, g.batch, gy.data(), gdx.data(), 1), "global");
        std::vector<double> wgy(gy.size()), wgdx(in);
        for (std::size_t i = 0; i < in; ++i)
            wgy[i / std::size_t(pixels * g.batch) * std::size_t(g.batch) + i % std::size_t(g.batch)] +=
                double(x[i]) / double(pixels);
        for (std::size_t i = 0; i < in; ++i)
            wgdx[i] = wgy[i / std::size_t(pixels * g.batch) * std::size_t(g.batch) + i % std::size_t(g.batch)] /
                      double(pixels);
        close(gy, wgy, "global pool"), close(gdx, wgdx, "global pool gradient");
    }
}

void test_arrays(int rounds) {
    for (int round = 0; round < rounds; ++round) {
        what = std::string("arrays ") + spc_isa();
        const int rows = uniform(1, 70), cols = uniform(1, 70);
        const Floats x = normals(std::size_t(rows * cols));
        Floats t(x.size());
        ok(spc_transpose(rows, cols, x.data(), t.data(), 2), "transpose");
        for (int r = 0; r < rows; ++r)
            for (int c = 0; c < cols; ++c)
                if (t[std::size_t(c * rows + r)] != x[std::size_t(r * cols + c)])
                    fail("transpose", t[std::size_t(c * rows + r)], x[std::size_t(r * cols + c)]);
        // Planes between the rows of x, [rows, 3, cols], to planes outermost, [3, cols, rows].
        const Floats apart = normals(std::size_t(3 * rows * cols));
        Floats planes(apart.size());
        ok(spc_transpose_planes(3, rows, cols, apart.data(), cols, 3 * cols, planes.data(),
                                rows * cols, rows, 2),
           "transpose_planes");
        for (int i = 0; i < 3 * rows * cols; ++i) {
            const int r = i / (3 * cols), p = i / cols % 3, c = i % cols;
            if (planes[std::size_t((p * cols + c) * rows + r)] != apart[std::size_t(i)])
                fail("transpose_planes", planes[std::size_t((p * cols + c) * rows + r)],
                     apart[std::size_t(i)]);
        }
        const std::size_t n = std::size_t(uniform(0, 50));
        Floats v = normals(n), g = normals(n), m(n), s(n), w = v, am(n), as(n);
        std::vector<double> dv(v.begin(), v.end()), dm(n), dw(v.begin(), v.end()), d1(n), d2(n);
        for (int step = 1; step <= 3; ++step) {
            ok(spc_sgd_step(int64_t(n), v.data(), g.data(), m.data(), 0.1, 0.9, 0.01, 1), "sgd");
            ok(spc_adam_step(int64_t(n), w.data(), g.data(), am.data(), as.data(), 0.1, 0.9, 0.99,
                             1e-8, 0.01, round % 2, step, 1),
               "adam");
            for (std::size_t i = 0; i < n; ++i) {
                dm[i] = 0.9 * dm[i] + (g[i] + 0.01 * dv[i]);
                dv[i] -= 0.1 * dm[i];
                double grad = g[i];
                if (round % 2) dw[i] *= 1 - 0.1 * 0.01;
                else grad += 0.01 * dw[i];
                d1[i] = 0.9 * d1[i] + 0.1 * grad;
                d2[i] = 0.99 * d2[i] + 0.01 * grad * grad;
                dw[i] -= 0.1 / (1 - std::pow(0.9, step)) * d1[i] /
                         (std::sqrt(d2[i]) / std::sqrt(1 - std::pow(0.99, step)) + 1e-8);
            }
        }
        close(v, dv, "sgd"), close(w, dw, "adam");
        // Twice the weight, and back: by plain integers, and nothing is left.
        const int64_t sizes[] = {int64_t(n), 0}, weight = uniform(-1000, 1000);
        const float *fixed[] = {g.data(), nullptr};
        const float *means[] = {round % 2 ? v.data() : nullptr, nullptr};
        std::vector<int64_t> high(n), low(n);
        int64_t *highs[] = {high.data(), nullptr}, *lows[] = {low.data(), nullptr}, refused[2];
        if (n) {
            const float kept = g[0];
            g[0] = round % 3 ? kept : std::numeric_limits<float>::quiet_NaN();
            for (int call = 0; call < 2; ++call)
                ok(spc_fixed_add(2, sizes, fixed, means, weight, highs, lows, refused, 2),
                   "fixed_add");
            if (refused[0] != (round % 3 ? 0 : 1)) fail("fixed_add refused", double(refused[0]), 0);
            for (std::size_t i = 0; i < n; ++i) {
                double sum = g[i];
                if (round % 2) sum += double(v[i]) * double(v[i]);
                sum = sum == sum ? 65536.0 * sum : 0.0;
                const double whole = std::floor(sum);
                const double rest = std::nearbyint((sum - whole) * 68719476736.0);
                if (high[i] != 2 * weight * int64_t(whole) || low[i] != 2 * weight * int64_t(rest))
                    fail("fixed_add", double(high[i]), whole);
            }
            ok(spc_fixed_add(2, sizes, fixed, means, -2 * weight, highs, lows, refused, 1), "back");
            for (std::size_t i = 0; i < n; ++i)
                if (high[i] || low[i]) fail("fixed_add back", double(high[i]), 0);
            g[0] = kept;
        }
        Floats y(n), d(n);
        ok(spc_relu_forward(int64_t(n), n ? v.data() : x.data(), n ? y.data() : t.data(), 1), "relu");
        ok(spc_relu_backward(int64_t(n), n ? y.data() : x.data(), n ? g.data() : x.data(),
                             n ? d.data() : t.data(), 1),
           "relu gradient");
        for (std::size_t i = 0; i < n; ++i) {
            if (y[i] != std::max(v[i], 0.0f)) fail("relu", y[i], v[i]);
            if (d[i] != (v[i] > 0 ? g[i] : 0.0f)) fail("relu gradient", d[i], g[i]);
        }
    }
}

// Through the dense weight, in arrays of exactly the size that is needed: what comes after an
// array must be neither read nor written.
void test_blocks(int rounds) {
    for (int round = 0; round < rounds; ++round) {
        what = std::string("blocks ") + spc_isa();
        const int out = uniform(1, 9), in = one_of({1, 7, 16, 31, 64, 100, 259});
        const int batch = one_of({1, 2, 3, 8, 17}), density = one_of({0, 1, 5, 9, 10});
        const std::size_t weights = std::size_t(out * in);
        Ints row_ptr{0}, cols;
        Floats values;
        const Floats dense = normals(weights), bias = normals(std::size_t(out));
        std::vector<double> w(weights);
        for (int o = 0; o < out; ++o) {
            for (int i = 0; i < in; ++i)
                if (uniform(0, 9) < density) {
                    cols.push_back(i);
                    values.push_back(dense[std::size_t(o * in + i)]);
                    w[std::size_t(o * in + i)] = values.back();
                }
            row_ptr.push_back(int32_t(cols.size()));
        }
        std::vector<uint16_t> bits(std::size_t(out * ((in + 15) / 16)));
        Floats weight(weights), back(values.size());
        ok(spc_pattern_bits(out, in, row_ptr.data(), cols.data(), bits.data(), 2), "bits");
        ok(spc_dense_weight(out, in, row_ptr.data(), bits.data(), values.data(), weight.data(), 2),
           "dense_weight");
        ok(spc_active_values(out, in, row_ptr.data(), bits.data(), dense.data(), back.data(), 1),
           "active_values");
        close(weight, w, "dense weight", 0), close(back, values, "active values", 0);

        const Floats x = normals(std::size_t(batch * in)), dy = normals(std::size_t(batch * out));
        Floats y(dy.size()), dx(x.size()), dvalues(values.size()), db(bias.size());
        ok(spc_linear_few(batch, in, out, row_ptr.data(), bits.data(), values.data(), bias.data(),
                          x.data(), y.data(), 2),
           "linear_few");
        ok(spc_linear_few_backward(batch, in, out, row_ptr.data(), bits.data(), values.data(),
                                   x.data(), dy.data(), dx.data(), dvalues.data(), db.data(), 2),
           "linear_few_backward");
        std::vector<double> wy(dy.size()), wdx(x.size()), wdb(bias.size()), wdv;
        for (int o = 0; o < out; ++o)
            for (int b = 0; b < batch; ++b) {
                const std::size_t at = std::size_t(b * out + o);
                wy[at] = bias[std::size_t(o)], wdb[std::size_t(o)] += dy[at];
                for (int i = 0; i < in; ++i) {
                    wy[at] += w[std::size_t(o * in + i)] * x[std::size_t(b * in + i)];
                    wdx[std::size_t(b * in + i)] += w[std::size_t(o * in + i)] * dy[at];
                }
            }
        for (int o = 0; o < out; ++o)
            for (int32_t e = row_ptr[std::size_t(o)]; e < row_ptr[std::size_t(o + 1)]; ++e) {
                wdv.push_back(0);
                for (int b = 0; b < batch; ++b)
                    wdv.back() += double(dy[std::size_t(b * out + o)]) *
                                  x[std::size_t(b * in + cols[std::size_t(e)])];
            }
        close(y, wy, "few"), close(dx, wdx, "few: input gradient");
        close(dvalues, wdv, "few: weight gradient"), close(db, wdb, "few: bias gradient");
    }
}

void test_refusals() {
    what = "refusals";
    spc_geometry g{2, 3, 4, 5, 5, 5, 5, 3, 3, 1, 1, 1, 1, 1, 1, 1};
    Ints row_ptr(5, 0), cols{27};
    Floats x(1000), y(1000);
    expect(spc_check_geometry(&g) == SPC_OK, "a sound geometry");
    expect(spc_check_geometry(nullptr) == SPC_NULL_POINTER, "null geometry");
    spc_geometry bad = g;
    bad.out_h = 6;
    expect(spc_check_geometry(&bad) == SPC_BAD_GEOMETRY, "wrong output size");
    bad = g, bad.groups = 2;
    expect(spc_check_geometry(&bad) == SPC_BAD_GEOMETRY, "groups");
    bad = g, bad.batch = -1;
    expect(spc_check_geometry(&bad) == SPC_BAD_GEOMETRY, "negative batch");
    bad = g, bad.in_channels = 1 << 30;
    expect(spc_check_geometry(&bad) == SPC_BAD_GEOMETRY, "overflow");
    row_ptr.back() = 1;
    expect(spc_check_pattern(&g, row_ptr.data(), cols.data()) == SPC_BAD_PATTERN, "column range");
    cols[0] = 26;
    expect(spc_check_pattern(&g, row_ptr.data(), cols.data()) == SPC_OK, "last column");
    row_ptr[2] = 7;
    expect(spc_check_pattern(&g, row_ptr.data(), cols.data()) == SPC_BAD_PATTERN, "row_ptr");
    expect(spc_conv_forward(&g, row_ptr.data(), cols.data(), x.data(), nullptr, nullptr, y.data(),
                            1) == SPC_NULL_POINTER,
           "null x");
    expect(spc_conv_forward(&g, row_ptr.data(), cols.data(), x.data(), nullptr, x.data(), y.data(),
                            0) == SPC_BAD_ARGUMENT,
           "no threads");
    expect(spc_set_isa("mmx") == SPC_UNSUPPORTED, "unknown instruction set");
    expect(std::strlen(spc_last_error()) > 0, "a message");
}

}  // namespace

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 150;
    std::vector<const char*> isas;
    for (const char* isa : {"avx512", "avx2", "neon", "scalar"})
        if (spc_set_isa(isa) == SPC_OK) isas.push_back(isa);
    test_refusals();
    test_layers(rounds, isas);
    for (const char* isa : isas) {
        spc_set_isa(isa);
        test_norm(rounds / 4 + 1);
        test_pool(rounds / 4 + 1);
        test_arrays(rounds / 4 + 1);
        test_blocks(rounds);
        std::printf("%s: ", spc_isa());
    }
    spc_release_scratch();
    std::printf(failures ? "%d failures\n" : "ok\n", failures);
    return failures ? 1 : 0;
}
