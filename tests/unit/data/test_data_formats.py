"""Every format is told from its columns and becomes TRL's columns; what is in none says what it lacks."""

from __future__ import annotations

import json

import pytest

from tests.unit.data.conftest import pair, said
from trimtab.data import FORMATS
from trimtab.data.formats import detect
from trimtab.data.outcome import BadRow, Dropped

Q, A, B, S = said("user", "q"), said("assistant", "a"), said("assistant", "b"), said("system", "s")
SPOKEN = {"prompt": [Q], "chosen": [A], "rejected": [B]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def convert(row, method, format="auto"):
    layout = detect(row, method, format)
    return layout.format, layout.read(row)


PAIRS = {
    "trl, text": (pair("q", "a", "b"), "trl", pair("q", "a", "b")),
    "trl, messages": (SPOKEN, "trl", SPOKEN),
    "trl, prompt inside the answers": (
        {"chosen": [S, Q, A], "rejected": [S, Q, B]},
        "trl",
        {**SPOKEN, "prompt": [S, Q]},
    ),
    "trl, prompt inside the text": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        "trl",
        pair("The sky is", " blue.", " green."),
    ),
    "trl, text prompt and whole conversations": (
        {"prompt": "q", "chosen": [Q, A], "rejected": [Q, B]},
        "trl",
        SPOKEN,
    ),
    "trl, prompt repeated in the answers": (
        {"prompt": [Q], "chosen": [Q, A], "rejected": [Q, B]},
        "trl",
        SPOKEN,
    ),
    "trl, prompt with a system message that the answers lack": (
        {"prompt": [S, Q], "chosen": [Q, A], "rejected": [Q, B]},
        "trl",
        {**SPOKEN, "prompt": [S, Q]},
    ),
    "trl, text prompt and answers as messages": (
        {"prompt": "q", "chosen": [A], "rejected": [B]},
        "trl",
        SPOKEN,
    ),
    "trl, prompt of messages and answers as text": (
        {"prompt": [Q], "chosen": "a", "rejected": "b"},
        "trl",
        SPOKEN,
    ),
    "trl, tools": ({**SPOKEN, "tools": [TOOL]}, "trl", {**SPOKEN, "tools": json.dumps([TOOL])}),
    "trl, conversations that part early and go on with tools": (
        {"chosen": [Q, {**A, "content": "", "tool_calls": [CALL]}, said("tool", "1"), A], "rejected": [Q, B]},
        "trl",
        {
            "prompt": [Q],
            "chosen": [{**A, "content": "", "tool_calls": [CALL]}, said("tool", "1"), A],
            "rejected": [B],
        },
    ),
    "LLaMA-Factory's newer messages": (
        {
            "chosen_messages": [
                {"role": "user", "content": [{"type": "text", "value": "q"}], "loss_weight": 0.0},
                {"role": "assistant", "content": [{"type": "text", "value": "a"}], "loss_weight": 1.0},
            ],
            "rejected_messages": [Q, B],
        },
        "trl",
        SPOKEN,
    ),
    "hh": (
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        "hh",
        SPOKEN,
    ),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
            "system": "s",
        },
        "sharegpt",
        {**SPOKEN, "prompt": [S, Q]},
    ),
    "sharegpt with answers as text": (
        {"conversations": [{"from": "human", "value": "q"}], "chosen": "a", "rejected": "b"},
        "sharegpt",
        SPOKEN,
    ),
    "alpaca": (
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b", "history": None, "system": None},
        "alpaca",
        SPOKEN,
    ),
    "ranked": (
        {"prompt": "q", "responses": ["b", "a", "c"], "scores": [0, 2, 1]},
        "ranked",
        pair("q", "a", "b"),
    ),
    "ranked, messages": ({"prompt": [Q], "responses": ["b", "a"], "scores": [0, 2]}, "ranked", SPOKEN),
    "ranked, RRHF's query": (
        {"query": "\n\nHuman: q\n\nAssistant:", "responses": [" a", " b"], "scores": [1.5, -1]},
        "ranked",
        SPOKEN,
    ),
    "ranked, AlpacaEval's objects": (
        {
            "instruction": "q",
            "responses": [
                {"generator": "m", "output": "b", "preference": 1.0},
                {"output": "a", "preference": 1.5},
            ],
        },
        "ranked",
        SPOKEN,
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name):
    row, format, made = PAIRS[name]
    assert convert(row, "dpo") == (format, made)


