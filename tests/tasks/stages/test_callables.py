"""Functions of a person's own in `params.yaml`: what they are given, and what is said when they cannot be used."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_core.errors import ConfigError, DataError
from rlhf_core.state.atomic import file_digest
from rlhf_core.text.tokenizer import decode_response, encode_prompts, encode_responses, train_tokenizer
from rlhf_core.trainers.ppo.replay import Written
from tasks.stages.callables import load_rate

TEXTS = ["How much is a broom?", "Where are the mops?"]
KEY = "align.ppo.scores.terms"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([*TEXTS, "A broom is 3 coins."] * 5, vocab_size=300)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Any]:
    """The little of a stage that matters, with a module `mine` among its inputs."""
    noted: dict[str, str] = {}
    definition = SimpleNamespace(deps=("tasks", "mine"))
    yield SimpleNamespace(root=tmp_path, name="align@ppo", definition=definition, depends_on=noted.update, noted=noted)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("mine", "other")]:
        del sys.modules[name]
    sys.path[:] = [entry for entry in sys.path if entry != str(tmp_path)]


def write(stage: Any, code: str, name: str = "mine/tone.py") -> None:
    path = stage.root / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(code)


def load(stage: Any, tokenizer: Any, name: str = "mine.tone:rate") -> Any:
    prompts = list(zip(TEXTS, encode_prompts(tokenizer, TEXTS, 50), strict=True))
    return load_rate(stage, KEY, name, prompts, tokenizer)


def test_a_function_is_given_what_it_names(stage: Any, tokenizer: Any) -> None:
    write(
        stage,
        "def rate(responses, prompts, finished, response_ids, prompt_ids, scale=2):\n"
        "    seen.append((responses, prompts, finished, response_ids, prompt_ids))\n"
        "    return [scale * len(one) for one in response_ids]\n"
        "seen = []\n",
    )
    rate = load(stage, tokenizer)
    ids = encode_responses(tokenizer, ["A broom is 3 coins.", "A broom"], 50)
    rows = [
        Written(prompt=1, response_ids=ids[0], finished=True),
        Written(prompt=0, response_ids=ids[1][:-1], finished=False),
    ]
    assert rate(rows) == [2.0 * len(ids[0]), 2.0 * (len(ids[1]) - 1)]
    tried, called = sys.modules["mine.tone"].seen
    assert tried == ([""], [TEXTS[0]], [True], [[tokenizer.eos_token_id]], encode_prompts(tokenizer, TEXTS[:1], 50))
    responses, prompts, finished, response_ids, prompt_ids = called
    assert responses == [decode_response(tokenizer, row.response_ids) for row in rows]
    assert responses[0].strip() == "A broom is 3 coins."
    assert prompts == [TEXTS[1], TEXTS[0]]
    assert finished == [True, False]
    assert response_ids == [row.response_ids for row in rows]
    assert prompt_ids == encode_prompts(tokenizer, prompts, 50)


def test_a_function_that_takes_any_keyword_gets_everything(stage: Any, tokenizer: Any) -> None:
    write(stage, "def rate(**given):\n    return [len(given)] * len(given['responses'])\n")
    assert load(stage, tokenizer)([Written(prompt=0, response_ids=[5], finished=True)]) == [5.0]


@pytest.mark.parametrize(
    ("code", "name", "said"),
    [
        ("", "mine.tone:rate", "cannot be imported (AttributeError: module 'mine.tone' has no attribute 'rate')"),
        ("", "mine.absent:rate", "cannot be imported (ModuleNotFoundError: No module named 'mine.absent')"),
        ("1 +", "mine.tone:rate", "cannot be imported (SyntaxError"),
        ("1 / 0", "mine.tone:rate", "cannot be imported (ZeroDivisionError"),
        ("rate = 3", "mine.tone:rate", "is a int, no function"),
        ("def rate(texts): ...", "mine.tone:rate", "takes texts. Fix: parameters named prompts, responses, prompt_ids"),
        ("def rate(responses, extra): ...", "mine.tone:rate", "takes extra. Fix:"),
        ("def rate(responses, /): ...", "mine.tone:rate", "takes responses. Fix:"),
        ("def rate(): ...", "mine.tone:rate", "takes none of the arguments. Fix:"),
    ],
)
def test_what_cannot_be_called_is_a_configuration_error(
    stage: Any, tokenizer: Any, code: str, name: str, said: str
) -> None:
    write(stage, code)
    with pytest.raises(ConfigError) as caught:
        load(stage, tokenizer, name)
    assert str(caught.value).startswith(f"params.yaml: {KEY}: {name}: ")
    assert said in str(caught.value)
    assert "Fix: " in str(caught.value)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def rate(responses):\n    return [len(one.split()[0]) for one in responses]", "IndexError: list index"),
        ("def rate(responses):\n    return 1.0", "it returned 1.0. Fix: one number a response"),
        ("def rate(responses):\n    return [float('inf')]", "inf for response 0 of 1. Fix: finite numbers only"),
    ],
)
def test_it_is_tried_on_an_empty_response_before_training(stage: Any, tokenizer: Any, code: str, said: str) -> None:
    write(stage, code)
    with pytest.raises(DataError) as caught:
        load(stage, tokenizer)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"params.yaml: {KEY}: mine.tone:rate: ")


def test_a_file_that_dvc_does_not_watch_is_refused(stage: Any, tokenizer: Any) -> None:
    write(stage, "def rate(responses): return [0.0] * len(responses)", name="other.py")
    with pytest.raises(ConfigError, match=r"other.py is no input of stage align@ppo.*add it to deps of stage align in"):
        load(stage, tokenizer, "other:rate")
    write(stage, "def rate(responses): return [0.0] * len(responses)")
    load(stage, tokenizer)
    assert stage.noted == {}, "DVC watches it"


def test_an_installed_function_is_part_of_the_checkpoints_identity(
    stage: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("site")
    (elsewhere / "other.py").write_text("def rate(responses): return [0.0] * len(responses)")
    monkeypatch.syspath_prepend(str(elsewhere))
    stage.depends_on = lambda name, digest: stage.noted.update({name: digest})
    load(stage, tokenizer, "other:rate")
    assert stage.noted == {f"params.yaml: {KEY}: other:rate": file_digest(elsewhere / "other.py")}
