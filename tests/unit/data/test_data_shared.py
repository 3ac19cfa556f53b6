"""Real public files, whole. They are not in the repository: TRIMTAB_TEST_DATA, or ../shared/data."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from tests.unit.data.conftest import Source
from trimtab.data.transcripts import turns

ROOT = Path(__file__).resolve().parents[3]
FOLDER = Path(os.environ.get("TRIMTAB_TEST_DATA", ROOT.parent / "shared" / "data"))
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"no real data files at {FOLDER} (TRIMTAB_TEST_DATA)"
)


def path(name: str) -> str:
    if not (FOLDER / name).is_file():
        pytest.skip(f"{FOLDER / name} is not there")
    return str(FOLDER / name)


def test_all_transcripts_parse(load):
    """2,101 pairs: four have an empty chosen answer; all others become messages, and no word is lost."""
    made = load("dpo", path("hh_harmless_base_test.jsonl.gz"), max_length=None)
    assert made.report.to_dict()["sources"][0]["format"] == "hh"
    assert (made.report.read, made.report.kept, made.report.dropped) == (2101, 2097, {"empty_response": 4})
    with gzip.open(path("hh_harmless_base_test.jsonl.gz"), "rt", encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if turns(row["chosen"])[-1]["content"]]
    for row, ours in zip(rows, made.dataset, strict=True):
        for side in ("chosen", "rejected"):
            whole = ours["prompt"] + ours[side]
            assert "".join(letters(message["content"]) for message in whole) == letters(untagged(row[side]))
            assert [message["role"] for message in whole] == ["user", "assistant"] * (len(whole) // 2)
            assert len(ours[side]) == 1


def untagged(text: str) -> str:
    return text.replace("\n\nHuman:", "").replace("\n\nAssistant:", "")


def letters(text: str) -> str:
    return "".join(text.split())


PAIRS = {
    "llamafactory_dpo_en_demo.json": ("sharegpt", 300, {}),
    "llamafactory_dpo_zh_demo.json": ("sharegpt", 300, {}),
    "llamafactory_v1_dpo_demo.jsonl": ("trl", 10, {}),
    "medicalgpt_dpo_zh_500.jsonl": ("sharegpt", 500, {}),
    "alpaca_eval_responses.jsonl.gz": ("ranked", 805, {"empty_response": 3}),
}


@pytest.mark.parametrize("name", PAIRS)
def test_preference_files(load, name):
    format, read, dropped = PAIRS[name]
    report = load("dpo", path(name), max_length=None).report
    assert (report.sources[0].format, report.read, report.dropped) == (format, read, dropped)
    assert report.kept == read - sum(dropped.values())


def test_ranked_responses_give_the_best_and_the_worst(load):
    made = load("dpo", Source(path("alpaca_eval_responses.jsonl.gz"), limit=50), max_length=None)
    with gzip.open(path("alpaca_eval_responses.jsonl.gz"), "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for _, line in zip(range(50), file, strict=False)]
    for row, ours in zip(rows, made.dataset, strict=True):
        by_score = sorted(row["responses"], key=lambda response: response["preference"])
        assert ours["prompt"] == [{"role": "user", "content": row["instruction"]}]
        assert ours["chosen"][0]["content"] == by_score[-1]["output"]
        assert ours["rejected"][0]["content"] == by_score[0]["output"]


INSTRUCTIONS = {
    "llamafactory_alpaca_en_demo.json": ("alpaca", 999, {}),
    "llamafactory_alpaca_zh_demo.json": ("alpaca", 1000, {}),
    "llamafactory_identity.json": ("alpaca", 91, {}),
    "llamafactory_glaive_toolcall_en_demo.json": ("sharegpt", 300, {}),
    "llamafactory_reason_tool_use_demo_50.jsonl": ("trl", 50, {}),
    "llamafactory_kto_en_demo.json": ("trl", 300, {"labelled_bad": 150}),
    "code_alpaca_2k.json": ("alpaca", 2017, {"empty_response": 2}),
}


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instruction_files(load, name, tool_tokenizer):
    format, read, dropped = INSTRUCTIONS[name]
    report = load("sft", path(name), max_length=None, tokenizer=tool_tokenizer).report
    assert (report.sources[0].format, report.read, report.dropped) == (format, read, dropped)
    assert report.kept == read - sum(dropped.values())


def test_tool_calls_survive(load, tool_tokenizer):
    """211 calls in 300 conversations, each with the arguments it was written with."""
    made = load(
        "sft", path("llamafactory_glaive_toolcall_en_demo.json"), max_length=None, tokenizer=tool_tokenizer
    )
    rows = json.loads(Path(path("llamafactory_glaive_toolcall_en_demo.json")).read_text(encoding="utf-8"))
    written = [
        json.loads(turn["value"])
        for row in rows
        for turn in row["conversations"]
        if turn["from"] == "function_call"
    ]
    read = [
        call["function"]
        for row in made.dataset
        for message in row["messages"]
        for call in message.get("tool_calls", ())
    ]
    assert len(written) == 211
    assert read == written
    assert sum(row["tools"] is not None for row in made.dataset) == 191


def test_labelled_answers(load, tool_tokenizer):
    made = load("kto", path("llamafactory_kto_en_demo.json"), max_length=None, tokenizer=tool_tokenizer)
    assert (made.report.read, made.report.kept, len(made.dataset)) == (300, 300, 300)
    assert sum(made.dataset["label"]) == 150
    assert all(row["completion"][0]["role"] == "assistant" for row in made.dataset)


def test_data_for_another_method_is_recognised(load):
    assert load.error("dpo", path("llamafactory_kto_en_demo.json")).endswith("which method kto reads)")
    assert load.error("sft", path("alpaca_eval_responses.jsonl.gz")).endswith("which method dpo reads)")
