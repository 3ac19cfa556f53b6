"""The package's surface: what is public, and what importing it loads."""

import subprocess
import sys

import pytest

import trimtab


def test_public_names_are_pinned():
    assert trimtab.__all__ == [
        "OnDARE",
        "OnTIES",
        "OnlineMerging",
        "ReferenceDelta",
        "UserError",
        "parameter_groups",
        "schedule",
    ]
    for name in trimtab.__all__:
        assert getattr(trimtab, name).__name__ == name


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'OnDRAE'"):
        trimtab.OnDRAE  # noqa: B018


def _modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    return set(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
    )


def test_rewards_load_no_training():
    loaded = _modules_after("from trimtab.rewards import RRHFScorer, RewardModel, load_reward")
    assert "trimtab.rewards.likelihood" in loaded
    assert not {"transformers", "trl", "peft", "datasets", "trimtab.train", "trimtab.optim"} & loaded


def test_import_trimtab_is_lazy():
    assert not {"torch", "transformers", "trl", "numpy", "pydantic"} & _modules_after("import trimtab")


def test_what_stands_on_torch_loads_no_transformers():
    loaded = _modules_after("import trimtab.ops, trimtab.optim, trimtab.losses, trimtab.sampling")
    assert "torch" in loaded
    assert not {"transformers", "trl", "accelerate", "datasets", "peft"} & loaded
