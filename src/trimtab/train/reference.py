"""The reference that a method compares the policy with: loaded from where the recipe says, never guessed."""

from __future__ import annotations

from typing import Any

from trimtab.model_folder import load_model
from trimtab.train.parts import Parts


def load_reference(parts: Parts) -> Any:
    """Load the reference, frozen; None where an adapter's own start is the reference.

    Without a model for it TRL reloads one from the path in the policy's configuration, whatever that is by
    now. Under an adapter TRL can do without a second model, but what it then compares with is the adapter's
    start: we let it only where that is the reference.
    """
    adapted = parts.recipe.adapter is not None or parts.policy.is_adapter
    return None if adapted and parts.reference == parts.policy else frozen_reference(parts)


def frozen_reference(parts: Parts) -> Any:
    """Load the reference as a model of its own, frozen; an adapter is merged into what it stands on."""
    assert parts.reference is not None
    reference: Any = load_model(parts.reference, parts.model_settings, trainable=False)
    if parts.reference.is_adapter:
        reference = reference.merge_and_unload()  # TRL reads log-probabilities off whole models only
    return reference.eval().requires_grad_(False)
