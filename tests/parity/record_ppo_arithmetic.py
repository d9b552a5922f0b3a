"""Record what the PPO arithmetic of TRL 1.12 makes of seeded tensors, for `test_ppo_arithmetic.py` to compare with.

TRL 1.16 has no PPO any more and 1.12 cannot be installed beside it, so its own statements are taken out of the
unpacked source by their targets and executed here on random tensors; nothing of it is imported or copied. To
record again:

    pip download trl==1.12.0 --no-deps --dest trl-1.12 && unzip -q trl-1.12/*.whl -d trl-1.12
    PYTHONPATH=tests python tests/parity/record_ppo_arithmetic.py trl-1.12
"""

import ast
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from support.source import execute, statements

RECORD = Path(__file__).with_name("ppo_arithmetic_trl_1_12.json")
FUNCTIONS = ("masked_mean", "masked_var", "masked_whiten")
ROWS, WIDTH = 4, 6
LENGTHS = [6, 3, 1, 5]
SETTINGS = {"kl_coef": 0.07, "gamma": 0.97, "lam": 0.9, "cliprange": 0.2, "cliprange_value": 0.3}


def definitions(tree: ast.Module) -> dict[str, Any]:
    """TRL's small functions and its constant for padded log-probabilities, compiled from its source."""
    found: dict[str, Any] = {"torch": torch}
    for node in tree.body:
        if (isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS) or (
            isinstance(node, ast.Assign) and ast.unparse(node).startswith("INVALID_LOGPROB =")
        ):
            execute(ast.Module(body=[node], type_ignores=[]), found, "trl 1.12")
    missing = [name for name in (*FUNCTIONS, "INVALID_LOGPROB") if name not in found]
    if missing:
        raise SystemExit(f"{missing} not found: is this TRL 1.12?")
    return found


def inputs(seed: int) -> dict[str, torch.Tensor]:
    """Random log-probabilities, values and scores of a rollout, and what an updated model says of it."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logprobs = -2 + draw(ROWS, WIDTH)
    return {
        "logprobs": logprobs,
        "ref_logprobs": logprobs + 0.3 * draw(ROWS, WIDTH),
        "new_logprobs": logprobs + 0.2 * draw(ROWS, WIDTH),
        "values": draw(ROWS, WIDTH),
        "new_values": draw(ROWS, WIDTH),
        "scores": draw(ROWS),
    }


def record(trl: Path, estimator: str, whiten_rewards: bool, seed: int) -> dict[str, Any]:
    """Everything TRL computes between the models' outputs and its two losses, on one rollout."""
    trainer = ast.parse((trl / "trl/experimental/ppo/ppo_trainer.py").read_text())
    given = inputs(seed)
    scope = definitions(trainer)
    scope |= {name: tensor.clone() for name, tensor in given.items()}
    scope |= {
        "args": SimpleNamespace(**SETTINGS, kl_estimator=estimator, whiten_rewards=whiten_rewards),
        "responses": torch.zeros(ROWS, WIDTH, dtype=torch.long),
        "sequence_lengths": torch.tensor(LENGTHS) - 1,
        "empty_cache": lambda: None,
    }
    rollout = statements(trainer, "response_idxs", "advantages")
    execute(rollout, scope, "trl 1.12")
    scope |= {
        "micro_batch_inds": torch.arange(ROWS),
        "vpred": scope["new_values"],
        "mb_values": scope["values"],
        "mb_return": scope["returns"],
        "mb_advantage": scope["advantages"],
        "mb_logprobs": scope["logprobs"],
        "new_logprobs": scope["new_logprobs"].masked_fill(scope["padding_mask"], scope["INVALID_LOGPROB"]),
    }
    update = statements(trainer, "vpred", "pg_loss")
    begin = next(i for i, each in enumerate(update.body) if "vpred = torch.masked_fill" in ast.unparse(each))
    update.body = update.body[begin:]
    execute(update, scope, "trl 1.12")
    measure = statements(trainer, "pg_clipfrac", "approxkl")
    measure.body = [each for each in measure.body if each.targets[0].id in ("pg_clipfrac", "approxkl")]
    execute(measure, scope, "trl 1.12")
    outputs = ("kl", "rewards", "advantages", "returns", "vf_loss", "vf_clipfrac", "pg_loss", "pg_clipfrac", "approxkl")
    return {
        "estimator": estimator,
        "whiten_rewards": whiten_rewards,
        "settings": SETTINGS,
        "lengths": LENGTHS,
        "inputs": {name: tensor.tolist() for name, tensor in given.items()},
        "outputs": {name: scope[name].tolist() for name in outputs},
    }


if __name__ == "__main__":
    source = Path(sys.argv[1])
    cases = [
        record(source, estimator, whiten, seed)
        for seed, (estimator, whiten) in enumerate([("k1", False), ("k3", False), ("k1", True)])
    ]
    RECORD.write_text(json.dumps({"trl": "1.12.0", "cases": cases}) + "\n")
