"""The walls of the house: who may import whom, what the graph must name, how big a file may grow."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from rlhf_core.config import Params
from rlhf_core.faults import FAULT_POINTS
from tasks import paths
from tasks.catalogue import CATALOGUE
from tasks.frame.definition import stage_definition
from tasks.params import load_params

ROOT = Path(__file__).parents[1]
PACKAGES = ("rlhf_core", "tasks", "flows")
ITEMS = {row.name: tuple(f"{row.name}@{item}" for item in row.items) for row in CATALOGUE if row.items}
STAGES = list(YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"])

# Frame modules that decide how a stage is started, not what it writes; the other code of a stage is a DVC input.
FRAME = {
    "tasks/paths.py",
    "tasks/frame/definition.py",
    "tasks/params.py",
    "rlhf_core/errors.py",
    "rlhf_core/faults.py",
    "rlhf_core/config/__init__.py",
}


def sections() -> dict[str, str]:
    """Classes of settings that `rlhf_core.config` hands on, by the module that defines each."""
    tree = ast.parse((ROOT / "rlhf_core/config/__init__.py").read_text())
    return {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("rlhf_core.config.")
        for alias in node.names
    }


SECTIONS = sections()

# The only modules of rlhf_core that need more than torch, transformers, tokenizers, safetensors, pydantic and numpy.
NEEDS_MORE = ("rlhf_core.evaluation", "rlhf_core.data.cleaning.duplicates")


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere in it; of the configuration only the sections that it names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "rlhf_core.config":
            names |= {SECTIONS[alias.name] for alias in node.names if alias.name in SECTIONS}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def file_of(module: str) -> Path | None:
    base = ROOT / module.replace(".", "/")
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def import_closure(start: Path) -> set[str]:
    """Project files that a file imports, directly or not, as relative paths."""
    found, queue = set(), [start]
    while queue:
        path = queue.pop()
        name = path.relative_to(ROOT).as_posix()
        if name in found:
            continue
        found.add(name)
        modules = [name for name in imported(path) if name.split(".")[0] in PACKAGES]
        queue += [file for module in modules if (file := file_of(module))]
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 300, "split the file: it has become two things"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= 60, f"{node.name} has {lines} lines"


def parameters_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many parameters a function has; `self`, `cls` and the `ctx` that torch hands to a backward do not count."""
    given = node.args
    names = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls", "ctx")]) + bool(given.vararg) + bool(given.kwarg)


def test_functions_take_at_most_eight_parameters() -> None:
    """What is more than eight is one thing that lacks a name: a dataclass, a state, a section."""
    over = {
        f"{path.relative_to(ROOT).as_posix()}:{node.name}"
        for folder in (*PACKAGES, "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and parameters_of(node) > 8
    }
    assert not over, f"over eight parameters: {sorted(over)}"


def stage_code(stage: str, item: str) -> set[str]:
    """Files of code that decide what a stage writes: what it imports, and the sections that it reads."""
    code = import_closure(ROOT / "tasks/stages" / stage / "run.py")
    for key in stage_definition(ROOT, item).params:  # a section is read through `Params`, which is imported by all
        field = Params.model_fields.get(key.split(".")[0], Params.model_fields.get(f"{key.split('.')[0]}_"))
        if field is not None and getattr(field.annotation, "__name__", "") in SECTIONS:
            code |= import_closure(file_of(SECTIONS[field.annotation.__name__]))
    return {name for name in code - FRAME if not is_bare(ROOT / name)}


def is_bare(path: Path) -> bool:
    """Whether a file only says what its package is."""
    return path.name == "__init__.py" and path.read_text().count("\n") <= 1


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_names_the_code_that_a_stage_imports_and_no_other(stage: str) -> None:
    """A folder is named where all of its files are imported: code that a stage does not read must not rerun it."""
    items = ITEMS.get(stage, (stage,))
    needed = {item: stage_code(stage, item) for item in items}
    for item in items:
        deps = [dep for dep in stage_definition(ROOT, item).deps if dep.split("/")[0] in PACKAGES]
        lacking = [name for name in needed[item] if not any(name == dep or name.startswith(f"{dep}/") for dep in deps)]
        assert not lacking, f"{item} lacks {lacking}"
        for dep in deps:
            files = (
                [ROOT / dep] if dep.endswith(".py") else [one for one in (ROOT / dep).rglob("*.py") if not is_bare(one)]
            )
            more = {one.relative_to(ROOT).as_posix() for one in files} - set.union(*needed.values())
            assert not more, f"{item} names {sorted(more)} without need"


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_outputs_are_where_the_frame_publishes(stage: str) -> None:
    name = ITEMS.get(stage, (stage,))[-1]
    outs = set(stage_definition(ROOT, name).outs)
    allowed = {str(paths.stage_output(name)), str(paths.metrics_file(name)), str(paths.plots_file(name))}
    assert str(paths.stage_output(name)) in outs
    assert outs <= allowed


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_parameters_exist_in_the_schema(stage: str) -> None:
    dumped = Params().model_dump(mode="json", by_alias=True)
    for item in ITEMS.get(stage, (stage,)):
        for key in stage_definition(ROOT, item).params:
            value = dumped
            for part in key.split("."):
                assert part in value, f"{item}: no parameter {key}"
                value = value[part]
    assert load_params(ROOT / "params.yaml")


def test_the_mlflow_folder_does_not_shadow_the_library() -> None:
    assert not list((ROOT / "mlflow").rglob("*.py"))
    code = "import mlflow; print(mlflow.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "site-packages" in found.stdout


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("mlflow", ("tasks/tracking/",)),
        ("great_expectations", ("tasks/stages/validate/expectations.py", "tasks/stages/validate/suites.py")),
        ("prefect", ("flows/",)),
        ("fastapi", ("flows/serving/",)),
        ("starlette", ("flows/serving/",)),
    ],
)
def test_each_service_is_imported_in_one_place(library: str, homes: tuple[str, ...]) -> None:
    for path in sources():
        name = path.relative_to(ROOT).as_posix()
        if any(module.split(".")[0] == library for module in imported(path)):
            assert name.startswith(homes), f"{name} imports {library}"


