"""Combinations of settings that cannot be meant: each is refused with what to do instead."""

from __future__ import annotations

from collections.abc import Iterator

from trimtab.recipe.loss_combinations import loss_problems
from trimtab.recipe.paths import local_path
from trimtab.recipe.recipe import Recipe
from trimtab.recipe.sections import BETAS, MERGE_SETTINGS, MERGING, Optimizer, Schedule
from trimtab.recipe.weights import is_adapter_folder
from trimtab.yaml_file import Key, Problem

NAME: Key = ("optimizer", "name")


def combination_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what does not fit together in a recipe whose values are right one by one."""
    yield from _models(recipe)
    if recipe.optimizer.merges:
        yield from _reference_delta(recipe)
        yield from _merging(recipe.optimizer)
        yield from _pairing(recipe.optimizer)
    else:
        yield from _not_merging(recipe)
    yield from _plain(recipe)
    yield from _regularisers(recipe)
    yield from _schedules(recipe)
    yield from loss_problems(recipe)


def _models(recipe: Recipe) -> Iterator[Problem]:
    if recipe.model is None:
        what = "the SFT model to start from" if recipe.needs_reference else "the model to start from"
        first = "reference" if recipe.needs_reference else "model"
        yield Problem((first,), f"is missing: method {recipe.method} needs {what}, a folder or a hub id")
    if recipe.base is not None and recipe.delta is not None:
        yield Problem(("delta",), "and base are both given; keep the one the reference delta is to come from")


def _reference_delta(recipe: Recipe) -> Iterator[Problem]:
    name = recipe.optimizer.name
    if recipe.base is None and recipe.delta is None and not _is_adapter(recipe.reference):
        yield Problem(
            ("base",),
            f"is missing: optimizer {name} merges a reference delta; give base (the pretrained model, or the "
            "one that a reference adapter stands on) or delta (made with trimtab delta)",
            also=(NAME, ("delta",)),
        )
    if recipe.base is not None and recipe.base == recipe.reference:
        yield Problem(
            ("base",), "is the reference itself, so the reference delta would be zero", also=(("reference",),)
        )
    if recipe.adapter is not None and recipe.base is not None:
        yield Problem(
            ("adapter",),
            "cannot go with base: the delta of two full models has no weights of a new adapter; train "
            "without it, or merge in adapter space, with a trained adapter as reference",
        )


def _is_adapter(reference: str | None) -> bool:
    """Whether the reference is an adapter on this machine, whose delta is against its own start."""
    folder = None if reference is None else local_path(reference)
    return folder is not None and is_adapter_folder(folder)


def _merging(optimizer: Optimizer) -> Iterator[Problem]:
    keeps_all = optimizer.name == "online_merging" and optimizer.sparsify == "none"
    if keeps_all and optimizer.reserve_rate not in (None, 1.0):
        yield Problem(
            ("optimizer", "reserve_rate"), "has no effect with sparsify none, which keeps every entry"
        )
    if optimizer.fidelity in ("released", "mergekit"):
        for field in ("consensus", "rescale", "redraw", "eps"):
            if getattr(optimizer, field) is not None:
                yield Problem(
                    ("optimizer", field),
                    f"is fixed by fidelity {optimizer.fidelity}; remove one of the two",
                    also=(("optimizer", "fidelity"),),
                )


def _pairing(optimizer: Optimizer) -> Iterator[Problem]:
    """The sparsifier, the consensus and what makes up for dropped entries."""
    free = optimizer.name == "online_merging"
    if optimizer.sparsify is not None and not free:
        yield Problem(
            ("optimizer", "sparsify"),
            f"is given by the name {optimizer.name}; name online_merging to choose it",
            also=(NAME,),
        )
    for field in ("sparsify", "consensus"):
        if free and getattr(optimizer, field) is None:
            yield Problem(
                ("optimizer", field), "is missing: online_merging has no default for it", also=(NAME,)
            )
    if free and optimizer.fidelity is not None:
        yield Problem(
            ("optimizer", "fidelity"), "goes with ondare and onties; online_merging names every field"
        )
    if free and optimizer.state_dtype is not None:
        yield Problem(
            ("optimizer", "state_dtype"),
            "goes with ondare and onties; online_merging takes inner: adamw_8bit",
        )
    sparsify = {"ondare": "bernoulli", "onties": "top"}.get(optimizer.name, optimizer.sparsify)
    if optimizer.rescale == "expected" and sparsify in ("top", "none"):
        yield Problem(
            ("optimizer", "rescale"),
            f"expected undoes random dropping, and {sparsify} drops nothing at random; take none or l1",
            also=(NAME, ("optimizer", "sparsify")),
        )


def _plain(recipe: Recipe) -> Iterator[Problem]:
    """The optimizer that takes the step, alone or wrapped, and the settings that are only another's."""
    optimizer, plain = recipe.optimizer, recipe.optimizer.plain
    named: Key = NAME if optimizer.name == plain else ("optimizer", "inner")
    if optimizer.inner is not None and optimizer.name != "online_merging":
        yield Problem(
            ("optimizer", "inner"),
            f"goes with online_merging, which wraps another optimizer; {optimizer.name} does not",
            also=(NAME,),
        )
    if optimizer.galore is not None and plain != "galore":
        yield Problem(("optimizer", "galore"), f"has no effect with {plain}; name galore", also=(NAME,))
    if plain == "galore" and recipe.adapter is not None:
        yield Problem(
            named,
            "galore projects whole matrices to a low rank, and an adapter's are of low rank already; leave "
            "adapter out, or take adamw",
            also=(("adapter",),),
        )
    if plain == "adafactor":
        given = {"betas": optimizer.betas != BETAS, "eps": optimizer.eps is not None}
        for field in (field for field, is_given in given.items() if is_given):
            yield Problem(
                ("optimizer", field), "has no effect with adafactor, which has none of Adam's", also=(named,)
            )


