"""What this machine can do at most: how fast it multiplies matrices, and how fast it reads and writes memory."""

import time
from collections.abc import Callable

import torch

from benchmarks.clock import synchronise
from benchmarks.workload import Size

TOKENS = {"cpu": 1536, "cuda": 16384}
"""Of the products that are timed: on a GPU enough to keep it busy."""

COPIED_MB = {"cpu": 256, "cuda": 2048}
"""Of the tensor that is copied: more than any cache holds."""

TIMED_S = 0.5


def matmul_rate(size: Size, *, with_output: bool, device: str = "cpu") -> float:
    """Operations a second of `torch.mm`, in the shapes and proportions of a training step.

    Each product of a layer with its two gradients; the output layer at half of the tokens. On a CPU in float32, a
    second of the processor; on a GPU in bfloat16, a second of the clock.
    """
    tokens, hidden, intermediate = TOKENS[device], size.hidden, size.intermediate
    shapes = [(tokens, hidden, hidden + 2 * size.kv_width), (tokens, hidden, hidden), (tokens, intermediate, hidden)]
    shapes = [*shapes, (tokens, hidden, 2 * intermediate)] * size.layers
    if with_output:
        shapes.append((tokens // 2, hidden, size.vocabulary))
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def random(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, device=device).to(dtype)

    pieces = [(random(n, k), random(m, k), random(n, m), shapes.count((n, k, m))) for n, k, m in set(shapes)]

    def products() -> None:
        for x, weight, grad, count in pieces:
            for _ in range(count):
                torch.mm(x, weight.t())
                torch.mm(grad, weight)
                torch.mm(grad.t(), x)

    flop = sum(6.0 * n * k * m for n, k, m in shapes)
    return flop * _times_a_second(products, device, time.process_time if device == "cpu" else time.perf_counter)


def bandwidth(device: str = "cpu") -> float:
    """Bytes a second that copying a large tensor reads and writes."""
    source = torch.ones(COPIED_MB[device] * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * source.numel() * _times_a_second(lambda: target.copy_(source), device, time.perf_counter)


def _times_a_second(work: Callable[[], object], device: str, clock: Callable[[], float]) -> float:
    work()  # what is made on first use is not what is measured
    times, spent = 0, 0.0
    while spent < TIMED_S:
        synchronise(device)
        start = clock()
        work()
        synchronise(device)
        spent += clock() - start
        times += 1
    return times / spent
