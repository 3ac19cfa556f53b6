"""Token ids that both vocabularies have must mean the same token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.unit.delta import checkpoints as made
from trimtab.delta import ReferenceDelta
from trimtab.errors import UserError

WORDS = ["<pad>", "<end>", "<unknown>", *"abcdefgh"]


def tokenizer(words: list[str]) -> object:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: id_ for id_, word in enumerate(words)}, unk_token="<unknown>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")


def folder(path: Path, seed: int, words: list[str] | None, rows: int = 40) -> Path:
    made.written(made.llama(seed, vocab_size=rows), path)
    if words is not None:
        tokenizer(words).save_pretrained(path)
    return path


def test_equal_tokenizers(tmp_path: Path) -> None:
    base, reference = tiny.write_models(tmp_path)
    assert len(ReferenceDelta.between(reference=reference, base=base)) == 20


def test_added_tokens_are_fine(tmp_path: Path) -> None:
    reference = folder(tmp_path / "r", 1, [*WORDS, "<user>", "<assistant>"], rows=42)
    base = folder(tmp_path / "b", 0, WORDS)
    delta = ReferenceDelta.between(reference=reference, base=base)
    assert delta.added_rows == {"model.embed_tokens.weight": 2, "lm_head.weight": 2}


def test_tokens_added_in_rows_that_were_there_already(tmp_path: Path) -> None:
    reference = folder(tmp_path / "r", 1, [*WORDS, "<user>"])
    delta = ReferenceDelta.between(reference=reference, base=folder(tmp_path / "b", 0, WORDS))
    assert not delta.added_rows
    assert delta.tensor("lm_head.weight")[len(WORDS)].any()  # a difference of two rows, like any other


def test_other_tokens_for_the_same_ids_are_refused(tmp_path: Path) -> None:
    reference = folder(tmp_path / "r", 1, [*WORDS[:-2], "h", "g"])
    base = folder(tmp_path / "b", 0, WORDS)
    with pytest.raises(UserError) as raised:
        ReferenceDelta.between(reference=reference, base=base)
    sentence = str(raised.value)
    assert "disagree on 2 of 11 shared token ids" in sentence
    assert (
        "(id 9 is 'h' in the reference and 'g' in the base, id 10 is 'g' in the reference and 'h'" in sentence
    )
    assert len(ReferenceDelta.between(reference=reference, base=base, check_tokenizers=False)) == 21


def test_only_the_first_few_are_named(tmp_path: Path) -> None:
    reference = folder(tmp_path / "r", 1, WORDS[:3] + WORDS[:2:-1])
    with pytest.raises(UserError, match=r"on 8 of 11 .*id 3 .*id 4 .*id 5 .*id 6 .*, …\)"):
        ReferenceDelta.between(reference=reference, base=folder(tmp_path / "b", 0, WORDS))


@pytest.mark.parametrize("words", [(WORDS, None), (None, WORDS), (None, None)])
def test_a_folder_without_a_tokenizer_is_not_checked(
    words: tuple[list[str] | None, list[str] | None], tmp_path: Path
) -> None:
    folders = folder(tmp_path / "r", 1, words[0]), folder(tmp_path / "b", 0, words[1])
    delta = ReferenceDelta.between(reference=folders[0], base=folders[1])
    assert torch.isfinite(delta.tensor("model.norm.weight")).all()


def test_a_broken_tokenizer(tmp_path: Path) -> None:
    folders = folder(tmp_path / "r", 1, WORDS), folder(tmp_path / "b", 0, WORDS)
    (folders[1] / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(UserError, match=r"cannot read the tokenizer in .*b: .*check_tokenizers=False"):
        ReferenceDelta.between(reference=folders[0], base=folders[1])
