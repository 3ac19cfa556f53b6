"""Embeddings of models with other tokenizers, row by row against the rules written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.delta import checkpoints as made
from trimtab.delta.locate import Located
from trimtab.errors import UserError
from trimtab.merge.architecture import Keys, resized, vocabulary_size
from trimtab.merge.inputs import FolderInput, Input
from trimtab.merge.vocabulary import Aligned, Vocabulary, build, check_vocabularies, vocabulary_keys

SPECIAL = ["<end>", "<unknown>"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def words(tokens: list[str], added: list[str] | None = None) -> Any:
    """A tokenizer with a token per word, ids in the order of the list."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: id_ for id_, word in enumerate(tokens)}, unk_token="<unknown>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken(token, special=True) for token in tokens if token in SPECIAL])
    made_of = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unknown>", eos_token="<end>")
    made_of.add_tokens([AddedToken(token, special=token.startswith("<")) for token in added or []])
    return made_of


def pairs(tokens: list[str], merges: list[tuple[str, str]]) -> Any:
    """A BPE tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: id_ for id_, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unknown>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unknown>", eos_token="<end>")


def model(
    folder: Path,
    seed: int,
    tokenizer: Any,
    rows: int | None = None,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> FolderInput:
    size = rows or max(tokenizer.get_vocab().values()) + 1
    made.written(made.llama(seed, vocab_size=size, **config).to(dtype), folder, shard="1GB")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return FolderInput(Located(folder, folder.name))


def whole(model: Input, key: str) -> Tensor:
    shape = torch.Size(model.shape(key))
    return model.read(key, 0, shape.numel()).view(shape)


def aligned(inputs: list[FolderInput], vocabulary: Vocabulary) -> list[Aligned]:
    return [Aligned(inputs, number, vocabulary, vocabulary_keys(one)) for number, one in enumerate(inputs)]


def by_the_rules(
    matrices: list[Tensor], vocabularies: list[dict[str, int]], base: int | None, output: dict[str, int]
) -> list[Tensor]:
    """The oracle: each model's matrix in the output's order, token by token."""
    kind = matrices[0].dtype
    for matrix in matrices:
        kind = torch.promote_types(kind, matrix.dtype)
    results = [torch.zeros(max(output.values()) + 1, matrices[0].shape[1], dtype=kind) for _ in matrices]
    for token, new in output.items():
        own = {}
        for number, vocabulary in enumerate(vocabularies):
            if token in vocabulary and vocabulary[token] < len(matrices[number]):
                own[number] = matrices[number][vocabulary[token]]
        for number, result in enumerate(results):
            if number in own:
                result[new] = own[number]
            elif len(own) == 1:
                result[new] = next(iter(own.values()))
            elif base in own:
                result[new] = own[base]
            elif own:
                total = torch.zeros_like(next(iter(own.values())), dtype=torch.float32)
                for row in own.values():
                    total = total + row.float()
                result[new] = total / len(own)
    return results


def assert_follows_the_rules(
    inputs: list[FolderInput], base: FolderInput | None, vocabulary: Vocabulary
) -> None:
    output = vocabulary.tokenizer.get_vocab()
    owned = [tokens_in(one.folder) for one in inputs]
    place = None if base is None else inputs.index(base)
    for key in (EMBEDDING, HEAD):
        expected = by_the_rules([whole(one, key) for one in inputs], owned, place, output)
        for one, wanted in zip(aligned(inputs, vocabulary), expected, strict=True):
            assert one.shape(key) == tuple(wanted.shape) == (vocabulary.size, 16)
            assert one.dtype(key) == wanted.dtype
            assert torch.equal(whole(one, key), wanted)


def tokens_in(folder: Path) -> dict[str, int]:
    from transformers import AutoTokenizer

    found: dict[str, int] = AutoTokenizer.from_pretrained(folder).get_vocab()
    return found


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[FolderInput]:
    """Overlapping vocabularies: some words in one, two or three of them, in other orders."""
    folder = tmp_path_factory.mktemp("three")
    return [
        model(folder / "base", 0, words([*SPECIAL, "a", "b", "c", "d"])),
        model(folder / "other", 1, words(["b", "a", *SPECIAL, "e", "f", "g"], ["<user>", "plain"])),
        model(folder / "third", 2, words([*SPECIAL, "f", "e", "d", "h"], ["<user>", "<tool>"])),
    ]


def test_union(three: list[FolderInput]) -> None:
    vocabulary = build(three, three[0], "union")
    tokens = vocabulary.tokenizer.get_vocab()
    order = [*SPECIAL, "a", "b", "c", "d", "e", "f", "g", "h", "<user>", "plain", "<tool>"]
    assert sorted(tokens, key=tokens.__getitem__) == order
    assert vocabulary.size == len(order)
    assert_follows_the_rules(three, three[0], vocabulary)


def test_whose_row_is_taken(three: list[FolderInput]) -> None:
    vocabulary = build(three, three[0], "union")
    ours, tokens = aligned(three, vocabulary), vocabulary.tokenizer.get_vocab()
    raw = [whole(one, EMBEDDING) for one in three]
    rows = [whole(one, EMBEDDING) for one in ours]
    assert torch.equal(rows[1][tokens["c"]], raw[0][4])  # in one model only
    assert torch.equal(rows[1][tokens["d"]], raw[0][5])  # in two, the base among them
    assert torch.equal(rows[0][tokens["e"]], (raw[1][4] + raw[2][3]) / 2)  # in two, not in the base
    assert torch.equal(rows[2][tokens["b"]], raw[0][3])
    assert torch.equal(rows[2][tokens["<tool>"]], raw[2][7])


def test_union_without_a_base(three: list[FolderInput]) -> None:
    vocabulary = build(three, None, "union")
    assert vocabulary.base is None
    assert_follows_the_rules(three, None, vocabulary)


def test_the_bases_tokenizer(three: list[FolderInput]) -> None:
    vocabulary = build(three, three[0], "base")
    assert vocabulary.tokenizer.get_vocab() == tokens_in(three[0].folder)
    assert vocabulary.size == 6
    assert_follows_the_rules(three, three[0], vocabulary)


def test_a_models_tokenizer(three: list[FolderInput], tmp_path: Path) -> None:
    vocabulary = build(three, three[0], three[2])
    assert vocabulary.tokenizer.get_vocab() == tokens_in(three[2].folder)
    assert_follows_the_rules(three, three[0], vocabulary)
    stranger = model(tmp_path / "stranger", 3, words([*SPECIAL, "a", "nobody"]))
    vocabulary = build(three, three[0], stranger)
    assert_follows_the_rules(three, three[0], vocabulary)
    assert not whole(aligned(three, vocabulary)[1], EMBEDDING)[3].any()


def test_who_only_gives_the_tokenizer_gives_no_rows(three: list[FolderInput], tmp_path: Path) -> None:
    stranger = model(tmp_path / "stranger", 3, words([*SPECIAL, "a", "nobody"]))
    inputs = [*three, stranger]
    vocabulary = build(inputs, three[0], stranger)
    one = Aligned(inputs, 0, vocabulary, vocabulary_keys(three[0]), members=[0, 1, 2])
    assert not whole(one, EMBEDDING)[3].any()
    assert whole(Aligned(inputs, 0, vocabulary, vocabulary_keys(three[0])), EMBEDDING)[3].any()


@pytest.mark.parametrize(
    "dtypes", [("float32", "bfloat16", "bfloat16"), ("bfloat16",) * 3, ("float16", "bfloat16", "float16")]
)
def test_dtypes_promote(dtypes: tuple[str, ...], tmp_path: Path) -> None:
    lists = [[*SPECIAL, "a"], [*SPECIAL, "x", "y"], [*SPECIAL, "y", "x", "a"]]
    inputs = [
        model(tmp_path / f"{number}", number, words(tokens), dtype=getattr(torch, dtype))
        for number, (tokens, dtype) in enumerate(zip(lists, dtypes, strict=True))
    ]
    assert_follows_the_rules(inputs, inputs[0], build(inputs, inputs[0], "union"))


def test_ranges_are_parts_of_the_whole(three: list[FolderInput]) -> None:
    generator = torch.Generator().manual_seed(0)
    for one in aligned(three, build(three, three[0], "union")):
        for key in (EMBEDDING, HEAD, "model.norm.weight"):
            flat = whole(one, key).view(-1)
            for low, high in (
                torch.randint(0, len(flat) + 1, (30, 2), generator=generator).sort(1)[0].tolist()
            ):
                assert torch.equal(one.read(key, low, high), flat[low:high])


class Counted:
    """An input that remembers what was read from it."""

    def __init__(self, model: Input) -> None:
        self.model, self.reads = model, list[tuple[int, int]]()
        self.label, self.folder, self.config = model.label, model.folder, model.config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def read(self, key: str, low: int, high: int) -> Tensor:
        self.reads.append((low, high))
        return self.model.read(key, low, high)


def test_ids_that_are_the_same_are_read_as_they_lie(tmp_path: Path) -> None:
    tokens = [*SPECIAL, *map(str, range(50))]
    one = Counted(model(tmp_path / "one", 0, words(tokens)))
    two = Counted(model(tmp_path / "two", 1, words([*tokens, "x"])))
    inputs = [one, two]
    vocabulary = build(inputs, one, "union")
    ours = [Aligned(inputs, number, vocabulary, vocabulary_keys(one)) for number in (0, 1)]
    view = ours[1].read(EMBEDDING, 5, 800)
    assert two.reads == [(5, 800)]
    assert view.data_ptr() == two.model.read(EMBEDDING, 5, 800).data_ptr()
    ours[0].read(EMBEDDING, 3, 53 * 16)
    assert one.reads == [(0, 52 * 16)]  # one read for all of its own rows, and one for the row it lacks
    assert two.reads[1:] == [(52 * 16, 53 * 16)]


def test_padding_rows_are_dropped(tmp_path: Path) -> None:
    inputs = [
        model(tmp_path / "padded", 0, words([*SPECIAL, "a"]), rows=8),
        model(tmp_path / "other", 1, words(["a", *SPECIAL])),
    ]
    for source in ("base", "union"):
        vocabulary = build(inputs, inputs[0], source)  # type: ignore[arg-type]
        assert vocabulary.size == 3
        assert_follows_the_rules(inputs, inputs[0], vocabulary)
        assert vocabulary.configured(inputs[0].config, 0)["vocab_size"] == 3


def test_tokens_beyond_the_rows_are_cut(tmp_path: Path) -> None:
    long = pairs([*SPECIAL, "a", "b", "ab", "aba"], [("a", "b"), ("ab", "a")])
    inputs = [
        model(tmp_path / "long", 0, long, rows=5),
        model(tmp_path / "other", 1, words([*SPECIAL, "aba", "c"])),
    ]
    vocabulary = build(inputs, inputs[0], "base")
    assert vocabulary.tokenizer.get_vocab() == {"<end>": 0, "<unknown>": 1, "a": 2, "b": 3, "ab": 4}
    assert vocabulary.tokenizer.tokenize("aba") == ["ab", "a"]
    assert_follows_the_rules(inputs, inputs[0], vocabulary)
    assert_follows_the_rules(inputs, inputs[0], build(inputs, inputs[0], "union"))
    with pytest.raises(
        UserError, match=r"tokenizer of words has 1 tokens without a row in the model \(it has 3: a\)"
    ):
        build([model(tmp_path / "words", 2, words([*SPECIAL, "b", "a"]), rows=3)], None, "base")


def test_a_special_token_that_is_cut_does_not_come_back(tmp_path: Path) -> None:
    tokenizer = pairs([*SPECIAL, "a"], [])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == 3
    vocabulary = build([model(tmp_path / "one", 0, tokenizer, rows=3)], None, "base")
    vocabulary.tokenizer.save_pretrained(tmp_path / "saved")
    assert "<pad>" not in tokens_in(tmp_path / "saved")


def test_a_merged_tokenizer_reads_as_it_should(three: list[FolderInput], tmp_path: Path) -> None:
    vocabulary = build(three, three[0], "union")
    vocabulary.tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == vocabulary.tokenizer.get_vocab()
    assert loaded.tokenize("a <user> g d") == ["a", "<user>", "g", "d"]
    assert loaded.decode(loaded("b <user> plain<end>").input_ids, skip_special_tokens=True).split() == [
        "b",
        "plain",
    ]


def test_token_ids_in_configurations_follow(three: list[FolderInput]) -> None:
    vocabulary = build(three, three[0], "union")
    config = {
        "vocab_size": 9,
        "eos_token_id": [2, 5],
        "pad_token_id": 3,
        "bos_token_id": None,
        "x": 3,
        "text_config": {"vocab_size": 9, "eos_token_id": 4},
    }
    assert vocabulary.configured(config, 1) == {
        "vocab_size": 13,
        "eos_token_id": [0, 7],
        "pad_token_id": 1,
        "bos_token_id": None,
        "x": 3,
        "text_config": {"vocab_size": 13, "eos_token_id": 6},
    }
    lost = build(three, three[0], "base").configured({"pad_token_id": 7, "eos_token_id": [5, 6]}, 1)
    assert lost == {"pad_token_id": None, "eos_token_id": None}


def test_a_model_without_a_tokenizer_has_the_bases(three: list[FolderInput], tmp_path: Path) -> None:
    bare = model(tmp_path / "bare", 5, None, rows=6)
    vocabulary = build([three[0], bare], three[0], "union")
    assert vocabulary.rows[1].tolist() == list(range(6))
    with pytest.raises(
        UserError, match=r"tokenizer_source needs the tokenizer of bare, but .*bare holds none"
    ):
        build([bare, three[0]], bare, "base")


def test_an_id_without_a_token_is_zeros(tmp_path: Path) -> None:
    tokenizer = words([*SPECIAL, "a"])
    one = model(tmp_path / "one", 0, tokenizer, rows=6)
    path = one.folder / "tokenizer.json"
    stated = json.loads(path.read_text())
    stated["model"]["vocab"]["a"] = 4
    path.write_text(json.dumps(stated))
    vocabulary = build([one], one, "base")
    assert vocabulary.size == 5
    rows = whole(aligned([one], vocabulary)[0], EMBEDDING)
    assert not rows[2:4].any()
    assert torch.equal(rows[4], whole(one, EMBEDDING)[4])


def test_a_tied_model_keeps_its_only_key(three: list[FolderInput], tmp_path: Path) -> None:
    tied = model(tmp_path / "tied", 3, words([*SPECIAL, "z"]), tie_word_embeddings=True)
    assert vocabulary_keys(tied) == {EMBEDDING}
    inputs = [three[0], tied]
    vocabulary = build(inputs, three[0], "union")
    assert whole(aligned(inputs, vocabulary)[1], EMBEDDING).shape == (7, 16)
    head = whole(aligned(inputs, vocabulary)[0], HEAD)
    assert torch.equal(head[6], whole(tied, EMBEDDING)[2])  # the head of a tied model is its embedding


def test_rows_of_other_lengths_are_refused(three: list[FolderInput], tmp_path: Path) -> None:
    wide = model(tmp_path / "wide", 3, words([*SPECIAL, "z"]), hidden_size=32)
    inputs = [three[0], wide]
    vocabulary = build(inputs, three[0], "union")
    with pytest.raises(UserError, match=r"have different lengths: 16 in base, 32 in wide"):
        aligned(inputs, vocabulary)


def test_what_is_checked_without_tokenizer_source(three: list[FolderInput], tmp_path: Path) -> None:
    tokens = [*SPECIAL, "a", "b", "c", "d"]
    check_vocabularies([three[0], model(tmp_path / "same", 1, words(tokens))])
    check_vocabularies([three[0], model(tmp_path / "bare", 1, None, rows=6)])
    check_vocabularies([three[0], model(tmp_path / "fewer", 1, words(tokens[:-1]), rows=6)])
    with pytest.raises(UserError) as raised:
        check_vocabularies([three[0], three[1]])
    sentence = str(raised.value)
    assert (
        f"base has 6 rows, one per token, in {HEAD}, {EMBEDDING}, and other has 9; set tokenizer_source"
        in sentence
    )
    other = model(tmp_path / "other", 1, words([*SPECIAL, "a", "b", "d", "c"]))
    with pytest.raises(
        UserError, match=r"disagree on 2 of 6 shared token ids \(id 4 is 'c' and 'd', id 5"
    ) as raised:
        check_vocabularies([three[0], other])
    assert "set tokenizer_source to union" in str(raised.value)


def test_equal_files_are_not_read(three: list[FolderInput], tmp_path: Path) -> None:
    same = model(tmp_path / "same", 1, words([*SPECIAL, "a", "b", "c", "d"]))
    (same.folder / "tokenizer.json").write_bytes((three[0].folder / "tokenizer.json").read_bytes())
    (same.folder / "config.json").unlink()  # the class is not asked for either
    check_vocabularies([three[0], same])


def test_a_broken_tokenizer(three: list[FolderInput], tmp_path: Path) -> None:
    broken = model(tmp_path / "broken", 1, words([*SPECIAL, "a", "b", "c", "d"]))
    (broken.folder / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(UserError, match=r"cannot read the tokenizer in .*broken"):
        check_vocabularies([three[0], broken])
    with pytest.raises(UserError, match=r"cannot read the tokenizer in .*broken"):
        build([three[0], broken], three[0], "union")


class Table:
    """An input that is one matrix."""

    label, folder = "table", Path()
    config: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def keys(self) -> tuple[str, ...]:
        return ("w",)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.matrix.shape)

    def dtype(self, key: str) -> torch.dtype:
        return self.matrix.dtype

    def read(self, key: str, low: int, high: int) -> Tensor:
        assert 0 <= low <= high <= self.matrix.numel()
        return self.matrix.view(-1)[low:high]

    def fingerprint(self) -> str:
        return ""


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_vocabularies(data: st.DataObject) -> None:
    """Against the rules, for random overlaps, orders, paddings and ranges."""
    letters = "abcdefghij"
    vocabularies = [
        {
            token: id_
            for id_, token in enumerate(data.draw(st.permutations(letters))[: data.draw(st.integers(1, 10))])
        }
        for _ in range(data.draw(st.integers(1, 4)))
    ]
    output = {token: id_ for id_, token in enumerate(data.draw(st.permutations(letters)))}
    base = data.draw(st.none() | st.integers(0, len(vocabularies) - 1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    matrices = [
        torch.randn(len(own) + data.draw(st.integers(0, 2)), 3, generator=generator) for own in vocabularies
    ]
    rows = tuple(torch.tensor([own.get(token, -1) for token in output]) for own in vocabularies)
    inputs = [Table(matrix) for matrix in matrices]
    vocabulary = Vocabulary(None, len(output), rows, base)
    expected = by_the_rules(matrices, vocabularies, base, output)
    low, high = sorted(data.draw(st.tuples(st.integers(0, 30), st.integers(0, 30))))
    for number, wanted in enumerate(expected):
        one = Aligned(inputs, number, vocabulary, frozenset({"w"}))
        assert torch.equal(one.read("w", low, high), wanted.view(-1)[low:high])


def test_keys_are_found_by_whole_components() -> None:
    keys = Keys(["model.a.weight", "b.weight", "x.c.weight", "y.c.weight"])
    assert keys.find("model.a.weight") == keys.find("a.weight") == "model.a.weight"
    assert keys.find("model.b.weight") == "b.weight"
    assert keys.find("c.weight") is None
    assert keys.find("el.a.weight") is None
    assert keys.find("weight") is None


def test_sizes_in_configurations() -> None:
    assert vocabulary_size({"vocab_size": 5}) == 5
    assert resized({"vocab_size": 5, "x": 1}, 7) == {"vocab_size": 7, "x": 1}
