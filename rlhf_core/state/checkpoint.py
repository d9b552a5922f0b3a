"""Checkpoints that are either complete and verified or never looked at.

A checkpoint is a folder `step-000123` with safetensors and JSON, no pickle. It is written under a temporary name,
flushed, its manifest (SHA-256 of every file and of itself) written last, and renamed; the older ones are pruned only
then. It holds what training changes: of a network the trainable parameters and the buffers, whole, however they are
divided among processes. Frozen weights (a base under adapters) are not written; their digest is, and is compared.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf_core.errors import EnvironmentProblem
from rlhf_core.faults import faultpoint
from rlhf_core.state.atomic import (
    digest_of,
    publish_folder,
    sweep_temporary,
    temporary_folder,
    tree_digest,
    write_json,
)
from rlhf_core.state.sharding import local, part_like, whole
from rlhf_core.state.train_state import TrainState
from rlhf_core.state.world import ALONE, World

SCHEMA = 3
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-[0-9]{9,}")


class Checkpointer:
    """Keeps and restores training states in one folder.

    Args:
        folder: where the `step-*` folders live; made when first needed.
        identity: what the state depends on (hashes of inputs, parameters, code, environment). A checkpoint of
            another identity is refused, because going on from it would give a result that nobody can rebuild.
        keep: newest checkpoints to keep, at least 2, so that a torn newest one has a predecessor.
        world: processes that train together. All call `save` and `restore`; the first writes, verifies and chooses.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], keep: int = 2, world: World = ALONE) -> None:
        if keep < 2:
            raise ValueError(f"keep must be at least 2, not {keep}: a torn newest checkpoint needs a predecessor")
        self.folder, self.identity, self.keep, self.world = folder, identity, keep, world
        self._frozen: dict[str, str] | None = None

    def save(self, state: TrainState) -> None:
        """Write `state` as `step-<step>`; a checkpoint of this step that is already there is left alone."""
        final = self.folder / f"step-{state.step:09d}"
        if self.world.rank == 0 and not final.exists():
            self._write(final, state)
        else:  # still gives its parts to whoever writes
            for tensors in _files(state)[0].values():
                _gathered(tensors, keep=False)

    def restore(self, state: TrainState) -> bool:
        """Load the newest checkpoint that verifies into `state`, in place.

        Returns:
            False where there is none to go on from: none at all, or all of them damaged, which is said. Damaged ones
            lie in `quarantine` then; training begins again and ends with the bytes of a run that was never stopped.

        Raises:
            EnvironmentProblem: there are checkpoints, and the whole ones belong to another identity.
        """
        found = [self._newest(state)] if self.world.rank == 0 else []
        step = self.world.collect(found)[0]
        if step is not None:
            _load(self.folder / f"step-{step:09d}", state)
        return step is not None

    def _write(self, final: Path, state: TrainState) -> None:
        files, groups = _files(state)
        with temporary_folder(self.folder, "checkpoint") as temporary:
            for name, tensors in files.items():
                save_file(_gathered(tensors, keep=True), temporary / f"{name}.safetensors")
            rest = {"step": state.step, "extra": state.extra, "history": state.history, "optimizers": groups}
            write_json(temporary / "state.json", rest | {"frozen": self._frozen_digests(state)})
            faultpoint("checkpoint.written")
            manifest = {"schema": SCHEMA, "identity": self.identity, "files": tree_digest(temporary)}
            write_json(temporary / MANIFEST, manifest | {"digest": digest_of(manifest)})
            faultpoint("checkpoint.before_rename")
            publish_folder(temporary, final)
        faultpoint("checkpoint.after_rename")
        for old in self._steps()[: -self.keep]:
            shutil.rmtree(old)

    def _newest(self, state: TrainState) -> int | None:
        """Step of the newest checkpoint that verifies; those after it are set aside."""
        if not self.folder.exists():
            return None
        sweep_temporary(self.folder)
        found, foreign = self._steps(), 0
        for folder in reversed(found):
            problem = self._damage(folder)
            if problem is None:
                problem = self._difference(folder, state)
                if problem is None:
                    return int(folder.name.removeprefix("step-"))
                foreign += 1
            broken = self.folder / "quarantine"
            broken.mkdir(exist_ok=True)
            shutil.rmtree(broken / folder.name, ignore_errors=True)
            folder.rename(broken / folder.name)
            print(f"checkpoint {folder.name} set aside in {broken}: {problem}", flush=True)
        if foreign:
            raise EnvironmentProblem(
                f"{self.folder}: none of {len(found)} checkpoints verifies. "
                f"Fix: look at {self.folder / 'quarantine'}, then remove {self.folder} to train from the beginning"
            )
        if found:
            print(
                f"WARNING: {self.folder}: all of {len(found)} checkpoints are damaged; "
                "training begins again at step 0, what they held is computed again",
                flush=True,
            )
        return None

    def _steps(self) -> list[Path]:
        """The checkpoints, oldest first; copies under names of one's own (`step-000000004.bak`) are none."""
        return sorted(path for path in self.folder.glob("step-*") if _NAME.fullmatch(path.name))

    def _damage(self, folder: Path) -> str | None:
        """What keeps a checkpoint from being read as it was written; None where it is whole."""
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            if manifest.pop("digest", None) != digest_of(manifest):
                return "the manifest does not have the content that it was written with"
            if manifest["schema"] != SCHEMA:
                return f"schema {manifest['schema']} instead of {SCHEMA}"
            recorded = manifest["files"]
            if not isinstance(recorded, dict) or not isinstance(manifest["identity"], dict):
                return "the manifest is of another form"
            there = tree_digest(folder)
        except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
            return f"unreadable ({type(error).__name__}: {error})"
        there.pop(MANIFEST)
        if there.keys() != recorded.keys():
            return f"files differ from the manifest: {sorted(there.keys() ^ recorded.keys())}"
        changed = [name for name, digest in recorded.items() if there[name] != digest]
        return f"{changed[0]} does not have the content that the manifest records" if changed else None

    def _difference(self, folder: Path, state: TrainState) -> str | None:
        """What a whole checkpoint depends on that is another here; None where it may be gone on from."""
        manifest = json.loads((folder / MANIFEST).read_text())
        differing = [key for key in self.identity if manifest["identity"].get(key) != self.identity[key]]
        if differing:
            return f"made under another {', '.join(differing)}"
        frozen, now = json.loads((folder / "state.json").read_text())["frozen"], self._frozen_digests(state)
        moved = [name for name in sorted(now.keys() | frozen.keys()) if frozen.get(name) != now.get(name)]
        return f"made on other frozen weights of {', '.join(moved)}" if moved else None

    def _frozen_digests(self, state: TrainState) -> dict[str, str]:
        """SHA-256 of each network's frozen weights, as this process holds them; taken once, for they do not change."""
        if self._frozen is None:
            self._frozen = {
                name: _digest(parameter for parameter in module.parameters() if not parameter.requires_grad)
                for name, module in state.modules.items()
            }
        return self._frozen


