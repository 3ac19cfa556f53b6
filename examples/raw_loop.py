"""A plain PyTorch loop: gradient clipping, schedules for the learning rate and for α, a checkpoint, a resume.

Run it with: python examples/raw_loop.py
"""

import tempfile
from pathlib import Path

import torch
from tiny_setup import batches, moved, policy_and_delta, weights

import trimtab

STEPS, ALPHA, P = 8, 0.02, 0.5


def merge_weight(step):
    """α warms up over 4 steps. torch's schedulers reach the learning rate, trimtab.schedule α and p."""
    return ALPHA * min(1.0, (step + 1) / 4)


def train(policy, delta, checkpoint, until):
    """Train to step ``until``, from the checkpoint where there is one, and write it. Return the loss."""
    settings = {"lr": 1e-3, "weight_decay": 0.01, "reserve_rate": P, "merge_weight": ALPHA}
    optimizer = trimtab.OnDARE(policy.named_parameters(), delta, **settings)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    trimtab.schedule(optimizer, "merge_weight", merge_weight)
    done = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        done = saved["step"]
        policy.load_state_dict(saved["policy"])
        optimizer.load_state_dict(saved["optimizer"])  # refuses the state of another delta, method or seed
        scheduler.load_state_dict(saved["scheduler"])
    for batch in list(batches(STEPS))[done:until]:
        loss = policy(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    if until == STEPS:
        optimizer.merge_now()  # with merge_every > 1: what has gathered since the last merge
    parts = {"policy": policy, "optimizer": optimizer, "scheduler": scheduler}
    torch.save({"step": until} | {name: part.state_dict() for name, part in parts.items()}, checkpoint)
    return loss.item()


def main():
    policy, delta = policy_and_delta()
    start = weights(policy)
    resumed, _ = policy_and_delta()
    with tempfile.TemporaryDirectory() as folder:
        loss = train(policy, delta, Path(folder) / "whole.pt", STEPS)
        for until in (STEPS // 2, STEPS):
            train(resumed, delta, Path(folder) / "halves.pt", until)
    expected = P * sum(merge_weight(step) for step in range(STEPS))
    print(f"raw loop: {STEPS} steps, loss {loss:.2f}, {moved(policy, start, delta, expected)}")
    same = torch.equal(weights(policy), weights(resumed))
    print(f"a resume at step {STEPS // 2} gives {'the same weights' if same else 'OTHER WEIGHTS'}")


if __name__ == "__main__":
    main()
