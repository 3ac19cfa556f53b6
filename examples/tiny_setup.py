"""What the examples train: a random Llama of 30,000 parameters, its base, made-up words. Not an example.

With models of your own it is two lines, and the second reads nothing until it has to:

    policy = AutoModelForCausalLM.from_pretrained(SFT, dtype=torch.float32)
    delta = ReferenceDelta.between(reference=SFT, base=BASE)
"""

import copy
import random

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trimtab import ReferenceDelta

WORDS = [f"w{i}" for i in range(60)]
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 64}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "tie_word_embeddings": True}
TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}


def policy_and_delta():
    """A policy that stands where its SFT model stands, and τ = θ_sft − θ_base."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES, **LAYERS, **TOKENS)).float()
    sft = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in sft.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return sft, ReferenceDelta.between(reference=sft, base=base)


def batches(count, rows=4, length=12):
    """``count`` batches of sequences that count upwards from some word."""
    chooser = random.Random(0)
    for _ in range(count):
        starts = torch.tensor([[chooser.randrange(40)] for _ in range(rows)])
        ids = 4 + starts + torch.arange(length)
        yield {"input_ids": ids, "labels": ids.clone()}


def dataset(count, length=12):
    """The same as single rows, for a Trainer."""
    return [{key: value[0] for key, value in row.items()} for row in batches(count, 1, length)]


def tokenizer():
    """One token per word; nothing is downloaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<end>", "<unknown>", "say", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unknown>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def preference_rows(count):
    """Prompts with a chosen answer that repeats the word and a rejected one that does not."""
    chooser = random.Random(0)
    pairs = [chooser.sample(WORDS, 2) for _ in range(count)]
    return [{"prompt": f"say {a}", "chosen": f" {a} {a}", "rejected": f" {b} {b}"} for a, b in pairs]


def weights(model):
    """All parameters in one vector."""
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def drift(model, start, delta, prefix=""):
    """How far the model has moved along τ since ``start``, in units of τ: (θ − θ_start)·τ / τ·τ.

    Merging adds α·F(τ) in every step. With OnDARE's defaults that comes to α·p·T after T steps, and what the
    gradients add is nearly orthogonal to a random τ such as this one: AdamW would show 0.00.

    ``prefix`` is what comes before the model's names where it is part of a larger one.
    """
    tau = torch.cat([delta.tensor(prefix + name).double().flatten() for name, _ in model.named_parameters()])
    return float((weights(model) - start) @ tau / (tau @ tau))


def moved(model, start, delta, expected, prefix=""):
    """The drift, and what it should be, in words."""
    return f"moved {drift(model, start, delta, prefix):.4f} τ along τ, expected {expected:.4f}"
