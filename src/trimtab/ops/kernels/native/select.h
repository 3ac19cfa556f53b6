/* Where the top sparsifier cuts: exactly, in one pass over Δ where a sample has told where to look.
 *
 * A sample of cache lines brackets the k-th largest magnitude. The pass over Δ counts what lies above the bracket and
 * gathers what lies inside; the rest is a selection among those. Where the sample says that too much lies inside (at
 * Adam's first step all magnitudes are equal but for rounding), the pass counts by size instead. Where the bracket has
 * missed, radix selection takes as many passes as it needs. */
#ifndef TRIMTAB_SELECT_H
#define TRIMTAB_SELECT_H

#include <stdlib.h>

#include "range.h"

#define LINES 1024     /* in a sample, at most */
#define SAMPLE_BITS 17 /* that its histogram drops of a magnitude: 64 bins a binade */
#define SAMPLE_BINS (1 << (31 - SAMPLE_BITS))
#define SMALL 2048     /* entries below which there is no sample */
#define FEW 16         /* numbers that are sorted rather than counted */
#define MARGIN 4.0     /* standard deviations of the sample's rank on either side */
#define LARGEST 0x7FFFFFFFu
#define BUFFERED (1LL << 22) /* entries up to which Δ is kept from the pass that finds the cut for the one that uses it */

/* -- the need-th largest of numbers that can be counted again and again */

/* What is known of it: it is the need-th largest in low … high (both included); in the end, among `equal` numbers. */
typedef struct {
    uint32_t low, high;
    int shift;
    int64_t need, equal;
    int64_t counts[BINS];
} Search;

/* Begin the next round, with at most `bins` counters; 0 where the number is known. */
static int search_round(Search *s, uint32_t bins) {
    uint32_t width = s->high - s->low;
    if (width == 0) return 0;
    s->shift = 0;
    while (width >> s->shift >= bins) s->shift++;
    memset(s->counts, 0, ((size_t)(width >> s->shift) + 1) * sizeof *s->counts);
    return 1;
}

static void search_narrow(Search *s) {
    int bin = (int)((s->high - s->low) >> s->shift);
    while (bin > 0 && s->counts[bin] < s->need) s->need -= s->counts[bin--];
    s->equal = s->counts[bin];
    uint32_t low = s->low + ((uint32_t)bin << s->shift), high = low + (1u << s->shift) - 1;
    s->high = high < s->high ? high : s->high;
    s->low = low;
}

/* The last rounds at once: sort what is left, FEW numbers at most. */
static void search_few(Search *s, const uint32_t *x, int64_t n) {
    uint32_t few[FEW];
    int found = 0;
    for (int64_t i = 0; found < s->equal && i < n; i++) {
        if (x[i] - s->low > s->high - s->low) continue;
        int at = found++; /* the largest come first */
        for (; at > 0 && few[at - 1] < x[i]; at--) few[at] = few[at - 1];
        few[at] = x[i];
    }
    uint32_t cut = few[s->need - 1];
    int64_t larger = 0, equal = 0;
    for (int i = 0; i < found; i++) {
        larger += few[i] > cut;
        equal += few[i] == cut;
    }
    s->low = s->high = cut;
    s->need -= larger;
    s->equal = equal;
}

/* Search a list of numbers that all lie in low … high. */
static void search_list(Search *s, const uint32_t *x, int64_t n) {
    uint32_t least = s->high, most = s->low;
    for (int64_t i = 0; i < n; i++) {
        least = x[i] < least ? x[i] : least;
        most = x[i] > most ? x[i] : most;
    }
    s->equal = n;
    s->low = least;
    s->high = most;
    while (s->low < s->high) {
        if (s->equal <= FEW) {
            search_few(s, x, n);
            return;
        }
        search_round(s, n < 8 * BINS ? BINS / 8 : BINS);
        const uint32_t low = s->low, width = s->high - low;
        for (int64_t i = 0; i < n; i++)
            if (x[i] - low <= width) s->counts[(x[i] - low) >> s->shift]++;
        search_narrow(s);
    }
}

/* -- the sample */

