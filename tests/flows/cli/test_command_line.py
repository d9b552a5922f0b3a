"""The `rlhf` command: speed, exit codes, one-line errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.timing import costs_at_most

from flows.cli.app import COMMANDS, MODEL_COMMANDS
from flows.cli.run import read_request
from flows.run.request import RunRequest
from rlhf_core.errors import ConfigError
from tests.flows.conftest import plain_environment

HEAVY = ("torch", "prefect", "mlflow", "dvc", "transformers", "datasets", "great_expectations", "pandas")
LOADED = f"""
import sys
from flows.cli.app import run_command
code = run_command(sys.argv[1:])
print([name for name in {HEAVY!r} if name in sys.modules], code, file=sys.stderr)
"""


def rlhf(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows.cli.app", *arguments],
        cwd=folder,
        env=plain_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("arguments", [["--help"], [], ["run", "--help"], ["models", "--help"], ["status"], ["schema"]])
def test_nothing_heavy_is_imported_for_a_quick_answer(counting_project: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-c", LOADED, *arguments]
    with costs_at_most(3):  # it is a third of a second
        done = subprocess.run(
            command, cwd=counting_project, env=plain_environment(), capture_output=True, text=True, check=True
        )
    assert done.stderr.strip().splitlines()[-1] == "[] 0"
    assert done.stdout


def test_help_says_what_every_command_does(counting_project: Path) -> None:
    text = rlhf(counting_project, "--help").stdout
    described = {line.strip("│ ").split("  ")[0]: line for line in text.splitlines() if line.startswith("│ ")}
    for name in COMMANDS:
        assert len(described[name].strip("│ ").split()) > 3, f"{name} has no line of its own"
    models = rlhf(counting_project, "models", "--help").stdout
    assert all(f"│ {name} " in models for name in MODEL_COMMANDS)


def test_help_shows_what_an_option_is_when_it_is_left_out(counting_project: Path) -> None:
    text = " ".join(rlhf(counting_project, "deploy", "--help").stdout.replace("│", " ").split())
    assert "--name STR Name of the deployment. [default: pipeline]" in text
    assert "[default: UTC]" in text
    assert "--cron STR Five fields, such as '0 3 * * *' for every night at three. [default: none]" in text
    assert text.count("[default: ") == text.count(" --") - text.count("--help"), "an option without its default"


def test_profiles_are_listed_with_what_they_are_for(counting_project: Path) -> None:
    folder = counting_project / "profiles"
    folder.mkdir(exist_ok=True)
    head = "# yaml-language-server: $schema=../params.schema.json\n"
    (folder / "mine.yaml").write_text(f"{head}# Pairs of my own:\n#   rlhf run --profile mine\nsft: {{max_steps: 3}}\n")
    (folder / "bare.yaml").write_text("sft: {max_steps: 3}\n")
    found = json.loads(rlhf(counting_project, "profiles", "--json").stdout)
    assert (found["mine"], found["bare"]) == ("Pairs of my own", "")
    assert "Pairs of my own" in rlhf(counting_project, "profiles").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["run", "--bogus"], 2, "--bogus"),
        (["fly"], 2, "fly"),
        (["run", "--set", "nothing"], 2, "section.key=value"),
        (["run", "--set", "sft.max_stepz=3"], 2, "max_steps"),
        (["run", "--set", "sft.max_steps=none"], 2, "sft.max_steps"),
        (["run", "--profile", "nope"], 2, "no such profile"),
        (["run", "--profile", "../params"], 2, "--profile"),
        (["run", "--name", "UP/../.."], 2, "--name"),
        (["run", "--data", "votes"], 2, "kind=path"),
        (["run", "--data", "wishes=x.jsonl"], 2, "unknown record kind"),
        (["run", "--data", "votes=absent.jsonl"], 4, "no such file"),
        (["run", "--data", "rankings=absent.jsonl"], 4, "no such file"),
        (["run", "--data", "votes=params.yaml"], 2, "unknown format '.yaml'"),
        (["resume"], 2, "nothing to go on with"),
        (["report"], 7, "no report yet"),
        (["deploy", "--cron", "0 3 * * *", "--profile", "nope"], 2, "no such profile"),
        (["deploy", "--cron", "0 3 * * *", "--timezone", "Europe/Berlim"], 2, "no such zone. Fix: Europe/Berlin"),
        (["deploy", "--interval", "60", "--timezone", "Nowhere"], 2, "--timezone 'Nowhere': no such zone"),
        (["deploy", "--interval", "60", "--timezone", "UTC+2"], 2, "no such zone. Fix: Etc/GMT-2 (its sign"),
        (["deploy", "--interval", "60", "--timezone", "utc"], 2, "--timezone 'utc': no such zone. Fix: UTC"),
        (["deploy", "--cron", "61 * * * *"], 2, "--cron '61 * * * *': not the five fields"),
        (["deploy", "--cron", "@daily"], 2, "not the five fields"),
        (["deploy", "--cron", "R R * * *"], 2, "not the five fields"),
        (["deploy", "--cron", ""], 2, "not the five fields"),
        (["deploy", "--cron", "0 0 30 2 *"], 2, "such a day never comes"),
        (["deploy", "--cron", "0 3 * * *", "--interval", "60"], 2, "both given"),
        (["deploy", "--interval", "0"], 2, "--interval 0: too short"),
        (["deploy", "--interval", "10000000000000"], 2, "longer than a year"),
        (["deploy", "--paused"], 2, "--paused: there is no schedule"),
        (["deploy", "--timezone", "Asia/Tokyo"], 2, "--timezone: there is no schedule"),
        (["deploy", "--name", "a/b"], 2, "--name 'a/b': not a plain name"),
        (["deploy", "--name", ""], 2, "not a plain name"),
        (["deploy", "--at-once", "0"], 2, "--at-once 0"),
        (["deploy", "--retries", "99"], 2, "--retries 99"),
        (["deploy", "--collision", "fight"], 2, "--collision"),
        (["deploy", "--list", "--delete", "x"], 2, "both given"),
        (["run", "--set", "model.path=models/own"], 2, "params.yaml: model.path: models/own would not be read"),
        (
            ["run", "--set", "model.path=models/own", "--set", "model.source=folder"],
            2,
            "models/own: there is no such folder",
        ),
        (["deploy", "--set", "generate.models=[models/own]"], 2, "params.yaml: generate.models: "),
    ],
)
def test_mistakes_cost_one_line_and_start_nothing(
    counting_project: Path, arguments: list[str], code: int, part: str
) -> None:
    done = rlhf(counting_project, *arguments)
    assert done.returncode == code, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert part in done.stderr
    assert "Fix: " in done.stderr
    assert done.stdout == ""
    assert not (counting_project / ".rlhf/servers.json").exists()
    assert not (counting_project / "runs").exists()


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("sft: {max_steps: 3, max_steps: 4}", "params.yaml:4: "),
        ("sft: {max_stepz: 3}", "did you mean 'max_steps'?"),
        ("sft:\n  learning_rate: 1e-5", "1.0e-5"),
        ("sft: {max_steps: 0}", "sft.max_steps"),
        ("sft: {max_steps: 3}\nmodel: {source: folder, path: data}", "model.path: {root}/data: missing config.json"),
    ],
)
def test_bad_parameters_are_refused_before_anything_starts(counting_project: Path, line: str, part: str) -> None:
    path = counting_project / "params.yaml"
    text = path.read_text().replace(
        "sft: {max_steps: 3}", line.replace("{learning_rate: 1e-5}", "\n  learning_rate: 1e-5")
    )
    path.write_text(text)
    done = rlhf(counting_project, "run")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert part.replace("{root}", str(counting_project)) in done.stderr
    assert not (counting_project / ".rlhf/servers.json").exists()


def test_missing_data_is_refused_before_anything_starts(counting_project: Path) -> None:
    (counting_project / "data/demonstrations.jsonl").unlink()
    done = rlhf(counting_project, "run")
    assert (done.returncode, done.stdout) == (4, "")
    assert "dvc pull data.dvc" in done.stderr
    (counting_project / "data/demonstrations.jsonl").write_text("")
    assert rlhf(counting_project, "run").returncode == 4


def test_outside_a_project_the_cure_is_named(tmp_path: Path) -> None:
    done = rlhf(tmp_path, "status")
    assert done.returncode == 2
    assert "cd into the project" in done.stderr


def test_schema_is_json_schema(counting_project: Path) -> None:
    schema = json.loads(rlhf(counting_project, "schema").stdout)
    assert schema["additionalProperties"] is False
    assert "validate" in schema["properties"]


def test_options_become_the_form_of_the_ui() -> None:
    request = read_request(
        "tiny",
        ("sft.max_steps=3",),
        ("votes=a=b.jsonl",),
        "mine",
        stage_timeout_minutes=5,
        run_timeout_minutes=9,
        retries=1,
    )
    assert request == RunRequest(
        profile="tiny",
        overrides=("sft.max_steps=3",),
        data={"votes": "a=b.jsonl"},
        name="mine",
        stage_timeout_minutes=5,
        run_timeout_minutes=9,
        retries=1,
    )
    assert not request.in_place
    assert read_request(None, (), (), None, stage_timeout_minutes=5).in_place
    wrong = {
        "stage_timeout_minutes": ("timeout", 10**9),
        "run_timeout_minutes": ("run-timeout", 0),
        "retries": ("retries", 11),
    }
    for field, (option, value) in wrong.items():
        with pytest.raises(ConfigError, match=f"--{option} {value}: "):
            read_request(None, (), (), None, **{field: value})


def test_a_kind_of_data_that_is_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^--data votes=b: votes is given twice, as a too\. Fix: "):
        read_request(None, (), ("votes=a", "rankings=c", "votes=b"), None)
