"""What GRPO and RLOO share: prompts and rewards from a recipe, an explicit reference, an exact resume.

TRL samples a group of responses to each prompt, scores them, and learns from a generation for several
micro-batches. This is what has to be said and kept around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch.utils.data import Sampler
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from trimtab.data.prompts import other_columns
from trimtab.errors import UserError
from trimtab.model_folder import load_model
from trimtab.recipe import SampledLoss
from trimtab.rewards import Reward, load_rewards
from trimtab.train.parts import Parts
from trimtab.train.reference import load_reference
from trimtab.train.sft import trainer_arguments


class GroupSampling:
    """To be mixed in front of TRL's GRPO or RLOO trainer.

    * Prompts are the tokens that the data was measured by, cut where it was cut.
    * The reference is the one given. TRL would load one from the path in the policy's configuration.
    * A checkpoint keeps the generation that is being learned from and the place in it, and the order of the
      prompts depends on the seed and the epoch alone, so that a resumed run is the uninterrupted one.

    Args:
        model: the policy.
        args: TRL's arguments.
        reference: the frozen reference; None where there is none to load (β = 0, or an adapter's own start).
        **kwargs: TRL's own.
    """

    def __init__(self, model: Any, args: Any, *, reference: Any = None, **kwargs: Any) -> None:
        self._prompt_ids: list[list[int]] = []
        beta = args.beta
        if reference is not None:
            args.beta = 0.0  # so that TRL loads none
        super().__init__(model, args=args, **kwargs)
        self.beta = args.beta = beta
        if reference is not None:
            self.ref_model = self._prepared(reference)

    def _prepared(self, reference: Any) -> Any:
        """Return the reference as TRL would have made it."""
        if self.args.disable_dropout:
            disable_dropout_in_model(reference)
        whole = reference.get_base_model() if hasattr(reference, "get_base_model") else reference
        add_fused_lm_head(whole, temperature=self.temperature)
        return self.accelerator.prepare_model(reference, evaluation_mode=True)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._prompt_ids = [list(row["prompt_ids"]) for row in inputs]
        made: dict[str, Any] = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        divergence = self._metrics["train" if self.model.training else "eval"].get("kl", [])[-1:]
        if not all(map(math.isfinite, divergence)):  # RLOO would take such answers for worth nothing
            raise UserError(self._not_finite("divergence from the reference", divergence[0], [made]))
        return made

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        assert len(prompts) == len(self._prompt_ids)
        return self._prompt_ids, None, {}

    def _get_train_sampler(self, dataset: Any = None) -> Sampler[int]:
        return EpochSampler(
            super()._get_train_sampler(dataset),  # type: ignore[misc]
            lambda: int(self.state.epoch or 0),
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        border = self._step % (self.args.steps_per_generation * self.num_iterations) == 0
        kept = {"step": self._step, "generation": None if border else self._buffered_inputs}
        checkpoint = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        torch.save(kept, self._responses_file(checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None:
            return
        file = self._responses_file(Path(checkpoint))
        if not file.is_file():
            raise UserError(f"{checkpoint} has no {file.name}, which says where in a generation it was saved")
        kept = torch.load(file, map_location="cpu", weights_only=True)
        self._step = kept["step"]
        self._buffered_inputs = send_to_device(kept["generation"], self.args.device)

    def _responses_file(self, checkpoint: Path) -> Path:
        return checkpoint / f"responses_{self.args.process_index}.pt"


class EpochSampler(Sampler[int]):
    """TRL's sampler, each epoch in an order that depends on the seed and the epoch alone.

    TRL's own order goes on from that of the epoch before, which a resumed run has not drawn.

    Args:
        sampler: TRL's.
        epoch: gives the epoch that begins.
    """

    def __init__(self, sampler: Any, epoch: Callable[[], int]) -> None:
        self.sampler, self.epoch = sampler, epoch

    def __iter__(self) -> Iterator[int]:
        """Yield the places of prompts, each as often as it is answered and learned from."""
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed + self.epoch())
        yield from self.sampler

    def __len__(self) -> int:
        """How many :meth:`__iter__` yields."""
        return len(self.sampler)


class RewardFunction:
    """A reward in the form TRL calls.

    Args:
        reward: scores texts.
    """

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self.__name__ = reward.name  # what TRL logs it as

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], row: Sequence[str], **_: Any
    ) -> list[float]:
        """Score completions, texts or messages; ``row`` is what :func:`other_columns` reads."""
        responses = [text if isinstance(text, str) else text[-1]["content"] or "" for text in completions]
        return self.reward(prompts, responses, [other_columns({"row": columns}) for columns in row])


def group_trainer_arguments(parts: Parts) -> dict[str, Any]:
    """Load what GRPO's and RLOO's trainers are made of: policy, reference and rewards."""
    loss = parts.recipe.loss
    assert isinstance(loss, SampledLoss)
    rewards = load_rewards(
        loss.rewards,
        key="loss.rewards",
        device=parts.arguments.device,
        batch_size=parts.arguments.per_device_train_batch_size,
    )
    return {
        "reference": load_reference(parts) if loss.beta else None,
        "model": load_model(parts.policy, parts.model_settings, trainable=True),
        "reward_funcs": [RewardFunction(part) for part in rewards.parts],
        **trainer_arguments(parts),
    }
