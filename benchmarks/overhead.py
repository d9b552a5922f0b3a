"""Time around the stages, and the demo beside other work: `python -m benchmarks.overhead`.

Runs the demo with `rlhf run` in a project of its own, once as it is and once with cores kept busy by spinning
processes, then once more with nothing changed, and prints from `reports/summary.json` what each took: the whole, the
stages' computing, what lay around each stage. `--tiny` takes the small profile and the head of the data, for a look at
the time around stages alone. `--models-gb` lays a folder under models/ that no run reads, and times `dvc status` beside
it, then with it as the folder that `generate` watches: first, when its bytes are hashed, and again. Servers are started
before and do not count. On two idle cores about five minutes.
"""

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import scratch
from rlhf_core.config.watched import PLACEHOLDER

SPIN = "while True: pass"
OWN = "models/own"


@contextlib.contextmanager
def spinning(count: int) -> Iterator[None]:
    """So many processes that do nothing but keep a core busy."""
    processes = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def rlhf(folder: Path, *arguments: str) -> float:
    """Run `rlhf` in the project; the seconds it took."""
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "flows.cli.app", *arguments],
        cwd=folder,
        env=scratch.environment(folder),
        check=True,
        capture_output=True,
    )
    return time.monotonic() - began


def dvc_status(folder: Path) -> float:
    """Ask DVC what has changed; the seconds it took."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "dvc", "status"], cwd=folder, env=scratch.environment(folder), check=True)
    return time.monotonic() - began


def describe(title: str, took_s: float, summary: dict[str, Any]) -> str:
    """A few lines on one run."""
    stages = [stage for stage in summary["stages"] if stage["compute_s"] is not None]
    lines = [f"{title}: {took_s:.1f} s by the clock, start and end included"]
    if stages:
        lines.append(
            f"  computing {summary['compute_s']:.1f} s, of which side by side "
            f"{summary['compute_s'] - summary['busy_s']:.1f} s; around it {summary['overhead_s']:.1f} s"
        )
        lines += [
            f"  {one['name']:<12} computed {one['compute_s']:6.1f} s, around it {one['overhead_s']:5.1f} s"
            for one in stages
        ]
        lines.append(f"  around a stage, mean: {summary['overhead_per_stage_s']:.2f} s")
    return "\n".join(lines)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, default=1, help="cores kept busy in the second run; 0 leaves it out")
    parser.add_argument("--tiny", action="store_true", help="the small profile and the head of the data")
    parser.add_argument("--models-gb", type=float, default=0.0, help="size of a folder under models/ that no run reads")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="overhead-")).resolve() / "project"
    try:
        scratch.make(folder, scratch.PROFILE if options.tiny else None, scratch.LINES if options.tiny else None)
        if options.models_gb:
            _fill(folder / OWN, options.models_gb)
        rlhf(folder, "up")
        took = {}
        for title, busy in (("idle", 0), *([(f"{options.busy} busy", options.busy)] if options.busy else [])):
            with spinning(busy):
                took[title] = rlhf(folder, "run")
            print(describe(title, took[title], _summary(folder)), flush=True)
            scratch.forget(folder)
        if options.busy:
            print(f"{options.busy} busy over idle: {took[f'{options.busy} busy'] / took['idle']:.2f}")
        rlhf(folder, "run")
        print(describe("nothing changed", rlhf(folder, "run"), _summary(folder)))
        print(f"dvc status: {dvc_status(folder):.1f} s")
        if options.models_gb:
            settings = folder / "params.yaml"
            settings.write_text(settings.read_text().replace(f"models_folder: {PLACEHOLDER}", f"models_folder: {OWN}"))
            print(f"dvc status, {OWN} watched: {dvc_status(folder):.1f} s, again {dvc_status(folder):.1f} s")
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            rlhf(folder, "down")
        shutil.rmtree(folder.parent, ignore_errors=True)
    return 0


def _summary(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "reports/summary.json").read_text()))


def _fill(folder: Path, size_gb: float) -> None:
    folder.mkdir(parents=True)
    block = bytes(range(256)) * 4096
    with (folder / "model.safetensors").open("wb") as file:
        for _ in range(int(size_gb * 1e9 / len(block))):
            file.write(block)


if __name__ == "__main__":
    sys.exit(main())
