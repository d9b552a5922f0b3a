"""A server in a thread, with a tiny policy and a tiny reward model behind it, for tests that ask it as others would."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flows.serving.limits import Limits
from flows.serving.server import listen, make_server, shown
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.serving.served import Room, Served, serve_folder
from support.tokenizer import CHATML, byte_level


def write_models(folder: Path) -> None:
    """`policy`, `plain` (without a chat template) and `reward` below `folder`."""
    for name, template in (("policy", CHATML), ("plain", None)):
        torch.manual_seed(1)
        tokenizer = byte_level(template)
        tokenizer.pad_token = "<|begin|>"
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.25,
            max_position_embeddings=512,
            bos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=True,
        )
        model = LlamaForCausalLM(config).eval()
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    reward = RewardModel.from_policy(model, "mean", seed=2)
    reward.standardise(0.25, 2.0)
    reward.save(folder / "reward", tokenizer)


def load(folder: Path, *names: str, rows: int = 4) -> dict[str, Served]:
    """Models of `folder` at work, by name."""
    room = Room(rows=rows, places=400)
    return {name: serve_folder(name, folder / name, torch.device("cpu"), room) for name in names}


@contextmanager
def serving(models: dict[str, Served], limits: Limits | None = None, keys: Sequence[str] = ()) -> Iterator[str]:
    """Address of a server of these models, which ends with the block as a signal would end it."""
    with listen("127.0.0.1", 0) as listener:
        server = make_server(models, limits or Limits(), keys, shown(listener))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://{shown(listener)}"
        finally:
            server.should_exit = True
            thread.join(60)
            for model in models.values():
                model.close()
