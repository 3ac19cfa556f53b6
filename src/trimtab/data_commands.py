"""The arguments of ``trimtab data rank`` and ``trimtab data score``; their work is imported when they run."""

from __future__ import annotations

import argparse
from typing import Any

from trimtab.errors import UserError


def declare_rank(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``trimtab data rank``."""
    parser.add_argument(
        "files",
        nargs="*",
        default=[],
        metavar="OUTPUTS",
        help="files of models' outputs: prompt and response (or completion, or responses), or messages",
    )
    parser.add_argument("--out", required=True, metavar="FILE.jsonl", help="the file to write")
    _declare_scorer(parser, "; without it and --likelihood, the scores in the files are taken")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="MODEL",
        help="a language model that answers the prompts besides; may be given several times",
    )
    parser.add_argument(
        "--prompts", metavar="FILE", help="what the models answer; the prompts of OUTPUTS when not given"
    )
    parser.add_argument("--samples", type=count, default=1, metavar="N", help="responses of a model (1)")
    parser.add_argument(
        "--max-new-tokens", type=count, default=256, metavar="N", help="longest of these responses (256)"
    )
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="of their sampling (1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of their sampling (0)")
    _declare_common(parser)


def rank(options: argparse.Namespace) -> None:
    """Run ``trimtab data rank``."""
    from trimtab import ranking
    from trimtab.sampling import Sampling

    key, scorer = _scorer(options)
    ranking.rank(
        options.files,
        options.out,
        scorer=scorer,
        key=key,
        models=options.model,
        prompts=options.prompts,
        samples=options.samples,
        sampling=Sampling(max_new_tokens=options.max_new_tokens, temperature=options.temperature),
        seed=options.seed,
        chat=options.chat,
        batch_size=options.batch_size,
        overwrite=options.overwrite,
    )


def declare_score(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``trimtab data score``."""
    parser.add_argument("file", metavar="PAIRS", help="pairs (prompt, chosen, rejected) or ranked responses")
    parser.add_argument("--out", metavar="FILE.json", help="where the result goes, with every score")
    _declare_scorer(parser, "")
    _declare_common(parser)


def score(options: argparse.Namespace) -> None:
    """Run ``trimtab data score``.

    Raises:
        UserError: if nothing is named that scores.
    """
    key, scorer = _scorer(options)
    if scorer is None:
        raise UserError("name what is measured: --reward MODEL (or module:function) or --likelihood MODEL")
    from trimtab import ranking

    ranking.score(
        options.file,
        scorer,
        key=key,
        out=options.out,
        chat=options.chat,
        batch_size=options.batch_size,
        overwrite=options.overwrite,
    )


def _declare_scorer(parser: argparse.ArgumentParser, otherwise: str) -> None:
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--reward",
        metavar="SOURCE",
        help=f"what scores: a reward model (folder or hub id), or a rule (module:function){otherwise}",
    )
    choice.add_argument(
        "--likelihood",
        metavar="MODEL",
        help="score by a language model's log-probability per token, as method rrhf trains it",
    )


def _declare_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chat", action="store_true", help="read prompts that are text as a user's message")
    parser.add_argument("--batch-size", type=count, default=8, metavar="N", help="rows at a time (8)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file that is written")


def _scorer(options: argparse.Namespace) -> tuple[str, Any]:
    """The option that names what scores, and the source; None where there is none."""
    if options.likelihood is not None:
        return "--likelihood", {"likelihood": options.likelihood}
    return "--reward", options.reward


def count(text: str) -> int:
    """Return a whole number above 0.

    Raises:
        argparse.ArgumentTypeError: if it is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
