"""The peer of sampling: `generate` of transformers, with its best settings on a CPU and plain ones on a GPU."""

from typing import Any

import torch

from benchmarks.clock import Clock
from benchmarks.rollouts import NEW_TOKENS, load, make_prompts
from benchmarks.worker import Setting


def generate(setting: Setting, clock: Clock) -> dict[str, Any]:
    """Responses of 64 tokens, all at once, rows of all lengths padded on the left.

    On a CPU a static cache and eager attention; on a GPU weights in bfloat16, torch's fused attention and the cache
    that grows, as TRL's trainers call it.
    """
    subject = setting.subject
    model = load(subject, ends=False)
    ways: dict[str, Any] = {}
    if setting.device == "cpu":
        model.set_attn_implementation("eager")
        ways = {"cache_implementation": "static", "disable_compile": True}
    else:
        model = model.to(setting.device, torch.bfloat16)
    model.generation_config.eos_token_id = None
    numbers = range(setting.seed * 1000, setting.seed * 1000 + setting.num_steps)
    batches = [make_prompts(setting.responses, subject, number) for number in numbers]
    clock.begin()
    for step, prompts in enumerate(batches):
        torch.manual_seed(step)
        width = max(map(len, prompts))
        ids = [[subject.pad] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        written = model.generate(
            input_ids=torch.tensor(ids, device=setting.device),
            attention_mask=torch.tensor(mask, device=setting.device),
            do_sample=True,
            top_k=0,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=subject.pad,
            **ways,
        )
        clock.tick(written[:, width:].numel())
    return {}
