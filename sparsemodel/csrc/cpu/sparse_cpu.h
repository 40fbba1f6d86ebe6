/* Sparse training kernels for CPUs: the C interface of the native library.
 *
 * Layouts. Activations are float32, contiguous, the batch innermost: X [C, H, W, B]; a linear
 * layer is a 1x1 convolution of a 1x1 plane, X [in, B]. A pattern is CSR of the weight flattened
 * to [out, in/groups * kernel_h * kernel_w]: row_ptr int32 [out + 1], cols int32 [nnz] ascending
 * in each row. Values and weight gradients are float32 [nnz] in that order, which is the flat
 * order of the mask. Pointers need only the alignment of their type.
 *
 * Calls. Every function returns SPC_OK or an error code; spc_last_error() then says what was
 * wrong, in the calling thread. Geometry, sizes, null pointers and row_ptr's ends are checked in
 * each call; the whole pattern only by spc_check_pattern, once per pattern. A call with a pattern
 * that fails spc_check_pattern is undefined. `threads` >= 1 is an upper bound: small work runs on
 * the caller alone. Results do not depend on it. AVX-512, AVX2 and NEON give the same bits, the
 * scalar path (which has no fused multiply-add) differs by rounding. Output arrays must not
 * overlap inputs unless the function says so. Outputs are written once and need not be cleared.
 * Calls from several threads at once are allowed. NaN and infinity come through the forward pass
 * exactly; one in x or dy may also reach weight gradients of the same channel that do not meet it.
 */
#ifndef SPARSE_CPU_H
#define SPARSE_CPU_H

#include <stdint.h>

#if defined(_WIN32)
#define SPC_API __declspec(dllexport)
#else
#define SPC_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised when a signature below changes. */
#define SPC_ABI_VERSION 1

enum spc_status {
    SPC_OK = 0,
    SPC_NULL_POINTER = 1,
    SPC_BAD_GEOMETRY = 2, /* negative, inconsistent or too large sizes */
    SPC_BAD_PATTERN = 3,  /* row_ptr not monotone, columns unsorted or out of range */
    SPC_BAD_ARGUMENT = 4, /* a number outside its range */
    SPC_NOT_FINITE = 5,   /* a gradient is NaN, so that no order can be made */
    SPC_NO_MEMORY = 6,
    SPC_UNSUPPORTED = 7 /* an instruction set this processor does not have */
};

typedef struct {
    int32_t batch;
    int32_t in_channels, out_channels;
    int32_t in_h, in_w;
    int32_t out_h, out_w; /* must equal (in + 2 pad - dilation (kernel - 1) - 1) / stride + 1 */
    int32_t kernel_h, kernel_w;
    int32_t stride_h, stride_w;
    int32_t pad_h, pad_w;
    int32_t dilation_h, dilation_w;
    int32_t groups; /* divides both channel numbers */
} spc_geometry;

typedef struct {
    int32_t batch, channels;
    int32_t in_h, in_w;
    int32_t out_h, out_w; /* floor mode, as above with dilation 1 */
    int32_t kernel_h, kernel_w;
    int32_t stride_h, stride_w;
    int32_t pad_h, pad_w; /* at most half the kernel */
} spc_pool_geometry;

/* ---- library ---- */
SPC_API int32_t spc_abi_version(void);
/* Why the last failing call of this thread failed; "" before any failure. */
SPC_API const char* spc_last_error(void);
/* The instruction set in use: "avx512", "avx2", "neon" or "scalar". */
SPC_API const char* spc_isa(void);
/* Use another one from now on, in all threads; "best" is the widest that the processor has. */
SPC_API int32_t spc_set_isa(const char* name);
/* Free the calling thread's and the workers' scratch memory (it grows again when needed). */
SPC_API void spc_release_scratch(void);

/* ---- patterns ---- */
SPC_API int32_t spc_check_geometry(const spc_geometry* g);
SPC_API int32_t spc_check_pattern(const spc_geometry* g, const int32_t* row_ptr,
                                  const int32_t* cols);
/* Rows of the transposed index: stride_h * stride_w * in_channels, or -1 on a bad geometry. */
SPC_API int64_t spc_transposed_rows(const spc_geometry* g);
/* The index by input channel that spc_conv_input_grad reads: t_row_ptr int32 [rows + 1], t_cols
 * int32 [nnz], t_perm int32 [nnz] (place of the entry in the values). Depends on the pattern,
 * groups, kernel, stride, padding and dilation, not on batch, heights or widths. */
SPC_API int32_t spc_transpose_pattern(const spc_geometry* g, const int32_t* row_ptr,
                                      const int32_t* cols, int32_t* t_row_ptr, int32_t* t_cols,
                                      int32_t* t_perm);

/* ---- sparse convolution and linear ---- */
/* y [O, OH, OW, B] = W * x [C, H, W, B] + bias [O] (NULL: none). */
SPC_API int32_t spc_conv_forward(const spc_geometry* g, const int32_t* row_ptr,
                                 const int32_t* cols, const float* values, const float* bias,
                                 const float* x, float* y, int32_t threads);
