"""A few answers of the model, before and after training: to read, not to measure."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch

from trimtab.recipe import Evaluation

Prompt = str | list[dict[str, Any]]


def sample_prompts(held_out: Any, evaluation: Evaluation) -> list[Prompt]:
    """Return the prompts to answer: the first of the held-out rows, then those written in the recipe.

    Args:
        held_out: held-out rows in one of TRL's formats, or None.
        evaluation: the recipe's section: ``samples`` rows are taken.
    """
    rows = islice(held_out or [], evaluation.samples)
    prompts = [prompt for row in rows if (prompt := _prompt(row))]
    return [*prompts, *([{"role": "user", "content": text}] for text in evaluation.prompts)]


def _prompt(row: dict[str, Any]) -> Prompt | None:
    if "prompt" in row:
        return row["prompt"]
    if "messages" in row:
        return row["messages"][:-1]
    shared = _shared(row.get("chosen"), row.get("rejected"))
    return shared or None


def _shared(chosen: Any, rejected: Any) -> list[Any]:
    """The messages that both conversations begin with: TRL's implicit prompt."""
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        return []
    count = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
    return chosen[:count]


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: list[Prompt], max_new_tokens: int) -> list[dict[str, Any]]:
    """Answer each prompt greedily, one at a time: padding plays no part and no random number is drawn.

    Returns:
        One ``{"prompt", "answer", "finished"}`` a prompt; an answer that reached ``max_new_tokens`` is not
        finished.
    """
    training = model.training
    model.eval()
    results = []
    for prompt in prompts:
        chat = not isinstance(prompt, str) and tokenizer.chat_template is not None
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        encoded = (
            tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            if chat
            else tokenizer(text, return_tensors="pt")
        ).to(model.device)
        settings = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "use_cache": True}
        settings["pad_token_id"] = tokenizer.pad_token_id
        inputs = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, **settings)[0]
        new = output[inputs["input_ids"].shape[1] :]
        answer = tokenizer.decode(new, skip_special_tokens=True)
        results.append({"prompt": prompt, "answer": answer, "finished": len(new) < max_new_tokens})
    model.train(training)
    return results
