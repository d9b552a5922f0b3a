"""What the reference policy makes of every response: asked once, kept on disk, used by every later run.

A policy that equals its reference must give log-ratios of exactly 0 (the first DPO loss is then ln 2), and the last
bits of a log-probability depend on what shares its forward pass. So the reference is asked on the very pieces that
the policy trains on, and how the data are cut into pieces is part of what a kept result is known by.
Shape suffixes: A = responses of all groups.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_core.data.batching.pairs import PreferenceGroup, collate_responses
from rlhf_core.engine.batches import cut
from rlhf_core.errors import check_finite
from rlhf_core.models.adapters import without_adapters
from rlhf_core.objectives.masked import masked_sum
from rlhf_core.rollout.logprobs import response_logprobs
from rlhf_core.state.atomic import digest_of, write_bytes
from rlhf_core.state.run_context import RunContext
from rlhf_core.state.sharding import in_step
from rlhf_core.state.world import World


@dataclass(frozen=True, kw_only=True, slots=True)
class LogprobCache:
    """Reference log-probabilities on disk, one file a set of rows, named by what its content depends on.

    A file begins with the SHA-256 of its rest, appears under its name only when it is whole, and is read only when
    the digest agrees; a damaged one is made again, and that is said. Runs that write the same file at the same time
    write the same bytes.

    Attributes:
        folder: where the files lie; made when first needed.
        identity: JSON-able; everything but the rows that the numbers depend on: content of the model and of the
            tokenizer, precision, truncation, code, versions, threads and device.
    """

    folder: Path
    identity: Mapping[str, Any]

    def path(self, rows: str) -> Path:
        """File of the rows with the digest `rows`."""
        return self.folder / f"{digest_of({'identity': dict(self.identity), 'rows': rows})}.logprobs"

    def find(self, rows: str) -> Tensor | None:
        """What was kept for these rows; None where there is nothing, or nothing that can be trusted."""
        path = self.path(rows)
        try:
            digest, _, content = path.read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        try:
            if digest.decode() != hashlib.sha256(content).hexdigest():
                raise ValueError("its content does not have the digest it was written with")
            return load(content)["logprobs"]
        except (ValueError, KeyError, SafetensorError) as error:
            print(f"reference log-probabilities {path.name[:12]} are computed again: {error}", flush=True)
            return None

    def keep(self, rows: str, logprobs: Tensor) -> None:
        """Write what `find` will find."""
        content = save({"logprobs": logprobs.contiguous()})
        write_bytes(self.path(rows), hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def response_places(groups: Sequence[PreferenceGroup]) -> list[Tensor]:
    """Where each group's responses stand when those of all groups are written one after the other."""
    sizes = [len(group.responses) for group in groups]
    return list(torch.arange(sum(sizes)).split(sizes))


def forward_passes(members: Sequence[int], per_forward: int | None, world: World) -> list[list[int]]:
    """This process's share of a step's groups, at most `per_forward` of them in a forward pass; None: all in one."""
    mine = world.share(members)
    size = per_forward or max(1, len(mine))
    return cut(mine, size)


def reference_logprobs(
    reference: PreTrainedModel,
    groups: Sequence[PreferenceGroup],
    batches: Sequence[Sequence[int]],
    run: RunContext,
    *,
    per_forward: int | None = None,
    cache: LogprobCache | None = None,
) -> Tensor:
    """Summed log-probability of every response under the reference, [A], on the CPU.

    Args:
        reference: causal language model; one that carries adapters stands for the model they were added to.
        groups: whose responses; their pairs do not matter.
        batches: the groups of each step, each group in one.
        run: each process of its world asks about its share and learns the rest.
        per_forward: see `forward_passes`.
        cache: where results are looked up and kept; None asks every time.

    Raises:
        Diverged: one is no finite number: each step that has it would be refused, and nobody told why.
    """
    rows = rows_digest(groups, batches, run.pad_id, per_forward, run.world.size)
    known = cache.find(rows) if cache else None
    # All processes go the same way: one that has to ask would wait for those that need not.
    found = run.world.total(torch.tensor(0 if known is None else 1))
    if known is not None and int(found) == run.world.size:
        return known
    with without_adapters(reference):
        logprobs_A = _ask(reference, groups, batches, run, per_forward)
    check_finite(
        logprobs_A.tolist(),
        "align.dpo: the reference's log-probability of training response",
        "look at the reference model and at that response",
    )
    if cache and run.world.rank == 0:
        cache.keep(rows, logprobs_A)
    return logprobs_A


def rows_digest(
    groups: Sequence[PreferenceGroup],
    batches: Sequence[Sequence[int]],
    pad_id: int,
    per_forward: int | None,
    world_size: int,
) -> str:
    """SHA-256 over every token of every row and over which rows share a forward pass."""
    cut = {"batches": [list(members) for members in batches], "per_forward": per_forward, "processes": world_size}
    digest = hashlib.sha256(digest_of(cut | {"pad_id": pad_id}).encode())
    for group in groups:
        rows = [group.prompt, *group.responses]
        digest.update(torch.tensor([len(rows), *map(len, rows)], dtype=torch.int64).numpy().tobytes())
        digest.update(torch.tensor([token for row in rows for token in row], dtype=torch.int64).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def group_logprob_sums(model: PreTrainedModel, groups: Sequence[PreferenceGroup], pad_id: int) -> Tensor:
    """Log-probability of every response of the groups, summed over its tokens, [B]."""
    batch = collate_responses(groups, pad_id).to(model.device)
    return masked_sum(response_logprobs(model, batch), batch.response_mask_BR)


def _ask(
    reference: PreTrainedModel,
    groups: Sequence[PreferenceGroup],
    batches: Sequence[Sequence[int]],
    run: RunContext,
    per_forward: int | None,
) -> Tensor:
    places = response_places(groups)
    logprobs_A = torch.zeros(sum(map(len, places)))
    for members in batches:
        mine: list[list[float]] = []
        for passing, weight in in_step(forward_passes(members, per_forward, run.world), reference, run.world):
            some = [groups[i] for i in passing]
            sums_B = group_logprob_sums(reference, some, run.pad_id).cpu()
            if weight:  # else it was gone through for the sake of the other processes
                mine += [sums.tolist() for sums in sums_B.split([len(group.responses) for group in some])]
        for i, sums in zip(members, run.world.collect(mine), strict=True):
            logprobs_A[places[i]] = torch.tensor(sums)
    return logprobs_A
