"""Labelled answers for KTO: every way to write them, pairs taken apart, what is dropped and refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.data.conftest import pair, said

ASKED, GOOD = [said("user", "hi")], [said("assistant", "yes")]

WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "messages in both": ("trl", {"prompt": ASKED, "completion": GOOD}),
    "a question as text": ("trl", {"prompt": "hi", "completion": GOOD}),
    "one conversation": ("trl", {"messages": ASKED + GOOD}),
    "alpaca": ("alpaca", {"instruction": "hi", "input": "", "output": "yes"}),
    "sharegpt": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
    ),
}


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("column", ["label", "kto_tag"])
def test_every_way_to_write_a_labelled_answer(load: Any, write: Any, name: str, column: str) -> None:
    format, row = WAYS[name]
    made = load("kto", write("rows.jsonl", [{**row, column: True}, {**row, column: False}]))
    assert made.report.sources[0].format == format
    assert sorted(made.dataset["label"]) == [False, True]
    for row in made.dataset:
        assert {key: row[key] for key in ("prompt", "completion")} == {"prompt": ASKED, "completion": GOOD}
    assert made.dataset.column_names == ["prompt", "completion", "label"]


def test_text_and_text_read_as_messages(load: Any, write: Any) -> None:
    rows = [{"prompt": "1 + 1 =", "completion": f" {answer}", "label": answer == 2} for answer in (2, 3)]
    file = write("rows.jsonl", rows)
    plain = load("kto", file).dataset
    assert sorted(plain["completion"]) == [" 2", " 3"]
    spoken = load("kto", file, format="chat").dataset
    assert sorted(row["completion"][0]["content"] for row in spoken) == [" 2", " 3"]


def test_pairs_and_labelled_answers_mix(load: Any, write: Any) -> None:
    pairs = write("pairs.jsonl", [pair("a", "1", "2"), pair("b", "3", "4")])
    rows = write("rows.jsonl", [{"prompt": "c", "completion": "5", "label": False}])
    made = load("kto", pairs, rows)
    assert {(row["prompt"], row["completion"], row["label"]) for row in made.dataset} == {
        ("a", "1", True),
        ("a", "2", False),
        ("b", "3", True),
        ("b", "4", False),
        ("c", "5", False),
    }
    report = made.report
    assert [(source.read, source.kept, source.used) for source in report.sources] == [(2, 2, 4), (1, 1, 1)]
    assert report.rows == 5


def test_the_order_is_random_and_the_seed_s(load: Any, write: Any) -> None:
    file = write("pairs.jsonl", [pair(f"q{index}", "yes", "no") for index in range(40)])
    first, again, other = (load("kto", file, seed=seed) for seed in (0, 0, 1))
    orders = [
        list(zip(made.dataset["prompt"], made.dataset["label"], strict=True))
        for made in (first, again, other)
    ]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])
    together = sum(one[0] == two[0] for one, two in zip(orders[0], orders[0][1:], strict=False))
    assert together <= 4  # about one of 80 neighbours is expected to share its prompt


def test_what_is_dropped_is_counted_as_for_dpo(load: Any, write: Any) -> None:
    pairs = [
        pair(),
        pair("b", "same", "same"),
        pair("c", " ", "no"),
        pair("d", "long " * 40),
        pair("", "a", "b"),
    ]
    made = load("kto", write("pairs.jsonl", pairs), max_length=60)
    assert made.report.dropped == {"overlong": 1, "empty_prompt": 1, "empty_response": 1, "identical": 1}
    assert made.report.dropped == load("dpo", write("pairs.jsonl", pairs), max_length=60).report.dropped
    rows = [
        {"prompt": "q", "completion": "a", "label": True},
        {"prompt": "q", "completion": "", "label": False},
        {"prompt": "q" * 70, "completion": "a", "label": False},
        {"prompt": "q", "completion": "b", "label": None},
        {"prompt": "q", "completion": "b", "label": False},
    ]
    made = load("kto", write("rows.jsonl", rows), max_length=60)
    assert made.report.dropped == {"overlong": 1, "null": 1, "empty_response": 1}
    assert len(made.dataset) == 2
    cut = load("kto", write("rows.jsonl", rows), max_length=60, overlong="truncate")
    assert cut.report.dropped == {"prompt_fills": 1, "null": 1, "empty_response": 1}


def test_what_is_no_label_is_said_with_its_place(load: Any, write: Any) -> None:
    rows = [{"prompt": "q", "completion": "a", "label": value} for value in (True, 0)]
    sentence = load.error("kto", write("rows.jsonl", rows))
    assert "rows.jsonl:2: column 'label' holds the number 0; true (desirable) or false is needed" in sentence
    without = load.error("kto", write("rows.jsonl", [{"prompt": "q", "completion": "a"}]))
    assert "method kto needs prompt + completion + label" in without
    assert without.endswith("(this is instruction data, which method sft reads)")


def test_a_stream_is_refused(load: Any, write: Any) -> None:
    assert "needs its rows in a random order" in load.error("kto", write("p.jsonl", [pair()]), streaming=True)
