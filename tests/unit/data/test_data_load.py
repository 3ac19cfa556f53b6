"""From a recipe's data section to a dataset and its report: what is kept, dropped and counted, or refused."""

from __future__ import annotations

import io
import json
import os
from itertools import islice
from pathlib import Path

import datasets
import pytest
from rich.console import Console

from tests import tiny
from tests.unit.data.conftest import Source, pair, said
from trimtab.data import collect, load_data
from trimtab.data.formats import NEEDS
from trimtab.errors import UserError

Q, A, B = said("user", "q"), said("assistant", "a"), said("assistant", "b")
CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
}


def messages(length: int) -> dict:
    """A pair whose longer side has this many tokens: 2 marks a message, one token a character."""
    return {"prompt": [Q], "chosen": [said("assistant", "c" * (length - 5))], "rejected": [B]}


REASONS = {
    "overlong": messages(65),
    "empty_prompt": {**messages(9), "prompt": [said("system", "s"), said("user", " ")]},
    "no_question": {**messages(9), "prompt": [Q, A]},
    "empty_response": {**messages(9), "rejected": [said("assistant", "\n")]},
    "identical": {**messages(9), "rejected": messages(9)["chosen"]},
    "prompts_differ": {"chosen": [Q, A, Q, A], "rejected": [Q, B, Q, A]},
    "broken_unicode": {**messages(9), "chosen": [said("assistant", "\ud800")]},
    "null": {**messages(9), "chosen": None},
}


@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_that_is_dropped_is_counted(load, write, reason, streaming):
    write("a.jsonl", [messages(64), REASONS[reason], messages(10)])
    made = load("dpo", "a.jsonl", max_length=64, streaming=streaming)
    assert list(made.dataset) == [messages(64), messages(10)]
    assert made.report.dropped == {reason: 1}
    assert (made.report.read, made.report.kept, made.report.complete) == (3, 2, True)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [said("system", "s"), Q]}, "empty_response"),
        ({"messages": [Q, A, Q, said("assistant", "")]}, "empty_response"),
        ({"messages": [Q, A], "label": False}, "labelled_bad"),
        ({"messages": []}, "empty_response"),
    ],
)
def test_conversations_without_an_answer(load, write, row, reason):
    write("a.jsonl", [{"messages": [Q, A]}, row])
    assert load("sft", "a.jsonl").report.dropped == {reason: 1}


def test_ties_and_single_responses(load, write):
    rows = [([1, 2], "ab"), ([1, 1], "ab"), ([1], "a"), ([2, 1], "aa"), ([], "")]
    write("a.jsonl", [{"prompt": "q", "responses": list(texts), "scores": scores} for scores, texts in rows])
    made = load("dpo", "a.jsonl")
    assert made.dataset.to_list() == [pair("q", "b", "a")]
    assert made.report.dropped == {"identical": 1, "tie": 1, "single_response": 2}


def test_pairs_of_text(load, write):
    write("a.jsonl", [pair(), pair(" "), pair(chosen=""), pair(chosen="no"), pair(chosen="x" * 100)])
    made = load("dpo", "a.jsonl", max_length=50)
    assert made.dataset.to_list() == [pair()]
    assert made.dataset.features == {
        name: datasets.Value("string") for name in ("prompt", "chosen", "rejected")
    }
    assert made.report.dropped == {"overlong": 1, "empty_prompt": 1, "empty_response": 1, "identical": 1}


def test_the_limit_is_for_the_whole_row(load, write):
    """64 tokens fit into 64; 65 do not."""
    write("a.jsonl", [messages(length) for length in (63, 64, 65, 66)])
    made = load("dpo", "a.jsonl", max_length=64)
    assert [len(row["chosen"][0]["content"]) + 5 for row in made.dataset] == [63, 64]
    assert made.report.sources[0].lengths.to_dict() == {"p50": 64, "p90": 66, "p99": 66, "max": 66}


def test_truncate_leaves_rows_for_the_trainer_and_counts_them(load, write):
    write("a.jsonl", [messages(10), messages(100), {**messages(10), "prompt": [said("user", "p" * 100)]}])
    made = load("dpo", "a.jsonl", max_length=64, overlong="truncate")
    assert made.dataset.to_list() == [messages(10), messages(100)]
    assert made.report.truncated == 1
    assert made.report.dropped == {"prompt_fills": 1}