/* dx [C, H, W, B] = W^T * dy [O, OH, OW, B]. */
SPC_API int32_t spc_conv_input_grad(const spc_geometry* g, const int32_t* t_row_ptr,
                                    const int32_t* t_cols, const int32_t* t_perm,
                                    const float* values, const float* dy, float* dx,
                                    int32_t threads);
/* Both gradients in one call, half again as fast as the two: dx as above, dvalues [nnz] and dbias
 * [O] (NULL: not wanted) as below, in the order of the values; sums are taken in another order
 * than spc_conv_weight_grad's. */
SPC_API int32_t spc_conv_backward(const spc_geometry* g, const int32_t* t_row_ptr,
                                  const int32_t* t_cols, const int32_t* t_perm,
                                  const float* values, const float* x, const float* dy, float* dx,
                                  float* dvalues, float* dbias, int32_t threads);
/* dvalues [nnz] = the weight gradient at the mask; dbias [O] (NULL: not wanted). */
SPC_API int32_t spc_conv_weight_grad(const spc_geometry* g, const int32_t* row_ptr,
                                     const int32_t* cols, const float* x, const float* dy,
                                     float* dvalues, float* dbias, int32_t threads);
/* The k largest |weight gradients| outside the mask, without the dense gradient: ties go to the
 * lower index; indices int64 [k] flat in [0, out * in/groups * kh * kw), ascending; top float32
 * [k]; *count of them are written (fewer than k where fewer weights are pruned). At most about
 * `tile_bytes` (>= 0; 0: 1 MiB) of gradient are held at a time by each thread, at least one row,
 * beside 2 k entries. A NaN gives SPC_NOT_FINITE. */
SPC_API int32_t spc_topk_grad(const spc_geometry* g, const int32_t* row_ptr, const int32_t* cols,
                              const float* x, const float* dy, int64_t k, int64_t tile_bytes,
                              int64_t* indices, float* top, int64_t* count, int32_t threads);

/* ---- through the dense weight, [rows, row_length], of which row_ptr, cols are the pattern ---- */
/* bits uint16 [rows, ceil(row_length / 16)]: bit i % 16 of a row's word i / 16 says whether its
 * weight i exists. Made once per pattern, a 32nd of the dense weight's size; the calls below find
 * the values of 16 weights by it in one step. */
SPC_API int32_t spc_pattern_bits(int64_t rows, int64_t row_length, const int32_t* row_ptr,
                                 const int32_t* cols, uint16_t* bits, int32_t threads);
/* weight [rows, row_length] = the values [nnz] at their places, zeros elsewhere. */
SPC_API int32_t spc_dense_weight(int64_t rows, int64_t row_length, const int32_t* row_ptr,
                                 const uint16_t* bits, const float* values, float* weight,
                                 int32_t threads);
/* values [nnz] = those of a dense weight or gradient at the pattern. */
SPC_API int32_t spc_active_values(int64_t rows, int64_t row_length, const int32_t* row_ptr,
                                  const uint16_t* bits, const float* weight, float* values,
                                  int32_t threads);
/* A linear layer of few samples, which lie one after the other: x [batch, in], y [batch, out];
 * bias [out] (NULL: none). The weight is put together 16 places at a time, in registers. */
SPC_API int32_t spc_linear_few(int64_t batch, int64_t in, int64_t out, const int32_t* row_ptr,
                               const uint16_t* bits, const float* values, const float* bias,
                               const float* x, float* y, int32_t threads);
/* Its gradients: dx [batch, in] and dvalues [nnz], either NULL: not wanted; dbias [out] (NULL: not
 * wanted). values are read for dx, x for dvalues. */
SPC_API int32_t spc_linear_few_backward(int64_t batch, int64_t in, int64_t out,
                                        const int32_t* row_ptr, const uint16_t* bits,
                                        const float* values, const float* x, const float* dy,
                                        float* dx, float* dvalues, float* dbias, int32_t threads);

/* ---- batch norm (+ residual) (+ ReLU), X [channels, count], count = H * W * B ---- */
/* y = relu(gamma * (x - mean) / sqrt(var + eps) + beta + residual) by the batch's statistics.
 * gamma, beta NULL: 1 and 0. residual NULL: none. relu: 0 or 1. saved_mean, saved_invstd
 * [channels] are written for the backward pass. running_mean, running_var (both NULL: not kept)
 * move by momentum in [0, 1], the variance unbiased, as torch's. count >= 2. y may be x (which
 * the backward pass then lacks) or residual. */
SPC_API int32_t spc_batchnorm_train(int64_t channels, int64_t count, const float* x,
                                    const float* residual, const float* gamma, const float* beta,
                                    double eps, double momentum, float* running_mean,
                                    float* running_var, int32_t relu, float* y, float* saved_mean,
                                    float* saved_invstd, int32_t threads);
/* The same by the running statistics. y may be x or residual. */
SPC_API int32_t spc_batchnorm_infer(int64_t channels, int64_t count, const float* x,
                                    const float* residual, const float* gamma, const float* beta,
                                    double eps, const float* running_mean,
                                    const float* running_var, int32_t relu, float* y,
                                    int32_t threads);
