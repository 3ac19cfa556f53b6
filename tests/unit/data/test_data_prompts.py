"""Prompts that the policy answers: from every kind of row, cut to the room there is, counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data.conftest import pair, said
from trimtab import UserError
from trimtab.data import load_data
from trimtab.data.prompts import other_columns
from trimtab.recipe.sections import Data

ASKED = [said("user", "hi")]
ANSWER = [said("assistant", "yes")]


@pytest.fixture
def read(write: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write rows to files and load them as prompts, with a budget of 20 tokens for the answer."""
    monkeypatch.chdir(tmp_path)

    def run(*files: list[dict[str, Any]], **section: Any) -> Any:
        paths = [str(write(f"{number}.jsonl", rows)) for number, rows in enumerate(files)]
        spec = Data.model_validate({"train": paths, **section})
        return load_data(spec, method="grpo", part="train", tokenizer=tokenizer, response_budget=20)

    return run


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": ASKED}, ASKED),
        ({"prompt": "1 + 1 ="}, "1 + 1 ="),
        ({"query": "\n\nHuman: hi\n\nAssistant:"}, ASKED),
        ({"instruction": "hi", "input": ""}, ASKED),
        (pair("1 + 1 =", " 2", " 2"), "1 + 1 ="),
        ({"chosen": [*ASKED, *ANSWER], "rejected": [*ASKED, said("assistant", "no")]}, ASKED),
        ({"prompt": ASKED, "responses": ["yes"], "scores": [1]}, ASKED),
        ({"prompt": ASKED, "completion": ANSWER, "label": False}, ASKED),
        ({"prompt": "1 + 1 =", "completion": ""}, "1 + 1 ="),
        ({"messages": [*ASKED, *ANSWER]}, ASKED),
        ({"messages": ASKED}, ASKED),
        ({"instruction": "hi", "output": "yes"}, ASKED),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}, ASKED),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_the_prompt_of_every_kind_of_row(row: dict[str, Any], prompt: Any, read: Any, tokenizer: Any) -> None:
    made = read([{**row, "result": [2, None]}])
    assert made.dataset.column_names == ["prompt", "prompt_ids", "row"]
    (first,) = made.dataset
    expected = (
        tokenizer(prompt)["input_ids"]
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    )
    assert first == {"prompt": prompt, "prompt_ids": expected, "row": json.dumps({"result": [2, None]})}
    assert other_columns(first) == {"result": [2, None]}


def test_a_prompt_for_which_there_is_no_room_is_dropped_or_cut_from_the_left(read: Any) -> None:
    rows = [{"prompt": "abcdefgh"}, {"prompt": "abcdefghi"}, {"prompt": " "}]  # one token per character
    dropped = read(rows, max_length=28)
    assert dropped.dataset["prompt"][:] == ["abcdefgh"]
    assert dropped.report.dropped == {"no_room": 1, "empty_prompt": 1}
    assert "1 (prompt longer than max_length less max_new_tokens = 8)" in dropped.report.summary()
    cut = read(rows, max_length=28, overlong="truncate")
    whole, last = cut.dataset["prompt_ids"][:]
    assert last[:-1] == whole[1:]
    assert len(last) == 8
    assert cut.dataset["prompt"][1] == "abcdefghi"
    assert (cut.report.kept, cut.report.truncated) == (2, 1)


def test_prompts_that_come_again_are_counted_over_all_files(read: Any) -> None:
    made = read([{"prompt": "a", "n": 1}, {"prompt": "b"}], [{"prompt": "a", "n": 2}, {"prompt": "a"}])
    assert [source.repeated for source in made.report.sources] == [0, 2]
    assert made.report.rows == 4
    assert made.report.to_dict()["sources"][1]["repeated_prompts"] == 2


@pytest.mark.parametrize(
    ("rows", "section", "sentence"),
    [
        (
            [{"prompt": ""}, {"prompt": "\n"}],
            {},
            r"no row of data\.train is left to use: 2 read .*empty prompt",
        ),
        (
            [{"prompt": "a" * 9}],
            {"max_length": 28},
            "1 dropped .*max_new_tokens = 8.*; half of the rows need 9",
        ),
        ([{"question": "hi"}], {}, "the columns are 'question'; method grpo needs prompt, alone or with"),
        ([{"promt": "hi"}], {}, "is 'promt' meant to be 'prompt'"),
        ([{"text": "hi"}], {}, "instruction data, which method sft reads"),
        ([{"prompt": ASKED, "tools": [{"name": "now"}]}], {}, "cannot have tool definitions"),
        ([{"prompt": ASKED}], {"streaming": True}, "method grpo reads its rows at once"),
    ],
    ids=["no prompts", "no room", "no prompt column", "typo", "text", "tools", "streaming"],
)
def test_what_is_refused(
    rows: list[dict[str, Any]], section: dict[str, Any], sentence: str, read: Any
) -> None:
    with pytest.raises(UserError, match=sentence):
        read(rows, **section)