@pytest.mark.parametrize("method", ["dpo", "ipo", "kto"])
def test_pairs_that_truncating_makes_the_same_are_dropped(load, write, method):
    """The prompt and what opens the answer are 4 of 64 tokens, so the answer's 60th is the last one left."""
    rows = [
        {
            "prompt": [Q],
            "chosen": [said("assistant", f"{same}a")],
            "rejected": [said("assistant", f"{same}bc")],
        }
        for same in ("x" * 58, "x" * 59, "x" * 60)
    ]
    write("a.jsonl", rows)
    made = load(method, "a.jsonl", max_length=64, overlong="truncate")
    assert (made.report.kept, made.report.truncated) == (2, 2)
    assert made.report.dropped == {"identical_cut": 1}
    assert "the same within max_length = 64" in made.report.summary()


def test_no_limit(load, write):
    write("a.jsonl", [messages(3000)])
    assert load("dpo", "a.jsonl", max_length=None).report.rows == 1


def test_train_and_eval_are_apart(load, write, tokenizer):
    from tests.unit.data.conftest import Spec

    write("a.jsonl", [pair("train")])
    write("b.jsonl", [pair("eval")])
    spec = Spec((Source("a.jsonl"),), (Source("b.jsonl"),))
    for part in ("train", "eval"):
        made = load_data(spec, method="dpo", part=part, tokenizer=tokenizer)
        assert [row["prompt"] for row in made.dataset] == [part]
    with pytest.raises(UserError, match=r"^data.eval names no source of rows"):
        load_data(Spec((Source("a.jsonl"),)), method="dpo", part="eval", tokenizer=tokenizer)


# What is refused


def test_nothing_is_left(load, write):
    write(
        "a.jsonl",
        [messages(30), messages(40), messages(50), {**messages(9), "chosen": [said("assistant", "")]}],
    )
    assert load.error("dpo", "a.jsonl", max_length=16) == (
        "no row of data.train is left to use: 4 read from a.jsonl, 3 dropped (longer than max_length = 16), "
        "1 dropped (empty response); half of the rows need 40 tokens or more"
    )


def test_nothing_is_left_of_a_stream(load, write):
    write("a.jsonl", [messages(30)])
    made = load("dpo", "a.jsonl", max_length=16, streaming=True)
    with pytest.raises(UserError, match=r"^no row of data.train is left to use: 1 read from a.jsonl"):
        list(made.dataset)


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", ""), ("a.jsonl.gz", "\n\n"), ("a.json", "[]"), ("a.csv", "text\n")]
)
def test_an_empty_file(load, write, name, content):
    write(name, content)
    assert load.error("sft", name) == f"{name} is empty: there is not one row in {name}"


def test_wrong_json_on_line_17(load, write):
    lines = [json.dumps(pair(str(number))) for number in range(20)]
    lines[16] = lines[16][:-1]
    write("pairs.jsonl", "\n".join(lines))
    assert (
        load.error("dpo", "pairs.jsonl") == "pairs.jsonl:17 is not JSON: Expecting ',' delimiter at column 51"
    )


def test_a_missing_column(load, write):
    write("a.jsonl", [{"prompt": "q", "chosen": "a", "rejcted": "b"}])
    assert load.error("dpo", "a.jsonl") == (
        "a.jsonl:1: the columns are 'prompt', 'chosen', 'rejcted'; method dpo needs conversations + chosen + "
        "rejected; or instruction + chosen + rejected; or chosen + rejected; or prompt + responses "
        "(is 'rejcted' meant to be 'rejected'?)"
    )


def test_a_column_that_is_missing_further_down(load, write):
    write("a.jsonl", [pair(), pair(), {"prompt": "q", "chosen": "a", "rejectd": "b"}])
    assert load.error("dpo", "a.jsonl") == (
        "a.jsonl:3: column 'rejected' is missing (is 'rejectd' meant?); "
        "there are 'prompt', 'chosen', 'rejectd'"
    )


def test_a_wrong_type_further_down(load, write):
    write("a.jsonl", [pair(), pair(chosen=["a"])])
    assert load.error("dpo", "a.jsonl") == "a.jsonl:2: column 'chosen' holds a list of texts; text is needed"


def test_forms_that_change_inside_a_source(load, write):
    write("a.jsonl", [pair(), {"prompt": [Q], "chosen": [A], "rejected": [B]}])
    assert load.error("dpo", "a.jsonl") == "a.jsonl:2: messages where the rows before it hold plain text"


