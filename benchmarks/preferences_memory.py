"""Memory and time of stage `preferences` by rows: `python -m benchmarks.preferences_memory --rows 10000 100000`.

For each number of rows it writes a table of labelled pairs (five a prompt, about 900 characters of text a row, words
drawn from 5,000) and runs the stage in a process of its own. A row's memory is the growth of the peak since the table
before, the first of which has 1,000 rows: what the stage takes once, whatever the rows (buffers of the writer, the last
texts that were cut), is in the first figure. `--system-words 500` puts the same instructions before every prompt. Times
are of the processor, the stage's alone, without imports.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_core.config import Params
from rlhf_core.data.cleaning.splits import is_heldout
from rlhf_core.text.identity import content_id, prompt_group, prompt_id
from rlhf_core.text.transcripts import render_turns
from tasks import paths
from tasks.frame.definition import StageDefinition
from tasks.frame.stage import Progress, Stage
from tasks.stages.preferences import run as preferences
from tasks.tables import SCHEMAS, write_table

ROOT = Path(__file__).parents[1]
SHARE, PAIRS_A_PROMPT, SMALLEST = 0.1, 5, 1000


def labelled_pairs(number: int, system_words: int = 0) -> Iterator[dict[str, Any]]:
    """Rows of `pairs.parquet`."""
    rng = random.Random(7)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randrange(3, 9))) for _ in range(5000)]
    system = {"role": "system", "content": " ".join(words[:system_words])}
    for row in range(number):
        if row % PAIRS_A_PROMPT == 0:
            prompt = " ".join(rng.choices(words, k=40))
            if system_words:
                prompt = render_turns([system, {"role": "user", "content": prompt}])
        one, other = (" ".join(rng.choices(words, k=50)) for _ in range(2))
        yield {
            "pair_id": content_id(prompt, one, other), "prompt_id": prompt_id(prompt), "prompt": prompt, "task": "t",
            "split": "heldout" if is_heldout(prompt_group(prompt), SHARE) else "train",
            "response_a": one, "response_b": other, "criterion": "overall", "label": "a",
            "num_votes": 3, "agreement": 1.0, "margin": rng.random(), "source": "file",
        }  # fmt: skip


def measure(number: int, system_words: int = 0) -> dict[str, float]:
    """Write the tables, run the stage in a fresh process, and return its peak memory (bytes) and time (seconds)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        groups = sorted({prompt_group(row["prompt"]) for row in labelled_pairs(number, system_words)})
        held = [{"group": group} for group in groups if is_heldout(group, SHARE)]
        write_table(folder / paths.VALIDATE / "heldout_groups.parquet", held, SCHEMAS["heldout_groups"])
        for table in ("heldout_prompts", "criteria"):
            write_table(folder / paths.VALIDATE / f"{table}.parquet", [], SCHEMAS[table])
        rows = labelled_pairs(number, system_words)
        write_table(folder / paths.LABEL / "pairs.parquet", rows, SCHEMAS["pairs"])
        command = [sys.executable, "-m", "benchmarks.preferences_memory", "--stage"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found


def run_stage() -> None:
    """Run the stage in the current folder and print its peak memory and time."""
    definition = StageDefinition(name="preferences", deps=(), params=(), outs=())
    folder = Path.cwd()
    stage = Stage(definition, Params(), folder, folder / "out", Progress(folder / "progress.jsonl"))
    start = time.process_time()
    preferences.run(stage)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak": peak, "seconds": time.process_time() - start}))


def main() -> None:
    """Print one line for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--system-words", type=int, default=0, help="instructions that all prompts share")
    parser.add_argument("--stage", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.stage:
        run_stage()
        return
    before, least = measure(SMALLEST, chosen.system_words), SMALLEST
    print(f"{least:>9,} rows: peak {before['peak'] / 1e6:,.0f} MB, {before['seconds']:.1f} s")
    for number in sorted(set(chosen.rows) - {SMALLEST}):
        found = measure(number, chosen.system_words)
        each = (found["peak"] - before["peak"]) / (number - least)
        print(
            f"{number:>9,} rows: peak {found['peak'] / 1e6:,.0f} MB, {each:,.0f} bytes for each row more, "
            f"{found['seconds']:.1f} s",
            flush=True,
        )
        before, least = found, number


if __name__ == "__main__":
    main()
