"""`rlhf serve`."""

import signal
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from flows.cli.versions import NamedModel, model_folder
from flows.serving.limits import Limits
from rlhf_core.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from rlhf_core.serving.served import Served

Device = Literal["auto", "cpu", "cuda"]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Where a server listens, and how much it takes.

    Parameters
    ----------
    host:
        Address to listen on; beyond loopback a key is required.
    port:
        Port to listen on; 0 for any that is free.
    api_key_file:
        File with the keys that open the server, one a line; left out, RLHF_API_KEY of the environment, if set.
    device:
        Where the models run: auto is a GPU where torch sees one.
    precision:
        In what matrix products run; weights are float32.
    rows:
        Responses under way at once; others wait.
    context:
        Most tokens of a prompt and its response together; the model may have fewer.
    max_tokens:
        Longest response that may be asked for.
    waiting:
        Responses that may wait; beyond, callers are told to come again (429).
    per_minute:
        Requests a minute of one caller; 0 for any number.
    body_kib:
        Longest body of a request, in KiB.
    grace:
        Seconds that requests under way have when the server is told to end.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    device: Device = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    rows: int = 32
    context: int = 4096
    max_tokens: int = 1024
    waiting: int = 128
    per_minute: int = 600
    body_kib: int = 1024
    grace: float = 30.0


def serve(
    *versions: str,
    options: ServeOptions = ServeOptions(),
    engine: Literal["own", "vllm"] = "own",
    vllm_arguments: Annotated[tuple[str, ...], Parameter(name="--vllm-argument", consume_multiple=False)] = (),
) -> int:
    """Serve versions with OpenAI's interface: chat, completions, models, streaming; /score for reward models.

    It listens on 127.0.0.1, without a key, until Ctrl-C (exit code 130) or SIGTERM (143); requests under way may end.

    Parameters
    ----------
    versions:
        Registered versions such as rlhf-policy@champion or rlhf-reward/2, or folders; one or several.
    engine:
        own: continuous batching over the pipeline's sampler; vllm: `vllm serve` on the version's folder, if installed.
    vllm_arguments:
        One more argument for vllm, such as --vllm-argument=--dtype=bfloat16; may be given several times.
    """
    if not versions:
        raise ConfigError("serve: no version. Fix: rlhf serve rlhf-policy@candidate, or a folder with a model")
    from flows.serving.keys import read_keys
    from flows.serving.server import check_exposure

    keys = read_keys(options.api_key_file)
    check_exposure(options.host, keys)
    limits = _limits(options)
    signal.signal(signal.SIGTERM, _end_with_its_code)
    if engine == "vllm":
        return _with_vllm(versions, options, keys, vllm_arguments)
    if vllm_arguments:
        raise ConfigError("serve: --vllm-argument needs --engine vllm")
    return _with_own(versions, options, limits, keys)


def _with_own(versions: tuple[str, ...], options: ServeOptions, limits: Limits, keys: tuple[str, ...]) -> int:
    from flows.serving.server import listen, run_server

    with listen(options.host, options.port) as listener:  # first: a port that is taken is known before minutes of work
        run_server(_loaded(versions, options), limits, keys, listener)
    return 0


def _loaded(versions: tuple[str, ...], options: ServeOptions) -> "dict[str, Served]":
    """The versions at work, by every name that they have."""
    from rlhf_core.serving.served import Room, serve_folder
    from rlhf_core.state.compute_mode import ComputeMode, set_compute_mode

    set_compute_mode(ComputeMode(precision=options.precision))
    room = Room(rows=options.rows, places=options.context)
    device = chosen_device(options.device)
    models: dict[str, Served] = {}
    for reference in versions:
        with model_folder(reference) as found:
            _check_names(models, found, reference)
            print(f"loading {found.name}", file=sys.stderr)
            served = serve_folder(found.name, found.folder, device, room)
            models |= dict.fromkeys((found.name, *found.aliases), served)
    return models


def _check_names(models: "dict[str, Served]", found: NamedModel, reference: str) -> None:
    if found.name in models:
        raise ConfigError(f"{reference}: {found.name} is served already. Fix: name each once")


def _with_vllm(
    versions: tuple[str, ...], options: ServeOptions, keys: tuple[str, ...], arguments: tuple[str, ...]
) -> int:
    from flows.serving.vllm import run_vllm

    if len(versions) > 1:
        raise ConfigError("serve: --engine vllm serves one version. Fix: one, or --engine own")
    with ExitStack() as stack:
        found = stack.enter_context(model_folder(versions[0]))
        names = (found.name, *found.aliases)
        place = ["--host", options.host, "--port", str(options.port), "--dtype", options.precision]
        return run_vllm(found.folder, names, options.context, keys, [*place, *arguments])


def chosen_device(device: Device) -> "torch.device":
    """The device that is asked for.

    Raises:
        ConfigError: torch sees no GPU.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU. Fix: --device cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def _limits(options: ServeOptions) -> Limits:
    least = {"rows": 1, "context": 2, "max_tokens": 1, "body_kib": 1, "waiting": 0, "per_minute": 0, "grace": 0}
    for name, lowest in least.items():
        if (given := vars(options)[name]) < lowest:
            raise ConfigError(f"--{name.replace('_', '-')} {given}: must be at least {lowest}")
    return Limits(
        response_tokens=options.max_tokens,
        body_bytes=options.body_kib * 1024,
        waiting=options.waiting,
        per_minute=options.per_minute,
        grace_s=options.grace,
    )


def _end_with_its_code(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
