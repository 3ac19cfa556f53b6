"""YAML files that are short and stand for very much, and text that no file can hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.errors import UserError
from trimtab.merge.config import load_config
from trimtab.yaml_file import WrongValue, read_yaml_file, text_in


def read(folder: Path, text: str) -> dict[str, object]:
    path = folder / "a.yaml"
    path.write_text(text)
    return read_yaml_file(path, "recipe", "method").values


def bomb(levels: int, item: str = "[{}]", start: str = "x") -> str:
    """Lists of nine aliases of the list before."""
    lines = [f"a0: &a0 {start}"]
    for level in range(1, levels + 1):
        nine = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} {item.format(nine)}")
    return "\n".join(lines)


@pytest.mark.parametrize("levels", [8, 40])
def test_aliases_of_aliases_are_refused(tmp_path: Path, levels: int) -> None:
    with pytest.raises(UserError, match=r"a.yaml has aliases that stand for more than 100000 values; write"):
        read(tmp_path, bomb(levels))


def test_so_are_merge_keys(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has aliases that stand for more than 100000 values"):
        read(tmp_path, bomb(20, "{{<<: [{}]}}", "{k: 1}"))


def test_a_merge_configuration_with_them_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "merge.yaml"
    path.write_text(bomb(8) + "\nmerge_method: linear\nmodels: *a8\n")
    with pytest.raises(UserError, match=r"has aliases that stand for more than 100000 values"):
        load_config(path)


def test_an_alias_of_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is nested too deeply, or an alias in it holds itself"):
        read(tmp_path, "a: &a [*a]")


def test_some_aliases_and_many_values_are_read(tmp_path: Path) -> None:
    assert read(tmp_path, bomb(3))["a1"] == ["x"] * 9
    assert read(tmp_path, "a: &a {k: 1}\nb: {<<: *a, l: 2}") == {"a": {"k": 1}, "b": {"k": 1, "l": 2}}
    many = read(tmp_path, f"a: [{', '.join(['1'] * 101_000)}]")["a"]
    assert isinstance(many, list)
    assert len(many) == 101_000


def test_halves_of_surrogate_pairs_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(WrongValue, match=r"must be text without halves of surrogate pairs, not '.ud800\{'"):
        text_in("\ud800{")
    assert text_in("\U0001f600{") == "\U0001f600{"
    path = tmp_path / "merge.yaml"
    path.write_text(
        'merge_method: linear\nchat_template: "\\ud800{"\n'
        "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\n"
    )
    with pytest.raises(UserError, match=r"line 2: chat_template must be text without halves of surrogate"):
        load_config(path)
