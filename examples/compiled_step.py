"""A compiled training step: the model compiled, then forward, backward and optimizer step in one function.

Run it with: python examples/compiled_step.py [backend]
The default backend, inductor, needs a C++ compiler on a CPU; aot_eager needs none.
"""

import sys

import torch
from tiny_setup import batches, moved, policy_and_delta, weights

import trimtab

STEPS, ALPHA, P = 8, 0.02, 0.5


def make_step(model, optimizer):
    """Forward, backward, and the optimizer's step."""

    def step(batch):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()  # the graph breaks here: this step has kernels of its own and runs as it is
        optimizer.zero_grad()
        return loss.detach()

    return step


def main():
    backend = sys.argv[1] if len(sys.argv) > 1 else "inductor"
    for place in ("outside", "inside"):
        policy, delta = policy_and_delta()
        start = weights(policy)
        model = torch.compile(policy, backend=backend)
        named = model.named_parameters()  # that they begin with "_orig_mod." does not matter
        optimizer = trimtab.OnDARE(named, delta, lr=1e-3, reserve_rate=P, merge_weight=ALPHA)
        step = make_step(model, optimizer)
        if place == "inside":
            step = torch.compile(step, backend=backend)
        losses = [step(batch).item() for batch in batches(STEPS)]
        far = moved(policy, start, delta, ALPHA * P * STEPS)
        print(f"step {place} the compiled function ({backend}): loss {losses[-1]:.2f}, {far}")


if __name__ == "__main__":
    main()