typedef struct {
    Found bracket;
    Search search;    /* counters, where the bracket holds too much to be listed */
    int64_t wanted;   /* k */
    int64_t room;     /* places in bracket.bits and .where */
    int advances;     /* the pass advances the moments */
    int borrows;      /* the lists are a thread's own */
    float *delta;     /* where it leaves Δ, or null */
} Survey;

static int sample_size(int64_t n) {
    int lines = 32; /* about n^(2/3)/2 entries */
    while (lines < LINES && (int64_t)lines * lines * lines * 512 < n * n / 64) lines *= 2;
    return lines;
}

/* Magnitudes of Δ in lines of 16 neighbours, one anywhere in each of `size` equal parts of a whole tensor. */
static void take_sample(const Job *job, int flags, uint32_t *sample, int size) {
    enum { SOON = 8 }; /* lines fetched ahead */
    int64_t at[LINES];
    uint32_t where[2 * W];
    Buffers own;
    Block b = block_of(job);
    Walk w = {.job = job, .n = W, .high = -1};
    for (int i = 0; i < size; i++) {
        int64_t lines = job->entries / W, from = lines * i / size, to = lines * (i + 1) / size;
        uint64_t spread = finalized((uint64_t)job->settings->step << 32 | (uint64_t)i);
        at[i] = (from + (int64_t)((spread >> 32) * (uint64_t)(to - from) >> 32)) * W;
    }
    for (int i = 0; i < size; i++) {
        if (flags & FROM_UPDATE) {
            vu_store(sample + i * W, magnitude(vf_load(job->update + at[i], W)));
            continue;
        }
        if (i + SOON < size && is_direct(job) && flags & FROM_GRAD) {
            __builtin_prefetch((const float *)job->first + at[i + SOON]);
            __builtin_prefetch((const float *)job->second + at[i + SOON]);
            __builtin_prefetch((const float *)job->grad + at[i + SOON]);
        }
        Found all = {.high = LARGEST, .bits = sample + i * W, .where = where};
        w.at = w.global = at[i];
        load_block(&b, job, &w, flags, &own);
        b.update = 0;
        survey_block(&b, flags, 0, &all, 0);
    }
}

/* Standard deviation of the number of magnitudes ≥ x in a sample of lines: neighbours may be alike. */
static double deviation(const uint32_t *sample, int size, uint32_t x) {
    int64_t sum = 0, squares = 0;
    for (int i = 0; i < size; i++) {
        int above = 0;
        for (int j = 0; j < W; j++) above += sample[i * W + j] >= x;
        sum += above;
        squares += above * above;
    }
    return __builtin_sqrt((double)squares - (double)sum * (double)sum / size + 1.0);
}

/* The bin of the rank-th largest of a sample: from `bin` down to `lowest`, with `reached` larger ones above. */
static uint32_t bin_of(double rank, const uint16_t *counts, uint32_t lowest, uint32_t bin, int64_t *reached) {
    while (bin > lowest && (double)(*reached + counts[bin]) < rank) *reached += counts[bin--];
    return bin;
}

/* Bracket the k-th largest of Δ: the ranks in a sample, give or take their deviation. Returns the share inside. */
static double find_bracket(const Job *job, int flags, Survey *survey) {
    Found *all = &survey->bracket;
    all->low = 1; /* zeros need not be told apart */
    all->high = LARGEST;
    if (job->entries < SMALL) return 0;
    uint32_t sample[(LINES + 1) * W], highest = 0, lowest = LARGEST, least = LARGEST, most = 0;
    uint16_t counts[SAMPLE_BINS];
    const int size = sample_size(job->entries), n = size * W;
    take_sample(job, flags, sample, size);
    for (int i = 0; i < n; i++) {
        highest = sample[i] > highest ? sample[i] : highest;
        lowest = sample[i] < lowest ? sample[i] : lowest;
    }
    highest >>= SAMPLE_BITS;
    lowest >>= SAMPLE_BITS;
    memset(counts + lowest, 0, (highest - lowest + 1) * sizeof *counts);
    for (int i = 0; i < n; i++) counts[sample[i] >> SAMPLE_BITS]++;
    double rank = (double)survey->wanted / (double)job->entries * n;
    int64_t reached = 0;
    uint32_t middle = bin_of(rank, counts, lowest, highest, &reached);
    double margin = MARGIN * deviation(sample, size, middle << SAMPLE_BITS) + 1.0;
    reached = 0;
    uint32_t top = bin_of(rank - margin, counts, lowest, highest, &reached);
    uint32_t bottom = bin_of(rank + margin, counts, lowest, top, &reached);
    const uint32_t from = bottom << SAMPLE_BITS, width = (top + 1 - bottom) << SAMPLE_BITS;
    uint32_t inside = 0;
    for (int i = 0; i < n; i++) { /* without branches */
        uint32_t x = sample[i], in = x - from < width ? LARGEST : 0;
        least = (x | (LARGEST ^ in)) < least ? x | (LARGEST ^ in) : least;
        most = (x & in) > most ? x & in : most;
        inside += in & 1;
    }
    if (rank - margin >= 1.0 && most > 0) all->high = most;
    if (rank + margin <= n && least > 0) all->low = least;
    return (double)inside / n;
}

