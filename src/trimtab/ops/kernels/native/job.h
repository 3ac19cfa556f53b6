/* What the Python side hands over. Every field takes eight bytes; native.py reads the field lists from this file. */
#ifndef TRIMTAB_JOB_H
#define TRIMTAB_JOB_H

#include <stdint.h>

enum { FP32, BF16, FP16, FP64 };                /* how numbers are held */
enum { NEAREST, RESIDUAL, STOCHASTIC };         /* how a master is stored */
enum { NO_TAU, DENSE, INT8, SPARSE };           /* how τ is held */
enum { IDENTITY, BERNOULLI, TOP };              /* F */
enum { LINEAR, SIGN, SIGN_UNWEIGHTED };         /* ⊕ */
enum { PAIR_MERGE, PAIR_MOMENTS, PAIR_ROUNDING, PAIRS }; /* pairs of streams, see masks.py */

#define CHUNK 65536 /* entries that one thread takes at a time: a block of a sparse τ */
#define NO_CUT (-1)

/* An affine piece of a layout, see layout.py. */
typedef struct {
    int64_t first;
    int64_t count;
    int64_t base;
    int64_t run;
    int64_t stride;
} Span;

/* One step's settings, see job.py; numbers that enter the arithmetic are rounded to fp32 on arrival. */
typedef struct {
    int64_t merge;
    int64_t identity;  /* F is the identity in this step: p = 1 */
    int64_t threshold; /* round(p·2^32) */
    int64_t step;
    int64_t maximize;
    int64_t reopen;
    int64_t factors_given; /* F rescales with the jobs' factors */
    double weight_update;
    double weight_tau;
    double decay_before;
    double decay_after;
    double one_minus_beta1;
    double beta2;
    double one_minus_beta2;
    double correction; /* sqrt(1 − β₂ᵗ) */
    double eps;
    double size; /* −lr / (1 − β₁ᵗ) */
    double expected; /* 1/p where F rescales by it, else 1 */
} Settings;

typedef struct {
    /* What never changes while the job lives. */
    void *param;
    void *residual;
    void *first;
    void *second;
    const Span *spans;
    const uint64_t *lanes; /* two for each pair of streams, for each value of an index's upper 32 bits */
    int64_t span_count;
    int64_t entries;
    int64_t total; /* entries of the unsharded tensor */
    int64_t scattered; /* runs are so short that indices are listed one by one */
    int64_t param_kind;
    int64_t stored;
    int64_t moment_kind;
    /* What is set before every step. */
    const Settings *settings;
    const void *grad;
    int64_t grad_kind;
    float *anchor;
    double anchor_decay;
    float *update;
    int64_t count;
    int64_t update_cut;       /* magnitude bits, or NO_CUT: to be found */
    int64_t update_cut_index; /* ties below this index are kept */
    int64_t tau_cut;
    int64_t tau_cut_index;
    double update_factor; /* what F rescales with where the caller has found it */
    double tau_factor;
    const void *tau;
    const float *scales;
    const int64_t *starts;
    const uint16_t *offsets;
    int64_t tau_format;
    int64_t tau_kind;
    int64_t tau_masked;
    int64_t scale_block;
    int64_t scale_first;
    /* The kernels' own. */
    void *survey;
} Job;

/* One call's work. */
typedef struct {
    Job **jobs;
    int64_t *ends; /* items of the jobs up to and including each */
    int64_t job_count;
    int64_t items;
    int64_t entries; /* that the items stand for */
    int64_t next; /* the first item that nobody has taken */
    int64_t threads;
    int64_t shared; /* entries from which on the threads share a tensor that top has to see whole */
    int64_t only_update; /* advance the moments and write Δ, no more */
    int64_t sparsify;
    int64_t consensus;
    int64_t round; /* 0, then 1 where jobs that many threads share go on */
    int64_t failed; /* out of memory */
} Plan;

/* One call's copies. */
typedef struct {
    void **to;
    void **from;
    int64_t *bytes;
    int64_t *ends; /* pieces of the copies up to and including each */
    int64_t count;
    int64_t next; /* the first piece that nobody has taken */
} Copies;

#endif
