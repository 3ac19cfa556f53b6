"""The typed recipe of a training run, and everything that is checked about it before a model is loaded."""

from trimtab.recipe.recipe import METHODS, DPORecipe, Recipe, SFTRecipe
from trimtab.recipe.sections import (
    MERGING,
    Adapter,
    Data,
    DPOLoss,
    Evaluation,
    Group,
    LearningRateSchedule,
    Optimizer,
    Schedule,
    Schedules,
    SFTLoss,
    Source,
)

__all__ = [
    "MERGING",
    "METHODS",
    "Adapter",
    "DPOLoss",
    "DPORecipe",
    "Data",
    "Evaluation",
    "Group",
    "LearningRateSchedule",
    "Optimizer",
    "Recipe",
    "SFTLoss",
    "SFTRecipe",
    "Schedule",
    "Schedules",
    "Source",
]
