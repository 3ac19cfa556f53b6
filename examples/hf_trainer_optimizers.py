"""transformers' Trainer with a ready-made optimizer: ``Trainer(optimizers=(optimizer, scheduler))``.

Legal in one process and under DDP. Not everywhere: with FSDP or a ``model_init`` the Trainer raises, and
under DeepSpeed it drops the optimizer without a word. The other examples for trainers build it when asked to.

Run it with: python examples/hf_trainer_optimizers.py
"""

import tempfile

from tiny_setup import dataset, drift, policy_and_delta, weights
from transformers import Trainer, TrainingArguments

import trimtab

STEPS, ALPHA, P = 8, 0.02, 0.5


def main():
    policy, delta = policy_and_delta()
    start = weights(policy)
    # The Trainer's own learning_rate and weight_decay are not used: the optimizer is there already.
    groups = trimtab.parameter_groups(policy.named_parameters(), weight_decay=0.01)
    optimizer = trimtab.OnTIES(groups, delta, lr=1e-3, reserve_rate=P, merge_weight=ALPHA)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=4,
            lr_scheduler_type="cosine",
            max_grad_norm=1.0,
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        )
        # None for the scheduler: the Trainer makes its own, from lr_scheduler_type.
        trainer = Trainer(policy, arguments, train_dataset=dataset(32), optimizers=(optimizer, None))
        loss = trainer.train().training_loss
    # OnTIES adds α·τ at the entries that τ keeps, unless Δ wins the vote: a part of α·T.
    far = f"moved {drift(policy, start, delta):.4f} τ along τ, at most {ALPHA * STEPS:.4f}"
    print(f"Trainer(optimizers=): {STEPS} steps, mean loss {loss:.2f}, {far}")


if __name__ == "__main__":
    main()
