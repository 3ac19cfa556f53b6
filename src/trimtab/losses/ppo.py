"""Proximal policy optimization of a language model, token by token.

The clipped objective is that of arXiv 1707.06347 (PPO); its use on a language model with a penalty for every
token's departure from a reference, and the controller of that penalty, are those of arXiv 1909.08593; so
trains arXiv 2203.02155 (InstructGPT).

Shapes: R responses, T tokens of the longest one; tables (R, T) are filled up on the right, and ``mask`` is 1
where a token is. Functions of single tokens take any shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Total = Callable[[torch.Tensor], torch.Tensor]


def _alone(values: torch.Tensor) -> torch.Tensor:
    """Sums over processes where there is only one."""
    return values


@dataclass(frozen=True)
class SurrogateTerms:
    """The policy's part of the loss and what is worth a look, one number a token.

    Args:
        loss: −min(ρ·A, clip(ρ, 1 − ε, 1 + ε)·A), differentiable.
        ratio: ρ = π(a) / π_old(a).
        clipped: 1 where the clipped product is the smaller one, so that no gradient flows.
        approximate_kl: ½·(log π − log π_old)², an estimate of the divergence from π_old.
    """

    loss: torch.Tensor
    ratio: torch.Tensor
    clipped: torch.Tensor
    approximate_kl: torch.Tensor


@dataclass(frozen=True)
class ValueTerms:
    """The value function's part of the loss, one number a token.

    Args:
        loss: ½·max((V − G)², (V_clipped − G)²), differentiable.
        clipped: 1 where the clipped value gives the larger error.
    """

    loss: torch.Tensor
    clipped: torch.Tensor


def token_rewards(
    scores_R: torch.Tensor,
    logps_RT: torch.Tensor,
    reference_logps_RT: torch.Tensor,
    mask_RT: torch.Tensor,
    kl_coefficient: float,
) -> torch.Tensor:
    """The reward of every token: r_t = [t is the last] · score − β · (log π(y_t) − log π_ref(y_t)).

    The difference of log-probabilities of the token that was sampled is an unbiased estimate of the
    divergence KL(π ‖ π_ref) at that place (the estimator called k1); it may be negative. Section 2.1 of arXiv
    1909.08593 subtracts it from the reward, spread over the tokens as here.

    Args:
        scores_R: what each response is worth, shape (R,).
        logps_RT: of the sampled tokens under the policy that sampled them, in nats, shape (R, T).
        reference_logps_RT: the same under the reference.
        mask_RT: 1 at tokens, each response having at least one.
        kl_coefficient: β.

    Returns:
        Rewards, 0 behind the end, shape (R, T).

    Examples:
        >>> zeros = torch.zeros(1, 2)
        >>> token_rewards(torch.tensor([3.0]), zeros, zeros - 1, torch.ones(1, 2), 0.5)
        tensor([[-0.5000,  2.5000]])
    """
    last_R = mask_RT.long().sum(1) - 1
    rewards_RT = -kl_coefficient * (logps_RT - reference_logps_RT)
    rewards_RT = rewards_RT.where(mask_RT.bool(), 0.0)
    return rewards_RT.scatter_add(1, last_R[:, None], scores_R[:, None].to(rewards_RT.dtype))


def generalized_advantages(
    rewards_RT: torch.Tensor,
    values_RT: torch.Tensor,
    mask_RT: torch.Tensor,
    *,
    discount: float = 1.0,
    trace: float = 0.95,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalized advantage estimation (Eq. 11 and 12 of arXiv 1707.06347; arXiv 1506.02438).

        δ_t = r_t + γ·V_{t+1} − V_t,    A_t = δ_t + γ·λ·A_{t+1},    G_t = A_t + V_t

    A response ends with its last token, whether with an end mark or cut off: V behind it is 0.

    Args:
        rewards_RT: of every token, shape (R, T).
        values_RT: V before every token, shape (R, T).
        mask_RT: 1 at tokens.
        discount: γ in [0, 1].
        trace: λ in [0, 1]; 1 gives the rewards still to come minus V, 0 the error of one step.

    Returns:
        Advantages A and returns G, 0 behind the end, each of shape (R, T), without a gradient.

    Examples:
        >>> ones = torch.ones(1, 2)
        >>> generalized_advantages(ones, torch.zeros(1, 2), ones, trace=1.0)[0]
        tensor([[2., 1.]])
    """
    rewards_RT, values_RT = rewards_RT.detach(), values_RT.detach()
    inside_RT = mask_RT.to(values_RT.dtype)
    advantages_RT = torch.zeros_like(values_RT)
    following_R = next_value_R = values_RT.new_zeros(values_RT.shape[0])
    for place in reversed(range(values_RT.shape[1])):
        inside_R = inside_RT[:, place]
        error_R = rewards_RT[:, place] + discount * next_value_R - values_RT[:, place]
        following_R = (error_R + discount * trace * following_R) * inside_R
        advantages_RT[:, place] = following_R
        next_value_R = values_RT[:, place] * inside_R
    return advantages_RT, (advantages_RT + values_RT) * inside_RT


