/* A range of one job, block by block: what is not fp32 passes through buffers that stay in the first-level cache. */
#ifndef TRIMTAB_RANGE_H
#define TRIMTAB_RANGE_H

#include "block.h"
#include "convert.h"

#define BLOCK 512 /* entries converted at a time */

/* One thread's buffers for a block. */
typedef struct {
    float param[BLOCK], grad[BLOCK], first[BLOCK], second[BLOCK], tau[BLOCK];
    uint32_t index[BLOCK], random[BLOCK];
} Buffers;

/* A walk over the local entries low … end − 1 in pieces whose global indices are neighbours (or listed). */
typedef struct {
    const Job *job;
    int64_t low, end;  /* what is left */
    int64_t at;        /* first local entry of the piece */
    int64_t global;    /* its global index */
    int64_t span;      /* where we are in the layout */
    int n;             /* entries of the piece */
    int64_t high;      /* upper half of its indices, for which `keys` hold */
    Keys keys[PAIRS];
} Walk;

static void walk_keys(Walk *w, int64_t high) {
    if (w->high == high) return;
    w->high = high;
    for (int pair = 0; pair < PAIRS; pair++)
        w->keys[pair] = keys_of(w->job->lanes + 2 * (high * PAIRS + pair), (uint64_t)w->job->settings->step);
}

static Walk walk_from(const Job *job, int64_t low, int64_t end) {
    Walk w = {.job = job, .low = low, .end = end, .high = -1};
    int64_t after = job->span_count - 1; /* the last span that begins at `low` or before */
    while (w.span < after) {
        int64_t middle = (w.span + after + 1) / 2;
        if (job->spans[middle].first <= low)
            w.span = middle;
        else
            after = middle - 1;
    }
    return w;
}

static int64_t global_index(Walk *w, int64_t local, int64_t *left) {
    while (local >= w->job->spans[w->span].first + w->job->spans[w->span].count) w->span++;
    const Span *s = &w->job->spans[w->span];
    int64_t j = local - s->first, row = j / s->run, column = j - row * s->run;
    *left = s->run - column;
    return s->base + row * s->stride + column;
}

/* The next piece, of at most `limit` entries. Indices are listed in `index` where the job's runs are short. */
static int walk_on(Walk *w, int limit, uint32_t *index) {
    if (w->low >= w->end) return 0;
    int64_t left, global = global_index(w, w->low, &left), high = global >> 32;
    int64_t room = w->end - w->low < limit ? w->end - w->low : limit;
    w->at = w->low;
    w->global = global;
    walk_keys(w, high);
    if (w->job->scattered) {
        int n = 0;
        for (; n < room && global >> 32 == high; n++) {
            index[n] = (uint32_t)global;
            if (n + 1 < room) global = --left > 0 ? global + 1 : global_index(w, w->low + n + 1, &left);
        }
        w->n = n;
    } else {
        int64_t until = (int64_t)((1LL << 32) - (global & 0xFFFFFFFFLL));
        int64_t n = left < room ? left : room;
        w->n = (int)(n < until ? n : until);
    }
    w->low += w->n;
    return 1;
}

/* -- from a job to the flags and constants of its blocks */

static int flags_of(const Job *job, const Plan *plan) {
    const Settings *s = job->settings;
    int flags = 0;
    if (job->grad) flags |= FROM_GRAD;
    if (job->anchor) flags |= ANCHORED;
    if (job->update && s->merge && !plan->only_update) flags = (flags & ANCHORED) | FROM_UPDATE;
    if (s->maximize) flags |= MAXIMIZES;
    if (job->grad && lerps_far(s)) flags |= LERPS_FAR;
    if (!s->merge && !plan->only_update) flags &= ~ANCHORED;
    if (s->decay_after != 1.0) flags |= DECAYS_AFTER;
    if (s->reopen && job->anchor) flags |= REOPENS;
    if (job->scattered) flags |= SCATTERED;
    if (!s->merge) return flags;
    flags |= MERGES;
    if (plan->consensus == SIGN) flags |= VOTES;
    if (plan->consensus == SIGN_UNWEIGHTED) flags |= VOTES_UNWEIGHTED;
    if (s->identity || plan->sparsify == IDENTITY) return flags;
    if (plan->sparsify == TOP) {
        if (job->count == job->total) return flags;
        flags |= CUT_UPDATE | (job->tau_masked ? 0 : CUT_TAU);
    } else if (s->threshold < 1LL << 32) {
        flags |= DRAW_UPDATE | (job->tau_masked ? 0 : DRAW_TAU);
    }
    if (s->factors_given || s->expected != 1.0) flags |= FACTORS;
    return flags;
}

