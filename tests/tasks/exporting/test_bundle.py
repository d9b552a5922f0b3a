"""What `rlhf models verify` finds: every byte, what is too much or too little, and whose signature it is."""

import base64
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from flows.cli.export import key, verify
from rlhf_core.errors import ConfigError
from rlhf_core.state.atomic import file_digest
from tasks.exporting.bundle import SIGNATURE, verify_folder, write_bundle
from tasks.exporting.signing import CONTEXT, make_key, signing_key, trusted_keys
from tasks.lineage.provenance import EXPORT_MANIFEST


@pytest.fixture(autouse=True)
def no_keys_of_mine(monkeypatch):
    monkeypatch.delenv("RLHF_SIGNING_KEY", raising=False)
    monkeypatch.delenv("RLHF_TRUSTED_KEYS", raising=False)


@pytest.fixture
def secret(tmp_path):
    make_key(tmp_path / "keys/mine")
    return tmp_path / "keys/mine"


@pytest.fixture
def folder(tmp_path, secret):
    return bundle(tmp_path / "export", secret)


def bundle(folder: Path, secret: Path | None) -> Path:
    (folder / "inside").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "inside/config.json").write_text("{}")
    write_bundle(folder, {"version": "rlhf-policy/3"}, signing_key(secret))
    return folder


def test_a_whole_folder_that_a_trusted_key_signed(folder, secret):
    found = verify_folder(folder, trusted_keys([Path(f"{secret}.pub")]))
    assert (found.problems, found.files, found.version) == ((), 2, "rlhf-policy/3")
    assert found.signature.holds
    assert found.signature.trusted
    assert verify(folder, trust=[Path(f"{secret}.pub")]) == 0


def change(folder):
    (folder / "model.safetensors").write_bytes(b"Weights")


def add(folder):
    (folder / "inside/modeling.py").write_text("import os")


def remove(folder):
    (folder / "inside/config.json").unlink()


def link(folder):
    (folder / "more").symlink_to(folder.parent)


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (change, "model.safetensors: changed"),
        (add, "inside/modeling.py: not in the list"),
        (remove, "inside/config.json: missing"),
        (link, "more: not in the list"),
    ],
)
def test_one_byte_too_many_too_few_or_other(folder, spoil, line, capsys):
    spoil(folder)
    assert verify_folder(folder).problems == (line,)
    assert verify(folder) == 3
    assert line in capsys.readouterr().out


def test_a_list_that_was_rewritten_to_fit_is_no_longer_what_was_signed(folder, secret):
    """What a hash of each file alone cannot see: whoever changes a file changes the list too."""
    change(folder)
    manifest = json.loads((folder / EXPORT_MANIFEST).read_text())
    manifest["files"]["model.safetensors"] = file_digest(folder / "model.safetensors")
    (folder / EXPORT_MANIFEST).write_text(json.dumps(manifest))
    (problem,) = verify_folder(folder).problems
    assert "not a signature of this" in problem
    assert verify(folder) == 3
    (folder / SIGNATURE).unlink()
    assert verify(folder) == 0, "unsigned and whole, which proves nothing of who wrote it"
    assert verify(folder, trust=[Path(f"{secret}.pub")]) == 3


def test_the_signature_of_another_key(folder, tmp_path, capsys):
    make_key(tmp_path / "other")
    assert verify(folder, trust=[tmp_path / "other.pub"]) == 3
    assert "a key that was not named as trusted" in capsys.readouterr().out
    assert verify(folder) == 0
    shutil.rmtree(folder)
    bundle(folder, tmp_path / "other")
    said = json.loads((folder / SIGNATURE).read_text())
    for spoilt in ("[]", "{", json.dumps(said | {"signature": "??"}), json.dumps(said | {"algorithm": "none"})):
        (folder / SIGNATURE).write_text(spoilt)
        assert verify(folder) == 3


def test_keys_by_the_environment(folder, secret, monkeypatch):
    monkeypatch.setenv("RLHF_TRUSTED_KEYS", f"{secret}.pub")
    assert verify(folder) == 0
    monkeypatch.setenv("RLHF_SIGNING_KEY", str(secret))
    assert signing_key(None) is not None


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_verifies_the_signature(folder, secret, tmp_path):
    (tmp_path / "signed").write_bytes(CONTEXT + (folder / EXPORT_MANIFEST).read_bytes())
    (tmp_path / "signature").write_bytes(base64.b64decode(json.loads((folder / SIGNATURE).read_text())["signature"]))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", f"{secret}.pub", "-rawin", "-in", "signed",
               "-sigfile", "signature"]  # fmt: skip
    assert subprocess.run(command, cwd=tmp_path, check=False, capture_output=True).returncode == 0
    (tmp_path / "signed").write_bytes((folder / EXPORT_MANIFEST).read_bytes())
    assert subprocess.run(command, cwd=tmp_path, check=False, capture_output=True).returncode != 0


def test_what_a_fetch_or_a_hub_lays_beside_is_said_and_no_harm(folder):
    (folder / "provenance.json").write_text("{}")
    (folder / ".gitattributes").write_text("")
    found = verify_folder(folder)
    assert (found.problems, found.beside) == ((), (".gitattributes", "provenance.json"))


def test_a_list_that_leads_out_of_the_folder_is_read_no_further(folder):
    for content, reason in (
        ('{"schema": 1, "version": "x", "files": {"../../etc/passwd": "0"}}', "names files outside of the folder"),
        ("[]", "not a manifest that can be read"),
        ('{"schema": 9}', "not a manifest that can be read"),
    ):
        (folder / EXPORT_MANIFEST).write_text(content)
        assert verify(folder) == 3
        problem, *_ = verify_folder(folder).problems
        assert reason in problem


def test_a_folder_that_is_no_export(tmp_path):
    with pytest.raises(ConfigError, match="so nothing to hold it against"):
        verify_folder(tmp_path)


def test_a_key_is_for_its_owner_alone_and_lies_in_no_checkout(tmp_path, secret, capsys):
    assert (secret.stat().st_mode & 0o777, b"PRIVATE" in Path(f"{secret}.pub").read_bytes()) == (0o600, False)
    with pytest.raises(ConfigError, match="is there already"):
        make_key(secret)
    (tmp_path / "repository/.git").mkdir(parents=True)
    with pytest.raises(ConfigError, match="lies in the git checkout"):
        make_key(tmp_path / "repository/sub/key")
    secret.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        signing_key(secret)
    assert key(tmp_path / "fresh") == 0
    assert capsys.readouterr().out.startswith("SHA256:")


def test_files_that_are_no_keys(tmp_path, secret):
    with pytest.raises(ConfigError, match="there is no such key"):
        signing_key(tmp_path / "absent")
    with pytest.raises(ConfigError, match="a private key, which nobody needs"):
        trusted_keys([secret])
    (tmp_path / "text").write_text("no key")
    (tmp_path / "text").chmod(0o600)
    with pytest.raises(ConfigError, match="not a private key"):
        signing_key(tmp_path / "text")
    with pytest.raises(ConfigError, match="not a public key"):
        trusted_keys([tmp_path / "text"])
