"""`python -m tasks.frame.forkserver <socket> <modules…>`: a process that imports what stages need and forks them.

The imports of DVC, torch, transformers and Great Expectations take three to eight seconds, which each stage would pay
twice. A fork of a process that has imported and done nothing else is as good as a fresh one: it shares no thread, lock
or state with anybody. For each stage two processes are forked:

    this one ─── `dvc repro --single-item STAGE` ─── the stage, forked before DVC did anything, waiting to be told

so DVC stays the one that decides and records, and the parent's death ends each of them at once (`tasks/launch.py`). It
is started in the folder whose stages it runs, hence with the code that lies there. Anything that could make a fork
differ from a fresh process (code that was edited since, a second thread) is a refusal, and the caller starts fresh
processes. Protocol: a request is a length (eight bytes, with the descriptors of the output
and of the answer), then JSON; the answer is lines of JSON: `pid`, then `code`, or `refused`.
"""

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tasks.frame.leave import leave
from tasks.frame.lock_file import write_whole_files
from tasks.launch import die_with_parent
from tasks.libraries import set_library_environment

LENGTH_BYTES = 8
DVC_MODULES = (
    "dvc.cli", "dvc.cli.parser", "dvc.commands.repro", "dvc.repo", "dvc.repo.reproduce", "dvc.stage.cache",
    "dvc.stage.run", "dvc.output", "dvc.scm", "dvc.dvcfile", "dvc.cachemgr", "dvc.fs",
)  # fmt: skip
PACKAGES = ("tasks", "rlhf_core")

Job = Callable[[], int]


class ForkServer:
    """Serves requests from one socket until its other end is closed.

    Args:
        requests: where they come from.
        modules: to be imported while there is nothing else to do.
    """

    def __init__(self, requests: socket.socket, modules: list[str]) -> None:
        self._requests, self._modules = requests, modules
        self._code = code_stamp()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries; whoever asked hears from the fork itself

    def serve(self) -> Job | None:
        """Serve until there is nobody to serve (None). In a forked process: return what that process is to do."""
        while True:
            idle = 0.0 if self._modules else None
            if not select.select([self._requests], [], [], idle)[0]:
                _import(self._modules.pop(0))
                continue
            prefix, descriptors, _, _ = socket.recv_fds(self._requests, LENGTH_BYTES, 2)
            if not prefix:
                return None
            request = json.loads(_exactly(self._requests, int.from_bytes(prefix, "big")))
            job = self._answer(request, *descriptors)
            if job is not None:
                return job

    def _answer(self, request: dict[str, Any], output: int, answer: int) -> Job | None:
        reply = socket.socket(fileno=answer)
        for name in (*DVC_MODULES, *request["modules"]):
            _import(name)
        self._modules = [name for name in self._modules if name not in sys.modules]
        why = self._unfit()
        if why:
            print(f"{request['command']}: {why}", file=sys.stderr, flush=True)
            _say(reply, {"refused": why})
        else:
            gc.freeze()  # a collection in a fork would copy every page that is shared
            parent = os.getpid()
            if os.fork() == 0:
                die_with_parent(parent)
                gc.enable()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                self._requests.close()
                _say(reply, {"pid": os.getpid()})
                return lambda: _dvc_and_word(request, output, reply)
        reply.close()
        os.close(output)
        return None

    def _unfit(self) -> str:
        """Why a fork of this process would not be what a fresh process is; empty where it would."""
        if code_stamp() != self._code:
            return "code was changed"
        if len(os.listdir("/proc/self/task")) > 1:
            return "an import started a thread"
        return ""


def _dvc_and_word(request: Mapping[str, Any], output: int, reply: socket.socket) -> int:
    """Run DVC and send its exit code to whoever asked; where this process is killed, they see the socket's end."""
    code = run_dvc(request, output, reply)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    _say(reply, {"code": code})
    return code


def run_dvc(request: Mapping[str, Any], output: int, reply: socket.socket) -> int:
    """Lead a new session and run `dvc` in it, with the request's arguments; the stage is forked before DVC begins."""
    os.setsid()
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    reader, writer = os.pipe()
    parent = os.getpid()
    stage = os.fork()
    if stage == 0:
        die_with_parent(parent)
        os.close(writer)
        reply.close()
        return _wait_and_run(reader)
    os.close(reader)
    _take_over_command(stage, writer, request["command"])
    from dvc.cli import main

    write_whole_files()
    sys.argv = ["dvc", *request["dvc"]]
    try:
        return int(main(request["dvc"]))
    finally:
        with contextlib.suppress(OSError, ChildProcessError):  # both are done with where the stage ran
            os.close(writer)
            os.waitpid(stage, 0)


def _take_over_command(stage: int, writer: int, command: str) -> None:
    """Have DVC run `command` by telling the process that waits for it, and every other command as it always does."""
    from dvc.stage import run
    from dvc.stage.exceptions import StageCmdFailedError

    otherwise = run._run

    def forked(executable: str, given: str, **kwargs: Any) -> None:
        if given != command:
            otherwise(executable, given, **kwargs)
            return
        # As DVC does it for SIGINT: both come to the whole session, and the stage ends in order if its parent stays.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        with open(writer, "w", encoding="ascii") as file:
            json.dump({"environment": kwargs["env"], "folder": os.fspath(kwargs["cwd"]), "command": given}, file)
        _, status = os.waitpid(stage, 0)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        code = os.waitstatus_to_exitcode(status)
        if code:
            raise StageCmdFailedError(given, code)

    run._run = forked


def _wait_and_run(reader: int) -> int:
    """Wait to be told what to run, and run it; nothing comes where DVC finds nothing to do."""
    with open(reader, encoding="ascii") as file:
        text = file.read()
    if not text:
        return 0
    order = json.loads(text)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    from tasks.__main__ import main

    stage = order["command"].split()[-1]
    sys.argv = [sys.argv[0], stage]
    return main([stage])


def code_stamp() -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of every file of code that a stage may have imported from."""
    folder = Path(__file__).parents[2]
    files = [path for name in PACKAGES for path in (folder / name).rglob("*.py")]
    found = {}
    for path in files:
        with contextlib.suppress(FileNotFoundError):
            about = path.stat()
            found[str(path)] = (about.st_ino, about.st_size, about.st_mtime_ns)
    return found


def _import(name: str) -> None:
    # whatever is wrong with it the stage itself will say when it imports it
    with contextlib.suppress(Exception):
        importlib.import_module(name)


def _exactly(source: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        more = source.recv(count - len(found))
        if not more:
            raise EOFError
        found += more
    return found


def _say(reply: socket.socket, word: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError):  # whoever asked is gone, and this process with it
        reply.sendall(json.dumps(word).encode() + b"\n")


def main(arguments: list[str]) -> int:
    """Serve the socket whose descriptor is the first argument."""
    descriptor, *modules = arguments
    set_library_environment()
    gc.disable()
    job = ForkServer(socket.socket(fileno=int(descriptor)), modules).serve()
    return 0 if job is None else job()


if __name__ == "__main__":
    leave(lambda: main(sys.argv[1:]))