def _not_merging(recipe: Recipe) -> Iterator[Problem]:
    """Settings of merging beside an optimizer that does not merge would be silently without effect."""
    known = ", ".join(MERGING)
    hint = f"has no effect with optimizer {recipe.optimizer.name}; set it to null or name one of {known}"
    for field in MERGE_SETTINGS:
        if getattr(recipe.optimizer, field) is not None:
            yield Problem(("optimizer", field), hint, also=(NAME,))
    for index, group in enumerate(recipe.optimizer.groups):
        for field in ("reserve_rate", "merge_weight", "merge_every"):
            if getattr(group, field) is not None:
                yield Problem(("optimizer", "groups", index, field), hint, also=(NAME,))
    for field in ("merge_weight", "reserve_rate"):
        if getattr(recipe.schedule, field) is not None:
            yield Problem(("schedule", field), hint, also=(NAME,))


def _regularisers(recipe: Recipe) -> Iterator[Problem]:
    optimizer, child = recipe.optimizer, recipe.optimizer.child_tuning
    if optimizer.ema is not None and recipe.training.get("load_best_model_at_end"):
        yield Problem(
            ("training", "load_best_model_at_end"),
            "cannot go with optimizer.ema: what is measured and kept is the average, and checkpoints hold "
            "the weights it is taken of; keep one of the two",
            also=(("optimizer", "ema"),),
        )
    for name, section in (("projection", optimizer.projection), ("child_tuning", child)):
        if recipe.method == "reward" and section is not None and section.data is not None:
            yield Problem(
                ("optimizer", name, "data"),
                "is not for method reward: the loss of instructions is that of a model that answers",
            )
        for index, source in enumerate((section and section.data) or ()):
            if source.weight != 1:
                yield Problem(
                    ("optimizer", name, "data", index, "weight"),
                    "has no effect here: rows are taken from the beginning of each source; leave it out",
                )
    if child is None:
        return
    if child.variant == "F":
        for field in ("rows", "data"):
            if getattr(child, field) is not None:
                yield Problem(
                    ("optimizer", "child_tuning", field),
                    "goes with variant D, whose mask is chosen by Fisher information; F draws its masks",
                    also=(("optimizer", "child_tuning", "variant"),),
                )
    elif recipe.adapter is not None:
        yield Problem(
            ("optimizer", "child_tuning", "variant"),
            "must be F with a fresh adapter: one of its two factors starts at 0, so that the other has no "
            "gradient yet and D would never train it",
            also=(("adapter",),),
        )
    elif child.data is None and (recipe.data.streaming or recipe.method in ("grpo", "rloo")):
        what = "data.streaming is read once" if recipe.data.streaming else f"method {recipe.method} samples"
        yield Problem(
            ("optimizer", "child_tuning", "data"),
            f"is missing: {what}, so there are no training rows to estimate Fisher information on; give "
            "instructions to estimate it on",
        )


def _schedules(recipe: Recipe) -> Iterator[Problem]:
    for field in ("lr", "merge_weight", "reserve_rate"):
        schedule: Schedule | None = getattr(recipe.schedule, field)
        if schedule is None:
            continue
        key: Key = ("schedule", field)
        if schedule.warmup_steps is not None and schedule.warmup_ratio is not None:
            yield Problem((*key, "warmup_ratio"), "and warmup_steps are both given; keep one")
        if schedule.type == "constant" and schedule.end is not None:
            yield Problem((*key, "end"), "has no meaning for a constant schedule; take linear or cosine")
        yield from _highest(recipe.optimizer, field, schedule)
    if recipe.schedule.reserve_rate is not None:
        yield from _reserve_rate_schedule(recipe.schedule.reserve_rate)
    if recipe.optimizer.merge_weight_follows_lr and recipe.schedule.merge_weight is not None:
        yield Problem(
            ("schedule", "merge_weight"), "and optimizer.merge_weight_follows_lr are both given; keep one"
        )


def _highest(optimizer: Optimizer, field: str, schedule: Schedule) -> Iterator[Problem]:
    """Alpha and p are shares: a schedule that ends above 1 takes them out of their range."""
    if field == "lr" or schedule.end is None:
        return
    values = [getattr(optimizer, field), *(getattr(group, field) for group in optimizer.groups)]
    top = max((value for value in values if value is not None), default=0.0)
    if top * schedule.end > 1:
        yield Problem(
            ("schedule", field, "end"),
            f"{schedule.end:g} takes {field} from {top:g} to {top * schedule.end:g}; it may end at 1 at most",
            also=(("optimizer", field),),
        )


def _reserve_rate_schedule(schedule: Schedule) -> Iterator[Problem]:
    key: Key = ("schedule", "reserve_rate")
    if schedule.warmup_steps or schedule.warmup_ratio:
        name = "warmup_steps" if schedule.warmup_steps else "warmup_ratio"
        yield Problem((*key, name), "starts reserve_rate at 0, which keeps nothing; leave it out")
    if schedule.type != "constant" and not schedule.end:
        yield Problem((*key, "end"), "must be given and above 0: a reserve_rate of 0 keeps nothing")