/* -- the pass */

/* Begin a survey of Δ, which is left in `delta` if there is room for it; 0 where there is no memory. What fits into one
 * chunk is listed in `lists` (where there are any), without telling where it was found. */
static int begin_survey(const Job *job, int flags, float *delta, const Found *lists, Survey *survey) {
    survey->bracket = (Found){0};
    survey->wanted = job->count;
    survey->delta = flags & FROM_GRAD ? delta : 0;
    survey->advances = flags & FROM_GRAD && (survey->delta || job->moment_kind == FP32);
    survey->borrows = lists && job->entries <= CHUNK;
    Found *all = &survey->bracket;
    const double inside = find_bracket(job, flags, survey);
    if (survey->borrows) {
        survey->room = job->entries;
        all->bits = lists->bits;
        return 1;
    }
    survey->room = 0;
    if (inside > 0.125) {
        survey->search = (Search){.low = all->low, .high = all->high};
        if (!search_round(&survey->search, BINS)) survey->search.shift = 0; /* one value: it is counted all the same */
        all->counts = survey->search.counts;
        all->shift = survey->search.shift;
        return 1;
    }
    survey->room = job->entries < SMALL ? job->entries : job->entries / 4;
    all->bits = malloc((size_t)(survey->room + SURVEY_SLACK) * sizeof(uint32_t));
    all->where = malloc((size_t)(survey->room + SURVEY_SLACK) * sizeof(uint32_t));
    return all->bits && all->where;
}

/* The flags of a pass after the survey. */
static int after_survey(int flags, const Survey *survey) {
    if (!survey->advances) return flags;
    return (flags & ~FROM_GRAD) | (survey->delta ? FROM_UPDATE : FROM_MOMENTS);
}

static void end_survey(Survey *survey) {
    if (survey->borrows) return;
    free(survey->bracket.bits);
    free(survey->bracket.where);
}

/* Survey one chunk by way of `own` (CHUNK + slack places in each of its lists), so that threads may share a survey. */
static void survey_chunk(const Job *job, int64_t low, int64_t end, int flags, Survey *survey, Found own) {
    Found *all = &survey->bracket;
    if (survey->borrows) {
        survey_range(job, low, end, flags, survey->advances, survey->delta, all);
        return;
    }
    int64_t counts[BINS];
    own.low = all->low;
    own.high = all->high;
    own.above = own.found = 0;
    own.shift = all->shift;
    own.counts = all->counts ? memset(counts, 0, sizeof counts) : 0;
    survey_range(job, low, end, flags, survey->advances, survey->delta, &own);
    __atomic_fetch_add(&all->above, own.above, __ATOMIC_RELAXED);
    if (all->counts) {
        for (int i = 0; i < BINS; i++)
            if (counts[i]) __atomic_fetch_add(&all->counts[i], counts[i], __ATOMIC_RELAXED);
        return;
    }
    int64_t at = __atomic_fetch_add(&all->found, own.found, __ATOMIC_RELAXED);
    if (at + own.found > survey->room) return; /* finish_survey sees it */
    memcpy(all->bits + at, own.bits, (size_t)own.found * sizeof *own.bits);
    memcpy(all->where + at, own.where, (size_t)own.found * sizeof *own.where);
}

/* -- more passes */

