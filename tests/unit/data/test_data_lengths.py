"""A row's length is what TRL makes of it: the same tokens, template and end-of-sequence token included."""

from __future__ import annotations

import inspect
import warnings
from types import SimpleNamespace

import pytest

from tests import tiny
from tests.unit.data.conftest import TOOL_TEMPLATE, pair, said
from trimtab.data.measure import Ruler

SYSTEM_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|system|>be kind<|end|>{% endif %}" + tiny.CHAT_TEMPLATE
)


def with_start(**options):
    """A tokenizer that, like Llama's, puts a token in front of text, and whose template writes it itself."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.tokenizer("<|pad|>" + SYSTEM_TEMPLATE, **options)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", tokenizer.pad_token_id)]
    )
    return tokenizer


TOKENIZERS = {"plain": tiny.tokenizer, "start": with_start, "tools": lambda: tiny.tokenizer(TOOL_TEMPLATE)}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": [1]}}}
TOOLS = '[{"type": "function", "function": {"name": "f"}}]'
Q, A = said("user", "question"), said("assistant", "answer")
PAIRS = {
    "text": pair("The sky is", " blue", " green, and more"),
    "text that has its end": pair("q", "a<|end|>", "b"),
    "messages": {
        "prompt": [said("system", "s"), Q],
        "chosen": [A],
        "rejected": [said("assistant", "no, longer")],
    },
}
CALLING = {"prompt": [Q], "chosen": [{**said("assistant", ""), "tool_calls": [CALL]}, said("tool", "2"), A]}
INSTRUCTIONS = {
    "text": {"text": "once upon a time"},
    "text that has its end": {"text": "once<|end|>"},
    "prompt and completion": {"prompt": "1 + 1 =", "completion": " 2"},
    "prompt and completion as messages": {"prompt": [Q], "completion": [A]},
    "messages": {"messages": [said("system", "s"), Q, A, said("user", "more"), A]},
}
WITH_TOOLS = {"messages": [*CALLING["prompt"], *CALLING["chosen"]], "tools": TOOLS}


def measured(tokenizer, row, max_length=None):
    ruler = Ruler(tokenizer, max_length)
    conversational = not isinstance(next(iter(row.values())), str)
    return ruler.measure([ruler.render(row)], conversational)[0].length


def trl_prepared(trainer, tokenizer, rows, max_length, **options):
    """Run TRL's own preparation of a dataset: of the trainer it needs only the tokenizer."""
    from datasets import Dataset, Features, Json, List, Value

    kinds = {
        key: List(Json()) if isinstance(value, list) else Value("string") for key, value in rows[0].items()
    }
    trainer_like = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=True)
    args = {"max_length": max_length, "truncation_mode": "keep_start", "dataset_num_proc": None, **options}
    wanted = {
        "dataset": Dataset.from_list(rows, features=Features(kinds)),
        "processing_class": tokenizer,
        "args": SimpleNamespace(**args),
        "dataset_name": "train",
        "packing": False,
        "formatting_func": None,
    }
    names = inspect.signature(trainer._prepare_dataset).parameters
    return trainer._prepare_dataset(trainer_like, **{name: wanted[name] for name in names if name != "self"})


@pytest.fixture(scope="module")
def trl():
    with warnings.catch_warnings():
        # What TRL's dependencies deprecate among themselves while being imported is not ours to fix.
        warnings.simplefilter("ignore")
        import trl
    return trl


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """TRL's preparation asks accelerate which process it is in."""
    from accelerate import PartialState

    PartialState(cpu=True)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("row", PAIRS)
def test_pairs_are_as_long_as_trl_makes_them(trl, name, row):
    tokenizer = TOKENIZERS[name]()
    made = trl_prepared(trl.DPOTrainer, tokenizer, [PAIRS[row]], None)[0]
    sides = [len(made["prompt_ids"]) + len(made[side]) for side in ("chosen_ids", "rejected_ids")]
    assert measured(tokenizer, PAIRS[row]) == max(sides)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("row", INSTRUCTIONS)
def test_instructions_are_as_long_as_trl_makes_them(trl, name, row):
    assert measured(TOKENIZERS[name](), INSTRUCTIONS[row]) == trl_length(
        trl, TOKENIZERS[name](), INSTRUCTIONS[row]
    )


def test_tools_and_calls_are_as_long_as_trl_makes_them(trl):
    tokenizer = TOKENIZERS["tools"]()
    length = measured(tokenizer, WITH_TOOLS)
    assert length == trl_length(trl, tokenizer, WITH_TOOLS)
    assert length > measured(tokenizer, {"messages": WITH_TOOLS["messages"]})


def trl_length(trl, tokenizer, row):
    options = {"dataset_text_field": "text", "shuffle_dataset": False, "assistant_only_loss": False}
    return len(trl_prepared(trl.SFTTrainer, tokenizer, [row], None, **options)[0]["input_ids"])


@pytest.mark.parametrize("answer", [1, 20])
@pytest.mark.parametrize("prompt", [1, 5, 20])
def test_what_trl_drops_for_its_prompt_we_count(trl, load, write, prompt, answer):
    """When too long rows are left to TRL, it silently drops those whose prompt fills the limit; we say so."""
    row = {"prompt": [said("user", "p" * prompt)], "chosen": [said("assistant", "a" * answer)]}
    row["rejected"] = [said("assistant", "b" * answer)]
    limit = 16
    write("a.jsonl", [row, {**row, "prompt": [said("user", "x")], "chosen": [said("assistant", "y")]}])
    made = load("dpo", "a.jsonl", max_length=limit, overlong="truncate")
    left = trl_prepared(trl.DPOTrainer, load.tokenizer, [row], limit)
    assert made.report.dropped.get("prompt_fills", 0) == 1 - len(left)
    assert (
        len(trl_prepared(trl.DPOTrainer, load.tokenizer, made.dataset.to_list(), limit)) == made.report.rows
    )
