/* Whole-step plans: the forward pass, loss and backward pass of a network in one call.
 *
 * A plan is a list of nodes, each reading results of earlier ones, built once and then run for
 * any batch of 1 to the planned number of samples. Activations stay batch innermost from the
 * first node to the last and live in one arena, whose places are planned from their lifetimes.
 * Parameters, gradients, momentum and running statistics stay in the caller's arrays, whose
 * addresses are bound to the nodes and may be bound anew at any time (after a mask change, say).
 *
 *     spc_plan* plan = spc_plan_new(64, 0);
 *     int32_t x = spc_plan_input(plan, 3, 32, 32);
 *     int32_t y = spc_plan_conv(plan, x, &geometry);
 *     ...
 *     spc_plan_bind_conv(plan, y, &arrays);          // every conv and batch norm
 *     spc_plan_build(plan, logits);
 *     spc_plan_train(plan, 64, images, labels, &sgd, threads, &loss, &correct);
 *     spc_plan_free(plan);
 *
 * Conventions are those of sparse_cpu.h; functions that add a node return its number, or -1
 * with spc_last_error(). A plan runs in one thread at a time; different plans may run at once.
 * Results do not depend on `threads`. After a training step that failed, gradients, running statistics and
 * parameters are partly updated, unless the error is about the arguments.
 */
#ifndef SPARSE_PLAN_H
#define SPARSE_PLAN_H

#include "sparse_cpu.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct spc_plan spc_plan;

enum spc_plan_flags {
    /* Drop the output of a convolution that only a batch norm reads, and compute it again in the
     * backward pass: about half the activations for one more forward convolution. */
    SPC_PLAN_RECOMPUTE = 1,
    /* Keep results of batch norm, ReLU, addition and pooling in bfloat16 between the passes: half
     * their bytes. Loss, statistics and inference stay the same bits; gradients are those of
     * activations rounded to 8 bits. */
    SPC_PLAN_BFLOAT16 = 2
};

typedef struct {
    float* values;
    float* gradient; /* overwritten by each step; NULL: frozen */
    float* momentum; /* as long as the values; NULL: none */
} spc_parameter;

typedef struct {
    const int32_t *row_ptr, *cols;             /* the pattern, checked by spc_check_pattern */
    /* Its index by input, spc_transpose_pattern. NULL: none, and no spc_plan_train or
     * spc_plan_topk_grads. */
    const int32_t *t_row_ptr, *t_cols, *t_perm;
    spc_parameter weight;                      /* [nnz] */
    spc_parameter bias;                        /* [out]; values NULL: none */
} spc_conv_arrays;

typedef struct {
    spc_parameter gamma, beta;         /* [channels]; values NULL: 1 and 0 */
    float *running_mean, *running_var; /* [channels]; both NULL: the batch's own, always */
    int64_t* num_batches;              /* counted up by each step; NULL: not counted */
} spc_norm_arrays;

typedef struct {
    double lr, momentum, weight_decay;
} spc_sgd;

enum spc_image_type { SPC_FLOAT32 = 0, SPC_UINT8 = 1 };

/* Contiguous [B, C, H, W]. Bytes become scale[c] * byte + shift[c]. */
typedef struct {
    const void* data;
    int32_t type;       /* spc_image_type */
    const float* scale; /* [C], for SPC_UINT8 */
    const float* shift;
} spc_images;

/* The largest gradients asked for, and found, at the pruned weights of one convolution. */
typedef struct {
    int64_t k;        /* >= 0; how many are asked for */
    int64_t* indices; /* [k] flat as in spc_topk_grad, ascending; `count` of them are written */
    float* top;       /* [k] */
    int64_t count;    /* written: at most k; -1 where a gradient is NaN */
    int32_t node;     /* the convolution; each at most once */
} spc_plan_topk;

/* Of what one batch norm saw: mean and population variance of each channel. */
typedef struct {
    double *mean, *variance; /* [channels], written */
    int64_t count;           /* written: values of a channel, samples times pixels */
    int32_t node;            /* the batch norm; each at most once */
} spc_plan_moments;

/* A plan for up to `batch` samples; `flags` of spc_plan_flags. NULL with spc_last_error(). */
SPC_API spc_plan* spc_plan_new(int32_t batch, int32_t flags);
SPC_API void spc_plan_free(spc_plan* plan);

/* ---- nodes ---- */
/* The images; node 0, once. */
SPC_API int32_t spc_plan_input(spc_plan* plan, int32_t channels, int32_t height, int32_t width);
/* Sparse convolution; linear is 1x1 on a 1x1 plane. The geometry's batch is ignored. */
SPC_API int32_t spc_plan_conv(spc_plan* plan, int32_t source, const spc_geometry* g);
/* relu(batch norm (source) + residual); residual -1: none. `momentum` in [0, 1], or below 0 for
 * the mean over all batches (which needs num_batches). */
