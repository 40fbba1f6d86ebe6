// A stride-1 convolution, or its input gradient, on the unpacked source: positions are told apart
// by which taps stay on the plane, and every such class has a list of the entries it needs.
#pragma once

#include <cstdint>
#include <vector>

#include "conv.h"

namespace spc {

// How positions are cut into steps: all rows of the pattern work on one before the next. Depends
// on the stencil and the number of entries alone, for sums over positions follow it.
struct DirectPlan {
    // By target row or column: its class; and by class the taps that stay on the plane, a bit each.
    std::vector<int> row_class, col_class;
    std::vector<std::uint64_t> row_taps, col_taps;
    std::int64_t lanes, rows, cols;           // of a step
    std::int64_t slices, steps_h, steps_w;

    std::int64_t classes() const {
        return static_cast<std::int64_t>(row_taps.size() * col_taps.size());
    }
    std::int64_t steps() const { return slices * steps_h * steps_w; }
};

// False where packing, as in `t`, costs less, or the source cannot be read directly.
bool plan_direct(const Stencil& s, const Tiling& t, std::int64_t nnz, DirectPlan* plan);

// Entries by class, in this thread's scratch memory.
struct DirectLists {
    const DirectEntry* entries;   // [classes][nnz], row r's from row_ptr[r]
    const std::int32_t* ends;     // [classes][rows]
    std::int64_t nnz, rows;
};
DirectLists list_entries(const Stencil& s, const DirectPlan& plan, const Rows& rows, int threads);

// Makes the tiles of steps for target channels [range[0], range[1]), all but the fields of the
// pattern and the output.
class DirectSteps {
public:
    DirectSteps(const Stencil& s, const DirectPlan& plan, const DirectLists& lists,
                const float* source, const std::int64_t* range);
    // The tile of one step; valid until the next call.
    DirectTile tile(std::int64_t step);

private:
    struct Rectangle {
        std::int64_t slice, lane, lanes, row, rows, col, cols;
    };
    Rectangle rectangle(std::int64_t step) const;
    Ahead ahead(const Rectangle& now, std::int64_t step);

    const Stencil& s_;
    const DirectPlan& plan_;
    const DirectLists& lists_;
    const float* source_;
    const std::int64_t* range_;
    std::vector<std::int64_t> sources_, targets_, lines_;
    std::vector<Piece> pieces_;
};

}  // namespace spc
