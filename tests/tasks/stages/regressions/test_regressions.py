"""Stage `regressions`: its figures on responses counted by hand, what it refuses."""

from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from rlhf_core.config import EvaluateConfig, Params
from rlhf_core.errors import DataError
from tasks import paths
from tasks.stages.evaluate.rows import responses_schema
from tasks.stages.regressions.run import is_copy, losses, run, variety
from tasks.tables import SCHEMAS, write_table

LEARNED = "The kettle stands in aisle C and costs 30 dollars."
OWN = "I do not know where they have put the kettle."
LOOP = "we do we do we do we do"


def responses(model: str, texts: list[str], temperature: float = 1.0) -> list[dict]:
    return [
        {
            "model": model, "temperature": temperature, "prompt_id": f"p{number}", "prompt": "Where is it?",
            "response": text, "num_tokens": len(text.split()), "finished": True, "reward_model": 0.0,
            **dict.fromkeys(("gold", "helpful", "truthful", "harmless", "concise")),
        }
        for number, text in enumerate(texts)
    ]  # fmt: skip


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.chdir(tmp_path)
    demonstrations = [
        {"id": "1", "prompt": "q", "response": LEARNED, "task": "", "source": "", "split": "train"},
        {"id": "2", "prompt": "q", "response": OWN, "task": "", "source": "", "split": "heldout"},
    ]
    write_table(tmp_path / paths.VALIDATE / "demonstrations.parquet", demonstrations, SCHEMAS["demonstrations"])
    write_table(tmp_path / paths.PREFERENCES / "train.parquet", [], SCHEMAS["train"])
    (tmp_path / "out").mkdir()
    return SimpleNamespace(root=tmp_path, out=tmp_path / "out", params=Params(evaluate=EvaluateConfig()))


def give(stage: SimpleNamespace, *rows: list[dict]) -> None:
    write_table(
        stage.root / paths.EVALUATE / "responses.parquet", [one for some in rows for one in some], responses_schema([])
    )


def test_variety_counted_by_hand() -> None:
    # "a b a b a b": 2 of 6 words differ, 2 (ab, ba) of 5 pairs; of 3 runs of four (abab, baba, abab) one came before
    assert variety(["a b A b a b"]) == pytest.approx({"distinct_1": 2 / 6, "distinct_2": 2 / 5, "repetition_4": 1 / 3})
    # over two responses: words a b c d, a b -> 4 of 6; pairs ab bc cd ab -> 3 of 4, none across the two; one run, none
    assert variety(["a b c d", "a b"]) == pytest.approx({"distinct_1": 4 / 6, "distinct_2": 3 / 4, "repetition_4": 0.0})
    assert variety([""]) == {"distinct_1": None, "distinct_2": None, "repetition_4": 0.0}


def test_a_copy_is_a_whole_reply_of_some_length_as_a_reader_sees_it() -> None:
    learned = frozenset({"the kettle stands in aisle c and costs 30 dollars.", "yes."})
    assert is_copy("  THE kettle stands\nin aisle\u200b C and costs 30 dollars. ", learned)
    assert not is_copy("The kettle stands in aisle D and costs 30 dollars.", learned)
    assert not is_copy(LEARNED + " Bye.", learned)
    assert not is_copy("Yes.", learned), "of fewer than eight words"


def test_a_policy_that_repeats_itself_and_one_that_copies_are_told(stage: SimpleNamespace) -> None:
    fine = [f"Item {number} stands in the first aisle near the door." for number in range(10)]
    give(
        stage,
        responses("sft", fine),
        responses("ppo", [LOOP] * 6 + [LOOP + " again"] * 4),
        responses("dpo", [LEARNED] * 10),
        responses("sft", [OWN] * 10, 0.0),
        responses("ppo", [OWN] * 10, 0.0),
    )
    found = run(stage)
    assert found["num_learned_replies"] == 1, "the held-out demonstration is not learned"
    assert found["ppo"]["T=1"]["worse"] == ["repetition_4_gain"]
    assert found["dpo"]["T=1"]["worse"] == ["copied_share_gain"]
    assert found["ppo"]["T=0"]["worse"] == []
    assert found["num_worse"] == 2
    assert "worse" not in found["sft"]["T=1"]
    # LOOP has 8 words, hence 5 runs of four, 2 of them different; with a ninth word 6 runs, 3 of them different
    assert found["ppo"]["T=1"]["repetition_4"] == pytest.approx(0.6 * 3 / 5 + 0.4 * 3 / 6)
    assert (found["dpo"]["T=1"]["copied_share"], found["dpo"]["T=1"]["copied_share_gain"]) == (1.0, 1.0)
    copies = pq.read_table(stage.out / "copies.parquet").to_pylist()
    assert copies == [{"model": "dpo", "prompt_id": f"p{number}", "response": LEARNED} for number in range(10)]


def test_too_few_prompts_accuse_nobody() -> None:
    found = losses([LOOP] * 4, [OWN] * 4, [True] * 4, [False] * 4, 0.95)
    assert (found["repetition_4_gain"], found["copied_share_gain"]) == (0.6, 1.0)
    assert found["worse"] == []
    assert set(found["undefined"]) == {"repetition_4_gain_low", "copied_share_gain_low"}
    assert losses([LOOP] * 5, [OWN] * 5, [True] * 5, [False] * 5, 0.95)["worse"] == [
        "repetition_4_gain",
        "copied_share_gain",
    ]


def test_models_must_have_answered_the_same_prompts(stage: SimpleNamespace) -> None:
    give(stage, responses("sft", [OWN] * 3), responses("ppo", [OWN] * 2))
    with pytest.raises(DataError, match=r"responses\.parquet: ppo at T=1 and sft .* Fix: run evaluate"):
        run(stage)
