"""From a recipe's regularisers to objects attached to the optimizer, in the order in which they act."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimtab.optim import (
    EMA,
    ChildTuning,
    ElasticReset,
    FisherChildTuning,
    GradientProjection,
    PullToReference,
)
from trimtab.optim.regulariser import attached
from trimtab.recipe import Recipe
from trimtab.train.row_losses import Rows, answer_losses, capability_sets, fisher_rows, training_losses


@dataclass(frozen=True)
class Regularisers:
    """The regularisers of a recipe, with the rows that some of them take gradients of.

    Args:
        recipe: a checked recipe.
        capability: a set of rows for each direction of the projection.
        fisher: rows for ChildTuning-D; None for the training rows.
    """

    recipe: Recipe
    capability: list[Rows]
    fisher: Rows | None = None

    @classmethod
    def from_recipe(cls, recipe: Recipe, tokenizer: Any) -> Regularisers:
        """Read the rows that the recipe's regularisers need.

        Raises:
            UserError: where they cannot be read.
        """
        return cls(recipe, capability_sets(recipe, tokenizer), fisher_rows(recipe, tokenizer))

    def attach(self, optimizer: torch.optim.Optimizer, trainer: Any) -> None:
        """Attach them: first what acts on gradients, then the pull; after the step resets, then averages.

        Args:
            optimizer: the run's.
            trainer: the run's, for what the rows' losses need.
        """
        section = self.recipe.optimizer
        if section.projection is not None:
            losses = [answer_losses(trainer, rows) for rows in self.capability]
            GradientProjection(optimizer, losses, every=section.projection.every)
        if section.child_tuning is not None:
            self._attach_child_tuning(optimizer, trainer)
        if section.pull is not None:
            PullToReference(optimizer, section.pull.strength)
        if section.elastic_reset is not None:
            ElasticReset(optimizer, **section.elastic_reset.model_dump())
        if section.ema is not None:
            EMA(optimizer, **section.ema.model_dump())

    def _attach_child_tuning(self, optimizer: torch.optim.Optimizer, trainer: Any) -> None:
        section = self.recipe.optimizer.child_tuning
        assert section is not None
        if section.variant == "F":
            ChildTuning(optimizer, section.reserve_rate, seed=self.recipe.seed)
            return
        if self.fisher is None:
            assert section.rows is not None
            losses = training_losses(trainer, section.rows)
        else:
            losses = answer_losses(trainer, self.fisher)
        FisherChildTuning(optimizer, losses, section.reserve_rate)


def keep_average(trainer: Any, checkpoint: Path | None) -> None:
    """Give the trained model its averaged weights for good, where the run has an EMA.

    Args:
        trainer: after training.
        checkpoint: what the model was loaded from where nothing was trained any more; its optimizer state
            has the averages.
    """
    if checkpoint is not None:
        trainer.create_optimizer()
        state = torch.load(checkpoint / "optimizer.pt", map_location=trainer.args.device, weights_only=True)
        trainer.optimizer.load_state_dict(state)
    for ema in attached(trainer.optimizer, EMA):
        ema.swap_in()
