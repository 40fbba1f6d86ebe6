// What stands at a network's ends: images in, softmax cross-entropy out.
#include <cmath>

#include "plan.h"
#include "workers.h"

namespace spc {

std::int32_t load_images(const spc_images& images, std::int64_t batch, std::int64_t lanes,
                         std::int64_t channels, std::int64_t pixels, float* x, int threads) {
    const auto* floats = static_cast<const float*>(images.data);
    const auto* bytes = static_cast<const std::uint8_t*>(images.data);
    const bool whole = images.type == SPC_FLOAT32;
    if (whole && lanes == batch) return spc_transpose(batch, channels * pixels, floats, x, threads);
    constexpr std::int64_t kPiece = 64;  // pixels at a time: a cache line of each sample
    const std::int64_t pieces = (pixels + kPiece - 1) / kPiece;
    const double work = static_cast<double>(batch * channels) * static_cast<double>(pixels);
    parallel(channels * pieces, worthwhile_threads(threads, work), [&](std::int64_t item) {
        const std::int64_t c = item / pieces, first = item % pieces * kPiece;
        const std::int64_t last = first + kPiece < pixels ? first + kPiece : pixels;
        for (std::int64_t p = first; p < last; ++p) {
            float* row = x + (c * pixels + p) * lanes;
            for (std::int64_t b = 0; b < batch; ++b) {
                const std::int64_t from = (b * channels + c) * pixels + p;
                row[b] = whole ? floats[from] : images.scale[c] * bytes[from] + images.shift[c];
            }
            for (std::int64_t b = batch; b < lanes; ++b) row[b] = 0.0f;
        }
    });
    return SPC_OK;
}

Score softmax_cross_entropy(const float* logits, const std::int64_t* labels, std::int64_t classes,
                            std::int64_t batch, std::int64_t lanes, float* dlogits) {
    Score score;
    const double share = 1.0 / static_cast<double>(batch);
    for (std::int64_t b = 0; b < batch; ++b) {
        const float* z = logits + b;
        std::int64_t best = 0;
        for (std::int64_t k = 1; k < classes; ++k) {
            const float rival = z[k * lanes], leader = z[best * lanes];
            if (rival > leader || (std::isnan(rival) && !std::isnan(leader))) best = k;
        }
        const double top = z[best * lanes];
        double sum = 0.0;
        for (std::int64_t k = 0; k < classes; ++k) sum += std::exp(z[k * lanes] - top);
        score.correct += best == labels[b];
        score.loss += (std::log(sum) - (z[labels[b] * lanes] - top)) * share;
        if (!dlogits) continue;
        for (std::int64_t k = 0; k < classes; ++k) {
            const double p = std::exp(z[k * lanes] - top) / sum;
            dlogits[k * lanes + b] = static_cast<float>((p - (k == labels[b])) * share);
        }
    }
    for (std::int64_t k = 0; dlogits && k < classes; ++k)
        for (std::int64_t b = batch; b < lanes; ++b) dlogits[k * lanes + b] = 0.0f;
    return score;
}

}  // namespace spc
