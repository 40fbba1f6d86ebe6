// The table of one instruction set: compiled once for each, with SPC_ISA and its flags.
#include "isa_arrays.h"
#include "isa_backward.h"
#include "isa_blocks.h"
#include "isa_direct.h"
#include "isa_norm.h"
#include "isa_sddmm.h"
#include "isa_spmm.h"

#define SPC_STRING_OF(x) #x
#define SPC_STRING(x) SPC_STRING_OF(x)

namespace spc::SPC_ISA {

extern const Kernels table;
const Kernels table = {
    SPC_STRING(SPC_ISA),
    kGroupFloats,
    kBackFloats,
    kGradientRows,
    spmm,
    backward,
    direct_spmm,
    direct_backward,
    sddmm,
    sddmm_rows,
    stage,
    pack,
    copy,
    count_bits,
    expand_row,
    gather_row,
    row_dots,
    row_gradients,
    channel_sum,
    channel_square,
    channel_affine,
    channel_gradient_sums,
    channel_gradient,
    relu_array,
    relu_gradient,
    max_step,
    pick_step,
    add_scaled,
    scale_array,
    transpose,
    sgd,
    adam,
    fixed_add,
};

}  // namespace spc::SPC_ISA