INSTRUCTIONS = {
    "trl, messages": ({"messages": [S, Q, A]}, "trl", {"messages": [S, Q, A]}),
    "trl, prompt and completion": (
        {"prompt": "q", "completion": "a"},
        "trl",
        {"prompt": "q", "completion": "a"},
    ),
    "trl, the same as messages": (
        {"prompt": [Q], "completion": [A]},
        "trl",
        {"prompt": [Q], "completion": [A]},
    ),
    "trl, text completion": ({"prompt": [Q], "completion": "a"}, "trl", {"prompt": [Q], "completion": [A]}),
    "trl, text": ({"text": "q a"}, "trl", {"text": "q a"}),
    "alpaca": (
        {"instruction": "do", "input": "this", "output": "a", "system": "s", "history": [["q", "a"]]},
        "alpaca",
        {"prompt": [S, Q, A, said("user", "do\nthis")], "completion": [A]},
    ),
    "alpaca beside a rendered text": (
        {"instruction": "q", "output": "a", "text": "### q"},
        "alpaca",
        {"prompt": [Q], "completion": [A]},
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
        "sharegpt",
        {"messages": [S, Q, A]},
    ),
    "sharegpt with a tool": (
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "a"},
            ],
            "tools": '[{"name": "f", "parameters": {}}]',
        },
        "sharegpt",
        {
            "messages": [Q, {**A, "content": "", "tool_calls": [CALL]}, said("tool", "2"), A],
            "tools": json.dumps([TOOL]),
        },
    ),
    "OpenAI's tool calls, arguments as text": (
        {
            "messages": [
                Q,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
                    ],
                },
                {"role": "tool", "tool_call_id": "1", "content": "2"},
                A,
            ]
        },
        "trl",
        {
            "messages": [
                Q,
                {"role": "assistant", "content": "", "tool_calls": [{"id": "1", **CALL}]},
                {"role": "tool", "content": "2", "tool_call_id": "1"},
                A,
            ]
        },
    ),
    "reasoning and calls as typed parts": (
        {
            "messages": [
                Q,
                {
                    "role": "assistant",
                    "content": [
                        {"type": "reasoning", "value": "hm"},
                        {"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                        {"type": "text", "text": "a"},
                    ],
                },
            ],
            "tools": "[]",
        },
        "trl",
        {"messages": [Q, {**A, "tool_calls": [CALL], "reasoning_content": "hm"}]},
    ),
    "the chosen side of a pair": (SPOKEN, "trl", {"prompt": [Q], "completion": [A]}),
    "the chosen side of a transcript": (
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        "hh",
        {"prompt": [Q], "completion": [A]},
    ),
    "the chosen side of a sharegpt pair": (
        {"conversations": [{"from": "human", "value": "q"}], "chosen": "a", "rejected": "b"},
        "sharegpt",
        {"prompt": [Q], "completion": [A]},
    ),
    "labelled as desirable": ({"messages": [Q, A], "label": True}, "trl", {"messages": [Q, A]}),
    "a class label": (
        {"prompt": "q", "completion": "a", "label": 0},
        "trl",
        {"prompt": "q", "completion": "a"},
    ),
}


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instructions(name):
    row, format, made = INSTRUCTIONS[name]
    assert convert(row, "sft") == (format, made)


def test_text_can_be_read_as_a_chat():
    assert convert({**pair("q", "a", "b"), "system": "s"}, "dpo", "chat") == (
        "chat",
        {**SPOKEN, "prompt": [S, Q]},
    )
    assert convert({"prompt": "q", "completion": "a"}, "sft", "chat") == (
        "chat",
        {"prompt": [Q], "completion": [A]},
    )


def test_a_transcript_can_be_read_as_plain_text():
    row = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
    assert convert(row, "dpo", "trl") == ("trl", pair("\n\nHuman: q\n\nAssistant:", " a", " b"))


DROPPED = {
    "tie": ("dpo", {"prompt": "q", "responses": ["a", "b"], "scores": [1, 1.0]}),
    "single_response": ("dpo", {"prompt": "q", "responses": ["a"], "scores": [1]}),
    "prompts_differ": ("dpo", {"chosen": [Q, A, Q, A], "rejected": [Q, B, Q, A]}),
    "labelled_bad": ("sft", {"prompt": "q", "completion": "a", "label": False}),
    "malformed": ("dpo", {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "oops"}),
}


@pytest.mark.parametrize("reason", DROPPED)
def test_rows_that_are_left_out(reason):
    method, row = DROPPED[reason]
    with pytest.raises(Dropped) as dropped:
        convert(row, method)
    assert dropped.value.reason == reason


