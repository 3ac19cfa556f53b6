"""What an online merging optimizer tells about its merges: values for a log, a line for a terminal.

How they are measured, and what the drift is: :mod:`trimtab.optim.measuring`.
"""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer

from trimtab.optim.measuring import Diagnostics, DiagnosticsMeter, drift

__all__ = [
    "DRIFT_WARNS",
    "HARM_BEGAN",
    "Diagnostics",
    "DiagnosticsMeter",
    "DriftWarning",
    "drift",
    "far_sentence",
    "log_line",
    "log_values",
    "unwrapped",
]

HARM_BEGAN = 0.3
"""Drift, in units of τ, from which on the lab's models lost a point of capability or more by it: the mean
over three SFT models, in training with OnDARE (0.4 by extrapolation alone); see
``benchmarks/results/drift.json``."""
DRIFT_WARNS = 0.2
"""Above this drift there is a warning: the largest that was measured below :data:`HARM_BEGAN`."""


class DriftWarning(UserWarning):
    """The merges have carried the model so far along the reference delta that its abilities may suffer."""


def far_sentence(step: int, far: float) -> str:
    """What is said about a drift above :data:`DRIFT_WARNS`."""
    return (
        f"at step {step} the merges have added up to {far:.2g} τ; on trimtab's lab models abilities suffered "
        f"from about {HARM_BEGAN:g} τ on, so consider a smaller merge_weight"
    )


def log_values(optimizer: Optimizer, since: int = 0) -> dict[str, float]:
    """What an online merging optimizer has to say, by the names it is logged under; nothing for others.

    ``merge/weight`` and ``merge/reserve_rate`` are α and p of the first group, ``merge/drift`` the drift so
    far. The rest was measured at the last measuring step: ``merge/cosine``, ``merge/conflicts``,
    ``merge/survived``, ``merge/arrived_delta``, ``merge/arrived_update``, ``merge/update_norm``,
    ``merge/kept_update_norm`` and ``merge/delta_norm``; with several groups also the drift and the norms of
    each, as ``merge/group_0/update_norm`` and so on. What is not defined is left out.

    Args:
        optimizer: any optimizer, or a wrapper (accelerate's) around one.
        since: what was measured is given only if that was after this step.
    """
    inner = unwrapped(optimizer)
    first = inner.param_groups[0]
    if "merge_weight" not in first:
        return {}
    logs = {"weight": float(first["merge_weight"]), "reserve_rate": float(first["reserve_rate"])}
    far = drift(inner.param_groups)
    logs["drift"] = far
    found: Diagnostics | None = getattr(inner, "diagnostics", None)
    if found is not None and found.step > since:
        logs |= {"cosine": found.cosine, "conflicts": found.conflicts}
        logs |= {"survived": found.survived}
        logs |= {"arrived_delta": found.arrived_delta, "arrived_update": found.arrived_update}
        logs |= _norms(found)
        for i, group in enumerate(found.groups if len(found.groups) > 1 else ()):
            if group is not None:
                own = {"drift": group.drift, **_norms(group)}
                logs |= {f"group_{i}/{name}": value for name, value in own.items()}
    return {f"merge/{name}": value for name, value in logs.items() if not math.isnan(value)}


def _norms(found: Diagnostics) -> dict[str, float]:
    return {
        "update_norm": found.update,
        "kept_update_norm": found.kept_update,
        "delta_norm": found.delta,
    }


def log_line(optimizer: Optimizer) -> str:
    """One line about the last measured merge, for a training loop of one's own.

    Args:
        optimizer: an online merging optimizer, or a wrapper (accelerate's) around one.

    Returns:
        The line; it says so where nothing has been measured.

    Examples:
        >>> import torch, trimtab
        >>> base, reference = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
        >>> delta = trimtab.ReferenceDelta.between(reference=reference, base=base)
        >>> named = reference.named_parameters()
        >>> opt = trimtab.OnDARE(named, delta, lr=1e-3, reserve_rate=0.5, merge_weight=1e-4)
        >>> log_line(opt)
        'no merge measured yet'
    """
    inner = unwrapped(optimizer)
    found: Diagnostics | None = getattr(inner, "diagnostics", None)
    if found is None:
        return "no merge measured yet"
    far = drift(inner.param_groups)
    words = [
        f"step {found.step}: ‖Δ‖ {found.update:.3g}",
        f"‖F(Δ)‖ {found.kept_update:.3g}",
        f"‖α·F(τ)‖ {found.delta:.3g}",
        f"cosine {found.cosine:.3f}",
        f"conflicts {found.conflicts:.1%}",
        f"arrived: Δ {found.arrived_update:.1%}, τ {found.arrived_delta:.1%}",
        f"drift {far:.3g} τ"
        + (f" (above {DRIFT_WARNS:g}: abilities may suffer)" if far > DRIFT_WARNS else ""),
    ]
    return ", ".join(words)


def unwrapped(optimizer: Any) -> Any:
    """The online merging optimizer inside of wrappers such as accelerate's; the innermost without one."""
    while not hasattr(optimizer, "merging") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