SPC_API int32_t spc_plan_batchnorm(spc_plan* plan, int32_t source, int32_t residual, int32_t relu,
                                   double eps, double momentum);
SPC_API int32_t spc_plan_relu(spc_plan* plan, int32_t source);
SPC_API int32_t spc_plan_add(spc_plan* plan, int32_t left, int32_t right);
SPC_API int32_t spc_plan_maxpool(spc_plan* plan, int32_t source, const spc_pool_geometry* g);
SPC_API int32_t spc_plan_avgpool(spc_plan* plan, int32_t source, const spc_pool_geometry* g,
                                 int32_t include_pad);
SPC_API int32_t spc_plan_global_avgpool(spc_plan* plan, int32_t source);
/* [C, H, W] -> [C * H * W, 1, 1], in the order of torch's flatten; costs nothing. */
SPC_API int32_t spc_plan_flatten(spc_plan* plan, int32_t source);

/* ---- arrays ---- */
/* The structs are copied, the arrays not. Which parameters are frozen is settled by
 * spc_plan_build; later calls must not change it. */
SPC_API int32_t spc_plan_bind_conv(spc_plan* plan, int32_t node, const spc_conv_arrays* arrays);
SPC_API int32_t spc_plan_bind_norm(spc_plan* plan, int32_t node, const spc_norm_arrays* arrays);

/* Settle the order of operations and the arena; `output` gives the logits, [classes, 1, 1]. No
 * node can be added afterwards. */
SPC_API int32_t spc_plan_build(spc_plan* plan, int32_t output);
/* Bytes of the arena for a full batch: of training and inference the larger; -1 if not built. It
 * is allocated by the first run that needs as much, and pages that smaller batches leave out stay
 * untouched. All kinds of runs share it. */
SPC_API int64_t spc_plan_arena_bytes(const spc_plan* plan);
/* Bytes of the arena as it is allocated now. */
SPC_API int64_t spc_plan_allocated_bytes(const spc_plan* plan);

/* ---- runs; 1 <= batch <= planned ---- */
/* One training step: mean softmax cross-entropy of the batch into *loss, samples whose largest
 * logit is their label into *correct; gradients written, running statistics moved; with `sgd`
 * (NULL: none) parameters that have a gradient move as by spc_sgd_step. labels int64 [batch]. */
SPC_API int32_t spc_plan_train(spc_plan* plan, int32_t batch, const spc_images* images,
                               const int64_t* labels, const spc_sgd* sgd, int32_t threads,
                               double* loss, int64_t* correct);
/* The k largest |gradients| of the mean loss of a batch outside the masks of `num` convolutions,
 * with batch norm by the batch's own statistics as in training; ties go to the lower index. No
 * other gradient of parameters is made, the backward pass ends with the first of these nodes, and
 * gradients, momentum and running statistics stay as they are. Memory is the arena (larger than
 * spc_plan_arena_bytes only for layers that were frozen when the plan was built) and that of
 * spc_topk_grad. A NaN gives SPC_NOT_FINITE, and what other nodes get is undefined. */
SPC_API int32_t spc_plan_topk_grads(spc_plan* plan, int32_t batch, const spc_images* images,
                                    const int64_t* labels, spc_plan_topk* topk, int32_t num,
                                    int32_t threads);
/* By running statistics: logits float32 [batch, classes] (NULL: not wanted), and with labels
 * (NULL: none) mean loss and number correct. */
SPC_API int32_t spc_plan_infer(spc_plan* plan, int32_t batch, const spc_images* images,
                               float* logits, const int64_t* labels, int32_t threads,
                               double* loss, int64_t* correct);
/* What `num` batch norms see of a batch in training mode: a forward pass as far as the last of
 * them, each normalising by the batch's own statistics, without a backward pass. Gradients,
 * running statistics and counters stay as they are, nothing is kept, so that the memory is that of
 * spc_plan_infer, and no index by input is needed. */
SPC_API int32_t spc_plan_statistics(spc_plan* plan, int32_t batch, const spc_images* images,
                                    spc_plan_moments* moments, int32_t num, int32_t threads);
/* Seconds that each node took in the last run, [nodes] forward then [nodes] backward (with
 * recomputation and optimiser); loss counts with the output node. Returns the number of nodes. */
SPC_API int32_t spc_plan_seconds(const spc_plan* plan, double* seconds);

#ifdef __cplusplus
}
#endif
#endif
