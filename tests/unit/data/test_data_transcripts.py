"""Human / Assistant transcripts become messages, turn by turn."""

from __future__ import annotations

import pytest

from tests.unit.data.conftest import said
from trimtab.data.outcome import Dropped
from trimtab.data.pairs import transcript_pair
from trimtab.data.transcripts import is_transcript, opening, turns

START = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three"
PROMPT = [said("user", "one"), said("assistant", "two"), said("user", "three")]


def test_turns():
    assert turns(f"{START}\n\nAssistant:  four \n") == [*PROMPT, said("assistant", "four")]


def test_a_name_inside_a_turn_is_no_turn():
    text = "\n\nHuman: Say\nAssistant: x. Human: y\n\nAssistant: no"
    assert turns(text) == [said("user", "Say\nAssistant: x. Human: y"), said("assistant", "no")]


def test_an_empty_turn_stays():
    assert turns(f"{START}\n\nAssistant: ")[-1] == said("assistant", "")


def test_a_speaker_twice_in_a_row_is_one_message():
    text = "\n\nHuman: one\n\nAssistant:\n\nAssistant: two\n\nAssistant: three\n\nHuman: four"
    assert turns(text) == [said("user", "one"), said("assistant", "two\n\nthree"), said("user", "four")]


@pytest.mark.parametrize("text", ["", "hello", "\n\nAssistant: hello", "Humanity: no"])
def test_what_is_no_transcript(text):
    assert not is_transcript(text)
    with pytest.raises(Dropped) as dropped:
        turns(text)
    assert dropped.value.reason == "malformed"


def test_an_open_turn_is_no_message():
    assert opening(f"{START}\n\nAssistant:") == opening(START) == PROMPT


def test_a_pair():
    row = {"chosen": f"{START}\n\nAssistant: good", "rejected": f"{START}\n\nAssistant: bad"}
    assert transcript_pair(row) == {
        "prompt": PROMPT,
        "chosen": [said("assistant", "good")],
        "rejected": [said("assistant", "bad")],
    }


def test_a_pair_with_its_prompt_apart():
    row = {"prompt": f"{START}\n\nAssistant:", "chosen": " good", "rejected": " bad"}
    assert transcript_pair(row)["prompt"] == PROMPT
    assert transcript_pair(row)["rejected"] == [said("assistant", "bad")]


@pytest.mark.parametrize(
    ("rejected", "reason"),
    [
        ("\n\nHuman: ONE\n\nAssistant: two\n\nHuman: three\n\nAssistant: bad", "prompts_differ"),
        ("\n\nHuman: one\n\nAssistant: bad", "prompts_differ"),
        ("oops", "malformed"),
    ],
)
def test_pairs_that_cannot_be_used(rejected, reason):
    with pytest.raises(Dropped) as dropped:
        transcript_pair({"chosen": f"{START}\n\nAssistant: good", "rejected": rejected})
    assert dropped.value.reason == reason


def test_transcripts_that_end_with_the_human():
    with pytest.raises(Dropped) as dropped:
        transcript_pair({"chosen": f"{START}", "rejected": f"{START}!"})
    assert dropped.value.reason == "empty_response"