def test_unknown_names(load, write):
    write("a.jsonl", [pair()])
    assert load.error("dpo", "a.jsonl", format="alpacca") == (
        "unknown format 'alpacca' at data.format; did you mean 'alpaca'? "
        "Known: auto, trl, chat, alpaca, sharegpt, hh, ranked"
    )
    known = ", ".join(NEEDS)
    assert load.error("dop", "a.jsonl") == f"unknown method 'dop'; did you mean 'dpo'? Known: {known}"


def test_messages_for_a_tokenizer_without_a_chat_template(load, write):
    write("a.jsonl", [messages(9)])
    assert load.error("dpo", "a.jsonl", tokenizer=tiny.tokenizer(None)) == (
        "a.jsonl:1 holds messages, but the tokenizer of the model has no chat template: take a tokenizer "
        "that has one (a model's instruct version), set tokenizer.chat_template and save it with the model, "
        "or give the data as plain text"
    )


def test_text_for_a_tokenizer_without_an_end(load, write):
    tokenizer = tiny.tokenizer(None)
    tokenizer.eos_token = None
    write("a.jsonl", [pair()])
    assert load.error("dpo", "a.jsonl", tokenizer=tokenizer) == (
        "a.jsonl:1 holds plain text, which is ended with the end-of-sequence token, but the tokenizer of the "
        "model has none: set tokenizer.eos_token and save it with the model"
    )


def test_text_needs_no_chat_template(load, write):
    write("a.jsonl", [pair()])
    assert load("dpo", "a.jsonl", tokenizer=tiny.tokenizer(None)).report.rows == 1


def test_messages_that_the_template_refuses(load, write):
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    write("a.jsonl", [{"messages": [Q, A]}, {"messages": [said("system", "s"), Q, A]}])
    assert load.error("sft", "a.jsonl", tokenizer=tiny.tokenizer(template)) == (
        "a.jsonl:2: the tokenizer's chat template refuses these messages: System role not supported"
    )


def test_calls_that_the_template_leaves_out(load, write, tool_tokenizer):
    write("a.jsonl", [{"messages": [Q, A]}, {"messages": [Q, CALL, said("tool", "1"), A]}])
    assert load.error("sft", "a.jsonl") == (
        "a.jsonl:2: the function 'f' is called, but the tokenizer's chat template leaves calls out; train a "
        "model whose template knows tools, or take the calls out of the data"
    )
    assert load("sft", "a.jsonl", tokenizer=tool_tokenizer).report.rows == 2


def test_text_and_messages_do_not_mix(load, write):
    write("a.jsonl", [pair()])
    write("b.jsonl", [messages(9)])
    assert load.error("dpo", "a.jsonl", "b.jsonl") == (
        "b.jsonl:1 holds messages and a.jsonl:1 plain text, which cannot be mixed; bring them into one form "
        "(format: chat reads prompts and answers that are text as messages)"
    )
    write("c.jsonl", [pair("c")])
    assert load("dpo", "a.jsonl", "c.jsonl").report.rows == 2


# What is said


def test_conversations_and_completions_are_mixed_as_messages(load, write):
    write("a.jsonl", [{"messages": [Q, A]}])
    write("b.jsonl", [{"instruction": "q", "output": "b"}])
    made = load("sft", "a.jsonl", "b.jsonl")
    assert sorted(row["messages"][1]["content"] for row in made.dataset) == ["a", "b"]
    notes = [source.notes for source in made.report.sources]
    assert notes == [
        [],
        ["prompt and completion are joined into messages, so that the prompt is learned too"],
    ]


def test_texts_and_completions_are_mixed_as_text(load, write):
    write("a.jsonl", [{"text": "once"}])
    write("b.jsonl", [{"prompt": "1 + 1 =", "completion": " 2"}])
    assert sorted(row["text"] for row in load("sft", "a.jsonl", "b.jsonl").dataset) == ["1 + 1 = 2", "once"]


def test_what_is_not_read_is_named(load, write, tool_tokenizer):
    write("a.jsonl", [{**messages(9), "id": 1, "model": "m"}])
    report = load("sft", "a.jsonl").report.sources[0]
    assert report.ignored == ("id", "model")
    assert report.notes == ["only the chosen answers are learned; the rejected ones are not used"]


