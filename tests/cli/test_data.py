"""``trimtab data rank`` and ``trimtab data score`` as a user runs them."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests import tiny
from tests.cli.conftest import Place, Result, refused, run_process, start
from tests.oracle import losses

pytestmark = pytest.mark.xdist_group("cli")

Run = Callable[..., Result]

RULES = """
def length(prompts, responses, rows):
    return [len(response) for response in responses]

def known(prompts, responses, rows):
    return [float(row["answer"] == response) for row, response in zip(rows, responses)]

def nan(prompts, responses, rows):
    return [float("nan")] * len(responses)
"""

STOPS = """
import os, signal

def stop(prompts, responses, rows):
    os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.fixture
def files(place: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Outputs of two models to the same prompts, in two ways of writing, and rules."""
    monkeypatch.delitem(sys.modules, "my_rules", raising=False)
    rows = tiny.preference_rows(5)
    (place.folder / "my_rules.py").write_text(RULES)
    tiny.write_rows(
        place.folder / "sft.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    )
    tiny.write_rows(
        place.folder / "dpo.jsonl", [{"messages": row["prompt"] + row["rejected"]} for row in rows[:4]]
    )
    return place


def written(place: Place, name: str = "ranked.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place.folder / name).read_text().splitlines()]


def table(result: Result, title: str = "outputs, joined by prompt") -> dict[str, list[str]]:
    """The cells of a table's lines, by their source."""
    below = result.out[result.out.index(f"{title} ") :]
    lines = [line.split("│")[1:-1] for line in below[: below.index("└")].splitlines() if "│" in line]
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}


def write(place: Place, name: str, rows: list[dict[str, Any]]) -> str:
    tiny.write_rows(place.folder / name, rows)
    return name


def test_outputs_are_joined_by_prompt_and_ranked_by_a_rule(files: Place, trimtab: Run) -> None:
    result = trimtab(
        "data", "rank", "sft.jsonl", "dpo.jsonl", "--reward", "my_rules:length", "--out", "ranked.jsonl"
    )
    assert result.code == 0, result.err
    pairs = tiny.preference_rows(4)
    rows = written(files)
    assert len(rows) == 4
    for row, pair in zip(rows, pairs, strict=True):
        texts = [pair["chosen"][0]["content"], pair["rejected"][0]["content"]]
        best_first = sorted(zip(texts, ("sft", "dpo"), strict=True), key=lambda one: -len(one[0]))
        assert row == {
            "prompt": pair["prompt"],
            "responses": [text for text, _ in best_first],
            "scores": [float(len(text)) for text, _ in best_first],
            "sources": [source for _, source in best_first],
        }
    assert table(result) == {  # rows, prompts, missing, responses, empty, repeated
        "sft": ["5", "5", "0", "5", "0", "0"],
        "dpo": ["4", "4", "1", "4", "0", "0"],
    }
    lengths = [[len(pair[side][0]["content"]) for side in ("chosen", "rejected")] for pair in pairs]
    untied = [pair for pair in lengths if pair[0] != pair[1]]
    assert table(result, "ranked") == {
        name: ["4", f"{sum(pair[i] for pair in lengths) / 4:.4g}", f"{share:.0%}"]
        for i, name in enumerate(("sft", "dpo"))
        for share in [sum(pair[i] > pair[1 - i] for pair in untied) / len(untied)]
    }
    assert "4 prompts with 8 ranked responses: ranked.jsonl" in result.out
    assert "warning: prompts with a single response, which were left out: 1" in result.err
    assert "all equal" not in result.err
    assert "were not used" not in result.out


