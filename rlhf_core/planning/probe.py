"""A short measured probe: steps of the real trainers on rows of real lengths, with fewer layers than the model has.

A layer costs what any other does, so two depths give the cost of one and of all that is not a layer (embedding, output
layer, bookkeeping), for seconds and for bytes alike. The weights are random: what a step takes does not depend on them.
It runs in a process of its own (`python -m rlhf_core.planning.probe` reads a `ProbeRequest` and writes a `Probed`, as
JSON), so that its memory is its own and goes back when it ends.
"""

import ctypes
import gc
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from rlhf_core.config import ComputeConfig, ModelConfig
from rlhf_core.config.lora import LoraConfig
from rlhf_core.state.host_memory import map_large_blocks


class ProbeRequest(BaseModel):
    """What is to be measured.

    Attributes:
        model: settings of the model; of a folder, its `config.json` is read and no weight.
        folder: of the pretrained model; null builds from numbers.
        vocabulary: tokens of the tokenizer.
        compute: threads, device, precision, checkpointing.
        lora: adapters of the trained variants; null measures all weights.
        depths: layers of the two models that are measured.
        rows: (prompt, response) lengths of a training pass.
        sampled: prompt lengths of the rows that are sampled at once.
        compact: freed memory goes back to the system at once (`machine.compact_memory`).
        seconds: after which no further step of the same kind begins.
    """

    model_config = ConfigDict(frozen=True)

    model: ModelConfig
    folder: str | None
    vocabulary: int
    compute: ComputeConfig
    lora: LoraConfig | None
    depths: tuple[int, int]
    rows: list[tuple[int, int]]
    sampled: list[int]
    compact: bool = False
    seconds: float = 0.8


class Work(BaseModel):
    """What one kind of work took at one depth.

    Attributes:
        seconds: of CPU time on a CPU, else of the clock, of one pass over the rows; of sampling, of reading the
            prompts.
        update_s: of those, what the optimiser took.
        step_s: of one decoding step (sampling alone).
        peak_bytes: how far the process rose above what it held before the model was made; making it is not counted.
    """

    seconds: float
    update_s: float = 0.0
    step_s: float = 0.0
    peak_bytes: int


class Probed(BaseModel):
    """What was measured.

    Attributes:
        base_bytes: what the process holds with the libraries of a stage and nothing else.
        work: kind of work -> depth -> what it took.
        tokens, responses: of the rows of a training pass.
    """

    base_bytes: int
    work: dict[str, dict[int, Work]]
    tokens: int
    responses: int


def probe(request: ProbeRequest) -> Probed:
    """Measure each kind of work at both depths."""
    import torch

    from rlhf_core.planning.probed_work import KINDS, made_model
    from rlhf_core.state.compute_mode import ComputeMode, set_compute_mode

    compute = request.compute
    if request.compact:
        map_large_blocks()
    torch.set_num_threads(compute.threads)
    set_compute_mode(
        ComputeMode(precision=compute.precision, activation_checkpointing=compute.activation_checkpointing)
    )
    base, found = memory("VmRSS"), dict[str, dict[int, Work]]()
    for depth in dict.fromkeys(request.depths):
        for kind, measure in KINDS.items():
            _give_back()
            held = memory("VmRSS")
            model = made_model(request, depth)
            forget_peak()
            taken = measure(request, model)
            found.setdefault(kind, {})[depth] = Work(**taken._asdict(), peak_bytes=memory("VmHWM") - held)
            del model
    return Probed(
        base_bytes=base,
        work=found,
        tokens=sum(prompt + response for prompt, response in request.rows),
        responses=sum(response for _, response in request.rows),
    )


def memory(key: str) -> int:
    """Bytes that `/proc/self/status` has under `key`: `VmRSS` now, `VmHWM` the most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def forget_peak() -> None:
    """Let the kernel measure the peak from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def _give_back() -> None:
    """Let the C library give freed memory back to the system, so that what comes next is measured by itself."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def main(arguments: Sequence[str]) -> int:
    """Read a request from standard input and write what was measured to standard output."""
    for name in arguments:  # what a stage has in memory before it begins
        importlib.import_module(name)
    request = ProbeRequest.model_validate_json(sys.stdin.read())
    out, sys.stdout = sys.stdout, sys.stderr
    found = probe(request)
    print(json.dumps(found.model_dump(mode="json")), file=out, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
