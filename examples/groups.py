"""Parameter groups by regular expressions: parts with their own lr, α, p and K, and frozen parts.

Run it with: python examples/groups.py
"""

import torch
from tiny_setup import batches, moved, policy_and_delta, weights

import trimtab

STEPS, ALPHA, P = 8, 0.02, 0.5
RULES = [  # the first pattern found in a parameter's name counts; one that finds nothing is an error
    {"pattern": "embed_tokens", "frozen": True},
    {"pattern": "norm", "lr": 1e-4, "merge_weight": 0.0, "reserve_rate": 1.0},  # plain AdamW
    {"pattern": r"layers\.0\.", "merge_weight": 2 * ALPHA},
    {"pattern": r"layers\.1\.mlp", "merge_weight": 4 * ALPHA, "merge_every": 4},
]
EXPECTED = {  # drift of some parts: α·p·T/K
    "model.embed_tokens": 0.0,
    "model.layers.0.mlp": 2 * ALPHA * P * STEPS,
    "model.layers.1.mlp": 4 * ALPHA * P * STEPS / 4,
}


def main():
    policy, delta = policy_and_delta()
    starts = {part: weights(policy.get_submodule(part)) for part in EXPECTED}
    groups = trimtab.parameter_groups(policy.named_parameters(), RULES, weight_decay=0.01)
    optimizer = trimtab.OnDARE(groups, delta, lr=1e-3, reserve_rate=P, merge_weight=ALPHA)
    for batch in batches(STEPS):
        policy(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"{len(optimizer.param_groups)} groups, {STEPS} steps")
    for part, start in starts.items():
        print(f"{part} {moved(policy.get_submodule(part), start, delta, EXPECTED[part], f'{part}.')}")


if __name__ == "__main__":
    main()
