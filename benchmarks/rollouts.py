"""What the benchmarks of sampling and PPO run on: prompts, sizes of a rollout, and a model whose responses end."""

import math
from pathlib import Path
from typing import Any

import torch

from benchmarks.workload import END, SIZES, make_pairs, model_folder

RESPONSES, NEW_TOKENS = 64, 64  # of a rollout; the most tokens of a response
EPOCHS, MINIBATCH = 4, 16  # TRL's numbers of passes and of minibatches
MEDIAN = 24  # tokens of a response where responses end by themselves
RATE = 1e-6  # of both models: too small to move the lengths while they are measured


def make_prompts(count: int, size: str, seed: int) -> list[list[int]]:
    """Prompts of the lengths that all benchmarks have."""
    return [pair.prompt for pair in make_pairs(count, SIZES[size].vocabulary, seed)]


def let_it_end(model: Any) -> None:
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
        head[END] = 0.0
        ids = torch.tensor([prompt[:16] for prompt in make_prompts(64, _size_of(model), seed=1)])
        states = model.model(input_ids=ids).last_hidden_state[:, -1]
        others = torch.logsumexp((states @ head.t()).index_fill_(1, torch.tensor([END]), -math.inf), -1)
        wanted = others + math.log(chance / (1 - chance))
        head[END, 0] = (wanted.mean() / states[:, 0].mean()).item()


def load(size: str, cache: Path, *, ends: bool) -> Any:
    """The benchmark's language model, whose responses end by themselves or never do."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder(size, cache), dtype=torch.float32).eval()
    if ends:
        let_it_end(model)
    return model


def _size_of(model: Any) -> str:
    return next(name for name, size in SIZES.items() if size.vocabulary == model.config.vocab_size)
