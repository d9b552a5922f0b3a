"""What a server writes for one caller after the other and for many at once: `python -m benchmarks.serving --size S`.

`rlhf serve` runs in a process of its own on a random Llama (or `--model FOLDER`), asked over HTTP by this one, each
caller sending its next request when it has the answer to the last. Prompts have the lengths of all benchmarks here, and
every response is as long as allowed.
"""

import argparse
import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import httpx
import psutil

from benchmarks.table import processor
from benchmarks.workload import SIZES, save_json, subject_of

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "runs/benchmarks"


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What one number of callers got.

    Attributes:
        callers: at once.
        tokens: written for all.
        wall_s: from the first request to the last answer.
        cpu_s: of the server meanwhile; what else the machine does changes it little.
        first_s: median time from a request to its first token.
        whole_s: median time from a request to its last.
    """

    callers: int
    tokens: int
    wall_s: float
    cpu_s: float
    first_s: float
    whole_s: float


async def ask(client: httpx.AsyncClient, body: dict[str, object]) -> tuple[int, float, float]:
    """Tokens of one streamed answer, and the seconds to its first and last token."""
    began, first, tokens = time.perf_counter(), 0.0, 0
    async with client.stream("POST", "/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                tokens += '"logprobs": {' in line
                first = first or time.perf_counter() - began
    return tokens, first, time.perf_counter() - began


async def measure(address: str, callers: int, bodies: Sequence[dict[str, object]], server: psutil.Process) -> Load:
    """Have so many callers ask all of it between them."""
    waiting, answers = list(reversed(bodies)), []
    async with httpx.AsyncClient(base_url=address, timeout=600, trust_env=False) as client:

        async def caller() -> None:
            while waiting:
                answers.append(await ask(client, waiting.pop()))

        began, cpu_s = time.perf_counter(), sum(server.cpu_times()[:2])
        await asyncio.gather(*(caller() for _ in range(callers)))
        wall_s, cpu_s = time.perf_counter() - began, sum(server.cpu_times()[:2]) - cpu_s
    tokens, first_s, whole_s = zip(*answers, strict=True)
    return Load(
        callers=callers,
        tokens=sum(tokens),
        wall_s=wall_s,
        cpu_s=cpu_s,
        first_s=median(first_s),
        whole_s=median(whole_s),
    )


def make_bodies(count: int, tokens: int, model: str) -> list[dict[str, object]]:
    """Requests with prompts of 16 to 64 tokens, each with a seed of its own. Log-probabilities make a chunk a token."""
    lengths = [16 + 48 * number // max(1, count - 1) for number in range(count)]
    return [
        {
            "model": model,
            "prompt": [2 + (7 * number + place) % 50 for place in range(length)],
            "max_tokens": tokens,
            "seed": number,
            "stream": True,
            "logprobs": 0,
        }
        for number, length in enumerate(lengths)
    ]


def serve(folder: Path, threads: int) -> tuple["subprocess.Popen[str]", str]:
    """A server in a process of its own, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli.app", "serve", str(folder), "--port", "0", "--per-minute", "0"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline() if process.stdout else ""
    if "http://" not in line:
        raise SystemExit(f"the server did not come up: exit code {process.wait()}")
    return process, line.split()[-1]


def page(loads: Sequence[Load], subject: str, tokens: int, threads: int) -> str:
    """The setting and a row a number of callers; the ratio is to one caller after the other."""
    one = loads[0]
    lines = [
        f"{subject}, {tokens} tokens a response, {threads} thread(s). Machine: {processor()}.",
        "",
        "| callers at once | tokens/CPU-s of the server | against one by one | tokens/s | against one by one "
        "| first token (median) | whole response (median) |",
        "|---|---|---|---|---|---|---|",
    ]
    for load in loads:
        rates = load.tokens / load.cpu_s, load.tokens / load.wall_s
        ratios = rates[0] / (one.tokens / one.cpu_s), rates[1] / (one.tokens / one.wall_s)
        times = f"{1000 * load.first_s:,.0f} ms | {1000 * load.whole_s:,.0f} ms"
        lines.append(
            f"| {load.callers} | {rates[0]:,.0f} | {ratios[0]:.2f} | {rates[1]:,.0f} | {ratios[1]:.2f} | {times} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what was asked for, write the figures as JSON and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="S")
    parser.add_argument("--model", type=Path, help="a folder in the place of a random model")
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=64, help="of each number of callers")
    parser.add_argument("--tokens", type=int, default=64, help="of a response")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for models and results")
    options = parser.parse_args(arguments)
    folder = subject_of(str(options.model or options.size), options.cache).folder.resolve()
    bodies = make_bodies(options.requests, options.tokens, str(folder))
    process, address = serve(folder, options.threads)
    try:
        server = psutil.Process(process.pid)
        asyncio.run(measure(address, 8, bodies[:8], server))  # warm-up
        loads = [asyncio.run(measure(address, callers, bodies, server)) for callers in options.callers]
    finally:
        process.terminate()
        process.wait()
    subject = f"Size {options.size}" if options.model is None else options.model.name
    text = page(loads, subject, options.tokens, options.threads)
    rows = [{name: getattr(load, name) for name in Load.__slots__} for load in loads]
    save_json(options.cache / f"serving-{subject.split()[-1]}.json", {"loads": rows, "machine": processor()})
    print(text)


if __name__ == "__main__":
    main()
