/* The whole step of many parameters on the CPU: one pass over memory, by as many threads as call `trimtab_work`.
 *
 * Compiled at first use (build.py), called through ctypes (native.py). The calling threads take items of work from a
 * counter; nobody waits for anybody here. The numbers are those of ops/kernels/torch_engine.py, bit for bit. */
#include "native/copy.h"
#include "native/rank.h"
#include "native/select.h"

static int64_t chunks_of(const Job *job) { return (job->entries + CHUNK - 1) / CHUNK; }

/* Whether the cut of Δ is still to be found. */
static int is_surveyed(const Job *job, const Plan *plan) {
    return !plan->only_update && job->settings->merge && !job->settings->identity && plan->sparsify == TOP &&
           job->count < job->total && job->update_cut == NO_CUT && job->entries > 0;
}

static int is_shared(const Job *job, const Plan *plan) {
    return plan->threads > 1 && job->entries >= plan->shared && is_surveyed(job, plan);
}

static void find_tau_cut(Job *job, const Plan *plan) {
    if (!plan->only_update && job->settings->merge && !job->settings->identity && plan->sparsify == TOP &&
        job->count < job->total && !job->tau_masked && job->tau_cut == NO_CUT && job->entries > 0)
        cut_from_nothing(job, 0, 1, &job->tau_cut, &job->tau_cut_index);
}

/* Count the items of work. Called by one thread, before the others begin; returns their number. */
int64_t trimtab_begin(Plan *plan) {
    int64_t items = 0;
    plan->entries = 0;
    for (int64_t i = 0; i < plan->job_count; i++) {
        Job *job = plan->jobs[i];
        job->survey = 0;
        plan->entries += job->entries;
        if (is_shared(job, plan) || !is_surveyed(job, plan)) find_tau_cut(job, plan);
        if (is_shared(job, plan)) {
            Survey *survey = malloc(sizeof *survey);
            if (!survey || !begin_survey(job, flags_of(job, plan), 0, 0, survey)) plan->failed = 1;
            job->survey = survey;
            items += chunks_of(job);
        } else {
            items += is_surveyed(job, plan) ? 1 : chunks_of(job);
        }
        plan->ends[i] = items;
    }
    plan->next = 0;
    plan->round = 0;
    return plan->items = plan->failed ? 0 : items;
}

/* After all threads have returned: the cuts of shared tensors, and the items of their second round (0: done). */
int64_t trimtab_continue(Plan *plan) {
    int64_t items = 0;
    if (plan->round) return 0;
    for (int64_t i = 0; i < plan->job_count; i++) {
        Job *job = plan->jobs[i];
        if (job->survey) {
            if (!plan->failed) finish_survey(job, after_survey(flags_of(job, plan), job->survey), job->survey);
            items += chunks_of(job);
        }
        plan->ends[i] = items;
    }
    plan->next = 0;
    plan->round = 1;
    return plan->items = plan->failed ? 0 : items;
}

/* Free what shared tensors have held; always called last. */
void trimtab_end(Plan *plan) {
    for (int64_t i = 0; i < plan->job_count; i++) {
        Survey *survey = plan->jobs[i]->survey;
        if (!survey) continue;
        end_survey(survey);
        free(survey);
        plan->jobs[i]->update_cut = NO_CUT; /* it holds for this step alone */
        plan->jobs[i]->survey = 0;
    }
}

/* What one thread keeps from item to item. */
typedef struct {
    Found lists; /* of one chunk */
    float *delta;
    int64_t room; /* for so many entries */
} Scratch;

/* A buffer for Δ; null for a tensor too large for one, or where there is no memory. */
static float *delta_for(const Job *job, Scratch *own) {
    if (job->entries > BUFFERED) return 0;
    if (job->entries > own->room) {
        free(own->delta);
        own->room = (job->entries + 4095) / 4096 * 4096;
        own->delta = aligned_alloc(64, (size_t)own->room * sizeof(float));
        if (!own->delta) own->room = 0;
    }
    return own->delta;
}

