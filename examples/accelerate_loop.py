"""A loop with Hugging Face accelerate: gradient accumulation, clipping, and a state saved and loaded.

Run it with: python examples/accelerate_loop.py, or accelerate launch examples/accelerate_loop.py
"""

import tempfile

import torch
from accelerate import Accelerator
from tiny_setup import dataset, moved, policy_and_delta, weights

import trimtab

STEPS, ALPHA, P, ACCUMULATE = 8, 0.02, 0.5, 2


def merge_weight(step):
    """α warms up over 4 steps."""
    return ALPHA * min(1.0, (step + 1) / 4)


def main():
    policy, delta = policy_and_delta()
    start = weights(policy)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
    optimizer = trimtab.OnDARE(policy.named_parameters(), delta, lr=1e-3, reserve_rate=P, merge_weight=ALPHA)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)
    loader = torch.utils.data.DataLoader(dataset(4 * STEPS * ACCUMULATE), batch_size=4)
    model, optimizer, loader, scheduler = accelerator.prepare(policy, optimizer, loader, scheduler)
    trimtab.schedule(optimizer, "merge_weight", merge_weight)  # it finds the optimizer inside accelerate's
    with tempfile.TemporaryDirectory() as folder:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()  # acts where the gradients are complete: every second time here
                scheduler.step()
                optimizer.zero_grad()
        accelerator.save_state(folder)
        accelerator.load_state(folder)
    expected = P * sum(merge_weight(step) for step in range(STEPS))
    far = moved(policy, start, delta, expected)
    print(f"accelerate: {STEPS} steps of {ACCUMULATE} batches each, loss {loss.item():.2f}, {far}")


if __name__ == "__main__":
    main()