def test_tools_and_reasoning_that_the_template_does_not_show(load, write, tool_tokenizer):
    reasoned = {**A, "reasoning_content": "because"}
    write("a.jsonl", [{"messages": [Q, reasoned], "tools": [{"name": "f"}]}] * 2)
    assert load("sft", "a.jsonl").report.sources[0].notes == [
        "the tokenizer's chat template does not show tool definitions to the model",
        "the tokenizer's chat template leaves out reasoning that the data has",
    ]
    assert load("sft", "a.jsonl", tokenizer=tool_tokenizer).report.sources[0].notes == []


def test_nulls_in_the_first_row_do_not_hide_the_format(load, write):
    write("a.jsonl", [pair(rejected=None), pair(prompt=None), pair()])
    made = load("dpo", "a.jsonl")
    assert made.report.dropped == {"null": 2}
    assert made.dataset.to_list() == [pair()]


def test_the_report_for_files(load, write):
    write("a.jsonl", [messages(10), messages(100), REASONS["identical"]])
    report = load("dpo", "a.jsonl", max_length=64).report
    assert json.loads(json.dumps(report.to_dict())) == {
        "part": "train",
        "method": "dpo",
        "columns": ["prompt", "chosen", "rejected"],
        "conversational": True,
        "max_length": 64,
        "overlong": "drop",
        "streaming": False,
        "complete": True,
        "rows": 1,
        "fingerprint": report.fingerprint,
        "sources": [
            {
                "path": "a.jsonl",
                "files": ["a.jsonl"],
                "format": "trl",
                "weight": 1.0,
                "read": 3,
                "kept": 1,
                "used": 1,
                "dropped": {"overlong": 1, "identical": 1},
                "truncated": 0,
                "lengths": {"p50": 10, "p90": 100, "p99": 100, "max": 100},
                "ignored_columns": [],
                "notes": [],
            }
        ],
    }


def test_the_report_for_people(load, write):
    write("a.jsonl", [messages(10), messages(100)])
    write("[b].jsonl", [messages(10)])
    report = load("dpo", "a.jsonl", Source("[b].jsonl", weight=2.0), max_length=64).report
    console = Console(file=io.StringIO(), width=110)
    console.print(report.table())
    lines = [" ".join(line.replace("│", " ").split()) for line in console.file.getvalue().splitlines()]
    assert lines[0] == "train data for dpo (tokens: limit 64, longer rows: drop)"
    assert "a.jsonl trl 2 1 0 1 1 1 10 100 100" in lines
    assert "[b].jsonl trl 1 0 0 1 2 2 10 10 10" in lines
    assert "a.jsonl: 1 dropped: longer than max_length = 64" in lines
    assert report.summary() == "train: 2 of 3 rows kept; dropped 1 (longer than max_length = 64)"


# How it is made


def test_the_fingerprint_is_of_the_content(load, write):
    write("a.jsonl", [pair("1"), pair("2")])
    write("b.json", [pair("1"), {**pair("2"), "id": 7}])
    write("c.jsonl", [pair("2"), pair("1")])
    first, same, other = (load("dpo", name) for name in ("a.jsonl", "b.json", "c.jsonl"))
    assert first.report.fingerprint == same.report.fingerprint != other.report.fingerprint
    assert first.dataset._fingerprint == same.dataset._fingerprint == first.report.fingerprint[:16]


