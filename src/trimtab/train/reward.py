"""A reward model of pairs: TRL's trainer on the model's layers with a head that gives one score.

The loss of a pair, after Bradley and Terry, with r(x, y) the score of a whole conversation at its last token:

    L = −log σ(r(x, y_w) − r(x, y_l)) + c · (r(x, y_w) + r(x, y_l))²
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, set_seed
from trl import RewardTrainer
from trl.trainer.reward_trainer import suppress_seqcls_warning

from trimtab.errors import UserError
from trimtab.model_folder import ModelFolder
from trimtab.rewards import pairwise_accuracy
from trimtab.rewards.reward import prompt_key
from trimtab.train.guard import GuardedTrainer
from trimtab.train.parts import Parts
from trimtab.train.sft import trainer_arguments


class MergingRewardTrainer(GuardedTrainer, RewardTrainer):
    """TRL's reward trainer with an optimizer built from named parameters; arguments of both."""

    def final_results(self) -> dict[str, Any]:
        """The accuracy on the held-out pairs as ``rewards``; nothing where there are none."""
        if self.eval_dataset is None:
            return {}
        pairs = self.held_out_scores()
        scores = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
        prompts = {prompt_key(row["prompt"]) for row in self.eval_dataset.select_columns(["prompt"])}
        return {"rewards": {**pairwise_accuracy(pairs, prompts=len(prompts)), "scores": scores}}

    @torch.no_grad()
    def held_out_scores(self) -> list[tuple[float, float]]:
        """Score every held-out pair.

        Returns:
            The scores of the chosen and of the rejected answer, in the order of the held-out rows.
        """
        training = self.model.training
        self.model.eval()
        found = []
        for batch in self.get_eval_dataloader():
            batch = self._prepare_inputs(batch)
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            with self.compute_loss_context_manager():
                scores = self.model(**inputs, use_cache=False).logits.squeeze(-1)
            pairs = torch.stack(torch.chunk(scores.float(), chunks=2), dim=1)
            found += self.accelerator.gather_for_metrics(pairs).tolist()
        self.model.train(training)
        return [(chosen, rejected) for chosen, rejected in found]


def make_trainer(parts: Parts) -> MergingRewardTrainer:
    """Load the model with a head for one score and put the trainer together."""
    set_seed(parts.arguments.seed)  # the head is drawn while the model is loaded
    return MergingRewardTrainer(
        model=load_scoring_model(parts.policy, parts.model_settings), **trainer_arguments(parts)
    )


def load_scoring_model(model: ModelFolder, settings: dict[str, Any]) -> Any:
    """Load a model for sequence classification with one label, in fp32 unless ``settings`` say otherwise.

    A language model's own head is left out, and a head for the score is drawn; a reward model keeps its own.

    Raises:
        UserError: if transformers cannot load it so.
    """
    arguments = {"dtype": torch.float32, **settings, "trust_remote_code": False, "use_safetensors": True}
    try:
        with suppress_seqcls_warning():
            return AutoModelForSequenceClassification.from_pretrained(model.folder, num_labels=1, **arguments)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{model.label!r} cannot be loaded as a reward model with one score: {said}"
        ) from error