/* A cut as the entries of one piece know it. */
static Cut cut_for(int64_t bits, int64_t index, const Walk *w) {
    const int64_t from = w->job->scattered ? w->high << 32 : w->global, size = w->job->scattered ? 1LL << 32 : w->n;
    const uint32_t tied = bits < NAN_MAGNITUDE ? (uint32_t)bits : NAN_MAGNITUDE; /* others write NaN in other ways */
    if (index <= from) /* none of the ties */
        return (Cut){.bits = tied};
    if (tied == 0) /* of zeros any will do: none */
        return (Cut){.bits = 0};
    return (Cut){tied - 1, (uint32_t)from, (uint32_t)(index - 1 - from), index < from + size};
}

static Block block_of(const Job *job) {
    const Settings *s = job->settings;
    Block b = {.adam = adam_of(s), .threshold = (uint32_t)s->threshold};
    b.before = (float)s->decay_before;
    b.after = (float)s->decay_after;
    b.anchor_decay = (float)job->anchor_decay;
    b.weight_update = (float)s->weight_update;
    b.weight_tau = (float)s->weight_tau;
    b.factor_update = (float)(s->factors_given ? job->update_factor : s->expected);
    b.factor_tau = job->tau_masked ? 1.0f : (float)(s->factors_given ? job->tau_factor : s->expected);
    return b;
}

/* -- loading and storing a block */

static void load_block(Block *b, const Job *job, const Walk *w, int flags, Buffers *own) {
    const int64_t low = w->at;
    b->n = w->n;
    b->base = (uint32_t)w->global;
    b->index = own->index;
    b->keys = w->keys[PAIR_MERGE];
    b->anchor = job->anchor ? job->anchor + low : 0;
    b->update = job->update ? job->update + low : 0;
    b->param = own->param;
    if (job->param_kind == FP32)
        b->param = (float *)job->param + low;
    else if (job->stored != RESIDUAL)
        widen(own->param, job->param, job->param_kind, low, w->n);
    else if (job->param_kind == BF16)
        join_bf16(own->param, (uint16_t *)job->param + low, (int16_t *)job->residual + low, w->n);
    else
        join_half(own->param, (uint16_t *)job->param + low, (uint16_t *)job->residual + low, w->n);
    if (flags & FROM_GRAD) {
        b->grad = own->grad;
        if (job->grad_kind == FP32)
            b->grad = (const float *)job->grad + low;
        else
            widen(own->grad, job->grad, job->grad_kind, low, w->n);
    }
    if (flags & (FROM_GRAD | FROM_MOMENTS)) {
        b->first = own->first;
        b->second = own->second;
        if (job->moment_kind == FP32) {
            b->first = (float *)job->first + low;
            b->second = (float *)job->second + low;
        } else {
            widen(own->first, job->first, BF16, low, w->n);
            widen(own->second, job->second, BF16, low, w->n);
        }
    }
}

/* Where a sparse τ's next kept entry is, in one of its blocks. */
typedef struct {
    int64_t from, at, end;
} Sparse;

static void begin_sparse(Sparse *s, const Job *job, int64_t low, Buffers *own) {
    if (job->tau_format != SPARSE) return;
    s->at = job->starts[low / CHUNK];
    s->end = job->starts[low / CHUNK + 1];
    memset(own->tau, 0, sizeof own->tau);
}

static void load_tau(Block *b, const Job *job, const Walk *w, Buffers *own, Sparse *s) {
    b->tau = own->tau;
    if (job->tau_format == DENSE && job->tau_kind == FP32) {
        b->tau = (const float *)job->tau + w->at;
    } else if (job->tau_format == DENSE) {
        widen(own->tau, job->tau, job->tau_kind, w->at, w->n);
    } else if (job->tau_format == SPARSE) {
        s->from = s->at;
        s->at = scatter(own->tau, job, s->at, s->end, w->at, w->at + w->n);
    } else if (!job->scattered) {
        widen_int8(own->tau, job, w->at, w->global, w->n);
    } else {
        for (int i = 0; i < w->n; i++)
            widen_int8(own->tau + i, job, w->at + i, w->high << 32 | own->index[i], 1);
    }
}

/* Zeros again where a sparse τ was not. */
static void unload_tau(const Walk *w, Buffers *own, const Sparse *s) {
    if (w->job->tau_format == SPARSE) unscatter(own->tau, w->job, s->from, s->at, w->at);
}

