// The inner loops, as a table of functions with one implementation per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace spc {

// A non-zero as the inner loops read it: where its input starts, in floats from the packed
// tile's start, and the weight.
struct Entry {
    std::int32_t offset;
    float value;
};

// A stretch of one row's results: `length` floats from `source` of the group to `target` of the
// output row.
struct Run {
    std::int32_t source, length;
    std::int64_t target;
};

constexpr int kBlockFloats = 16;
constexpr int kMaxGroupFloats = 128;  // positions per pass divide this in every set

// Sparse rows times consecutive positions of a packed tile, a group of `group_floats` at a time.
// Where each position's result goes is told by block if pixels are whole blocks, else by runs.
struct SpmmTile {
    const float* packed;            // first position
    const std::int32_t* row_ptr;    // [rows + 1], into entries
    const Entry* entries;
    const float* bias;              // [rows] or null
    std::int64_t rows;
    float* out;                     // row 0 of the output
    std::int64_t out_stride;        // floats from one output row to the next
    std::int64_t blocks;            // positions in blocks of 16, the last one may be partly used
    std::int64_t segments;          // that many times, `segment_floats` further each time
    std::int64_t segment_floats;
    const std::int64_t* targets;    // by block: place in the output row, -1: no pixel; or null
    bool streams;                   // write past the caches; targets must be whole cache lines
    const Run* runs;                // without targets: runs of group i are
    const std::int32_t* run_starts; // [run_starts[i], run_starts[i + 1])
};

// Both gradients of a layer, by the transposed pattern: every packed output gradient that is
// loaded serves its input gradient and its weight gradient.
struct BackwardTile {
    const float* packed;            // the output gradient
    const std::int32_t* row_ptr;
    const Entry* entries;
    std::int64_t rows;
    const float* x;                 // row 0 of the input and of its gradient, both laid out alike
    float* dx;
    std::int64_t stride;
    std::int64_t blocks, segments, segment_floats;
    const std::int64_t* targets;    // as in SpmmTile, with groups of `backward_floats`
    bool streams;
    const Run* runs;
    const std::int32_t* run_starts;
    float* sums;                    // sums[e] += weight gradient of entry e
    float* lanes;                   // scratch, 16 floats for each entry of the longest row
};

// An entry in the list of one class of positions: the offset is from a position's own pixel, and
// `slot` its place in the whole row.
struct DirectEntry {
    std::int32_t offset;
    float value;
    std::int32_t slot;
};

// Blocks of positions that have the same taps on the plane, and the entries of those taps.
struct Piece {
    const DirectEntry* entries;     // row r's are [row_ptr[r], ends[r])
    const std::int32_t* ends;
    std::int64_t blocks;
    const std::int64_t* sources;    // by block: its pixel in the source
    const std::int64_t* targets;    // by block: place in the output row
};

// What to bring into the second-level cache along the way: these lines of every source channel.
struct Ahead {
    const float* source;
    std::int64_t channels, channel_stride;
    const std::int64_t* lines;
    std::int64_t num_lines;
};

// Sparse rows times an unpacked source; with x, sums and lanes, both gradients.
struct DirectTile {
    const Piece* pieces;
    std::int64_t num_pieces;
    const std::int32_t* row_ptr;
    std::int64_t rows;
    const float* source;
    const float* bias;              // [rows] or null
    float* out;                     // row 0 of the output, or of the input gradient
    std::int64_t stride;            // floats from one row of out, and of x, to the next
    bool streams;
    Ahead ahead;
    const float* x;                 // as in BackwardTile
    float* sums;
    float* lanes;
};

// Inner products of staged output gradients with shifted inputs.
struct SddmmBlock {
    const float* packed;           // first position in the packed tile
    const float* dy;               // staged gradient, [rows][dy_stride], zero where there is none
    std::int64_t dy_stride;
    int blocks;                    // length of the products in blocks of 16
};

struct PackTile {
    const float* source;           // channel 0, pixel (0, 0), lane 0 of the wanted lanes
    float* packed;
    std::int64_t channel_stride, row_stride, pixel_stride;  // of the source, in floats
    std::int64_t packed_channel;   // floats from one packed channel-and-phase to the next
    std::int64_t packed_row;       // floats from one packed row to the next
    int lanes, lane_pitch;         // wanted lanes; lanes of a packed pixel (the rest is zero)
    int rows, cols;                // packed rows and columns
    int first_row, last_row, first_col, last_col;  // those that lie in the source
    std::int64_t first_offset;     // source offset of packed (first_row, first_col)
};

// One row of a weight: the bit of each place, and the values of those that exist.
struct BlockRow {
    const float* values;
    const float* values_end;       // of all rows
    const std::uint16_t* bits;
    std::int64_t length;           // places
    std::int64_t stride;           // floats from one sample of x to the next
};

