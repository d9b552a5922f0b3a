"""What the benchmarks of sampling and PPO run on: prompts, sizes of a rollout, and a model whose responses end."""

import math
from typing import Any

import torch

from benchmarks.workload import Subject, make_pairs

NEW_TOKENS = 64  # the most tokens of a response
EPOCHS, MINIBATCHES = 4, 4  # TRL's numbers of passes and of minibatches
MEDIAN = 24  # tokens of a response where responses end by themselves
RATE = 1e-6  # of both models: too small to move the lengths while they are measured


def make_prompts(count: int, subject: Subject, seed: int) -> list[list[int]]:
    """Prompts of the lengths that all benchmarks have."""
    return [pair.prompt for pair in make_pairs(count, subject, seed)]


def let_it_end(model: Any, subject: Subject) -> None:
    """Change a random Llama so that each token is the end with the chance that makes responses `MEDIAN` long.

    Place 0 of the residual stream becomes a constant that nothing else writes; the output layer reads it for the end
    token alone. The chance is then the same at every token, and lengths are geometric.
    """
    chance = 1 - 0.5 ** (1 / MEDIAN)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        head = model.lm_head.weight
        head[:, 0] = 0.0
        head[subject.end] = 0.0
        ids = torch.tensor([prompt[:16] for prompt in make_prompts(64, subject, seed=1)])
        states = model.model(input_ids=ids).last_hidden_state[:, -1]
        others = torch.logsumexp((states @ head.t()).index_fill_(1, torch.tensor([subject.end]), -math.inf), -1)
        wanted = others + math.log(chance / (1 - chance))
        head[subject.end, 0] = (wanted.mean() / states[:, 0].mean()).item()


def load(subject: Subject, *, ends: bool) -> Any:
    """The benchmark's language model, whose responses end by themselves or never do."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(subject.folder, dtype=torch.float32).eval()
    if ends:
        let_it_end(model, subject)
    return model