/* A tensor that top has to see whole, by one thread. */
static void survey_and_step(Job *job, const Plan *plan, Scratch *own) {
    int flags = flags_of(job, plan);
    float *given = job->update, *delta = delta_for(job, own);
    Survey survey;
    find_tau_cut(job, plan);
    if (delta && flags & FROM_GRAD && job->entries <= CHUNK) { /* all of it in cache: Δ first, the rest from that */
        job->update = delta;
        update_range(job, 0, job->entries, flags);
        flags = (flags & ~FROM_GRAD) | FROM_UPDATE;
    }
    int again = flags;
    if (begin_survey(job, flags, delta, &own->lists, &survey)) {
        for (int64_t low = 0; low < job->entries; low += CHUNK)
            survey_chunk(job, low, low + CHUNK < job->entries ? low + CHUNK : job->entries, flags, &survey, own->lists);
        again = after_survey(flags, &survey);
        if (survey.delta) job->update = survey.delta;
        finish_survey(job, again, &survey);
    } else {
        cut_from_nothing(job, flags, 0, &job->update_cut, &job->update_cut_index);
    }
    end_survey(&survey);
    for (int64_t i = chunks_of(job); i-- > 0;) /* the last chunk is the one in cache */
        step_range(job, i * CHUNK, (i + 1) * CHUNK < job->entries ? (i + 1) * CHUNK : job->entries, again);
    job->update = given;
    job->update_cut = NO_CUT; /* it holds for this step alone */
}

static void work_on(Job *job, Plan *plan, int64_t item, Scratch *own) {
    int64_t low = item * CHUNK, end = low + CHUNK < job->entries ? low + CHUNK : job->entries;
    Survey *survey = job->survey;
    if (survey && plan->round == 0)
        survey_chunk(job, low, end, flags_of(job, plan), survey, own->lists);
    else if (survey)
        step_range(job, low, end, after_survey(flags_of(job, plan), survey));
    else if (is_surveyed(job, plan))
        survey_and_step(job, plan, own);
    else if (plan->only_update)
        update_range(job, low, end, flags_of(job, plan));
    else
        step_range(job, low, end, flags_of(job, plan));
}

/* Take items until none is left. Any number of threads may be in here at once. */
void trimtab_work(Plan *plan) {
    Scratch own = {0};
    int64_t i = 0;
    if (plan->sparsify == TOP && !plan->only_update) {
        own.lists.bits = malloc((CHUNK + SURVEY_SLACK) * sizeof(uint32_t));
        own.lists.where = malloc((CHUNK + SURVEY_SLACK) * sizeof(uint32_t));
        if (!own.lists.bits || !own.lists.where) __atomic_store_n(&plan->failed, 1, __ATOMIC_RELAXED);
    }
    while (!__atomic_load_n(&plan->failed, __ATOMIC_RELAXED)) {
        int64_t item = __atomic_fetch_add(&plan->next, 1, __ATOMIC_RELAXED);
        if (item >= plan->items) break;
        while (plan->ends[i] <= item) i++;
        work_on(plan->jobs[i], plan, item - (i ? plan->ends[i - 1] : 0), &own);
    }
    free(own.lists.bits);
    free(own.lists.where);
    free(own.delta);
}

/* Count the pieces of the copies; returns their number. */
int64_t trimtab_copy_begin(Copies *all) {
    int64_t items = 0;
    for (int64_t i = 0; i < all->count; i++) all->ends[i] = items += (all->bytes[i] + PIECE - 1) / PIECE;
    all->next = 0;
    return items;
}

/* Copy pieces until none is left. Any number of threads may be in here at once. */
void trimtab_copy(Copies *all) {
    const int64_t items = all->count ? all->ends[all->count - 1] : 0;
    int64_t item, i = 0;
    while ((item = __atomic_fetch_add(&all->next, 1, __ATOMIC_RELAXED)) < items) copy_item(all, item, &i);
}

/* What this build is: sizes for native.py to check, and what it can. */
int64_t trimtab_size(int64_t of) {
    return of == 0 ? (int64_t)sizeof(Job) : of == 1 ? (int64_t)sizeof(Settings) : of == 2 ? (int64_t)sizeof(Plan) : of == 3 ? (int64_t)sizeof(Copies) : TRIMTAB_HALF;
}

/* Offline merging (merging.py): ranges of tensors, by any number of threads at once. */
void trimtab_merge(Merge *merge) { merge_range(merge); }
void trimtab_sum(Merge *merge) { sum_range(merge); }
void trimtab_survey(Ranked *ranked) { survey_of(ranked); }
int64_t trimtab_place(const Ranked *ranked) { return place_of(ranked); }
int64_t trimtab_histogram(const Ranked *ranked) { return histogram_of(ranked); }
void trimtab_l1(const Ranked *ranked) { l1_of(ranked); }
int64_t trimtab_merge_size(int64_t of) {
    return of == 0 ? (int64_t)sizeof(Term) : of == 1 ? (int64_t)sizeof(Merge) : (int64_t)sizeof(Ranked);
}

const char *trimtab_vectors(void) { return VEC_NAME; }