/* Gradients of spc_batchnorm_train. y is its output, read only with relu (NULL otherwise).
 * dgamma, dbeta [channels], dresidual [channels, count]: NULL where not wanted. Without relu the
 * residual's gradient is dy itself. dx or dresidual may be dy; they must differ. */
SPC_API int32_t spc_batchnorm_backward(int64_t channels, int64_t count, const float* x,
                                       const float* y, const float* dy, const float* gamma,
                                       const float* saved_mean, const float* saved_invstd,
                                       int32_t relu, float* dx, float* dgamma, float* dbeta,
                                       float* dresidual, int32_t threads);
/* y = max(x, 0), NaN kept; y may be x. dx = dy where y > 0, else 0; dx may be dy. */
SPC_API int32_t spc_relu_forward(int64_t count, const float* x, float* y, int32_t threads);
SPC_API int32_t spc_relu_backward(int64_t count, const float* y, const float* dy, float* dx,
                                  int32_t threads);

/* ---- pooling, X [C, H, W, B] ---- */
/* taps uint8 [C, OH, OW, B]: which of the (at most 256) window places won; NULL: not wanted. Of
 * equal values the first place wins; NaN wins over numbers. */
SPC_API int32_t spc_maxpool_forward(const spc_pool_geometry* g, const float* x, float* y,
                                    uint8_t* taps, int32_t threads);
SPC_API int32_t spc_maxpool_backward(const spc_pool_geometry* g, const uint8_t* taps,
                                     const float* dy, float* dx, int32_t threads);
/* include_pad: divide by the whole window (1, torch's default) or by what lies inside (0). */
SPC_API int32_t spc_avgpool_forward(const spc_pool_geometry* g, int32_t include_pad,
                                    const float* x, float* y, int32_t threads);
SPC_API int32_t spc_avgpool_backward(const spc_pool_geometry* g, int32_t include_pad,
                                     const float* dy, float* dx, int32_t threads);
/* x [C, pixels, B] -> y [C, B], the mean of each plane; and back. */
SPC_API int32_t spc_global_avgpool_forward(int64_t channels, int64_t pixels, int64_t batch,
                                           const float* x, float* y, int32_t threads);
SPC_API int32_t spc_global_avgpool_backward(int64_t channels, int64_t pixels, int64_t batch,
                                            const float* dy, float* dx, int32_t threads);

/* ---- layout ---- */
/* y [cols, rows] = transpose of x [rows, cols]. NCHW to CHWB: rows = B, cols = C * H * W; CHWB
 * to NCHW: rows = C * H * W, cols = B. */
SPC_API int32_t spc_transpose(int64_t rows, int64_t cols, const float* x, float* y,
                              int32_t threads);
/* The same of many planes: y[p * y_plane + c * y_row + r] = x[p * x_plane + r * x_row + c], so
 * that rows may lie apart. CHWB to NHWC: planes = H * W, rows = C, cols = B, x_plane = B, x_row =
 * H * W * B, y_plane = C, y_row = H * W * C. */
SPC_API int32_t spc_transpose_planes(int64_t planes, int64_t rows, int64_t cols, const float* x,
                                     int64_t x_plane, int64_t x_row, float* y, int64_t y_plane,
                                     int64_t y_row, int32_t threads);

/* ---- optimiser steps on n values, in place; a momentum or moment starts at zero ---- */
/* torch.optim.SGD's order: g += weight_decay * v; m = momentum * m + g; v -= lr * m.
 * momentum_buffer NULL: no momentum (momentum must be 0). */
SPC_API int32_t spc_sgd_step(int64_t n, float* values, const float* gradient,
                             float* momentum_buffer, double lr, double momentum,
                             double weight_decay, int32_t threads);
/* torch.optim.Adam's order (decoupled = 0) or AdamW's (1); step counts from 1. */
SPC_API int32_t spc_adam_step(int64_t n, float* values, const float* gradient, float* mean,
                              float* square, double lr, double beta1, double beta2, double eps,
                              double weight_decay, int32_t decoupled, int64_t step,
                              int32_t threads);

/* ---- sums whose bits do not depend on their order ---- */
/* For each of `arrays` arrays a of sizes[a] numbers: adds weight * x in fixed point to high[a] and
 * low[a], modulo 2^64, where x = values[a][i] + means[a][i]^2 (means[a] NULL: values[a][i]) is
 * high / 2^16 + low / 2^52, low from 0 to 2^36: x * 2^16 rounded down, the rest times 2^36 to the
 * nearest, ties to even. What is not finite or of magnitude 2^20 or more is left out and counted
 * in refused[a]. |weight| < 2^31. */
SPC_API int32_t spc_fixed_add(int64_t arrays, const int64_t* sizes, const float* const* values,
                              const float* const* means, int64_t weight, int64_t* const* high,
                              int64_t* const* low, int64_t* refused, int32_t threads);

#ifdef __cplusplus
}
#endif
#endif
