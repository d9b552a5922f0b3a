"""`StaticDecoder` for a GPU: a token's few hundred kernels are captured in a CUDA graph once and launched as one after.

Decoding a small model on a GPU is bound by launches: each kernel takes less time than asking for it does. A graph
launches all of them at once, but it is a recording: it reads and writes the addresses of the time it was captured at,
and its shapes are fixed. So whatever changes from token to token lies in buffers that stay where they are (tokens,
places, positions, cache), and attention reads a multiple of `GRAIN_PLACES` places, those that are not written yet being
hidden. A graph serves one number of rows and one number of places; rows are always the first of the buffers.
Shape suffixes: as in `static_decoder`; C = rows that there is room for.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_core.engine.batches import SequenceBatch
from rlhf_core.rollout.static_decoder import HIDDEN, StaticDecoder
from rlhf_core.state.compute_mode import compute_mode

GRAIN_PLACES = 128
"""Attention reads a multiple of so many places: more would read for nothing, fewer would be captured too often."""

Replay = Callable[[], object]
Capture = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]
"""Records what a function does, without doing it: returns what does it, and the tensor where its result then lies."""

_said: set[str] = set()


class CudaCapture:
    """A `Capture` by CUDA graphs, which share their memory: no two of them run at once."""

    def __init__(self) -> None:
        self.pool: tuple[int, int] | None = None

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """Capture `work`.

        Raises:
            RuntimeError: it does something that cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.stream(torch.cuda.current_stream())  # back to it, also where capturing breaks off
        with current, torch.cuda.graph(graph, pool=self.pool):
            result = work()
        self.pool = graph.pool()
        return graph.replay, result


