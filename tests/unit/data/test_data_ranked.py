"""Ranked responses for RRHF: every way to write them, what is dropped and counted, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.data.conftest import pair, said
from trimtab import UserError
from trimtab.data import load_data
from trimtab.recipe.sections import Data
from trimtab.rewards.ranked_batches import encode_ranked

ASKED = [said("user", "hi")]
SCORED = {"responses": ["yes", "no", "yes no"], "scores": [1, 0, 0.5]}


@pytest.fixture
def read(write: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write rows to a file and load them for RRHF."""

    monkeypatch.chdir(tmp_path)

    def run(rows: list[dict[str, Any]], **section: Any) -> Any:
        spec = Data.model_validate({"train": str(write("rows.jsonl", rows)), **section})
        return load_data(spec, method="rrhf", part="train", tokenizer=tokenizer, encode=encode_ranked)

    return run


@pytest.mark.parametrize(
    ("row", "prompt", "format"),
    [
        ({"prompt": ASKED, **SCORED}, ASKED, "ranked"),
        ({"prompt": "1 + 1 =", **SCORED, "sources": ["a", "b", "c"]}, "1 + 1 =", "ranked"),
        ({"query": "\n\nHuman: hi\n\nAssistant:", **SCORED}, ASKED, "ranked"),
        ({"instruction": "hi", **SCORED}, ASKED, "ranked"),
    ],
    ids=["messages", "text", "RRHF's query", "instruction"],
)
def test_every_way_to_write_ranked_responses(
    row: dict[str, Any], prompt: Any, format: str, read: Any, tokenizer: Any
) -> None:
    made = read([row])
    assert made.report.sources[0].format == format
    assert made.dataset.column_names == ["prompt", "prompt_ids", "response_ids", "scores"]
    assert made.dataset[0] == {
        "prompt": prompt,
        **encode_ranked(tokenizer, prompt, SCORED["responses"]),
        "scores": [1.0, 0.0, 0.5],
    }


def test_a_pair_is_two_responses(read: Any, tokenizer: Any) -> None:
    made = read([pair("1 + 1 =", " 2", " 3"), pair("1 + 2 =", " 3", " 3")])
    assert made.report.dropped == {"identical": 1}
    assert made.dataset[0] == {
        "prompt": "1 + 1 =",
        **encode_ranked(tokenizer, "1 + 1 =", [" 2", " 3"]),
        "scores": [1.0, 0.0],
    }
    assert made.report.sources[0].notes == ["each pair is learned as two responses, with the scores 1 and 0"]


def test_responses_that_are_empty_repeated_or_do_not_fit_are_dropped_and_counted(read: Any) -> None:
    long = "yes " * 60
    rows = [
        {"prompt": ASKED, "responses": ["yes", "", long, "no"], "scores": [1, 2, 3, 4]},
        {"prompt": ASKED, "responses": ["yes", long], "scores": [1, 2]},
        {"prompt": ASKED, "responses": ["", " "], "scores": [1, 2]},
        {"prompt": ASKED, "responses": ["yes"], "scores": [1]},
        {"prompt": [said("user", " ")], "responses": ["yes", "no"], "scores": [1, 2]},
        {"prompt": ASKED, "responses": ["\ud800", "no"], "scores": [1, 2]},
        {"prompt": ASKED, "responses": ["yes", "no"], "scores": [2, 2]},
        {"prompt": ASKED, "responses": ["yes", "no", "yes", "no"], "scores": [1, 3, 2, 3]},
        {"prompt": ASKED, "responses": ["yes", "yes"], "scores": [1, 2]},
    ]
    made = read(rows, max_length=40)
    assert made.dataset["scores"][:] == [[1.0, 4.0], [2.0, 2.0], [1.0, 3.0]]
    report = made.report.sources[0]
    assert (report.read, report.kept) == (9, 3)
    assert report.reasons() == {
        "empty_prompt": 1, "single_response": 1, "few_left": 3, "broken_unicode": 1
    }  # fmt: skip
    assert report.responses.to_dict() == {
        "kept": 6,
        "dropped": {"empty_response": 3, "overlong": 2, "repeated": 3},
        "tied_prompts": 1,
    }
    said_lines = [str(line) for line in made.report._lines()]
    assert "  2 responses dropped: longer than max_length = 40" in said_lines
    assert "  3 responses dropped: empty response" in said_lines
    assert "  3 responses dropped: the same response to the same prompt is there before it" in said_lines
    assert any("warning: prompts whose scores are all equal: 1 (kept" in line for line in said_lines)


def test_a_limit_is_met_to_the_token(read: Any) -> None:
    row = {"prompt": ASKED, **SCORED}
    longest = read([row]).report.sources[0].lengths.percentile(100)
    assert read([row], max_length=longest).report.sources[0].responses.kept == 3
    assert read([row], max_length=longest - 1).report.sources[0].responses.kept == 2


@pytest.mark.parametrize(
    ("rows", "section", "sentence"),
    [
        ([{"prompt": ASKED, "responses": ["yes"], "scores": [1]}] * 2, {},
         r"no prompt of .*rows\.jsonl has two responses \(2 read\), and method rrhf learns from their order"),
        ([{"prompt": ASKED, "responses": ["yes", "no"], "scores": [1, float("nan")]}], {},
         r"rows\.jsonl:1: column 'scores' holds the number nan; every score must be a finite number"),
        ([{"prompt": ASKED, "responses": ["yes", "no"], "scores": [1, float("-inf")]}], {},
         r"column 'scores' holds the number -inf"),
        ([{"prompt": ASKED, "responses": ["yes", "no"], "scores": [1, 10**400]}], {},
         r"column 'scores' holds the number 10{400}; every score must be a finite number"),
        ([{"prompt": ASKED, "responses": ["yes", "no"], "scores": [1, True]}], {},
         r"column 'scores' holds true; every score must be a finite number"),
        ([{"prompt": ASKED, "responses": ["yes", "no"], "scores": [1]}], {},
         r"2 responses need a list of as many 'scores'"),
        ([{"prompt": ASKED, "responses": ["yes", "no"]}], {}, r"2 responses need a list of as many 'scores'"),
        ([{"prompt": ASKED, **SCORED}], {"max_length": 2},
         r"no row of data\.train is left to use: 1 read .* half of the rows need \d+ tokens or more"),
        ([{"prompt": ASKED, **SCORED}, {"prompt": "text", **SCORED}], {},
         r"rows\.jsonl:2: plain text where the rows before it hold messages"),
        ([{"prompt": ASKED, "chosen": [said("assistant", "yes")], "rejected": [said("assistant", "no")],
           "tools": [{"type": "function", "function": {"name": "f"}}]}], {},
         r"rows\.jsonl:1: ranked responses cannot have tool definitions"),
        ([{"question": "hi", "answers": ["yes"]}], {}, r"rows\.jsonl:1"),
    ],
)  # fmt: skip
def test_what_is_refused(
    rows: list[dict[str, Any]], section: dict[str, Any], sentence: str, read: Any
) -> None:
    with pytest.raises(UserError, match=sentence):
        read(rows, **section)
