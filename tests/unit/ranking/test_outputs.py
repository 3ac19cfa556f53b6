"""Outputs of models: every way to write them gives the same; what is none is refused with a hint."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trimtab.data.outcome import BadRow, Dropped
from trimtab.ranking.outputs import read_output

ASKED = [{"role": "user", "content": "hi"}]
ANSWER = [{"role": "assistant", "content": "yes"}]
HI = {"prompt": "hi"}
CALL = {"function": {"name": "f", "arguments": {}}}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "hi", "completion": "yes", "score": 2}, "hi"),
        ({"prompt": "hi", "response": "yes", "score": 2}, "hi"),
        ({"prompt": ASKED, "response": "yes", "score": 2}, ASKED),
        ({"prompt": ASKED, "completion": ANSWER, "score": 2}, ASKED),
        ({"prompt": "hi", "completion": ANSWER, "score": 2}, ASKED),
        ({"messages": ASKED + ANSWER, "score": 2}, ASKED),
        (
            {
                "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}],
                "score": 2,
            },
            ASKED,
        ),
        ({"instruction": "hi", "output": "yes", "score": 2}, ASKED),
        ({"query": "\n\nHuman: hi\n\nAssistant:", "response": " yes", "score": 2}, ASKED),
        ({"prompt": "hi", "responses": ["yes"], "scores": [2]}, "hi"),
        ({"prompt": "hi", "responses": [{"text": "yes", "score": 2}]}, "hi"),
    ],
)
def test_every_way_to_write_an_output(row: dict[str, Any], prompt: Any) -> None:
    output = read_output(row)
    assert (output.prompt, output.responses, output.scores) == (prompt, ("yes",), (2,))
    assert output.sources == (None,)
    assert output.as_chat().prompt == ASKED


def test_several_responses_with_what_is_known_of_them() -> None:
    row = {"prompt": "hi", "responses": ["a", "b"]}
    output = read_output({**row, "scores": [None, 1], "sources": ["x", None]})
    assert (output.responses, output.scores, output.sources) == (("a", "b"), (None, 1), ("x", None))
    objects = [{"output": "a", "generator": "x", "score": 2}, {"text": "b", "source": "y"}]
    output = read_output({**HI, "responses": objects})
    assert (output.responses, output.scores, output.sources) == (("a", "b"), (2, None), ("x", "y"))
    assert read_output({**HI, "response": "a", "generator": "x", "source": "y"}).sources == ("x",)
    assert read_output(row).scores == (None, None)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({}, "there are no columns; outputs need prompt"),
        ({**HI, "respnse": "yes"}, r"'respnse'; outputs need .* \(is 'respnse' meant to be 'response'\?\)"),
        ({**HI, "chosen": "a", "rejected": "b"}, "the columns are 'prompt', 'chosen', 'rejected'; outputs"),
        ({**HI, "response": 5}, "column 'response' holds the number 5; text is needed"),
        ({**HI, "completion": [*ANSWER, *ASKED, *ANSWER]}, "'completion' holds more than one message"),
        ({**HI, "responses": "yes"}, "column 'responses' holds the text 'yes'; a list"),
        ({**HI, "responses": ["a"], "scores": [1, 2]}, "1 responses need a list of as many 'scores'"),
        ({**HI, "responses": ["a"], "sources": "x"}, "1 responses need a list of as many 'sources'"),
        ({**HI, "response": "a", "tools": [{"name": "f"}]}, "cannot have tool definitions"),
        ({"messages": [*ASKED, {**ANSWER[0], "tool_calls": [CALL]}]}, "or more than its text"),
    ],
)
def test_what_is_refused(row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadRow, match=sentence):
        read_output(row)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": None, "response": "a"}, "null"),
        ({"prompt": "a", "response": None}, "null"),
        ({"messages": ASKED}, "empty_response"),
    ],
)
def test_what_is_left_out(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(Dropped) as dropped:
        read_output(row)
    assert dropped.value.reason == reason


TEXTS = st.sampled_from(["", "a", "\n\nHuman: hi", "assistant", "gpt"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.just(ASKED + ANSWER),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "text", "score", "from", "value"]), inner)
    ),
    max_leaves=5,
)
NAMES = (
    *("prompt", "query", "instruction", "response", "responses", "completion", "output", "messages"),
    *("conversations", "score", "scores", "sources", "tools", "input", "system", "history"),
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6))
def test_whatever_a_row_holds_it_is_read_left_out_or_refused(row: dict[str, Any]) -> None:
    try:
        output = read_output(row)
    except (BadRow, Dropped):
        return
    assert len(output.responses) == len(output.scores) == len(output.sources)
    assert all(isinstance(text, str) for text in output.responses)