class GraphedDecoder(StaticDecoder):
    """A `StaticDecoder` whose steps can be replayed.

    The first step of a shape is taken kernel by kernel, which is also the warm-up that capturing wants; the second is
    captured. Where capturing fails, that is said once and no more graphs are tried. With `compute_mode().cuda_graphs`
    off none is: the kernels and their shapes are the same, so a graph changes no bit.

    Args:
        model: one that `StaticDecoder.supports`; use the decoder while it does not change.
        capture: how a graph is made; None: `CudaCapture`.
    """

    def __init__(self, model: PreTrainedModel, capture: Capture | None = None) -> None:
        super().__init__(model)
        self.capture = (capture or CudaCapture()) if compute_mode().cuda_graphs == "auto" else None
        self.why_not = None if self.capture else "compute.cuda_graphs is off"
        self._forget(0, 0)

    def prefill(self, prompts: SequenceBatch, max_new_tokens: int) -> Tensor:
        """See `Decoder`."""
        logits_BV = super().prefill(prompts, max_new_tokens)
        self.rotations_TE[: self.places].copy_(self.rotation_TE)
        self.rotation_TE = self.rotations_TE
        self.hidden_C1T.fill_(HIDDEN)
        self._put(len(prompts.ids_BS), self.hidden_N1T[..., : self.filled], self.next_position_B)
        self.place_1.fill_(self.filled)
        return logits_BV

    def step(self, tokens_B: Tensor) -> Tensor:
        """See `Decoder`; the logits are overwritten by the next step."""
        rows, self.filled = len(tokens_B), self.filled + 1
        shape = (rows, -(-self.filled // GRAIN_PLACES) * GRAIN_PLACES)
        self.tokens_C[:rows].copy_(tokens_B)
        if self.capture is None or shape not in self.seen:
            self.seen.add(shape)
            return self._step_in_place(shape)
        if shape not in self.graphs and not self._captured(shape, self.capture):
            return self._step_in_place(shape)
        replay, logits_BV = self.graphs[shape]
        replay()
        return logits_BV

    def select(self, rows: Tensor) -> None:
        """See `Decoder`."""
        kept = [[layer_BKET[..., : self.filled][rows] for layer_BKET in cache] for cache in (self.keys, self.values)]
        hidden_NKT = self.hidden_N1T[..., : self.filled].unflatten(0, (-1, self.num_kv_heads))[rows]
        position_B = self.next_position_B[rows]
        if len(rows) > len(self.tokens_C):
            rotation_TE = self.rotations_TE
            self._forget(len(rows), self.room_places)
            self.rotations_TE.copy_(rotation_TE)
            self.rotation_TE = self.rotations_TE
            self.hidden_C1T.fill_(HIDDEN)
            self.place_1.fill_(self.filled)
        self._look_at(len(rows))
        for layers, cache in zip(kept, (self.keys, self.values), strict=True):
            for layer_BKET, target_BKET in zip(layers, cache, strict=True):
                target_BKET[..., : self.filled].copy_(layer_BKET)
        self._put(len(rows), hidden_NKT.flatten(0, 1), position_B)

    def _captured(self, shape: tuple[int, int], capture: Capture) -> bool:
        """Capture the step of a shape; where that fails, say why and try no other."""
        try:
            self.graphs[shape] = capture(lambda: self._step_in_place(shape))
        except RuntimeError as error:
            self.capture, self.why_not = None, str(error).strip().partition("\n")[0]
            if self.why_not not in _said:
                _said.add(self.why_not)
                print(f"sampling without CUDA graphs: {self.why_not}", flush=True)
            return False
        return True

    def _step_in_place(self, shape: tuple[int, int]) -> Tensor:
        """What is captured: reads and writes buffers only, and asks nothing of them."""
        rows, places = shape
        hidden_N1T = self.hidden_C1T[: rows * self.num_kv_heads, :, :places]
        hidden_N1T.index_fill_(-1, self.place_1, 0.0)
        logits_BV = self._next(
            self.tokens_C[:rows],
            hidden_N1T,
            lambda cache, new: cache.index_copy_(-1, self.place_1, new[..., None]),
        )
        self.place_1.add_(1)
        self.next_position_B.add_(1)
        return logits_BV

    def _make_room(self, rows: int) -> None:
        """Buffers for a batch: those of before where they suffice, so that their graphs serve again."""
        if rows > len(self.tokens_C) or self.places > self.room_places:
            places = max(self.room_places, -(-self.places // GRAIN_PLACES) * GRAIN_PLACES)
            self._forget(max(rows, len(self.tokens_C)), places)
        self._look_at(rows)

    def _forget(self, rows: int, places: int) -> None:
        """New buffers, and no graphs. They are 0: what is hidden has a probability of 0, but 0 times NaN is NaN."""
        device, layers = self.embedding.device, len(self.layers)
        self.seen: set[tuple[int, int]] = set()
        self.graphs: dict[tuple[int, int], tuple[Replay, Tensor]] = {}
        shape = (2, layers, rows, self.num_kv_heads, self.head_size, places)
        self.room_places, self.cache_2LCKET = places, torch.zeros(shape, dtype=self.dtype, device=device)
        self.tokens_C = torch.zeros(rows, dtype=torch.int64, device=device)
        self.position_C = torch.zeros_like(self.tokens_C)
        self.place_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self.hidden_C1T = torch.zeros(rows * self.num_kv_heads, 1, places, dtype=self.dtype, device=device)
        self.rotations_TE = torch.zeros(places, self.head_size // 2, dtype=torch.complex64, device=device)

    def _look_at(self, rows: int) -> None:
        keys_LBKET, values_LBKET = self.cache_2LCKET[:, :, :rows]
        self.keys, self.values = list(keys_LBKET), list(values_LBKET)

    def _put(self, rows: int, hidden_N1T: Tensor, position_B: Tensor) -> None:
        """What the rows must not see, and where they are, into the buffers."""
        self.hidden_N1T, self.next_position_B = self.hidden_C1T[: rows * self.num_kv_heads], self.position_C[:rows]
        self.hidden_N1T[..., : hidden_N1T.shape[-1]].copy_(hidden_N1T)
        self.next_position_B.copy_(position_B)