def test_what_is_written_trains_with_rrhf(files: Place, trimtab: Run) -> None:
    arguments = ("--reward", "my_rules:length", "--out", "ranked.jsonl")
    assert trimtab("data", "rank", "sft.jsonl", "dpo.jsonl", *arguments).code == 0
    recipe = files.recipe(
        {
            "method": "rrhf",
            "optimizer": {"name": "adamw", "lr": 1e-4},
            "base": ...,
            "data.train": "ranked.jsonl",
            "data.eval": "ranked.jsonl",
        }
    )
    result = trimtab("train", recipe)
    assert result.code == 0, result.err
    counts = json.loads((files.folder / "run" / "results" / "data.json").read_text())["train"]["sources"][0]
    assert (counts["format"], counts["kept"], counts["dropped"]) == ("ranked", 4, {})
    assert counts["responses"]["kept"] == 8
    assert (files.folder / "run" / "model" / "model.safetensors").is_file()
    judged = json.loads((files.folder / "run" / "results" / "rewards.json").read_text())
    assert (judged["pairs"], judged["prompts"]) == (4 - counts["responses"]["tied_prompts"],) * 2
    result = trimtab("data", "score", "ranked.jsonl", "--likelihood", "run/model", "--out", "score.json")
    assert result.code == 0, result.err
    measured = json.loads((files.folder / "score.json").read_text())
    assert {name: measured[name] for name in ("pairs", "prompts", "correct", "interval")} == {
        name: judged[name] for name in ("pairs", "prompts", "correct", "interval")
    }


def test_a_reward_model_and_a_likelihood_score(files: Place, trimtab: Run) -> None:
    from transformers import AutoModelForCausalLM

    from trimtab.rewards.ranked_batches import encode_ranked

    recipe = files.recipe(
        {"method": "reward", "optimizer": {"name": "adamw", "lr": 1e-3}, "base": ..., "training.max_steps": 1}
    )
    assert trimtab("train", recipe).code == 0
    arguments = ("data", "rank", "sft.jsonl", "dpo.jsonl", "--out", "ranked.jsonl")
    assert trimtab(*arguments, "--reward", "run/model").code == 0
    by_model = written(files)
    from trimtab.rewards import load_reward

    reward = load_reward("run/model")
    for row in by_model:
        assert row["scores"] == pytest.approx(reward([row["prompt"]] * 2, row["responses"]), abs=1e-5)
        assert row["scores"] == sorted(row["scores"], reverse=True)
    assert trimtab(*arguments, "--likelihood", "reference", "--overwrite").code == 0
    exact = AutoModelForCausalLM.from_pretrained("reference").double()
    for row in written(files):
        encoded = encode_ranked(tiny.tokenizer(), row["prompt"], row["responses"])
        known = [
            sum(losses.log_probabilities(exact, encoded["prompt_ids"], ids)) / len(ids)
            for ids in encoded["response_ids"]
        ]
        assert row["scores"] == pytest.approx(known, rel=1e-5)


def test_scores_that_the_files_have_are_taken(files: Place, trimtab: Run) -> None:
    first = [
        {"prompt": "a", "responses": ["x", "y"], "scores": [1, 3], "sources": ["human", "human"]},
        {"prompt": "b", "responses": ["x", "y"], "scores": [2, 2]},
        {"prompt": "c", "responses": ["x", "x", " ", "\n"], "scores": [1, 2, 3, 4]},
        {"prompt": " ", "responses": ["x", "y"], "scores": [1, 2]},
        {"prompt": "d", "responses": [], "scores": []},
        {"prompt": "e", "response": None},
        {"prompt": "f", "responses": ["x", "\ud800"], "scores": [1, 2]},
    ]
    second = [{"prompt": "a", "response": "z", "score": 2}, {"prompt": "a", "response": "x", "score": 9}]
    names = write(files, "first.jsonl", first), write(files, "second.jsonl", second)
    result = trimtab("data", "rank", *names, "--out", "ranked.jsonl")
    assert result.code == 0, result.err
    assert written(files) == [
        {
            "prompt": "a",
            "responses": ["y", "z", "x"],
            "scores": [3.0, 2.0, 1.0],
            "sources": ["human", "second", "human"],
        },
        {"prompt": "b", "responses": ["x", "y"], "scores": [2.0, 2.0], "sources": ["first", "first"]},
    ]
    assert table(result) == {  # rows, prompts, missing, responses, empty, repeated
        "first": ["7", "4", "0", "8", "2", "1"],
        "second": ["2", "1", "3", "2", "0", "1"],
    }
    assert table(result, "ranked") == {  # responses, mean score, best
        "human": ["2", "2", "100%"],
        "second": ["1", "2", "0%"],
        "first": ["2", "2", "0%"],
    }
    for line in (
        "1 rows left out: a column that is needed is null",
        "1 rows left out: empty prompt",
        "1 rows left out: not valid Unicode (a lone surrogate)",
        "1 prompts left out: no response",
    ):
        assert line in result.out
    assert "single response, which were left out: 1" in result.err
    assert "warning: prompts whose scores are all equal: 1 (kept; they rank nothing" in result.err


