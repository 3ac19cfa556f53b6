"""FSDP2: parameters, gradients, state and τ sharded over processes; a sharded checkpoint, an export.

Run it with: torchrun --nproc-per-node=2 examples/fsdp2.py
"""

import os
import sys
import tempfile

import torch
import torch.distributed.checkpoint as dcp
from tiny_setup import batches, moved, policy_and_delta, weights
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

import trimtab

STEPS, ALPHA, P = 8, 0.02, 0.5


def sharded_policy():
    """The policy cut over all processes, its optimizer, and the delta: each process reads its part of τ."""
    policy, delta = policy_and_delta()
    for layer in policy.model.layers:
        fully_shard(layer)
    fully_shard(policy)
    settings = {"lr": 1e-3, "reserve_rate": P, "merge_weight": ALPHA}
    return policy, trimtab.OnDARE(policy.named_parameters(), delta, **settings), delta


def train(policy, optimizer, steps):
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for step, batch in enumerate(batches(STEPS)):
        if step in steps:
            loss = policy(**{key: value[rank::processes] for key, value in batch.items()}).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


def state_of(policy, optimizer):
    model_state, optimizer_state = get_state_dict(policy, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def exported(policy):
    """An ordinary model with the weights of the sharded one."""
    plain, _ = policy_and_delta()
    plain.load_state_dict(get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True)))
    return plain


def main():
    torch.distributed.init_process_group("gloo")
    first = torch.distributed.get_rank() == 0
    policy, optimizer, delta = sharded_policy()
    start = weights(policy_and_delta()[0])
    train(policy, optimizer, range(STEPS // 2))
    resumed, other, _ = sharded_policy()  # the number of processes may be another one by then
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        torch.distributed.broadcast_object_list(folder)  # the first process's
        dcp.save(state_of(policy, optimizer), checkpoint_id=folder[0])
        state = state_of(resumed, other)
        dcp.load(state, checkpoint_id=folder[0])
        set_state_dict(resumed, other, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        torch.distributed.barrier()
    train(policy, optimizer, range(STEPS // 2, STEPS))
    train(resumed, other, range(STEPS // 2, STEPS))
    plain, again = exported(policy), exported(resumed)
    if first:
        same = "the same weights" if torch.equal(weights(plain), weights(again)) else "OTHER WEIGHTS"
        print(f"FSDP2: {STEPS} steps, {moved(plain, start, delta, ALPHA * P * STEPS)}")
        print(f"a resume at step {STEPS // 2} gives {same}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    if "RANK" not in os.environ:
        sys.exit("start this with torchrun --nproc-per-node=2 examples/fsdp2.py")
    main()
