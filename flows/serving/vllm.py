"""vLLM behind the same command: its own server on a version's folder."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from rlhf_core.errors import ConfigError, EnvironmentProblem
from rlhf_core.model_folder import check_model_folder, read_json
from rlhf_core.models.mixture import is_mixture
from rlhf_core.serving.served import is_reward_model, positions_of


def run_vllm(
    folder: Path,
    names: Sequence[str],
    context: int,
    keys: Sequence[str],
    more: Sequence[str],
) -> int:
    """Start `vllm serve`, wait for its end and return its exit code; however this is left, it is ended with us.

    The key goes by the environment, where other users of the machine do not see it.

    Args:
        names: by which callers know the model.
        context: most tokens of a prompt and its response together.
        keys: vLLM takes one.
        more: further arguments, as they are.

    Raises:
        ConfigError: the model cannot be served by vLLM: a reward model with a head of ours, a mixture, several keys.
        EnvironmentProblem: vLLM is not installed, or the folder is not whole.
    """
    program = shutil.which("vllm")
    if program is None:
        raise EnvironmentProblem("vllm: not installed here. Fix: pip install vllm, or --engine own")
    if is_reward_model(folder) or is_mixture(folder):
        raise ConfigError(f"{names[0]}: vLLM knows neither reward heads nor mixtures of ours. Fix: --engine own")
    if len(keys) > 1:
        raise ConfigError("--api-key-file: vLLM takes one key. Fix: a file with one")
    check_model_folder(folder)
    command = [
        *(program, "serve", str(folder), "--served-model-name", *names),
        *("--max-model-len", str(min(context, positions_of(read_json(folder / "config.json")))), *more),
    ]
    environment = {**os.environ, **({"VLLM_API_KEY": keys[0]} if keys else {})}
    process = subprocess.Popen(command, env=environment)
    try:
        return process.wait()
    finally:
        _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
