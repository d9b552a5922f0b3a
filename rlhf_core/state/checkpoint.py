"""Checkpoints that are either complete and verified or never looked at.

A checkpoint is a folder `step-000123` with safetensors and JSON, no pickle. It is written under a temporary name,
flushed, its manifest (SHA-256 of every file) written last, and renamed; the older ones are pruned only then.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_core.errors import EnvironmentProblem
from rlhf_core.state.atomic import (
    file_digest,
    publish_folder,
    sweep_temporary,
    temporary_folder,
    tree_digest,
    write_json,
)
from rlhf_core.state.faults import faultpoint
from rlhf_core.state.train_state import TrainState

SCHEMA = 1
MANIFEST = "manifest.json"


class Checkpointer:
    """Keeps and restores training states in one folder.

    Args:
        folder: where the `step-*` folders live; made when first needed.
        identity: what the state depends on (hashes of inputs, parameters, code, environment). A checkpoint of
            another identity is refused, because going on from it would give a result that nobody can rebuild.
        keep: newest checkpoints to keep, at least 2, so that a torn newest one has a predecessor.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], keep: int = 2) -> None:
        if keep < 2:
            raise ValueError(f"keep must be at least 2, not {keep}: a torn newest checkpoint needs a predecessor")
        self.folder, self.identity, self.keep = folder, identity, keep

    def save(self, state: TrainState) -> None:
        """Write `state` as `step-<step>`; a checkpoint of this step that is already there is left alone."""
        final = self.folder / f"step-{state.step:09d}"
        if final.exists():
            return
        with temporary_folder(self.folder, "checkpoint") as temporary:
            for name, module in state.modules.items():
                _save_tensors(_module_tensors(module), temporary / f"module-{name}.safetensors")
            groups = {}
            for name, optimizer in state.optimizers.items():
                tensors, groups[name] = _flatten_optimizer(optimizer)
                _save_tensors(tensors, temporary / f"optimizer-{name}.safetensors")
            _save_tensors(state.tensors, temporary / "tensors.safetensors")
            write_json(
                temporary / "state.json",
                {"step": state.step, "extra": state.extra, "history": state.history, "optimizers": groups},
            )
            faultpoint("checkpoint.written")
            manifest = {"schema": SCHEMA, "identity": self.identity, "files": tree_digest(temporary)}
            write_json(temporary / MANIFEST, manifest)
            faultpoint("checkpoint.before_rename")
            publish_folder(temporary, final)
        faultpoint("checkpoint.after_rename")
        for old in self._steps()[: -self.keep]:
            shutil.rmtree(old)

    def restore(self, state: TrainState) -> bool:
        """Load the newest checkpoint that verifies into `state`, in place.

        Returns:
            False where there is no checkpoint at all.

        Raises:
            EnvironmentProblem: there are checkpoints and none verifies, or they belong to another identity.
        """
        if not self.folder.exists():
            return False
        sweep_temporary(self.folder)
        found = self._steps()
        for folder in reversed(found):
            problem = self._problem(folder)
            if problem is None:
                _load(folder, state)
                return True
            broken = self.folder / "quarantine"
            broken.mkdir(exist_ok=True)
            shutil.rmtree(broken / folder.name, ignore_errors=True)
            folder.rename(broken / folder.name)
            print(
                f"checkpoint {folder.name} set aside in {broken}: {problem}; going back to the one before",
                flush=True,
            )
        if found:
            raise EnvironmentProblem(
                f"{self.folder}: none of {len(found)} checkpoints verifies. "
                f"Fix: look at {self.folder / 'quarantine'}, then remove {self.folder} to train from the beginning"
            )
        return False

    def _steps(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))

    def _problem(self, folder: Path) -> str | None:
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
        except (OSError, ValueError) as error:
            return f"manifest unreadable ({error})"
        if manifest.get("schema") != SCHEMA:
            return f"schema {manifest.get('schema')} instead of {SCHEMA}"
        there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
        if there != set(manifest["files"]):
            return f"files differ from the manifest: {sorted(there ^ set(manifest['files']))}"
        for name, digest in manifest["files"].items():
            if file_digest(folder / name) != digest:
                return f"{name} does not have the content that the manifest records"
        differing = [key for key in self.identity if manifest["identity"].get(key) != self.identity[key]]
        return f"made under another {', '.join(differing)}" if differing else None


def _module_tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimiser's state into tensors (`<parameter index>/<key>`) and JSON-able rest."""
    saved = optimizer.state_dict()
    tensors, scalars = {}, {}
    for index, entry in saved["state"].items():
        for key, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{key}"] = value
            else:
                scalars[f"{index}/{key}"] = value
    return tensors, {"groups": saved["param_groups"], "scalars": scalars}


def _load(folder: Path, state: TrainState) -> None:
    saved = json.loads((folder / "state.json").read_text())
    state.step, state.extra, state.history = saved["step"], saved["extra"], saved["history"]
    state.tensors = load_file(folder / "tensors.safetensors")
    with torch.no_grad():
        for name, module in state.modules.items():
            tensors = load_file(folder / f"module-{name}.safetensors")
            for key, target in _module_tensors(module).items():
                target.copy_(tensors[key])
    for name, optimizer in state.optimizers.items():
        rest = saved["optimizers"][name]
        entries: dict[int, dict[str, Any]] = {}
        flat = {**load_file(folder / f"optimizer-{name}.safetensors"), **rest["scalars"]}
        for path, value in flat.items():
            index, key = path.split("/", 1)
            entries.setdefault(int(index), {})[key] = value
        groups = [
            {k: tuple(v) if isinstance(v, list) and k == "betas" else v for k, v in g.items()} for g in rest["groups"]
        ]
        optimizer.load_state_dict({"state": entries, "param_groups": groups})