/* One pass over the magnitudes of Δ (or of τ): counts those in the range of `search`, or finds the `skip`-th tie. */
typedef struct {
    Search *search;
    int64_t skip, tie;
} Pass;

static void pass_over(const Job *job, int flags, int of_tau, Pass *pass) {
    const Search *s = pass->search;
    uint32_t bits[BLOCK + SURVEY_SLACK], where[BLOCK + SURVEY_SLACK];
    Buffers own;
    Block b = block_of(job);
    Sparse sparse;
    for (int64_t low = 0; low < job->entries; low += CHUNK) {
        Walk w = walk_from(job, low, low + CHUNK < job->entries ? low + CHUNK : job->entries);
        if (of_tau) begin_sparse(&sparse, job, low, &own);
        while (walk_on(&w, BLOCK, own.index)) {
            Found found = {.low = s->low, .high = s->high, .bits = bits, .where = where};
            if (pass->skip < 0) {
                found.counts = pass->search->counts;
                found.shift = s->shift;
            }
            load_block(&b, job, &w, flags, &own);
            if (of_tau) {
                load_tau(&b, job, &w, &own, &sparse);
                b.update = (float *)b.tau; /* it is only read */
            } else if (!(flags & FROM_UPDATE)) {
                b.update = 0;
            }
            survey_block(&b, of_tau ? FROM_UPDATE : flags, 0, &found, (uint32_t)w.at);
            if (of_tau) unload_tau(&w, &own, &sparse);
            if (pass->skip >= 0 && pass->skip < found.found) {
                pass->tie = where[pass->skip];
                return;
            }
            pass->skip -= pass->skip >= 0 ? found.found : 0;
        }
    }
}

/* Radix selection of the cut of Δ (or of τ), from what is known of it. */
static void cut_by_radix(const Job *job, int flags, int of_tau, Search *s, int64_t *cut, int64_t *index) {
    while (search_round(s, BINS)) {
        pass_over(job, flags, of_tau, &(Pass){.search = s, .skip = -1});
        search_narrow(s);
    }
    *cut = s->low;
    *index = job->total;
    if (s->low == 0 || s->need == s->equal) return; /* of zeros any will do */
    Pass ties = {.search = s, .skip = s->need, .tie = job->total};
    pass_over(job, flags, of_tau, &ties);
    *index = ties.tie;
}

static void cut_from_nothing(const Job *job, int flags, int of_tau, int64_t *cut, int64_t *index) {
    Search s = {.high = LARGEST, .need = job->count};
    cut_by_radix(job, flags, of_tau, &s, cut, index);
}

/* The cut of Δ from a survey that has seen all of it; `again` are the flags of a pass after it. */
static void finish_survey(Job *job, int again, Survey *survey) {
    Found *all = &survey->bracket;
    int64_t need = survey->wanted - all->above, n = all->found;
    if (all->counts)
        for (int i = 0; i < BINS; i++) n += all->counts[i];
    int missed = need < 1 || need > n, overflow = !all->counts && n > survey->room;
    if (all->low == 1 && need > n && !overflow) { /* fewer than k are not 0 */
        job->update_cut = 0;
        job->update_cut_index = job->total;
    } else if (missed || overflow) {
        cut_from_nothing(job, again, 0, &job->update_cut, &job->update_cut_index);
    } else if (all->counts) {
        survey->search.need = need;
        search_narrow(&survey->search);
        cut_by_radix(job, again, 0, &survey->search, &job->update_cut, &job->update_cut_index);
    } else {
        Search s = {.low = all->low, .high = all->high, .need = need};
        search_list(&s, all->bits, n);
        if (!all->where) {
            cut_by_radix(job, again, 0, &s, &job->update_cut, &job->update_cut_index);
            return;
        }
        job->update_cut = s.low;
        job->update_cut_index = job->total;
        if (s.need == s.equal) return;
        int64_t ties = 0;
        for (int64_t i = 0; i < n; i++)
            if (all->bits[i] == s.low) all->where[ties++] = all->where[i];
        Search first_dropped = {.high = 0xFFFFFFFFu, .need = ties - s.need};
        search_list(&first_dropped, all->where, ties);
        job->update_cut_index = first_dropped.low;
    }
}

#endif