def _digest(tensors: Iterator[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(local(tensor.detach()).cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _changing(module: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters and saved buffers by name, tied ones once."""
    trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    saved = module.state_dict().keys()
    return trainable | {name: buffer for name, buffer in module.named_buffers() if name in saved}


def _files(state: TrainState) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors of a state by the file that holds them, and the optimisers' JSON-able rest."""
    files, groups = {f"module-{name}": _changing(module) for name, module in state.modules.items()}, {}
    for name, optimizer in state.optimizers.items():
        files[f"optimizer-{name}"], groups[name] = _flatten_optimizer(optimizer)
    return files | {"tensors": state.tensors}, groups


def _gathered(tensors: dict[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU, one at a time, so that only who keeps them ever holds them all."""
    kept = {}
    for name, tensor in tensors.items():
        complete = whole(tensor.detach())
        if keep:
            kept[name] = complete.cpu().contiguous()
    return kept


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
            with safe_open(folder / f"module-{name}.safetensors", "pt") as file:
                for key, target in _changing(module).items():
                    target.copy_(part_like(file.get_tensor(key), target))
    for name, optimizer in state.optimizers.items():
        rest = saved["optimizers"][name]
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        entries: dict[int, dict[str, Any]] = {}
        flat = {**load_file(folder / f"optimizer-{name}.safetensors"), **rest["scalars"]}
        for path, value in flat.items():
            place, key = path.split("/", 1)
            moment = isinstance(value, Tensor) and value.shape == parameters[int(place)].shape
            entries.setdefault(int(place), {})[key] = part_like(value, parameters[int(place)]) if moment else value
        groups = [
            {k: tuple(v) if isinstance(v, list) and k == "betas" else v for k, v in g.items()} for g in rest["groups"]
        ]
        optimizer.load_state_dict({"state": entries, "param_groups": groups})
