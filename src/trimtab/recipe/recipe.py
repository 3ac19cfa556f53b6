"""The recipe: everything a training run is made of, as one typed, frozen value."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ModelWrapValidatorHandler, model_validator

from trimtab.recipe.losses import (
    DPOLoss,
    GRPOLoss,
    IPOLoss,
    KTOLoss,
    PPOLoss,
    RewardLoss,
    RLOOLoss,
    RRHFLoss,
    SampledLoss,
    SFTLoss,
)
from trimtab.recipe.sections import MERGING, Adapter, Data, Evaluation, Optimizer, Schedules, Section
from trimtab.recipe.values import NonNegativeCount, Text


class Recipe(Section):
    """What every method's recipe has; one subclass per method narrows it.

    Examples:
        >>> recipe = DPORecipe.model_validate(
        ...     {"method": "dpo", "model": "org/sft", "data": {"train": "org/pairs"}, "output": "runs/a"}
        ... )
        >>> recipe.reference, recipe.data.train[0].path, recipe.optimizer.lr, recipe.loss.beta
        ('org/sft', 'org/pairs', 1e-06, 0.1)
    """

    default_lr: ClassVar[float] = 2e-5

    method: str
    """What to train with: sft, dpo, ipo, kto, reward, rrhf, ppo, grpo or rloo."""
    model: Text | None = None
    """Where the policy starts: a model folder or a hub id; the reference when not given."""
    reference: Text | None = None
    """The SFT model: what the policy is compared with, the end of the delta; the model when not given."""
    base: Text | None = None
    """The pretrained model the reference was tuned from; gives the reference delta.

    Where the reference is an adapter: the model it stands on; null: as its configuration says.
    """
    delta: Text | None = None
    """A reference delta made with `trimtab delta`, instead of base."""
    adapter: Adapter | None = None
    """Train a LoRA adapter instead of the weights."""
    data: Data
    loss: SFTLoss | DPOLoss | IPOLoss | KTOLoss | RewardLoss | RRHFLoss | SampledLoss
    optimizer: Optimizer
    schedule: Schedules = Schedules()
    training: dict[str, Any] = Field(default_factory=dict)
    """Further fields of TRL's config for the method (TrainingArguments and more), by their names there."""
    evaluation: Evaluation = Evaluation()
    output: Text
    """The run folder."""
    seed: Annotated[NonNegativeCount, Field(lt=2**32)] = 0

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        """Fill the defaults that depend on other keys, so that the recipe spells them out."""
        if not isinstance(values, dict):
            return values
        optimizer = values.get("optimizer")
        optimizer = {} if optimizer is None else optimizer
        if isinstance(optimizer, dict) and optimizer.get("lr") is None:
            optimizer = {**optimizer, "lr": cls.default_lr}
        filled = {**values, "optimizer": optimizer}
        for section in ("loss", "schedule", "training", "evaluation"):
            if filled.get(section) is None:
                filled[section] = {}
        return cls._fill_models(filled)

    @model_validator(mode="wrap")
    @classmethod
    def _remember_what_was_given(cls, values: Any, validated: ModelWrapValidatorHandler[Recipe]) -> Recipe:
        """Leave what was filled in out of ``model_fields_set``: errors name the key that was written."""
        recipe = validated(values)
        for name in ("model", "reference"):
            if isinstance(values, dict) and values.get(name) is None:
                recipe.model_fields_set.discard(name)
        return recipe

    def key_of_model(self) -> Literal["model", "reference"]:
        """The key under which the policy's start was given."""
        return "reference" if "model" not in self.model_fields_set and self.reference is not None else "model"

    @classmethod
    def _fill_models(cls, values: dict[str, Any]) -> dict[str, Any]:
        if values.get("model") is None and values.get("reference") is not None:
            values["model"] = values["reference"]
        optimizer = values["optimizer"]
        merges = isinstance(optimizer, dict) and optimizer.get("name") in MERGING
        if values.get("reference") is None and (cls.needs_reference or merges):
            values["reference"] = values.get("model")
        return values

    needs_reference: ClassVar[bool] = False

    def resolved(self) -> dict[str, Any]:
        """Return the recipe as plain values with every default spelled out; reading it gives an equal recipe.

        Merging settings that do not apply (all of them, for AdamW) are left out rather than written as null,
        as is what a source of rewards is not.
        """
        values = self.model_dump(mode="json")
        optimizer = values["optimizer"]
        values["optimizer"] = {
            **_given(optimizer),
            "groups": [_given(group) for group in optimizer["groups"]],
        }
        if "rewards" in values["loss"]:
            values["loss"]["rewards"] = [_given(source) for source in values["loss"]["rewards"]]
        return values


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


