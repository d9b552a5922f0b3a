"""Stand-ins on which TRL's losses run: the few attributes they read, and a model that says what it is told.

Importing this skips a test module where the extra `parity` is not installed.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="needs the extra `parity`: pip install -e '.[parity]'")


class OneProcess:
    """What of an `Accelerator` a loss touches when there is one process."""

    device = torch.device("cpu")

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    gather_for_metrics = gather


def trainer(**attributes: Any) -> SimpleNamespace:
    """An object with the attributes that a TRL trainer's loss reads; those given come first."""
    common = {
        "model": SimpleNamespace(training=True),
        "accelerator": OneProcess(),
        "aux_loss_enabled": False,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    return SimpleNamespace(**(common | attributes))


def model_of_logprobs(logprobs_BS: Tensor) -> Any:
    """A model whose fused output layer gives these log-probabilities of the labels, 0 where a label is ignored."""

    def forward(*, labels: Tensor, **_: Any) -> SimpleNamespace:
        counted_BS = labels[:, 1:] != -100
        return SimpleNamespace(
            log_probs=torch.where(counted_BS, logprobs_BS, 0.0),
            entropy=torch.zeros_like(logprobs_BS),
            mean_logits=torch.zeros_like(logprobs_BS),
            is_top1=torch.zeros_like(logprobs_BS, dtype=torch.bool),
        )

    return forward
