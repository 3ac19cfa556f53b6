"""PyTorch Lightning: automatic optimization, which calls ``step`` with a closure, and manual optimization.

Needs Lightning: ``pip install 'trimtab[lightning]'``.

Run it with: python examples/lightning_module.py
"""

import logging
import warnings

import lightning
import torch
from tiny_setup import dataset, moved, policy_and_delta, weights

import trimtab

STEPS, ALPHA, P = 8, 0.02, 0.5
QUIET = dict.fromkeys(
    ["logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"], False
)


class Automatic(lightning.LightningModule):
    """Lightning calls backward, clips and steps."""

    def __init__(self, policy, delta):
        super().__init__()
        self.policy, self.delta = policy, delta

    def training_step(self, batch, _):
        return self.policy(**batch).loss

    def configure_optimizers(self):
        # The policy's names, which the delta has too, and not this module's, which begin with "policy.".
        named = self.policy.named_parameters()
        optimizer = trimtab.OnDARE(named, self.delta, lr=1e-3, reserve_rate=P, merge_weight=ALPHA)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Manual(Automatic):
    """The same by hand."""

    automatic_optimization = False

    def training_step(self, batch, _):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.policy(**batch).loss)
        self.clip_gradients(optimizer, gradient_clip_val=1.0)
        optimizer.step()
        self.lr_schedulers().step()


def main():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    ends = []
    for kind, clipping in ((Automatic, {"gradient_clip_val": 1.0}), (Manual, {})):
        policy, delta = policy_and_delta()
        start = weights(policy)
        loader = torch.utils.data.DataLoader(dataset(4 * STEPS), batch_size=4)
        trainer = lightning.Trainer(accelerator="cpu", devices=1, max_steps=STEPS, **clipping, **QUIET)
        trainer.fit(kind(policy, delta), loader)
        ends.append(weights(policy))
        far = moved(policy, start, delta, ALPHA * P * STEPS)
        print(f"Lightning, {kind.__name__.lower()} optimization: {trainer.global_step} steps, {far}")
    print(f"both give {'the same weights' if torch.equal(*ends) else 'OTHER WEIGHTS'}")


if __name__ == "__main__":
    main()
