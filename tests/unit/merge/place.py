"""A folder with models to merge, and merges of them that are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.unit.merge import made
from trimtab.errors import UserError

SHAPES = {
    "model.embed_tokens.weight": (8, 4),
    "model.layers.0.w": (4, 4),
    "model.layers.1.w": (4, 4),
    "model.norm.weight": (4,),
}
Edit = Callable[[dict[str, Tensor]], Any]


class Place:
    """A folder with a base and two models tuned from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        base = made.random_tensors(SHAPES, 0)
        self.tensors = {"base": base, "one": made.moved(base, 1), "two": made.moved(base, 2)}
        for name in self.tensors:
            self.write(name)

    def write(self, name: str, edit: Edit = lambda tensors: None, **config: Any) -> None:
        """Write a model, changed."""
        tensors = dict(self.tensors[name])
        edit(tensors)
        made.folder(self.folder / name, tensors, **{"num_hidden_layers": 2, **config})

    def values(self, method: str = "ties", **top: Any) -> dict[str, Any]:
        """A merge of all three."""
        paths = [self.folder / name for name in self.tensors]
        if method == "linear":
            return made.values_of(method, None, paths, [{"weight": 0.3}] * 3, **top)
        if method in ("slerp", "hma"):
            shared = {"t": 0.5} if method == "slerp" else {"ratio": 0.5}
            return made.values_of(method, paths[0], paths[1:2], parameters=shared, **top)
        return made.values_of(method, paths[0], paths[1:], [{"weight": 1, "density": 0.5}] * 2, **top)

    def merged(self, values: Mapping[str, Any], **options: Any) -> dict[str, Tensor]:
        return made.merged(self.folder / "out", values, **options)

    def refuses(self, values: Mapping[str, Any], words: Sequence[str], **options: Any) -> str:
        """The merge is refused in one sentence with these words in this order, and leaves nothing."""
        before = made.files_in(self.folder)
        with pytest.raises(UserError) as caught:
            self.merged(values, **options)
        sentence = str(caught.value)
        assert "\n" not in sentence
        at = 0
        for part in words:
            assert part in sentence[at:], f"{part!r} is not in {sentence!r} (after {at})"
            at = sentence.index(part, at) + len(part)
        assert made.files_in(self.folder) == before
        return sentence
