"""Counting and probing in processes of their own: this one stays light, and a probe's memory is nobody else's."""

import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

from rlhf_core.config import Params
from rlhf_core.errors import EnvironmentProblem
from rlhf_core.planning.probe import Probed, ProbeRequest
from rlhf_core.planning.shapes import ModelShape
from rlhf_core.planning.workload import Workload
from rlhf_core.state.atomic import digest_of
from tasks import paths
from tasks.launch import tied
from tasks.libraries import SETTINGS
from tasks.planning.kept import data_digest, kept, machine_digest

CODE = Path(__file__).resolve().parents[2]
LONGEST_SECONDS = 600
STAGE_MODULES = ("tasks.stages.sft.run", "tasks.stages.reward.run")
"""What a stage's process has imported before it begins to work."""
PROBE_WORK, LEAST_TOKENS, MOST_TOKENS = 2.5e10, 256, 2048
"""Multiplications of a probe's training step, and the bounds of its tokens: about a second of one core."""
SAMPLED_ROWS = 64
SOURCES = ("data", "artifacts/validate", "artifacts/preferences", "artifacts/sft/model")


def counted(root: Path, params: Params, stale: Collection[str], *, ask: bool = True) -> Workload | None:
    """Rows and lengths of a checkout; what was counted before of the same files is not counted again.

    Raises:
        EnvironmentProblem: they could not be counted.
    """
    data = params.data.model_dump()
    files = [root / str(file) for file in data.values() if isinstance(file, str) and (root / file).is_file()]
    files += [root / source for source in SOURCES[1:]]
    parts = params.model_dump(mode="json", by_alias=True)
    settings = {name: parts[name] for name in ("model", "data", "generate", "label", "preferences")}
    name = digest_of([settings, parts["sft"]["heldout_share"], parts["sft"]["turns"], sorted(stale), str(root)])
    name = digest_of([name, data_digest(root, files), _folder_digest(root, params)])[:24]

    def count() -> Workload:
        return Workload.model_validate_json(_run(["tasks.planning", str(root), *sorted(stale)], root, ""))

    return kept(paths.home(root), Workload, name, count if ask else None)


def probed(root: Path, request: ProbeRequest, *, ask: bool = True) -> Probed | None:
    """What a probe measured, now or before.

    Raises:
        EnvironmentProblem: it could not be measured.
    """
    name = digest_of([request.model_dump(mode="json"), machine_digest(CODE)])[:24]

    def measure() -> Probed:
        arguments = ["rlhf_core.planning.probe", *STAGE_MODULES]
        return Probed.model_validate_json(_run(arguments, root, request.model_dump_json()))

    return kept(paths.home(root), Probed, name, measure if ask else None)


def probe_request(root: Path, params: Params, shape: ModelShape, workload: Workload) -> ProbeRequest:
    """What is to be measured for a run: rows of its own lengths, few enough for about a second each."""
    from_folder = params.model.source == "folder"
    high = min(shape.layers, 3)
    depths = (1, high) if high > 1 else (1, 1)
    work = high * shape.layer_parameters + shape.embedding_parameters // 2
    budget = min(MOST_TOKENS, max(LEAST_TOKENS, int(PROBE_WORK / (3 * work))))
    lengths = [(one[0], answer) for one in workload.group_lengths for answer in one[1:2]]
    lengths = workload.demonstration_lengths or lengths or [(params.model.max_prompt_tokens // 2, 32)]
    middle = sorted(lengths, key=sum)[len(lengths) // 4 : max(1, 3 * len(lengths) // 4) + 1]
    rows: list[tuple[int, int]] = []
    while len(rows) < 2 or (sum(map(sum, rows)) < budget and len(rows) < 256):
        rows.append(middle[(7 * len(rows)) % len(middle)])
    prompts = workload.prompt_lengths or [prompt for prompt, _ in rows]
    sampled = [prompts[(7 * number) % len(prompts)] for number in range(min(SAMPLED_ROWS, 8 * len(rows)))]
    return ProbeRequest(
        model=params.model,
        folder=str((root / params.model.path).resolve()) if from_folder else None,
        vocabulary=workload.vocabulary or shape.vocabulary,
        compute=params.compute,
        lora=params.model.lora,
        depths=depths,
        compact=params.machine.compact_memory,
        rows=rows,
        sampled=sampled,
    )


def _folder_digest(root: Path, params: Params) -> str:
    return data_digest(root, [root / params.model.path]) if params.model.source == "folder" else ""


def _run(arguments: list[str], root: Path, given: str) -> str:
    path = [str(CODE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**SETTINGS, **os.environ, "PYTHONPATH": os.pathsep.join(path)}
    try:
        done = subprocess.run(
            tied([sys.executable, "-P", "-m", *arguments]),
            input=given,
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LONGEST_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise EnvironmentProblem(f"plan: {arguments[0]} took over {LONGEST_SECONDS} s. Fix: try again later") from error
    if done.returncode == 0:
        return done.stdout
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    raise EnvironmentProblem(f"plan: {arguments[0]}: {last}. Fix: rlhf doctor")