BAD = {
    "number in a text column": ("dpo", pair(chosen=3), "column 'chosen' holds the number 3; text is needed"),
    "texts and messages": (
        "dpo",
        {"chosen": "a", "rejected": [B]},
        "columns 'chosen' and 'rejected' must both be",
    ),
    "list of texts": (
        "sft",
        {"messages": ["q"]},
        "column 'messages' holds a list of texts; a list of messages is needed",
    ),
    "no role": (
        "sft",
        {"messages": [{"content": "q"}]},
        "message 1 of column 'messages' has neither 'role' nor 'from'; it has 'content'",
    ),
    "unknown role": (
        "sft",
        {"messages": [Q, said("asistant", "a")]},
        "message 2 of column 'messages' has the unknown role 'asistant' (did you mean 'assistant'?); known ",
    ),
    "no content": (
        "sft",
        {"messages": [{"role": "user"}]},
        "message 1 of column 'messages' has null as its content; text is needed",
    ),
    "picture": (
        "sft",
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "message 1 of column 'messages' has a part that is the text 'image'; only text is read",
    ),
    "call that is not JSON": (
        "sft",
        {"conversations": [{"from": "function_call", "value": "f(1)"}]},
        "message 1 of column 'conversations' is a function call that is not JSON (Expecting value): the ",
    ),
    "call without a name": (
        "sft",
        {"conversations": [{"from": "function_call", "value": "{}"}]},
        "message 1 of column 'conversations' has a function call without a name: an empty object",
    ),
    "call with a huge number": (
        "sft",
        {
            "conversations": [
                {
                    "from": "function_call",
                    "value": '{"name": "f", "arguments": {"x": [99999999999999999999]}}',
                }
            ]
        },
        "message 1 of column 'conversations' has a function call with the number 99999999999999999999, ",
    ),
    "tools that are not JSON": (
        "sft",
        {"messages": [Q, A], "tools": "f"},
        "column 'tools' is not JSON (Expecting value): the text 'f'",
    ),
    "tools that are texts": (
        "sft",
        {"messages": [Q, A], "tools": ["f"]},
        "column 'tools' holds a list of texts; a list of tool definitions is needed",
    ),
    "scores that do not match": (
        "dpo",
        {"prompt": "q", "responses": ["a", "b"], "scores": [1]},
        "2 responses need a list of as many 'scores', not a list of numbers",
    ),
    "no scores": (
        "dpo",
        {"prompt": "q", "responses": ["a", "b"]},
        "2 responses need a list of as many 'scores', not null",
    ),
    "score that is no number": (
        "dpo",
        {"prompt": "q", "responses": ["a", "b"], "scores": [1, "2"]},
        "column 'scores' holds the text '2'; every score must be a finite number",
    ),
    "score that is NaN": (
        "dpo",
        {"prompt": "q", "responses": ["a", "b"], "scores": [1, float("nan")]},
        "column 'scores' holds the number nan; every score must be a finite number",
    ),
    "response that is no text": (
        "dpo",
        {"prompt": "q", "responses": ["a", 2], "scores": [1, 2]},
        "column 'responses' holds the number 2; every response must be text",
    ),
    "history of texts": (
        "sft",
        {"instruction": "q", "output": "a", "history": ["x"]},
        "column 'history' holds a list of texts; a list of [question, answer] is needed",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_rows_that_stop_the_run(name):
    method, row, sentence = BAD[name]
    with pytest.raises(BadRow) as caught:
        convert(row, method)
    assert str(caught.value).startswith(sentence)


UNFIT = {
    "a typo": (
        "dpo",
        {"prompt": "q", "chosen": "a", "rejcted": "b"},
        " (is 'rejcted' meant to be 'rejected'?)",
    ),
    "a null": ("dpo", {"prompt": "q", "chosen": "a", "rejected": None}, " ('rejected' is null here)"),
    "KTO's data": ("dpo", {"prompt": "q", "completion": "a", "label": True}, "which method kto reads)"),
    "instructions": (
        "dpo",
        {"instruction": "q", "output": "a"},
        " (this is instruction data, which method sft reads)",
    ),
    "ranked": (
        "sft",
        {"prompt": "q", "responses": [], "scores": []},
        " (these are ranked responses, which method dpo reads)",
    ),
    "something else": ("sft", {"question": "q"}, "; or conversations; or text"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_columns_that_fit_no_format(name):
    method, row, ending = UNFIT[name]
    with pytest.raises(BadRow) as caught:
        detect(row, method)
    columns = ", ".join(repr(column) for column in row)
    assert str(caught.value).startswith(f"the columns are {columns}; method {method} needs ")
    assert str(caught.value).endswith(ending)


def test_a_format_that_the_columns_do_not_fit():
    with pytest.raises(BadRow) as caught:
        detect({"prompt": "q", "chosen": "a", "rejected": "b"}, "dpo", "alpaca")
    assert str(caught.value) == (
        "the columns are 'prompt', 'chosen', 'rejected'; method dpo in format 'alpaca' needs "
        "instruction + chosen + rejected"
    )
    with pytest.raises(BadRow, match=r"^format 'ranked' is of no use to method sft"):
        detect({"text": "a"}, "sft", "ranked")


def test_the_recipe_knows_the_same_formats():
    from typing import get_args

    sections = pytest.importorskip("trimtab.recipe.sections")
    assert set(get_args(sections.Data.model_fields["format"].annotation)) == set(FORMATS)