/* 16 random bits for each entry: a half of the coarse words. */
static void draw(Buffers *own, const Walk *w, int pair, int odd) {
    const Keys keys = w->keys[pair];
    for (int i = 0; i < w->n; i += W) {
        vu index = w->job->scattered ? vu_load(own->index + i, W) : vu_add(vu_lanes(), vu_set((uint32_t)w->global + (uint32_t)i));
        vu word = hash(index, keys.k0, keys.k1);
        vu_store(own->random + i, odd ? vu_and(word, vu_set(0xFFFFu)) : vu_right(word, 16));
    }
}

static void store_moments(const Job *job, const Walk *w, Buffers *own) {
    draw(own, w, PAIR_MOMENTS, 0);
    round_bf16((uint16_t *)job->first + w->at, own->first, own->random, w->n);
    draw(own, w, PAIR_MOMENTS, 1);
    round_bf16((uint16_t *)job->second + w->at, own->second, own->random, w->n);
}

static void store_param(const Job *job, const Walk *w, Buffers *own) {
    uint16_t *to = (uint16_t *)job->param + w->at;
    if (job->stored == RESIDUAL) {
        if (job->param_kind == BF16)
            split_bf16(to, (int16_t *)job->residual + w->at, own->param, w->n);
        else
            split_half(to, (uint16_t *)job->residual + w->at, own->param, w->n);
    } else if (job->stored == STOCHASTIC) {
        draw(own, w, PAIR_ROUNDING, 1);
        if (job->param_kind == BF16)
            round_bf16(to, own->param, own->random, w->n);
        else
            round_half(to, own->param, own->random, w->n);
    } else if (job->param_kind == BF16) {
        for (int i = 0; i < w->n; i++) to[i] = to_bf16(own->param[i]);
    } else {
        for (int i = 0; i < w->n; i++) to[i] = to_half(own->param[i]);
    }
}

/* Whether every array of the job is fp32 and used where it lies. */
static int is_direct(const Job *job) {
    return job->param_kind == FP32 && (!job->grad || (job->grad_kind == FP32 && job->moment_kind == FP32));
}

/* -- what is done with a range */

/* From one chunk. */
static void step_range(const Job *job, int64_t low, int64_t end, int flags) {
    Buffers own;
    Sparse sparse;
    Block b = block_of(job);
    const int merges = flags & MERGES;
    b.direct = is_direct(job);
    if (merges) begin_sparse(&sparse, job, low, &own);
    int whole = b.direct && !job->scattered && (!merges || (job->tau_format == DENSE && job->tau_kind == FP32));
    Walk w = walk_from(job, low, end);
    while (walk_on(&w, whole ? CHUNK : BLOCK, own.index)) {
        load_block(&b, job, &w, flags, &own);
        if (merges) load_tau(&b, job, &w, &own, &sparse);
        if (flags & CUT_UPDATE) b.cuts[0] = cut_for(job->update_cut, job->update_cut_index, &w);
        if (flags & CUT_TAU) b.cuts[1] = cut_for(job->tau_cut, job->tau_cut_index, &w);
        step_block(&b, flags);
        if (merges) unload_tau(&w, &own, &sparse);
        if (flags & FROM_GRAD && job->moment_kind != FP32) store_moments(job, &w, &own);
        if (job->param_kind != FP32) store_param(job, &w, &own);
    }
}

static void update_range(const Job *job, int64_t low, int64_t end, int flags) {
    Buffers own;
    Block b = block_of(job);
    Walk w = walk_from(job, low, end);
    while (walk_on(&w, BLOCK, own.index)) {
        load_block(&b, job, &w, flags, &own);
        update_block(&b, flags);
        if (flags & FROM_GRAD && job->moment_kind != FP32) store_moments(job, &w, &own);
    }
}

/* Δ of a range, counted, and put into `delta` (where there is one); the moments are advanced where `keeps`. */
static void survey_range(const Job *job, int64_t low, int64_t end, int flags, int keeps, float *delta, Found *found) {
    Buffers own;
    Block b = block_of(job);
    b.direct = is_direct(job) && flags & FROM_GRAD;
    Walk w = walk_from(job, low, end);
    while (walk_on(&w, b.direct && !job->scattered ? CHUNK : BLOCK, own.index)) {
        load_block(&b, job, &w, flags, &own);
        if (!(flags & FROM_UPDATE)) b.update = delta ? delta + w.at : 0;
        survey_block(&b, flags, keeps, found, (uint32_t)w.at);
        if (keeps && job->moment_kind != FP32) store_moments(job, &w, &own);
    }
}

#endif
