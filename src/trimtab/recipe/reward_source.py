"""What a recipe names as rewards."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from trimtab.named_function import names_function
from trimtab.recipe.section import Section
from trimtab.recipe.values import Number, Text


class RewardSource(Section):
    """What scores responses: a reward model, the likelihood under a language model, or a rule; one of them.

    A text alone is a rule where it is written ``module:function``, else a reward model.
    """

    model: Text | None = None
    """A reward model: a folder or a hub id of a model for sequence classification with one label."""
    likelihood: Text | None = None
    """A language model, whose length-normalised log-probability of a response is its score (RRHF's)."""
    rule: Text | None = None
    """module:function, called as function(prompts, responses, rows); gives one number for each response."""
    weight: Number = 1.0
    """Factor in the sum of several rewards; below 0 for what is to become less."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, values: Any) -> Any:
        if not isinstance(values, str):
            return values
        return {"rule" if names_function(values) else "model": values}

    @model_validator(mode="after")
    def _exactly_one(self) -> RewardSource:
        given = [name for name in ("model", "likelihood", "rule") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) if given else "none"
            raise PydanticCustomError(
                "refused", "must name one of model, likelihood and rule, not {found}", {"found": found}
            )
        if self.rule is not None and not names_function(self.rule):
            raise PydanticCustomError(
                "refused",
                "must have a rule written as module:function, not {rule}",
                {"rule": repr(self.rule)},
            )
        return self

    @property
    def source(self) -> str:
        """The folder, hub id or function, whichever it is."""
        return next(value for value in (self.model, self.likelihood, self.rule) if value is not None)


def _as_list(value: Any) -> Any:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


RewardSources = Annotated[tuple[RewardSource, ...], BeforeValidator(_as_list), Field(min_length=1)]
"""One source of rewards or a list; several are added up by their weights."""