def test_models_answer_the_prompts(files: Place, trimtab: Run) -> None:
    arguments = (
        *("data", "rank", "--prompts", "pairs.jsonl", "--model", "base", "--samples", "2"),
        *("--max-new-tokens", "6", "--reward", "my_rules:length", "--out", "ranked.jsonl", "--overwrite"),
    )
    result = trimtab(*arguments)
    assert result.code == 0, result.err
    first = written(files)
    prompts = [row["prompt"] for row in tiny.preference_rows(24)]
    ranked = [row["prompt"] for row in first]
    assert ranked == [prompt for prompt in prompts if prompt in ranked]
    assert len(ranked) > 20  # a random model now and then says nothing
    assert all(row["sources"] == ["base", "base"] for row in first)
    assert all(0 < len(text) <= 6 for row in first for text in row["responses"])
    assert trimtab(*arguments).code == 0
    assert written(files) == first
    assert trimtab(*arguments, "--seed", "1").code == 0
    assert written(files) != first
    beside = trimtab("data", "rank", "sft.jsonl", *arguments[4:6], *arguments[8:])
    assert beside.code == 0, beside.err
    assert {tuple(sorted(row["sources"])) for row in written(files)} == {("base", "sft")}


def test_prompts_without_room_and_answers_that_the_limit_ends_are_counted(files: Place, trimtab: Run) -> None:
    rows = [{"prompt": "a" * 250, "response": "x"}, {"prompt": "a", "response": "x"}]
    shutil.copytree(files.folder / "base", files.folder / "twin")
    arguments = ("--model", "base", "--model", "twin", "--max-new-tokens", "7", *LENGTH, *OUT)
    result = trimtab("data", "rank", write(files, "text.jsonl", rows), *arguments)
    assert result.code == 0, result.err
    # rows, prompts, missing, responses, empty, repeated, no room, cut
    assert table(result)["text"] == ["2", "2", "0", "2", "0", "0", "0", "0"]
    for model in ("base", "twin"):
        assert table(result)[model] == ["0", "1", "1", "1", "0", "0", "1", "1"]
    (found,) = written(files, "o.jsonl")
    assert sorted(found["sources"]) == ["base", "text", "twin"], "each model has its own random numbers"
    shutil.copytree(files.folder / "base", files.folder / "plain")
    tiny.tokenizer(chat_template="{{ raise_exception('no') }}").save_pretrained(files.folder / "plain")
    spoken = ("data", "rank", "sft.jsonl", "--model", "plain", *LENGTH, *OUT, "--overwrite")
    refused(trimtab(*spoken), ["plain: the chat template refuses the prompt 'say ", "no"])


def test_best_responses_share_the_place(files: Place, trimtab: Run) -> None:
    rows = [
        {"prompt": "a", "responses": ["x", "y", "z"], "scores": [3, 3, 1], "sources": ["one", "two", "two"]},
        {"prompt": "b", "responses": ["x", "y"], "scores": [2, 1], "sources": ["one", "two"]},
    ]
    result = trimtab("data", "rank", write(files, "rows.jsonl", rows), "--out", "ranked.jsonl")
    assert result.code == 0, result.err
    assert table(result, "ranked") == {"one": ["2", "2.5", "75%"], "two": ["3", "1.667", "25%"]}


