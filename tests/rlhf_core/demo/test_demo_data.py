"""The data files: same seed, same bytes; small; split without leaks; and the committed ones are these."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from rlhf_core.demo.gold import grade
from rlhf_core.demo.scene import read_scene
from rlhf_core.demo.world import heldout_content
from rlhf_core.demo.write import write_demo_data
from rlhf_core.state.atomic import tree_digest

ROOT = Path(__file__).parents[3]
LIMIT = 3_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_demo_data(0, folder)
    return folder


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[str, list[dict]]:
    return {path.stem: [json.loads(line) for line in path.open()] for path in sorted(folder.glob("*.jsonl"))}


def test_the_same_seed_gives_the_same_bytes_in_another_process(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlhf_core.demo", "--seed", "0", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "simulated" in done.stdout
    assert tree_digest(tmp_path) == tree_digest(folder)


def test_another_seed_gives_other_prompts_and_stays_small(files: dict[str, list[dict]], tmp_path: Path) -> None:
    write_demo_data(1, tmp_path)
    other = {json.loads(line)["prompt"] for line in (tmp_path / "heldout_prompts.jsonl").open()}
    mine = {row["prompt"] for row in files["heldout_prompts"]}
    assert len(mine & other) < 0.1 * len(mine)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= LIMIT


def test_all_files_fit_in_three_megabytes(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.iterdir()) <= LIMIT


def test_the_tracked_data_is_what_the_generator_writes(folder: Path) -> None:
    """`data.dvc` and the store in the repository, read without DVC."""
    tracked = re.search(r"md5: (\w{32})\.dir", (ROOT / "data.dvc").read_text())
    assert tracked
    store = ROOT / ".dvcstore/files/md5"
    listing = json.loads((store / tracked[1][:2] / f"{tracked[1][2:]}.dir").read_text())
    written = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    assert {entry["relpath"]: entry["md5"] for entry in listing} == written
    for digest in written.values():
        assert (store / digest[:2] / digest[2:]).is_file()


def test_ids_are_unique(files: dict[str, list[dict]]) -> None:
    for name in ("demonstrations", "prompts", "heldout_prompts", "graded"):
        ids = [row["id"] for row in files[name]]
        assert len(set(ids)) == len(ids)


def test_no_prompt_stands_in_two_files(files: dict[str, list[dict]]) -> None:
    prompts = [row["prompt"] for name in ("demonstrations", "prompts", "heldout_prompts") for row in files[name]]
    assert len(set(prompts)) == len(prompts) == 6600 + 2236 + 900


def test_no_held_out_content_leaks_into_training(files: dict[str, list[dict]]) -> None:
    training = [read_scene(row["prompt"]) for name in ("demonstrations", "prompts") for row in files[name]]
    heldout = [read_scene(row["prompt"]) for row in files["heldout_prompts"]]
    assert all(heldout_content(scene) for scene in heldout)
    products = {scene.product for scene in heldout if not scene.unsafe}
    requests = {scene.request for scene in heldout if scene.unsafe}
    assert products
    assert requests
    assert not products & {scene.product for scene in training}
    assert not requests & {scene.request for scene in training}


def test_graded_replies_range_widely_and_carry_their_gold_score(files: dict[str, list[dict]]) -> None:
    scores = defaultdict(list)
    replies = Counter((row["prompt"], row["response"]) for row in files["graded"])
    assert max(replies.values()) == 1
    for row in files["graded"]:
        assert row["score"] == pytest.approx(grade(row["prompt"], row["response"]).gold, abs=1e-4)
        scores[row["prompt"]].append(row["score"])
    assert list(scores) == [row["prompt"] for row in files["heldout_prompts"][:400]]
    assert all(3 <= len(values) <= 5 for values in scores.values())
    assert sum(max(values) - min(values) for values in scores.values()) / 400 > 0.5


def test_votes_come_from_five_annotators_a_pair(files: dict[str, list[dict]]) -> None:
    by_pair = defaultdict(list)
    for row in files["votes"]:
        assert row["response_a"] != row["response_b"]
        assert row["choice"] in ("a", "b", "tie")
        assert 1 <= row["strength"] <= 3
        assert row["annotator"].startswith("sim-")
        by_pair[row["pair_id"]].append(row["annotator"])
    assert len(by_pair) == 150
    assert all(len(set(names)) == len(names) == 5 for names in by_pair.values())
    sides = {row["prompt"] for row in files["heldout_prompts"][:400]}
    assert len({row["pair_id"] for row in files["votes"] if row["prompt"] in sides}) == 40


def test_the_folder_says_that_it_is_simulated(folder: Path) -> None:
    assert "Simulated" in (folder / "README.md").read_text().splitlines()[0]