class SFTRecipe(Recipe):
    """Supervised fine-tuning."""

    method: Literal["sft"]
    loss: SFTLoss


class AgainstReference(Recipe):
    """What the methods share that compare the policy with an explicit reference."""

    default_lr: ClassVar[float] = 1e-6
    needs_reference: ClassVar[bool] = True


class DPORecipe(AgainstReference):
    """Direct preference optimization against an explicit reference."""

    method: Literal["dpo"]
    loss: DPOLoss


class IPORecipe(AgainstReference):
    """Identity preference optimization against an explicit reference."""

    method: Literal["ipo"]
    loss: IPOLoss


class KTORecipe(AgainstReference):
    """Kahneman-Tversky optimization against an explicit reference."""

    method: Literal["kto"]
    loss: KTOLoss


class RewardRecipe(Recipe):
    """A reward model: the model's layers with a new head that gives one score."""

    default_lr: ClassVar[float] = 1e-5

    method: Literal["reward"]
    loss: RewardLoss

    @classmethod
    def _fill_models(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The head is in no delta of two language models, so that it takes the plain step."""
        optimizer = values["optimizer"]
        merges = isinstance(optimizer, dict) and optimizer.get("name") in MERGING
        if merges and optimizer.get("without_delta") is None:
            values["optimizer"] = {**optimizer, "without_delta": [SCORE_HEAD]}
        return super()._fill_models(values)


class RRHFRecipe(Recipe):
    """Ranked responses: the model's own log-probabilities are brought into the order of the scores."""

    method: Literal["rrhf"]
    loss: RRHFLoss


class PPORecipe(AgainstReference):
    """Proximal policy optimization: the policy answers prompts, and a reward scores the answers."""

    method: Literal["ppo"]
    loss: PPOLoss

    @classmethod
    def _fill_models(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The value head is in no delta, and starts at 0, far from where the policy's learning rate leads."""
        optimizer = values["optimizer"]
        if isinstance(optimizer, dict):
            filled = dict(optimizer)
            if filled.get("name") in MERGING and filled.get("without_delta") is None:
                filled["without_delta"] = [VALUE_HEAD]
            if not filled.get("groups"):
                filled["groups"] = [{"pattern": VALUE_HEAD, "lr": VALUE_HEAD_LR}]
            values["optimizer"] = filled
        return super()._fill_models(values)


class GRPORecipe(AgainstReference):
    """Group relative policy optimization: the policy's own answers, compared within a group."""

    method: Literal["grpo"]
    loss: GRPOLoss


class RLOORecipe(AgainstReference):
    """REINFORCE with the other answers to the prompt as the baseline."""

    method: Literal["rloo"]
    loss: RLOOLoss


SCORE_HEAD = r"^(score|classifier)\."
"""Finds the head of a sequence classification model, as transformers names it."""

VALUE_HEAD = r"^value_head\."
"""Finds the value head of PPO's policy."""

VALUE_HEAD_LR = 1e-4
"""The value head's learning rate, where a recipe has no groups of its own."""

METHODS: dict[str, type[Recipe]] = {
    "sft": SFTRecipe,
    "dpo": DPORecipe,
    "ipo": IPORecipe,
    "kto": KTORecipe,
    "reward": RewardRecipe,
    "rrhf": RRHFRecipe,
    "ppo": PPORecipe,
    "grpo": GRPORecipe,
    "rloo": RLOORecipe,
}
"""The recipe class of each method."""
