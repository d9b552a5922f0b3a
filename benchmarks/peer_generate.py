"""The peer of sampling: `generate` of transformers, with the settings that were its best on a CPU."""

from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import Clock
from benchmarks.rollouts import NEW_TOKENS, RESPONSES, load, make_prompts
from benchmarks.worker import Setting
from benchmarks.workload import PAD


def generate(setting: Setting, clock: Clock) -> dict[str, Any]:
    """64 responses of 64 tokens a step: static cache, eager attention, rows of all lengths padded on the left."""
    model = load(setting.size, Path(setting.cache), ends=False)
    model.set_attn_implementation("eager")
    model.generation_config.eos_token_id = None
    batches = [make_prompts(RESPONSES, setting.size, setting.seed * 1000 + step) for step in range(setting.num_steps)]
    clock.begin()
    for step, prompts in enumerate(batches):
        torch.manual_seed(step)
        width = max(map(len, prompts))
        written = model.generate(
            input_ids=torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts]),
            attention_mask=torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
            do_sample=True,
            top_k=0,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=PAD,
            cache_implementation="static",
            disable_compile=True,
        )
        clock.tick(written[:, width:].numel())
    return {}
