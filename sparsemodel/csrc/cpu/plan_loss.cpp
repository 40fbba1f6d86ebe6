// What stands at a network's ends: images in, softmax cross-entropy out.
#include <cmath>

#include "plan.h"
#include "workers.h"

namespace spc {

std::int32_t load_images(const spc_images& images, std::int64_t batch, std::int64_t channels,
                         std::int64_t pixels, float* x, int threads) {
    if (images.type == SPC_FLOAT32)
        return spc_transpose(batch, channels * pixels, static_cast<const float*>(images.data), x,
                             threads);
    const auto* bytes = static_cast<const std::uint8_t*>(images.data);
    constexpr std::int64_t kPiece = 64;  // pixels at a time: a cache line of each sample
    const std::int64_t pieces = (pixels + kPiece - 1) / kPiece;
    const double work = static_cast<double>(batch * channels) * static_cast<double>(pixels);
    parallel(channels * pieces, worthwhile_threads(threads, work), [&](std::int64_t item) {
        const std::int64_t c = item / pieces, first = item % pieces * kPiece;
        const std::int64_t last = first + kPiece < pixels ? first + kPiece : pixels;
        for (std::int64_t p = first; p < last; ++p)
            for (std::int64_t b = 0; b < batch; ++b)
                x[(c * pixels + p) * batch + b] =
                    images.scale[c] * bytes[(b * channels + c) * pixels + p] + images.shift[c];
    });
    return SPC_OK;
}

Score softmax_cross_entropy(const float* logits, const std::int64_t* labels, std::int64_t classes,
                            std::int64_t batch, float* dlogits) {
    Score score;
    const double share = 1.0 / static_cast<double>(batch);
    for (std::int64_t b = 0; b < batch; ++b) {
        const float* z = logits + b;
        std::int64_t best = 0;
        for (std::int64_t k = 1; k < classes; ++k) {
            const float rival = z[k * batch], leader = z[best * batch];
            if (rival > leader || (std::isnan(rival) && !std::isnan(leader))) best = k;
        }
        const double top = z[best * batch];
        double sum = 0.0;
        for (std::int64_t k = 0; k < classes; ++k) sum += std::exp(z[k * batch] - top);
        score.correct += best == labels[b];
        score.loss += (std::log(sum) - (z[labels[b] * batch] - top)) * share;
        if (!dlogits) continue;
        for (std::int64_t k = 0; k < classes; ++k) {
            const double p = std::exp(z[k * batch] - top) / sum;
            dlogits[k * batch + b] = static_cast<float>((p - (k == labels[b])) * share);
        }
    }
    return score;
}

}  // namespace spc