// A stretch of a row that begins at a whole block, and where its gradient goes.
struct GradientRow {
    const float* values;           // read for dx
    const float* values_end;
    const std::uint16_t* bits;
    float* dvalues;                // written with x
    float* dvalues_end;            // of the stretch
};

struct BlockSamples {
    std::int64_t count, places, stride;  // stride: floats from one sample of x and dx to the next
    const float* dy;               // of the first sample; rows follow each other
    std::int64_t dy_stride;
    const float* x;                // null: no dvalues
    float* dx;                     // added to; null: not wanted
};

struct AdamFactors {
    float beta1_rest, beta2, beta2_rest, decay, shrink, eps, root_correction, step_size;
    bool decoupled;
};

struct Kernels {
    const char* name;
    int group_floats, backward_floats;  // positions per pass: registers times width
    int gradient_rows;
    void (*spmm)(const SpmmTile&);
    void (*backward)(const BackwardTile&);
    void (*direct_spmm)(const DirectTile&);
    void (*direct_backward)(const DirectTile&);
    // sums[e] += product of dy row 0 with the input at offsets[e].
    void (*sddmm)(const SddmmBlock&, const std::int32_t* offsets, std::int64_t count, float* sums);
    // The same for `rows` staged rows at once; sums of row r start at r * sums_stride.
    void (*sddmm_rows)(const SddmmBlock&, int rows, const std::int32_t* offsets,
                       std::int64_t count, float* sums, std::int64_t sums_stride);
    // staged[run.source ...] = row[run.target ...]; the rest of `staged` stays.
    void (*stage)(const Run* runs, std::int64_t num_runs, const float* row, float* staged);
    void (*pack)(const PackTile&, std::int64_t channels);
    void (*copy)(float* to, const float* from, std::int64_t count);

    std::int64_t (*count_bits)(const std::uint16_t* bits, std::int64_t words);
    // Values to their places in a row, which is written once, zeros too; and back, where up to
    // values_end, the row's, may be written in between.
    void (*expand_row)(const BlockRow&, float* weight);
    void (*gather_row)(const BlockRow&, const float* weight, float* values,
                       const float* values_end);
    // sums[s] = the row times sample s.
    void (*row_dots)(const BlockRow&, const float* x, std::int64_t samples, float* sums);
    // Gradients of at most `gradient_rows` rows.
    void (*row_gradients)(const GradientRow* rows, int num_rows, const BlockSamples&);

    // Batch norm of one channel. Moments are summed in double over blocks.
    double (*channel_sum)(const float* x, std::int64_t count);
    double (*channel_square)(const float* x, float mean, std::int64_t count);
    void (*channel_affine)(const float* x, const float* residual, float* y, float mean,
                           float scale, float shift, bool relu, std::int64_t count);
    // *sum = sum of g, *product = sum of g * (x - mean); g = dy where y > 0 (y null: dy).
    void (*channel_gradient_sums)(const float* x, const float* y, const float* dy, float mean,
                                  std::int64_t count, double* sum, double* product);
    // dx = scale * (g - mean_g - (x - mean) * slope); dresidual = g.
    void (*channel_gradient)(const float* x, const float* y, const float* dy, float* dx,
                             float* dresidual, float mean, float scale, float mean_g, float slope,
                             std::int64_t count);
    void (*relu)(const float* x, float* y, std::int64_t count);
    void (*relu_gradient)(const float* y, const float* dy, float* dx, std::int64_t count);

    // Lane-wise steps of pooling.
    void (*max_step)(const float* x, float* best, std::uint8_t* taps, std::uint8_t tap,
                     std::int64_t count);
    void (*pick_step)(const std::uint8_t* taps, const float* dy, float* dx, std::uint8_t tap,
                      std::int64_t count);
    void (*add_scaled)(const float* x, float* y, float factor, std::int64_t count);  // y += f x
    void (*scale)(const float* x, float* y, float factor, std::int64_t count);       // y = f x

    void (*transpose)(const float* x, float* y, std::int64_t rows, std::int64_t cols,
                      std::int64_t x_stride, std::int64_t y_stride);

    void (*sgd)(float* values, const float* gradient, float* buffer, float lr, float momentum,
                float decay, std::int64_t count);
    void (*adam)(float* values, const float* gradient, float* mean, float* square,
                 const AdamFactors& factors, std::int64_t count);

    // Adds |weight| < 2^32 times values + means^2 (means null: values) in fixed point, and returns
    // how many did not fit.
    std::int64_t (*fixed_add)(const float* values, const float* means, std::int64_t weight,
                              std::int64_t* high, std::int64_t* low, std::int64_t count);
};

// The table in use.
const Kernels& kernels();

}  // namespace spc
