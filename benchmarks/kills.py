"""Kill -9 at random moments: `python -m benchmarks.kills --kills 200`. Two figures, both to be 0.

On a small project of its own it starts `dvc repro` and `rlhf run` in turn, kills one process of what has been started
(the command itself, DVC, the shell, the fork server, the stage, a worker; whichever there are at a random moment) and
goes on from there, until as many kills are done. Counted are processes that are still there a second after the command
ended, and files of finished runs that differ from those of a run that nobody disturbed. The local servers are meant to
stay and do not count. A `dvc.lock` that a killed `dvc repro` left cut off is mended as the documentation has it, and
counted beside. About eight seconds a kill on two idle cores.
"""

import argparse
import collections
import contextlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks import scratch
from tasks.frame.lock_file import readable
from tasks.paths import LOCK

COMMANDS = {"dvc repro": ("dvc", "repro"), "rlhf run": ("flows.cli.app", "run")}
SERVERS = ("prefect", "uvicorn", "mlflow", "gunicorn", "multiprocessing.")
DIE_WITHIN_S = 1.0
STARTING_S = 8.0
LOCK_FILE = "tasks.frame.lock_file"
MEND = ("flows.cli.app", "run", "--dry-run")
PATIENCE_S = 600.0


def start(folder: Path, name: str) -> "subprocess.Popen[bytes]":
    """Start a command in a session of its own."""
    module, *arguments = COMMANDS[name]
    with (folder / ".kills.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=folder,
            env=scratch.environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def tree(root: int) -> list[psutil.Process]:
    """A command's living processes, itself first; local servers are none of them."""
    try:
        first = psutil.Process(root)
        everyone = [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
    return [one for one in everyone if _alive(one) and not _serves(one)]


def left_over(folder: Path) -> list[psutil.Process]:
    """Processes that work in the project's folder though nothing should."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(folder) and _alive(process) and not _serves(process):
                found.append(process)
    return found


def _alive(process: psutil.Process) -> bool:
    """Whether it lives; one without a command line is on its way out, the kernel has taken its memory already."""
    with contextlib.suppress(psutil.Error):
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) and bool(process.cmdline())
    return False


def _serves(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        module = words[words.index("-m") + 1] if "-m" in words[:-1] else (words or [""])[0]
        return any(name in module or name in " ".join(words[:2]) for name in SERVERS)
    return False


def _role(process: psutil.Process, command: int) -> str:
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        if process.pid == command:
            return "the command"
        if words[:1] == ["/bin/sh"]:
            return "shell"
        if "tasks.frame.forkserver" in words:
            generation = sum("tasks.frame.forkserver" in parent.cmdline() for parent in process.parents()[:-2])
            return ("fork server", "dvc (forked)", "stage (forked)", "worker")[min(generation, 3)]
        return next(
            (name for name in ("tasks.launch", "launch.py", "dvc", LOCK_FILE, "tasks", "git") if name in words), "other"
        )
    return "gone"


def one_kill(folder: Path, name: str, chance: random.Random, longest_s: float) -> tuple[str, int | None, list[str]]:
    """Start a command, kill one of its processes at a random moment, wait for its end.

    Returns:
        Who was killed, empty where the command ended before; the exit code; command lines of what was left.
    """
    process = start(folder, name)
    soon = chance.random() < 0.5  # while everything starts, or somewhere in the work
    deadline = time.monotonic() + chance.uniform(0.0, min(STARTING_S, longest_s) if soon else longest_s)
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    whom = ""
    everyone = tree(process.pid)
    if process.poll() is None and everyone:
        victim = everyone[0] if chance.random() < 0.3 else chance.choice(everyone)
        whom = _role(victim, process.pid)
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    code = process.wait(PATIENCE_S)
    deadline = time.monotonic() + DIE_WITHIN_S
    while left_over(folder) and time.monotonic() < deadline:
        time.sleep(0.02)
    left = []
    for other in left_over(folder):
        with contextlib.suppress(psutil.Error):
            left.append(" ".join(other.cmdline()))
            other.kill()
    return whom, code, left


def cut_off(folder: Path) -> bool:
    """Whether the last kill came while DVC wrote what it had done."""
    path = folder / LOCK
    return path.exists() and not readable(path.read_text(encoding="utf-8"))


def main() -> int:
    """Kill, compare, and print the two figures; 1 unless both are 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of who is killed")
    parser.add_argument("--only", choices=tuple(COMMANDS), help="one of the two commands")
    parser.add_argument("--minutes", type=float, help="stop killing after so long, however many kills that were")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kills-")).resolve() / "project"
    chance = random.Random(options.seed)
    killed, orphans, differing, finished, cut = collections.Counter[str](), 0, 0, 0, 0
    try:
        scratch.make(folder, lines=scratch.LINES)
        began = time.monotonic()
        code = start(folder, "dvc repro").wait(PATIENCE_S)
        if code:
            raise SystemExit(
                f"the undisturbed run failed with exit code {code}:\n{(folder / '.kills.log').read_text()}"
            )
        longest_s, reference = time.monotonic() - began, scratch.published(folder)
        scratch.forget(folder)
        begun = time.monotonic()
        while killed.total() < options.kills:
            if options.minutes and time.monotonic() - begun > options.minutes * 60:
                break
            name = options.only or chance.choice(tuple(COMMANDS))
            if cut_off(folder):
                cut += 1
                print("dvc.lock is cut off", flush=True)
                subprocess.run([sys.executable, "-m", *MEND], cwd=folder, env=scratch.environment(folder), check=True)
            whom, code, left = one_kill(folder, name, chance, longest_s / 2)
            killed[f"{name}: {whom}"] += bool(whom)
            orphans += len(left)
            print(f"{killed.total()}: {name}: killed {whom or 'nobody'}, exit code {code}", flush=True)
            if left:
                print(f"{name}: after killing {whom or 'nobody'} there was left: {left}", flush=True)
            if code == 0:
                finished += 1
                found = scratch.published(folder)
                other = sorted(file for file in {*found, *reference} if found.get(file) != reference.get(file))
                differing += len(other)
                if other:
                    print(f"{name}: files that differ: {other}", flush=True)
                scratch.forget(folder)
        subprocess.run(
            [sys.executable, "-m", "flows.cli.app", "down"], cwd=folder, env=scratch.environment(folder), check=False
        )
    except KeyboardInterrupt:
        print("interrupted; so far:", flush=True)
    finally:
        for process in left_over(folder):
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        shutil.rmtree(folder.parent, ignore_errors=True)
    for whom, count in sorted((+killed).items()):
        print(f"{count:5d}  {whom}")
    print(f"{killed.total()} kills, {finished} runs finished: {orphans} orphans, {differing} files that differ")
    print(f"dvc.lock was cut off {cut} times, and mended")
    return int(bool(orphans or differing))


if __name__ == "__main__":
    sys.exit(main())