def whitened(values: torch.Tensor, mask: torch.Tensor, total: Total = _alone) -> torch.Tensor:
    """Values with mean 0 and variance 1 over all tokens: (x − mean) / √(variance + 1e-8).

    The variance is the mean square of the differences, over all tokens of all processes.

    Args:
        values: numbers, any shape.
        mask: 1 where they count.
        total: adds a tensor up over all processes.

    Returns:
        Whitened values, 0 where the mask is 0; equal values become 0.

    Examples:
        >>> whitened(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([1, 1, 0]))
        tensor([-1.,  1.,  0.])
    """
    mean, variance = _moments(values, mask, total)
    return ((values - mean) * (variance + 1e-8).rsqrt()).where(mask.bool(), 0.0)


def clipped_surrogate(
    logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, clip: float = 0.2
) -> SurrogateTerms:
    """The clipped surrogate objective of every token (Eq. 7 of arXiv 1707.06347), to be minimised.

    Args:
        logps: log π of the sampled tokens, differentiable, in nats.
        old_logps: the same under the policy that sampled them.
        advantages: A.
        clip: ε.

    Examples:
        >>> found = clipped_surrogate(torch.tensor([0.5]), torch.zeros(1), torch.ones(1))
        >>> found.loss, found.clipped
        (tensor([-1.2000]), tensor([1.]))
    """
    difference = logps - old_logps
    ratio = difference.exp()
    free, held = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return SurrogateTerms(
        loss=torch.maximum(free, held),
        ratio=ratio.detach(),
        clipped=(held > free).to(logps.dtype).detach(),
        approximate_kl=(0.5 * difference.square()).detach(),
    )


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float = 0.2
) -> ValueTerms:
    """The squared error of every value, which may not gain by moving further than ε from the old one.

    The clipping is not in PPO's paper but in its authors' code, and in that of arXiv 1909.08593.

    Args:
        values: V, differentiable.
        old_values: V when the response was sampled.
        returns: G.
        clip: ε, in units of the reward.

    Examples:
        >>> clipped_value_loss(torch.tensor([1.0]), torch.zeros(1), torch.ones(1)).loss
        tensor([0.3200])
    """
    held = old_values + (values - old_values).clamp(-clip, clip)
    free_error, held_error = (values - returns).square(), (held - returns).square()
    clipped = (held_error > free_error).to(values.dtype).detach()
    return ValueTerms(0.5 * torch.maximum(free_error, held_error), clipped)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """−Σ_v p_v · log p_v of softmax distributions, in nats.

    Args:
        logits: unnormalized log-probabilities, shape (…, V).

    Returns:
        Entropies, float32 or wider, shape (…).

    Examples:
        >>> entropy(torch.zeros(1, 4)).exp()
        tensor([4.])
    """
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    result: torch.Tensor = torch.special.entr(logps.exp()).sum(-1)
    return result


def explained_variance(
    values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, total: Total = _alone
) -> torch.Tensor:
    """1 − Var(G − V) / Var(G): 1 where the values foretell the returns, 0 where they say nothing of them.

    Args:
        values: V when the responses were sampled.
        returns: G.
        mask: 1 at tokens.
        total: adds a tensor up over all processes.

    Returns:
        A number, shape (); NaN where all returns are equal.

    Examples:
        >>> explained_variance(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 2.0]), torch.ones(2))
        tensor(0.7500)
    """
    _, left = _moments(returns - values, mask, total)
    _, whole = _moments(returns, mask, total)
    return torch.where(whole > 0, 1 - left / whole, torch.nan)


def adapted_kl_coefficient(coefficient: float, kl: float, target: float, gain: float = 0.1) -> float:
    """The controller of the penalty's weight (section 2.2 of arXiv 1909.08593).

        e = clip((KL − target) / target, −0.2, 0.2),    β ← β · (1 + K · e)

    Args:
        coefficient: β of the rollout that was measured.
        kl: its mean divergence from the reference, in nats a response.
        target: the divergence that is wanted, above 0.
        gain: K; 0.1 in the paper.

    Returns:
        β of the next rollout.

    Examples:
        >>> adapted_kl_coefficient(1.0, kl=12.0, target=6.0)
        1.02
    """
    error = min(max((kl - target) / target, -0.2), 0.2)
    return coefficient * (1 + gain * error)


def _moments(values: torch.Tensor, mask: torch.Tensor, total: Total) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of the values that count, over all processes."""
    inside = mask.to(values.dtype)
    count = total(inside.sum())
    mean = total((values * inside).sum()) / count
    return mean, total(((values - mean).square() * inside).sum()) / count
