"""Addressed randomness: a generator is derived from where it is used, never carried from step to step.

A resumed run therefore needs no saved generator state, and adding a random choice in one place moves none elsewhere.
"""

import hashlib

import torch


class StepRng:
    """Generators for one step of one stage.

    Args:
        seed: the run's seed.
        stage: stage name, so that two stages never share a stream.
        step: optimiser step, rollout or epoch the choices belong to.
    """

    def __init__(self, seed: int, stage: str, step: int = 0) -> None:
        self._address = f"{seed}/{stage}/{step}"

    def integer(self, purpose: str) -> int:
        """Return a 63-bit integer that depends on the address and `purpose` alone."""
        digest = hashlib.sha256(f"{self._address}/{purpose}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    def __call__(self, purpose: str) -> torch.Generator:
        """Return a fresh CPU generator for `purpose`."""
        return torch.Generator().manual_seed(self.integer(purpose))
