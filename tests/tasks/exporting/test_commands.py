"""`rlhf models export` and `verify` as they are typed, from a registry."""

import json

from support.pyfunc import TEXTS

from flows.cli.app import run_command


def test_a_version_of_the_registry_by_its_alias(registered, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    secret, folder = str(tmp_path / "keys/mine"), str(tmp_path / "out")
    assert run_command(["models", "key", secret]) == 0
    asked = ["models", "export", "rlhf-policy@candidate", folder, "--prompts", str(tmp_path / "prompts.jsonl")]
    assert run_command([*asked, "--key", secret]) == 0, capsys.readouterr().err
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1] == folder
    assert "greedy tokens equal on 3 of 3 prompts" in shown.err
    assert run_command(["models", "verify", folder, "--trust", f"{secret}.pub"]) == 0
    assert "which is trusted" in capsys.readouterr().out
    said = json.loads((tmp_path / "out/rlhf_manifest.json").read_text())
    assert said["version"] == "rlhf-policy/1"
    assert [gate["passed"] for gate in said["gates"]], "the gates that it is held against stand there"
    pushed = ["models", "push", "rlhf-policy/1", str(tmp_path / "pushed"), "--prompts", str(tmp_path / "prompts.jsonl")]
    assert run_command(pushed) == 0, capsys.readouterr().err
    assert run_command(["models", "verify", str(tmp_path / "pushed")]) == 0
    assert not list((registered / ".rlhf/staging").iterdir()), "the copy of the registry's folder is gone"


def test_what_is_asked_wrongly_is_one_line_and_a_code(registered, tmp_path, capsys):
    assert run_command(["models", "export", "rlhf-policy/9", str(tmp_path / "out")]) == 2
    assert run_command(["models", "export", "rlhf-policy/1", str(tmp_path / "out")]) == 7
    assert "which the export is tried on, is in no checkout" in capsys.readouterr().err.splitlines()[-1]
    assert run_command(["models", "export", "rlhf-policy/1", str(tmp_path / "out"), "--format", "pickle"]) == 2
    assert run_command(["models", "verify", str(tmp_path / "out")]) == 7
    assert run_command(["models", "verify", str(tmp_path)]) == 2
    assert not (tmp_path / "out").exists()
