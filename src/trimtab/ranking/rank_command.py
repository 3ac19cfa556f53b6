"""``trimtab data rank``: ranked responses out of several models' outputs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from trimtab.data.outcome import BadRow
from trimtab.data.pairs import finite_score
from trimtab.errors import UserError
from trimtab.files import replacing_file
from trimtab.model_folder import ModelFolder, find_model
from trimtab.ranking.candidates import Candidate, Candidates, Question
from trimtab.ranking.generate import generate
from trimtab.ranking.reading import file_names, read_outputs, read_prompts
from trimtab.ranking.scoring import Group, checked_target, score_groups
from trimtab.ranking.summary import Ranked, show_ranked
from trimtab.rewards.loading import Sources, find_rewards, load_reward, model_names
from trimtab.sampling import Sampling
from trimtab.terminal import plain_libraries, progress_bar


def rank(
    files: Sequence[str],
    out: str,
    *,
    scorer: Sources | None = None,
    key: str = "scorer",
    models: Sequence[str] = (),
    prompts: str | None = None,
    samples: int = 1,
    sampling: Sampling | None = None,
    seed: int = 0,
    chat: bool = False,
    batch_size: int = 8,
    overwrite: bool = False,
    console: Console | None = None,
) -> None:
    """Bring models' outputs together by their prompts, score them, and write a file of ranked responses.

    Each row of the file is ``{"prompt", "responses", "scores", "sources"}``, the best response first, for
    prompts with two different responses or more. It appears whole or not at all.

    Args:
        files: outputs, as :func:`~trimtab.ranking.outputs.read_output` reads them.
        out: the JSONL file to write.
        scorer: a reward as :func:`~trimtab.rewards.load_reward` takes it; the scores in the files when None.
        key: where the user named it, for errors.
        models: that answer the prompts besides.
        prompts: a file with prompts for them; those of ``files`` when None.
        samples: responses of each model to each prompt.
        sampling: how they are drawn.
        seed: of the drawing.
        chat: read prompts that are text as a user's message.
        batch_size: rows scored, and responses generated, at once.
        overwrite: replace ``out``.
        console: where the summary is printed; default stdout.

    Raises:
        UserError: for a missing or malformed file, for scores that are missing or no numbers, for an output
            that exists, and if no prompt has two different responses.
    """
    target = checked_target(out, ".jsonl", [*files, *([prompts] if prompts else [])], overwrite)
    found = _found_models(files, models, prompts, scorer)
    if scorer is not None:
        find_rewards(scorer, key=key)
    with plain_libraries():
        candidates, left_out = _read(files, prompts, chat)
        for place, (model, name) in enumerate(zip(found, model_names(models), strict=True)):
            # Their own random numbers, so that models that are much alike do not say the same.
            how = {"samples": samples, "seed": seed + place, "batch_size": batch_size}
            generate(model, name, candidates, sampling or Sampling(), **how)
        questions = candidates.comparable()
        replaced = scorer is not None and any(one.has_scores for one in questions)
        truncated = _score(questions, scorer, key, batch_size)
    _write(target, questions)
    ranked = Ranked(candidates, questions, left_out, truncated, replaced)
    show_ranked(ranked, str(target), console or Console(width=None if sys.stdout.isatty() else 140))


def _found_models(
    files: Sequence[str], models: Sequence[str], prompts: str | None, scorer: Sources | None
) -> list[ModelFolder]:
    """Find the models that answer, unless there is nothing to answer or nothing that scores."""
    if not files and not (models and prompts):
        raise UserError("name files of models' outputs, or models (--model) and what they answer (--prompts)")
    if prompts and not models:
        raise UserError("--prompts is what models answer; name them with --model")
    if models and scorer is None:
        raise UserError("generated responses have no scores; name what scores them (--reward, --likelihood)")
    return [find_model(model, "--model") for model in models]


def _read(files: Sequence[str], prompts: str | None, chat: bool) -> tuple[Candidates, int]:
    """The candidates in the files, and how many rows of ``prompts`` were left out."""
    candidates, left_out = Candidates(), 0
    with progress_bar("reading files", len(files)) as advance:
        for path, name in zip(files, file_names(files), strict=True):
            read_outputs(path, name, candidates, chat=chat)
            advance(1)
    if prompts is not None:
        left_out = read_prompts(prompts, candidates, chat=chat)
    candidates.require_one_form()
    return candidates, left_out


def _score(questions: Sequence[Question], scorer: Sources | None, key: str, batch_size: int) -> int:
    """Give every candidate its score; return how many inputs were too long for what scores."""
    if scorer is None:
        for question in questions:
            for candidate in question.candidates:
                candidate.score = _own_score(candidate)
        return 0
    reward = load_reward(scorer, key=key, batch_size=batch_size)
    groups = [
        Group(one.prompt, [each.text for each in one.candidates], [each.row for each in one.candidates])
        for one in questions
    ]
    for question, scores in zip(questions, score_groups(reward, groups), strict=True):
        for candidate, score in zip(question.candidates, scores, strict=True):
            candidate.score = score
    return getattr(reward, "truncated", 0)


def _own_score(candidate: Candidate) -> float:
    if candidate.score is None:
        raise UserError(
            f"{candidate.place}: a response has no score; give every response one, or name what scores them "
            "(--reward, --likelihood)"
        )
    try:
        return finite_score(candidate.score)
    except BadRow as error:
        raise UserError(f"{candidate.place}: {error}") from None


def _write(target: Path, questions: Sequence[Question]) -> None:
    with replacing_file(target) as temporary, temporary.open("w", encoding="utf-8") as file:
        for question in questions:
            best_first = sorted(question.candidates, key=lambda candidate: -candidate.score)
            row = {
                "prompt": question.prompt,
                "responses": [candidate.text for candidate in best_first],
                "scores": [candidate.score for candidate in best_first],
                "sources": [candidate.source for candidate in best_first],
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
