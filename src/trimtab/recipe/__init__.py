"""The typed recipe of a training run, and everything that is checked about it before a model is loaded."""

from trimtab.recipe.differences import Difference, recipe_differences, refuse_differences
from trimtab.recipe.loading import load_recipe, make_recipe
from trimtab.recipe.losses import DPOLoss, IPOLoss, KTOLoss, RewardLoss, RRHFLoss, SampledLoss, SFTLoss
from trimtab.recipe.paths import local_path
from trimtab.recipe.recipe import (
    METHODS,
    DPORecipe,
    IPORecipe,
    KTORecipe,
    Recipe,
    RewardRecipe,
    RRHFRecipe,
    SFTRecipe,
)
from trimtab.recipe.sections import (
    MERGING,
    Adapter,
    Data,
    Evaluation,
    Group,
    LearningRateSchedule,
    Optimizer,
    RewardSource,
    RewardSources,
    Schedule,
    Schedules,
    Source,
)
from trimtab.recipe.training_fields import OWNED, cast_training_arguments

__all__ = [
    "MERGING",
    "METHODS",
    "OWNED",
    "Adapter",
    "DPOLoss",
    "DPORecipe",
    "Data",
    "Difference",
    "Evaluation",
    "Group",
    "IPOLoss",
    "IPORecipe",
    "KTOLoss",
    "KTORecipe",
    "LearningRateSchedule",
    "Optimizer",
    "RRHFLoss",
    "RRHFRecipe",
    "Recipe",
    "RewardLoss",
    "RewardRecipe",
    "RewardSource",
    "RewardSources",
    "SFTLoss",
    "SFTRecipe",
    "SampledLoss",
    "Schedule",
    "Schedules",
    "Source",
    "cast_training_arguments",
    "load_recipe",
    "local_path",
    "make_recipe",
    "recipe_differences",
    "refuse_differences",
]