def test_nothing_unsafe_is_called() -> None:
    forbidden = re.compile(
        r"pickle\.load|torch\.load\(|yaml\.load\((?!.*ruamel)|shell=True|trust_remote_code=True|(?<![.\w])eval\(|verify=False|\|\s*safe\b"
    )
    for path in sources():
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            code = line.split("#")[0]
            found = forbidden.search(code)
            assert not found or '"' in code[: found.start()], f"{path.name}:{number}: {line.strip()}"


def test_every_point_of_failure_in_the_code_may_be_ordered() -> None:
    """With `RLHF_FAULT` set, one that the list lacks would end whatever passes it."""
    passed = {
        node.args[0].value
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "faultpoint"
        if isinstance(node.args[0], ast.Constant)
    }
    assert passed == FAULT_POINTS


BLOCKED_IMPORT = """
import importlib, pkgutil, sys

class Without:
    # a finder that does not find what is blocked, and is the wrapped finder otherwise
    blocked = {"prefect", "mlflow", "dvc", "datasets", "great_expectations", "pandas", "pyarrow", "scipy",
               "sklearn", "matplotlib", "fastapi", "sqlalchemy", "ruamel", "rich", "cyclopts", "statsmodels"}
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in self.blocked else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import rlhf_core
more = MORE
names = [module.name for module in pkgutil.walk_packages(rlhf_core.__path__, "rlhf_core.")]
for name in names:
    if not name.startswith(more) and not name.endswith("__main__"):
        importlib.import_module(name)
assert not any(name in sys.modules for name in Without.blocked)
print(len(names))
"""


def test_rlhf_core_imports_with_only_its_five_libraries() -> None:
    code = BLOCKED_IMPORT.replace("MORE", repr(NEEDS_MORE))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


def test_the_readme_tree_is_the_tree() -> None:
    tree = re.search(r"```\n(rlhf-pipeline/.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert tree, "README.md needs the file tree in a fence that begins with rlhf-pipeline/"
    named, stack = set(), []
    for line in tree[1].splitlines()[1:]:
        match = re.match(r"(?P<indent>[ │├└─]*)(?P<name>[\w.\-/]+)", line)
        assert match, line
        depth = len(match["indent"]) // 4
        stack = [*stack[: depth - 1], match["name"].rstrip("/")]
        named.add("/".join(stack))
    missing = [name for name in sorted(named) if not (ROOT / name).exists() and name not in ("data", "dvc.lock")]
    assert not missing, f"README names what is not there: {missing}"
    packages = {
        path.parent.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("__init__.py")
        if "tasks/stages/" not in path.parent.as_posix()  # a folder a stage: the catalogue lists them
    }
    assert packages <= named, f"README lacks {sorted(packages - named)}"


def test_every_declared_package_is_used() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.split(r"[<>=!~]", entry)[0].lower() for entry in declared}
    files = [path for folder in (*PACKAGES, "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    used = {name.split(".")[0] for path in files for name in imported(path)}
    modules = {"great-expectations": "great_expectations", "markdown-it-py": "markdown_it", "ruamel.yaml": "ruamel"}
    unused = {name for name in names if modules.get(name, name) not in used}
    bounds = {"fastapi", "sqlalchemy"}  # named for their versions, which Prefect cannot do without
    tools = {"ruff", "mypy", "import-linter", "pytest-timeout", "pytest-xdist"}
    assert unused <= bounds | tools, f"declared and never imported: {sorted(unused - bounds - tools)}"
    own = {name.split(".")[0] for path in sources() for name in imported(path)}
    parts = {"annotated_types", "pydantic_core", "markupsafe", "packaging", "httpx2"}  # of pydantic, hub
    named = {modules.get(name, name) for name in names} | parts | set(PACKAGES)
    missing = own - named - set(sys.stdlib_module_names)
    assert not missing, f"imported and not declared: {sorted(missing)}"


def test_what_is_made_from_the_schema_is_fresh() -> None:
    from tasks.reference import json_schema, parameter_reference

    assert (ROOT / "docs/parameters.md").read_text() == parameter_reference(), "run python -m tasks.reference"
    assert (ROOT / "params.schema.json").read_text() == json_schema(), "run python -m tasks.reference"