def test_rules_see_the_rows(files: Place, trimtab: Run) -> None:
    rows = [{"prompt": "2 + 2 =", "response": text, "answer": "4"} for text in ("4", "5")]
    rows[0]["score"] = 5
    name = write(files, "rows.jsonl", rows)
    result = trimtab("data", "rank", name, "--reward", "my_rules:known", "--chat", "--out", "ranked.jsonl")
    assert result.code == 0, result.err
    assert written(files) == [
        {
            "prompt": [{"role": "user", "content": "2 + 2 ="}],
            "responses": ["4", "5"],
            "scores": [1.0, 0.0],
            "sources": ["rows", "rows"],
        }
    ]
    assert "the scores that the files have were not used" in result.out


RANK = ("data", "rank", "sft.jsonl", "dpo.jsonl")
LENGTH = ("--reward", "my_rules:length")
OUT = ("--out", "o.jsonl")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*RANK, *OUT), ["sft.jsonl:1: a response has no score; give", "--reward"]),
        ((*RANK, *LENGTH, "--out", "o.txt"), ["--out 'o.txt' must end in .jsonl"]),
        ((*RANK, *LENGTH, "--out", "pairs.jsonl"), ["'pairs.jsonl' is there already", "--overwrite"]),
        ((*RANK, *LENGTH, "--out", "sft.jsonl", "--overwrite"), ["'sft.jsonl' is one of the files"]),
        ((*RANK, "--reward", "my_rules:nan", *OUT),
         ["my_rules:nan gives the score nan to the response", "to the prompt 'say "]),
        ((*RANK, "--reward", "my_rules:nan", "--out", "pairs.jsonl", "--overwrite"), ["gives the score nan"]),
        ((*RANK, "--reward", "my_rules:gone", *OUT), ["--reward 'my_rules:gone' cannot be"]),
        ((*RANK, "--reward", "base", *OUT), ["'base' is a LlamaForCausalLM, so it gives no score"]),
        ((*RANK, "--likelihood", "nothing", *OUT), ["--likelihood: there is no folder 'nothing'"]),
        (("data", "rank", "sft.jsonl", *LENGTH, *OUT),
         ["none of 5 prompts has two different responses"]),
        (("data", "rank", "pairs.jsonl", *LENGTH, *OUT),
         ["pairs.jsonl:1: the columns are 'prompt', 'chosen', 'rejected'; outputs need prompt + response"]),
        (("data", "rank", "sft.jsnl", *LENGTH, *OUT), ["did you mean 'sft.jsonl'?"]),
        (("data", "rank", *LENGTH, *OUT), ["name files of models' outputs"]),
        ((*RANK, "--prompts", "pairs.jsonl", *LENGTH, *OUT), ["--prompts is what models answer"]),
        ((*RANK, "--model", "base", *OUT), ["generated responses have no scores"]),
        ((*RANK, "--model", "gone", *LENGTH, *OUT), ["--model: there is no folder 'gone'"]),
        ((*RANK, "--model", "base", "--temperature", "-1", *LENGTH, *OUT), ["temperature must be"]),
        (("data", "score", "pairs.jsonl"), ["name what is measured"]),
        (("data", "score", "sft.jsonl", *LENGTH), ["sft.jsonl:1: the columns are 'prompt', 'completion'"]),
        (("data", "score", "pairs.jsonl", *LENGTH, "--out", "o.txt"), ["--out 'o.txt' must end in .json"]),
        (("data", "score", "tied.jsonl", *LENGTH), ["tied.jsonl has no pair to measure on; left out: 1"]),
    ],
)  # fmt: skip
def test_what_is_refused(arguments: tuple[str, ...], words: list[str], files: Place, trimtab: Run) -> None:
    write(files, "tied.jsonl", [{"prompt": "a", "responses": ["x", "y"], "scores": [1, 1]}])
    before = files.files()
    refused(trimtab(*arguments), words)
    after = {name: size for name, size in files.files().items() if "__pycache__" not in name}
    assert after == before, "nothing is written"


