"""TRL's DPOTrainer with trimtab's mixin, which fits every transformers and TRL trainer.

DPOTrainer and KTOTrainer take no ``optimizer_cls_and_kwargs``; the mixin overrides ``create_optimizer``. It
also logs what arrives of the merges, and schedules α and p.

Run it with: python examples/trl_dpo_mixin.py
"""

import copy
import tempfile

from datasets import Dataset
from tiny_setup import moved, policy_and_delta, preference_rows, tokenizer, weights
from trl import DPOConfig, DPOTrainer

from trimtab import OnDARE
from trimtab.train import OnlineMergingMixin, OptimizerPlan

STEPS, ALPHA, P = 8, 0.02, 0.5


class MergingDPOTrainer(OnlineMergingMixin, DPOTrainer):
    """DPOTrainer that builds its optimizer by the plan it is given."""


def falling(step, total):
    """A factor on α: it falls to 0."""
    return 1 - step / total


def main():
    policy, delta = policy_and_delta()
    start = weights(policy)
    plan = OptimizerPlan(
        lambda groups: OnDARE(groups, delta, lr=1e-3, reserve_rate=P, merge_weight=ALPHA),
        weight_decay=0.01,
        groups=[{"pattern": "norm", "lr": 1e-4}],
        factors={"merge_weight": falling},
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=4,
            bf16=False,
            activation_checkpointing=False,
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=STEPS,
        )
        trainer = MergingDPOTrainer(
            policy,
            copy.deepcopy(policy),  # the reference; without it TRL loads the policy's folder once more
            arguments,
            train_dataset=Dataset.from_list(preference_rows(32)),
            processing_class=tokenizer(),
            optimizer_plan=plan,
        )
        loss = trainer.train().training_loss
    arrived = next(log["merge/arrived_delta"] for log in trainer.state.log_history if "loss" in log)
    expected = P * sum(ALPHA * falling(step, STEPS) for step in range(STEPS))
    print(f"{arrived:.1%} of α·F(τ) arrived in the weights at the step that measured it")
    print(f"DPO: {STEPS} steps, mean loss {loss:.3f}, {moved(policy, start, delta, expected)}")


if __name__ == "__main__":
    main()
