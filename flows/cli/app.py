"""The `rlhf` command. The modules of commands import nothing heavy at their top, so help and status answer at once."""

import ast
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cyclopts import App, CycloptsError, Parameter

from rlhf_core.errors import ConfigError, RlhfError
from tasks.loopback import reach_loopback_directly

HELP = """Train a language model from human preferences: validate, SFT, reward model, PPO and DPO, evaluation, registry.

Results go to stdout, progress to stderr. Exit codes: 0 ok · 1 bug · 2 usage or configuration · 3 a gate said no ·
4 data refused · 5 waiting for people · 6 training diverged · 7 environment · 130/143 interrupted (`rlhf resume`).
"""

COMMANDS = {
    "run": "flows.cli.run:run",
    "plan": "flows.cli.plan:plan",
    "resume": "flows.cli.run:resume",
    "status": "flows.cli.look:status",
    "report": "flows.cli.look:report",
    "ui": "flows.cli.servers:ui",
    "up": "flows.cli.servers:up",
    "down": "flows.cli.servers:down",
    "deploy": "flows.cli.deploy:deploy",
    "chat": "flows.cli.chat:chat",
    "serve": "flows.cli.serve:serve",
    "sync": "flows.cli.look:sync",
    "clean": "flows.cli.clean:clean",
    "doctor": "flows.cli.look:doctor",
    "profiles": "flows.cli.look:profiles",
    "schema": "flows.cli.look:schema",
}
MODEL_COMMANDS = {
    "list": "flows.cli.models:list_models",
    "compare": "flows.cli.models:compare",
    "promote": "flows.cli.models:promote",
    "rollback": "flows.cli.models:rollback",
    "reproduce": "flows.cli.models:reproduce",
    "fetch": "flows.cli.fetch:fetch",
    "export": "flows.cli.export:export",
    "verify": "flows.cli.export:verify",
    "key": "flows.cli.export:key",
    "push": "flows.cli.export:push",
}
DATA_COMMANDS = {"fetch": "flows.cli.fetch:fetch_data", "show": "flows.cli.show:show"}


def build_app(*, listing: bool = False) -> App:
    """The command tree; a command's module is imported when it is called, or described by itself.

    Args:
        listing: the commands are about to be listed, which takes the first line of each and imports none.
    """
    app = App(
        name="rlhf",
        help=HELP,
        version=_version,
        result_action="return_value",
        help_format="plaintext",
        default_parameter=Parameter(negative="", show_default=_shown_default),
    )
    for name, target in COMMANDS.items():
        app.command(target, name=name, help=_first_line(target) if listing else None)
    models = App(
        name="models",
        help="Registered models: list, compare, promote, rollback, reproduce; fetch brings others, export takes away.",
    )
    for name, target in MODEL_COMMANDS.items():
        models.command(target, name=name, help=_first_line(target) if listing else None)
    app.command(models)
    data = App(name="data", help="Data: fetch brings that of others, show prints it as tokens.")
    for name, target in DATA_COMMANDS.items():
        data.command(target, name=name, help=_first_line(target) if listing else None)
    app.command(data)
    return app


def main() -> None:
    """Entry point: run the command line's command and exit with the documented code."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Run one command and return its exit code; every failure that is no bug is one line on stderr."""
    for left_out in reach_loopback_directly():
        print(left_out, file=sys.stderr)
    try:
        app = build_app(listing=not set(arguments) - {"-h", "--help", "models", "data"})
        result = app(arguments, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        problem = " ".join(str(error).split())
        print(f"rlhf: {problem} Fix: rlhf --help", file=sys.stderr)
        return ConfigError.exit_code
    except RlhfError as error:
        print(" ".join(str(error).split("\n")), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except Exception:
        traceback.print_exc()
        print("rlhf: this is a bug of the program; the lines above say where", file=sys.stderr)
        return 1
    return result if isinstance(result, int) else 0


def _first_line(target: str) -> str:
    """What a command does: the first line of its docstring, read without importing its module."""
    module, _, function = target.partition(":")
    tree = ast.parse((Path(__file__).parent / f"{module.rpartition('.')[2]}.py").read_text(encoding="utf-8"))
    named = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    return (ast.get_docstring(named) or "").partition("\n")[0]


def _shown_default(value: object) -> str:
    """A default as help shows it: `none` where an option that is left out does nothing, `no` for a switch."""
    match value:
        case None | () | "":
            return "none"
        case bool():
            return "yes" if value else "no"
    return str(value)


def _version() -> str:
    try:
        return version("rlhf-pipeline")
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
