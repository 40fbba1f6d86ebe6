// A convolution, or its input gradient, as sparse rows times tiles of a packed source.
//
// The source (x, or dy) is packed tile by tile: one tile holds all channels of a rectangle of
// positions with its halo, zeros where the rectangle leaves the plane, and some lanes (samples)
// of the batch innermost. In it every tap of the kernel is one fixed shift, whatever the stride,
// padding and dilation, so a row of results is a sum of shifted, scaled stretches of the tile.
//
//   forward, stride s     x is split into s phases a axis, kept as further channels;
//                         target i reads phase (k d - p) mod s at i + floor((k d - p) / s)
//   input gradient        target pixels are split into s phases; phase f of grid position i is
//                         pixel s i + f and reads dy at i + (f + p - k d) / s for taps that fit
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "sparse_cpu.h"

namespace spc {

struct Tap {
    int source_slot;   // which kept source phase it reads
    int target_phase;  // which target phase it belongs to
    std::int64_t shift;
};

struct Axis {
    std::vector<Tap> taps;
    std::vector<int> source_phases;  // slot -> phase
    int source, target;              // sizes
    int source_step, target_step;
    std::int64_t grid;               // target positions of phase 0
    std::int64_t min_shift, extent;  // extent: largest minus smallest shift
};

struct Stencil {
    Axis h, w;
    int batch, groups;
    std::int64_t source_channels, target_channels;

    std::int64_t target_phases() const {
        return static_cast<std::int64_t>(h.target_step) * w.target_step;
    }
    std::int64_t source_slots() const {
        return static_cast<std::int64_t>(h.source_phases.size() * w.source_phases.size());
    }
    std::int64_t kernel() const {
        return static_cast<std::int64_t>(h.taps.size() * w.taps.size());
    }
    std::int64_t target_row() const {  // floats of one target channel
        return static_cast<std::int64_t>(h.target) * w.target * batch;
    }
    std::int64_t source_row() const {
        return static_cast<std::int64_t>(h.source) * w.source * batch;
    }
};

Stencil forward_stencil(const spc_geometry& g);
Stencil input_grad_stencil(const spc_geometry& g);

// Which rectangle and lanes a tile holds.
struct Tile {
    std::int64_t row, col, rows, cols;  // of grid positions
    std::int64_t first_lane;
    int lanes;
};

// How the grid and the batch are cut; depends on the stencil alone, never on the machine or the
// number of threads, for sums over positions follow it.
struct Tiling {
    int lanes;  // of a packed pixel
    std::int64_t slices, tile_rows, tile_cols, tiles_h, tiles_w;
    std::int64_t pitch;         // packed pixels from one packed row to the next
    std::int64_t packed_rows, packed_cols;
    std::int64_t plane;         // floats of one packed channel and phase
    std::int64_t packed_floats; // of a tile, with slack for whole blocks
    // Positions that all rows work on before the next ones: a rectangle, or whole rows joined
    // (with what lies between them) where a row is too short to fill a group.
    std::int64_t stretch_rows, stretch_cols;
    bool joined;
    bool direct;                // the source itself serves as the packed tile

    std::int64_t tiles() const { return slices * tiles_h * tiles_w; }
    // Packed positions from the first to the last result of a full tile.
    std::int64_t span(const Tile& t) const {
        return ((t.rows - 1) * pitch + t.cols) * lanes;
    }
};

// Positions that all rows of the pattern work on at a time: `segments` times `blocks` blocks from
// packed position `first`, `segment_floats` apart.
struct Stretch {
    std::int64_t first, blocks, segments, segment_floats;
};

// The stretches of a tile; `even`: results go by whole blocks, so that a stretch may begin at any.
std::vector<Stretch> stretches(const Tiling& t, const Tile& tile, bool even);

// False where the offsets in a tile would not fit 31 bits.
bool make_tiling(const Stencil& s, Tiling* tiling);

Tile tile_at(const Stencil& s, const Tiling& t, std::int64_t index);

// The tile's packed source: packed into `buffer`, or the source itself where that serves.
const float* packed_tile(const Stencil& s, const Tiling& t, const Tile& tile, const float* source,
                         float* buffer);

// Packed offset of each code (channel in group * kernel + tap): [source_channels / groups *
// kernel] floats from the group's first channel.
void code_offsets(const Stencil& s, const Tiling& t, std::int32_t* offsets);

// Floats from one group's first packed channel to the next group's.
std::int64_t group_pitch(const Stencil& s, const Tiling& t);

// The runs between packed positions [first, first + length) of a tile and one target row, for
// one target phase; at most `length` of them. Returns their number.
std::int64_t make_runs(const Stencil& s, const Tiling& t, const Tile& tile, std::int64_t phase,
                       std::int64_t first, std::int64_t length, Run* runs);

}  // namespace spc
