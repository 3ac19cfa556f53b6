"""transformers' Trainer and TRL's SFTTrainer with ``optimizer_cls_and_kwargs=(Factory, settings)``.

A class that is no Optimizer is taken for a factory: the trainer makes one without arguments and calls it with
its model when training starts, so the optimizer gets the model's names.

Run it with: python examples/hf_trainer_factory.py
"""

import tempfile

from datasets import Dataset
from tiny_setup import dataset, moved, policy_and_delta, preference_rows, tokenizer, weights
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import trimtab

STEPS, ALPHA, P = 8, 0.02, 0.5
COMMON = {"max_steps": STEPS, "per_device_train_batch_size": 4, "save_strategy": "no", "disable_tqdm": True}


class OnDAREFactory:
    """What the trainer calls with its model and the settings below."""

    def __call__(self, model, *, delta, weight_decay, **settings):
        groups = trimtab.parameter_groups(model.named_parameters(), weight_decay=weight_decay)
        return trimtab.OnDARE(groups, delta, **settings)


def transformers_trainer(policy, folder, factory):
    arguments = TrainingArguments(folder, use_cpu=True, **COMMON)
    return Trainer(policy, arguments, train_dataset=dataset(32), optimizer_cls_and_kwargs=factory)


def trl_trainer(policy, folder, factory):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in preference_rows(32)]
    return SFTTrainer(
        policy,
        SFTConfig(folder, use_cpu=True, bf16=False, activation_checkpointing=False, **COMMON),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        optimizer_cls_and_kwargs=factory,
    )


def main():
    for make in (transformers_trainer, trl_trainer):
        policy, delta = policy_and_delta()
        start = weights(policy)
        # A factory is not given the trainer's learning_rate: say it here. Its scheduler does drive it.
        settings = {
            "delta": delta,
            "lr": 1e-3,
            "weight_decay": 0.01,
            "reserve_rate": P,
            "merge_weight": ALPHA,
        }
        with tempfile.TemporaryDirectory() as folder:
            trainer = make(policy, folder, (OnDAREFactory, settings))
            loss = trainer.train().training_loss
        far = moved(policy, start, delta, ALPHA * P * STEPS)
        print(f"{type(trainer).__name__} with a factory: {STEPS} steps, mean loss {loss:.2f}, {far}")


if __name__ == "__main__":
    main()
