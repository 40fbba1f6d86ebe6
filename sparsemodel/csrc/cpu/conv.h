// Sparse convolution on checked arguments; sparse_cpu.h says what the arguments are.
#pragma once

#include <cstdint>

#include "stencil.h"

namespace spc {

// Sparse rows in the order in which a stencil's target channels (by phase) read them.
struct Rows {
    const std::int32_t* row_ptr;  // [target_phases * target_channels + 1]
    const std::int32_t* cols;     // [nnz]
    const std::int32_t* perm;     // [nnz] place of the value, or null: in order
    const float* values;
};

std::int32_t check_geometry(const spc_geometry* g, const char* where);
std::int32_t check_row_ptr(const spc_geometry* g, const std::int32_t* row_ptr, std::int64_t rows,
                           const char* where);

// target = rows * source + bias.
bool sparse_times_tiles(const Stencil& s, const Rows& rows, const float* bias,
                        const float* source, float* target, int threads);

// Where the results of a tile go, for one target phase, in groups of `group_floats`.
struct Aim {
    std::int64_t blocks;
    const std::int64_t* targets;
    const Run* runs;
    const std::int32_t* run_starts;
};
Aim aim(const Stencil& s, const Tiling& t, const Tile& tile, std::int64_t phase, int group_floats);

// Whether results are better written past the caches: they are more than stay there, and every
// block is a cache line.
bool streams(const Stencil& s, const float* target);

// The entries as the inner loops read them.
void expand(const Stencil& s, const Tiling& t, const Rows& rows, Entry* entries, int threads);

// About how many block operations a pass over all tiles takes.
double pass_work(const Stencil& s, const Tiling& t, std::int64_t nnz);

// The same where the source is read directly.
double direct_work(const Stencil& s, std::int64_t nnz);

// dx and the weight gradient from the input-gradient stencil and the transposed pattern.
bool backward(const Stencil& s, const Rows& rows, const float* x, const float* dy, float* dx,
              float* dvalues, int threads);

// dbias [channels] = sums of dy [channels, count].
void bias_grad(std::int64_t channels, std::int64_t count, const float* dy, float* dbias,
               int threads);

bool weight_grad(const Stencil& s, const std::int32_t* row_ptr, const std::int32_t* cols,
                 const float* x, const float* dy, float* dvalues, int threads);

struct TopK {
    std::int64_t k, tile_bytes;
    std::int64_t* indices;
    float* values;
    std::int64_t count;
    bool not_finite;
};

bool topk_grad(const Stencil& s, const std::int32_t* row_ptr, const std::int32_t* cols,
               const float* x, const float* dy, TopK* top, int threads);

// Boundaries [parts + 1] of parts of about equally many entries.
void split_rows(const std::int32_t* row_ptr, std::int64_t rows, std::int64_t parts,
                std::int64_t* bounds);

// An own number for each call, by which a worker knows that its packed tile is of this call.
std::uint64_t next_call();

// Packs tile `index` into this thread's buffer unless it is the one already there.
const float* own_tile(const Stencil& s, const Tiling& t, std::uint64_t call, std::int64_t index,
                      const float* source);

}  // namespace spc
