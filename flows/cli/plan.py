"""`rlhf plan`: what a run would take of this machine, stage by stage, and what does not fit."""

import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console

from flows.cli.dry_run import prepared_run
from flows.cli.folding import Column, folding_table
from flows.cli.result import PLAIN_WIDTH
from flows.cli.run import RunOptions, request_of
from flows.root import find_root
from flows.run.headlines import seconds
from flows.run.request import PreparedRun, pipeline_stages
from flows.run.selection import chosen_stages
from rlhf_core.errors import EnvironmentProblem, RlhfError
from tasks.planning.fitting import with_cures
from tasks.planning.plan import Plan, Problem, StagePlan, known_of, machine_of, problems, stage_plans

COLUMNS = (
    Column(title="stage"),
    Column(title="parameters", folds=3, right=True),
    Column(title="trained", folds=2, right=True),
    Column(title="memory", right=True),
    Column(title="at its most in", folds=1),
    Column(title="disk", folds=4, right=True),
    Column(title="tokens", folds=5, right=True),
    Column(title="time", right=True),
)
DOES_NOT_FIT = EnvironmentProblem.exit_code


DEFAULTS = RunOptions()


def plan(*, options: RunOptions = DEFAULTS, json: bool = False) -> int:
    """What a run would take: parameters, memory, disk, tokens and time of each stage. Exit code 7 if it does not fit.

    Rows are counted, tokens of a sample of them, and some seconds are measured on this machine; both are kept, so that
    the next plan of the same takes no time. Nothing is run.

    Parameters
    ----------
    json:
        Print the plan as JSON.
    """
    from tasks.frame.changes import stage_changes

    request = request_of(options)
    with prepared_run(find_root(Path.cwd()), request) as prepared:
        changed = set(stage_changes(prepared.root))
        print("counting rows, measuring steps: some seconds, once", file=sys.stderr)
        found = make_plan(prepared, changed)
    if json:
        print(found.model_dump_json(indent=2))
    else:
        print_plan(found, Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH))
    return DOES_NOT_FIT if found.problems else 0


def make_plan(prepared: PreparedRun, changed: Collection[str], *, ask: bool = True) -> Plan:
    """The plan of a prepared run.

    Args:
        prepared: its checkout and settings.
        changed: stages that are not up to date.
        ask: count and measure what is not known yet.

    Raises:
        LookupError: nothing is known and `ask` is false.
        ConfigError, EnvironmentProblem: see `known_of`.
    """
    root, params, request = prepared.root, prepared.params, prepared.request
    every = pipeline_stages(root)
    chosen = chosen_stages(root, every, first=request.from_stage, last=request.until_stage, changed=changed)
    stages = [stage for stage in every if stage in chosen]
    known = known_of(root, params, changed, ask=ask)
    if known is None:
        raise LookupError("nothing is counted yet")
    machine = machine_of(root)
    plans = stage_plans(known, params, stages, [stage for stage in stages if stage not in changed])
    return Plan(
        machine=machine,
        stages=plans,
        counted=known.workload.counted,
        sampled=known.workload.sampled,
        measured=known.probed is not None,
        problems=tuple(with_cures(problems(plans, machine), known, params, plans, machine)),
    )


def print_plan(found: Plan, console: Console) -> None:
    """The table, the sum, and what does not fit."""
    rows = [_cells(stage) for stage in found.stages]
    console.print(folding_table(COLUMNS, rows, width=console.width, figures="stage", box=SIMPLE_HEAD))
    console.print(summed(found))
    sources = ", ".join(f"{what} of {where}" for what, where in found.counted.items())
    console.print(f"counted: {sources}; tokens of {found.sampled} rows each")
    for line in complaints(found.problems):
        console.print(line)


def summed(found: Plan) -> str:
    """The run in one line."""
    run = found.to_run
    if not run:
        return "plan: every stage is up to date"
    most = max(run, key=lambda stage: stage.memory_bytes)
    disk = sum(stage.disk_bytes for stage in run) + max(stage.checkpoint_bytes for stage in run)
    total = "not measured" if found.seconds is None else f"about {seconds(found.seconds)} of computing"
    machine = found.machine
    return (
        f"plan: {len(run)} stages, {total}; memory up to {size(most.memory_bytes)} ({most.stage}) of "
        f"{size(machine.free_memory_bytes)} free; disk {size(disk)} of {size(machine.free_disk_bytes)} free"
    )


def complaints(found: Sequence[Problem]) -> list[str]:
    """A line for each thing that does not fit, with what to do."""
    return [
        f"does not fit: {f'{one.stage} ' if one.stage else ''}needs {size(one.needed_bytes)} of {one.what}, "
        f"{size(one.free_bytes)} are free. Fix: {_cure(one)}"
        for one in found
    ]


def say_before(prepared: PreparedRun, changed: Collection[str]) -> None:
    """One line to standard error before a run, of what is known without asking; and what does not fit.

    A plan is an estimate: it warns, and what fails for want of memory says so itself.
    """
    try:
        found = make_plan(prepared, changed, ask=False)
    except LookupError:
        print("plan: not made yet; rlhf plan says what a run takes", file=sys.stderr)
        return
    except RlhfError as error:
        print(f"plan: {error}", file=sys.stderr)
        return
    print(summed(found), file=sys.stderr)
    for line in complaints(found.problems):
        print(f"warning: {line}", file=sys.stderr)


def size(number: int) -> str:
    """Bytes for people, in the units of the table of a run."""
    return f"{number / 2**30:.1f} GB" if number >= 2**30 else f"{number / 2**20:,.0f} MB"


def _cure(problem: Problem) -> str:
    if problem.cure:
        return " ".join(f"--set '{change}'" if "{" in change else f"--set {change}" for change in problem.cure)
    return "a smaller model, or a larger machine: no setting that is tried is enough"


def _cells(stage: StagePlan) -> dict[str, str]:
    if stage.cached:
        return {"stage": stage.stage, "memory": "cached", "time": ""}
    return {
        "stage": stage.stage,
        "parameters": _count(stage.parameters),
        "trained": _count(stage.trained_parameters),
        "memory": size(stage.memory_bytes),
        "at its most in": stage.memory_at,
        "disk": size(stage.disk_bytes + stage.checkpoint_bytes),
        "tokens": _count(stage.tokens),
        "time": "" if stage.seconds is None else seconds(stage.seconds),
    }


def _count(number: int) -> str:
    if not number:
        return ""
    return f"{number / 1e6:,.1f} M" if number >= 1e6 else f"{number:,}"
