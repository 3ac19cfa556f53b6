"""How a configuration names a model: a folder or hub id, at a revision, with a LoRA adapter on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trimtab.errors import UserError
from trimtab.yaml_file import WrongValue, spelled, text_in


@dataclass(frozen=True)
class ModelRef:
    """A model, as ``path[@revision][+lora[@revision]]``.

    Args:
        path: a folder or a hub id.
        revision: branch, tag or commit on the hub.
        lora: folder or hub id of an adapter that is merged into it.
        lora_revision: the adapter's revision.
    """

    path: str
    revision: str | None = None
    lora: str | None = None
    lora_revision: str | None = None

    @classmethod
    def parse(cls, text: Any) -> ModelRef:
        """Read a model's name.

        Raises:
            UserError: it is no text, a part of it is empty, or it has two revisions or two adapters.

        Examples:
            >>> ModelRef.parse("org/model@v2+runs/lora")
            ModelRef(path='org/model', revision='v2', lora='runs/lora', lora_revision=None)
            >>> str(ModelRef.parse("org/model@v2+runs/lora"))
            'org/model@v2+runs/lora'
        """
        try:
            text = text_in(text)
        except WrongValue as error:
            raise UserError(str(error)) from None
        model, *adapters = text.split("+")
        if len(adapters) > 1:
            raise UserError(
                f"{spelled(text)} holds more than one +; write path+lora, or {{model: …, lora: …}} where a "
                "path holds one"
            )
        lora, lora_revision = _path_and_revision(adapters[0], text) if adapters else (None, None)
        path, revision = _path_and_revision(model, text)
        return cls(path, revision, lora, lora_revision)

    def __str__(self) -> str:
        model = f"{self.path}@{self.revision}" if self.revision else self.path
        if self.lora is None:
            return model
        return f"{model}+{self.lora}@{self.lora_revision}" if self.lora_revision else f"{model}+{self.lora}"


def _path_and_revision(part: str, text: str) -> tuple[str, str | None]:
    path, *revisions = part.split("@")
    if len(revisions) > 1:
        raise UserError(
            f"{spelled(text)} holds more than one @ in a path; write path@revision, or "
            "{model: {path: …, revision: …}} where a path holds one"
        )
    if not all(name.strip() for name in (path, *revisions)):
        raise UserError(f"{spelled(text)} has an empty part; write path, path@revision or path+lora")
    return path, revisions[0] if revisions else None