def test_text_and_messages_are_not_mixed(files: Place, trimtab: Run) -> None:
    rows = [{"prompt": "say it", "responses": ["x", "y"]}]
    arguments = ("data", "rank", "sft.jsonl", write(files, "text.jsonl", rows), *LENGTH, *OUT)
    refused(trimtab(*arguments), ["the prompt 'say it' is text and 'say ", "is messages", "--chat"])
    assert trimtab(*arguments, "--chat").code == 0
    assert written(files, "o.jsonl")[0]["prompt"] == [{"role": "user", "content": "say it"}]


def test_a_reward_is_measured_on_pairs(files: Place, trimtab: Run) -> None:
    pairs = tiny.preference_rows(24)
    right = sum(len(pair["chosen"][0]["content"]) > len(pair["rejected"][0]["content"]) for pair in pairs)
    result = trimtab("data", "score", "pairs.jsonl", *LENGTH, "--out", "score.json")
    assert result.code == 0, result.err
    z, share = 1.959963984540054, right / 24
    centre = (share + z * z / 48) / (1 + z * z / 24)
    half = z / (1 + z * z / 24) * math.sqrt(share * (1 - share) / 24 + z * z / 4 / 24**2)
    said = (
        f"my_rules:length: the better response scores higher in {right} of 24 ranked pairs: accuracy "
        f"{share * 100:.1f} % (95 % interval {(centre - half) * 100:.1f} to {(centre + half) * 100:.1f} %)"
    )
    assert said in result.out
    found = json.loads((files.folder / "score.json").read_text())
    assert (found["reward"], found["data"], found["correct"]) == ("my_rules:length", "pairs.jsonl", right)
    first = [len(pairs[0][side][0]["content"]) for side in ("chosen", "rejected")]
    assert found["scores"][0] == {"scores": [1.0, 0.0], "values": [float(length) for length in first]}


def test_a_reward_is_measured_on_all_pairs_of_ranked_responses(files: Place, trimtab: Run) -> None:
    rows = [
        {"prompt": "a", "responses": ["xxx", "xx", "x"], "scores": [3, 2, 2]},
        {"prompt": "b", "responses": ["x", "xx", "xxx"], "scores": [3, 2, 1]},
        {"prompt": "c", "responses": ["x", " "], "scores": [3, 2]},
        {"prompt": "d", "responses": ["x"], "scores": [3]},
        {"prompt": "a", "responses": ["x", "x", "y", ""], "scores": [3, 9, 2, 1]},
        {"prompt": "e", "responses": ["x", "y"], "scores": [3, 3]},
    ]
    result = trimtab("data", "score", write(files, "ranked.jsonl", rows), *LENGTH)
    assert result.code == 0, result.err
    assert "scores higher in 2 of 6 ranked pairs of 2 prompts: accuracy 33.3 %" in result.out
    assert sorted(line.strip() for line in result.out.splitlines() if "left out" in line) == [
        "1 responses left out: the same response to the same prompt is there before it",
        "1 rows left out: all scores are equal",
        "1 rows left out: fewer than two responses",
        "1 rows left out: fewer than two responses left of those that differ, fit and are not empty",
        "2 responses left out: empty response",
    ]


def test_an_interrupted_ranking_leaves_nothing(files: Place) -> None:
    (files.folder / "slow.py").write_text(STOPS)
    before = set(files.files())
    process = start(*RANK, "--reward", "slow:stop", "--out", "ranked.jsonl")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "stopped by Ctrl-C" in err
    assert {name for name in files.files() if "__pycache__" not in name} == before


def test_help_is_there_at_once() -> None:
    result = run_process("data", "rank", "--help", PYTHONPROFILEIMPORTTIME="1")
    imported = {line.rsplit("|", 1)[-1].strip() for line in result.err.splitlines()}
    assert result.code == 0
    assert not imported & {"torch", "transformers", "numpy", "pydantic", "rich", "yaml"}