def test_nothing_is_written_anywhere(load, write, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    write("a.jsonl", [pair(str(number)) for number in range(10)])
    before = sorted(tmp_path.rglob("*"))
    for streaming in (False, True):
        made = load("dpo", Source("a.jsonl", weight=1.5), streaming=streaming)
        assert len(list(made.dataset)) >= 10
    assert made.dataset.map(lambda row: row) is not None
    assert sorted(tmp_path.rglob("*")) == before


def test_large_data_goes_to_temporary_files(load, write, monkeypatch):
    """With a budget of nothing every chunk is a file; the dataset is the same, and so are its messages."""
    rows = [messages(10 + number) for number in range(7)]
    rows[5]["chosen"] = [{**rows[5]["chosen"][0], "reasoning_content": "hm"}]
    write("a.jsonl", rows)
    small = load("dpo", "a.jsonl")
    monkeypatch.setattr(collect, "CHUNK", 2)
    monkeypatch.setattr(collect.Collector.__init__, "__defaults__", (0,))
    large = load("dpo", "a.jsonl")
    assert not small.dataset.cache_files
    assert len(large.dataset.cache_files) == 4
    folder = Path(large.dataset.cache_files[0]["filename"]).parent
    assert folder.name.startswith("trimtab-data-")
    assert {Path(file["filename"]).parent for file in large.dataset.cache_files} == {folder}
    assert large.dataset.to_list() == small.dataset.to_list() == rows
    assert large.dataset._fingerprint == small.dataset._fingerprint


def test_messages_keep_exactly_their_keys(load, write, tool_tokenizer):
    """Plain rows come first: the first chunk does not know of calls. Arguments differ in every row."""
    rows = [{"messages": [Q, A]} for _ in range(collect.CHUNK)]
    for arguments in ({"x": 1.5, "deep": {"a": None}}, {"y": ["z", 2]}, "text"):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        rows.append(
            {"messages": [Q, {**said("assistant", ""), "tool_calls": [call]}], "tools": '[{"type": "f"}]'}
        )
    write("a.jsonl", rows)
    made = load("sft", "a.jsonl", tokenizer=tool_tokenizer)
    assert [row["messages"] for row in made.dataset] == [row["messages"] for row in rows]
    assert [row["tools"] for row in made.dataset] == [None] * collect.CHUNK + ['[{"type": "f"}]'] * 3


def test_plain_messages_have_plain_features(load, write):
    write("a.jsonl", [messages(9)])
    message = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    assert load("dpo", "a.jsonl").dataset.features["prompt"] == datasets.List(message)


def test_all_kinds_of_files_give_the_same_dataset(load, write, tmp_path):
    rows = [messages(9 + number) for number in range(5)]
    write("a.jsonl", rows)
    write("b.json", rows)
    write("c.jsonl.gz", rows)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    made = [load("dpo", name).dataset for name in ("a.jsonl", "b.json", "c.jsonl.gz", "d.parquet")]
    assert {dataset._fingerprint for dataset in made} == {made[0]._fingerprint}
    assert all(dataset.to_list() == rows for dataset in made)


def test_a_stream_reads_only_what_it_needs(load, write):
    write("a.jsonl", "".join(json.dumps(pair(str(number))) + "\n" for number in range(1000)) + "oops")
    made = load("dpo", "a.jsonl", streaming=True)
    assert made.report.read == 0
    first = [row["prompt"] for row in islice(made.dataset, 3)]
    assert first == ["0", "1", "2"]
    assert 3 <= made.report.read < 300
    assert not made.report.complete
    with pytest.raises(UserError, match=r"^a.jsonl:1001 is not JSON"):
        list(made.dataset)


def test_a_stream_that_is_started_again_is_counted_once(load, write):
    write("a.jsonl", [messages(9)] * 5 + [messages(100)])
    made = load("dpo", "a.jsonl", max_length=64, streaming=True)
    next(iter(made.dataset))
    assert len(list(made.dataset)) == 5
    next(iter(made.dataset))
    assert made.report.summary() == "train: 5 of 6 rows kept; dropped 1 (longer than max_length = 64)"


def test_a_stream_goes_on_where_it_was_left(load, write):
    write("a.jsonl", [pair(str(number)) for number in range(20)])
    write("b.jsonl", [pair(f"b{number}") for number in range(20)])
    whole = list(load("dpo", "a.jsonl", "b.jsonl", streaming=True).dataset)
    first = load("dpo", "a.jsonl", "b.jsonl", streaming=True).dataset
    head = list(islice(first, 7))
    again = load("dpo", "a.jsonl", "b.jsonl", streaming=True).dataset
    again.load_state_dict(first.state_dict())
    assert head + list(again) == whole


def test_progress_is_shown_when_asked(load, write, capsys):
    from tests.unit.data.conftest import Spec

    write("a.jsonl", [pair()])
    spec = Spec((Source("a.jsonl"),))
    assert (
        load_data(spec, method="dpo", part="train", tokenizer=load.tokenizer, progress=True).report.rows == 1
    )
    assert capsys.readouterr().out == ""


def test_a_file_that_cannot_be_read(load, write, tmp_path):
    write("a.jsonl", [pair()])
    (tmp_path / "a.jsonl").chmod(0)
    if os.access(tmp_path / "a.jsonl", os.R_OK):
        pytest.skip("this user reads every file")
    assert load.error("dpo", "a.jsonl") == "cannot read a.jsonl: Permission denied"
