"""A rollout of PPO: the policy answers prompts, a reward scores the answers, every token gets an advantage.

Shapes: R responses of this process, T tokens of the longest, N response tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from trimtab.data.prompts import other_columns
from trimtab.losses import entropy, explained_variance, generalized_advantages, token_rewards, whitened
from trimtab.recipe import PPOLoss
from trimtab.rewards import WeightedSum
from trimtab.sampling import Response, Sampling, TransformersSampler
from trimtab.train.ppo_model import read_tokens, sequences


@dataclass(frozen=True)
class Judged:
    """Responses to prompts and what everyone thinks of them; tables have the shape (R, T).

    Args:
        responses: R of them.
        parts: the scores that each part of the reward gave.
        scores: the reward, shape (R,).
        mask: true at tokens.
        logps: log π of each token.
        reference_logps: log π_ref of each token.
        values: V before each token.
        entropies: of the distributions that the tokens were drawn from.
    """

    responses: list[Response]
    parts: dict[str, list[float]]
    scores: torch.Tensor
    mask: torch.Tensor
    logps: torch.Tensor
    reference_logps: torch.Tensor
    values: torch.Tensor
    entropies: torch.Tensor

    @property
    def cut_off(self) -> torch.Tensor:
        """1 for the responses without an end mark, shape (R,)."""
        return torch.tensor([response.end == "length" for response in self.responses]).to(self.scores)

    def sums(self) -> dict[str, torch.Tensor]:
        """What is worth a look, added up over responses, and their number as ``responses``."""
        found = {
            "responses": torch.ones(len(self.responses)),
            "reward": self.scores,
            **{f"rewards/{name}/mean": torch.tensor(scores) for name, scores in self.parts.items()},
            "kl": (self.logps - self.reference_logps) * self.mask,
            "entropy": self.entropies * self.mask,
            "response_length": self.mask,
            "ended_by_eos": 1 - self.cut_off,
        }
        return {name: values.float().sum() for name, values in found.items()}


@dataclass(frozen=True)
class Rollout:
    """What the epochs of a rollout learn from; tables have the shape (R, T) and lie on the CPU.

    Args:
        prompt_ids: R prompts.
        response_ids: R responses.
        logps: log π_old.
        values: V_old.
        advantages: A, whitened over all processes.
        returns: G.
        metrics: what is logged beside the losses of its steps.
    """

    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    logps: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    metrics: dict[str, float]


class RolloutMaker:
    """Makes rollouts of rows ``{prompt, prompt_ids, row}`` (:mod:`trimtab.data.prompts`).

    Args:
        model: the policy with its value head; in eval mode while it answers and is read.
        reference: frozen; None where it is the model with its adapter off.
        reward: scores responses.
        tokenizer: the policy's.
        settings: the loss section of the recipe.
        seed: of everything that is drawn.
        batch_size: responses read at once.
        reading: the context that the model is read in, such as autocast.
        total: adds a tensor up over all processes.
    """

    def __init__(
        self,
        model: Any,
        *,
        reference: Any,
        reward: WeightedSum,
        tokenizer: Any,
        settings: PPOLoss,
        seed: int,
        batch_size: int,
        reading: Callable[[], AbstractContextManager[Any]],
        total: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self.model, self.reference, self.reward = model, reference, reward
        self.settings, self.seed, self.batch_size = settings, seed, batch_size
        self.reading, self.total = reading, total
        self.padding = int(tokenizer.pad_token_id or 0)
        self.sampler = TransformersSampler(model, tokenizer, settings.generation_batch_size)

    def make(self, rows: Sequence[dict[str, Any]], places: Sequence[int], kl_coefficient: float) -> Rollout:
        """Answer prompts, and work out what each token was good for.

        Args:
            rows: R of them, at least one.
            places: what the random numbers of each are told apart by.
            kl_coefficient: β, the weight of the penalty.
        """
        judged, settings = self.judge(rows, places), self.settings
        mask_RT, values_RT = judged.mask, judged.values
        scores_R = judged.scores - (settings.missing_eos_penalty or 0.0) * judged.cut_off
        rewards_RT = token_rewards(scores_R, judged.logps, judged.reference_logps, mask_RT, kl_coefficient)
        advantages_RT, returns_RT = generalized_advantages(
            rewards_RT, values_RT, mask_RT, discount=settings.discount, trace=settings.trace
        )
        metrics = self.means({**judged.sums(), "objective": rewards_RT.float().sum()})
        foretold = explained_variance(values_RT, returns_RT, mask_RT, self.total)
        return Rollout(
            prompt_ids=[list(response.prompt_ids) for response in judged.responses],
            response_ids=[list(response.ids) for response in judged.responses],
            logps=judged.logps.cpu(),
            values=values_RT.cpu(),
            advantages=whitened(advantages_RT, mask_RT, self.total).cpu(),
            returns=returns_RT.cpu(),
            metrics={**metrics, "kl_coefficient": kl_coefficient, "explained_variance": float(foretold)},
        )

    @torch.no_grad()
    def judge(self, rows: Sequence[dict[str, Any]], places: Sequence[int]) -> Judged:
        """Answer prompts, score the answers, and read them with policy and reference."""
        settings, training = self.settings, self.model.training
        sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p, settings.top_k)
        self.model.eval()
        with self.reading():
            prompts = [row["prompt_ids"] for row in rows]
            found = self.sampler.sample(prompts, sampling, seed=self.seed, streams=places)
            responses = [response for (response,) in found]
            mask_RT, logps_RT, values_RT, entropies_RT = self._read(self.model, responses)
            with self._reference() as reference:
                reference_logps_RT = self._read(reference, responses)[1]
        self.model.train(training)
        # Not in that context: a reward model scores as it does elsewhere.
        texts, columns = [response.text for response in responses], [other_columns(row) for row in rows]
        parts = self.reward.by_part([row["prompt"] for row in rows], texts, columns)
        scores_R = torch.tensor(self.reward.total(parts), dtype=torch.float64).to(logps_RT)
        return Judged(
            responses, parts, scores_R, mask_RT, logps_RT, reference_logps_RT, values_RT, entropies_RT
        )

    @contextmanager
    def _reference(self) -> Iterator[Any]:
        if self.reference is not None:
            yield self.reference
            return
        with self.model.disable_adapter():
            yield self.model

    def _read(self, model: Any, responses: list[Response]) -> tuple[torch.Tensor, ...]:
        """Where tokens are, and log π, V and entropy of each: tables of shape (R, T)."""
        device, found = self.model.device, []
        lengths_R = torch.tensor([len(response.ids) for response in responses])
        mask_RT = (torch.arange(int(lengths_R.max())) < lengths_R[:, None]).to(device)
        how = {"head": self.model.value_head, "temperature": self.settings.temperature}
        for first in range(0, len(responses), self.batch_size):
            some = responses[first : first + self.batch_size]
            batch = sequences([(one.prompt_ids, one.ids) for one in some], self.padding)
            batch = {name: values.to(device) for name, values in batch.items()}
            logps_N, values_N, logits_NV = read_tokens(model, batch, **how)
            found.append(torch.stack([logps_N, values_N.to(logps_N), entropy(logits_NV).to(logps_N)]))
        flat = torch.cat(found, 1)
        tables = flat.new_zeros(len(flat), *mask_RT.shape)
        tables[:, mask_RT] = flat
        return mask_RT, *tables

    def means(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """Means over all processes' responses, and of the entropy over their tokens.

        Args:
            sums: of :meth:`Judged.sums`.
        """
        stacked = torch.stack([value.to(self.model.device) for value in sums.values()])
        total = dict(zip(sums, self.total(stacked).tolist(), strict=True))
        responses, tokens = total.pop("responses"), total["response_length"]
        return {name: value / (tokens if name == "entropy" else responses) for name, value in total.items()}
