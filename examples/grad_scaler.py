"""Mixed precision: fp16 autocast with a GradScaler and an overflow; bf16 autocast, which needs no scaler.

Run it with: python examples/grad_scaler.py
"""

import torch
from tiny_setup import batches, moved, policy_and_delta, weights

import trimtab

STEPS, ALPHA, P, OVERFLOW = 8, 0.02, 0.5, 3


def train(policy, delta, dtype):
    """Train in autocast; return the number of steps that the scaler skipped."""
    optimizer = trimtab.OnDARE(policy.named_parameters(), delta, lr=1e-3, reserve_rate=P, merge_weight=ALPHA)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=dtype == torch.float16)
    skipped = 0
    for step, batch in enumerate(batches(STEPS)):
        with torch.autocast("cpu", dtype=dtype):
            loss = policy(**batch).loss
        if step == OVERFLOW and scaler.is_enabled():
            loss = loss * float("inf")  # what an overflow in fp16 looks like
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)  # before clipping, which is to see the gradients as they are
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        before = scaler.get_scale()
        scaler.step(optimizer)  # a skipped step merges nothing: neither Δ nor τ
        scaler.update()
        skipped += scaler.get_scale() < before
        optimizer.zero_grad()
    return skipped


def main():
    for dtype in (torch.float16, torch.bfloat16):
        policy, delta = policy_and_delta()
        start = weights(policy)
        skipped = train(policy, delta, dtype)
        far = moved(policy, start, delta, ALPHA * P * (STEPS - skipped))
        print(f"{dtype} autocast: {skipped} of {STEPS} steps skipped, {far}")


if __name__ == "__main__":
    main()
