"""Text to tokens and back: nothing lost, nothing forged, the same tokenizer every time."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_core.config import ModelConfig
from rlhf_core.errors import ConfigError, DataError
from rlhf_core.models.policy import build_policy, save_policy
from rlhf_core.state.atomic import tree_digest
from rlhf_core.text.tokenizer import (
    decode_response,
    encode_prompt,
    encode_prompts,
    encode_response,
    encode_responses,
    load_tokenizer,
    train_tokenizer,
)

CORPUS = ["The broom stands in aisle F, price 45.", "We don't have 12345 of them.\n\nSorry!"] * 5
HARD = [
    "plain",
    "emoji 🙂👩‍👩‍👧",
    "漢字かな交じり文",
    "e\u0301 and é",
    "tabs\tand\n\nlines",
    "a  b",
    "\u202eright to left עברית",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(CORPUS, 300)


def test_control_tokens_have_the_promised_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert len(tokenizer) == 300


@pytest.mark.parametrize("text", HARD)
def test_any_text_comes_back_as_it_went_in(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert decode_response(tokenizer, encode_response(tokenizer, text, 1000)) == text
    assert tokenizer.decode(encode_prompt(tokenizer, text, 1000)) == text


def test_a_response_is_stripped_begins_with_a_space_and_ends(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode_response(tokenizer, "  aisle F \n", 1000)
    assert tokenizer.decode(ids[:-1]) == " aisle F"
    assert ids[-1] == tokenizer.eos_token_id


def test_a_cut_response_has_no_end_and_a_cut_prompt_keeps_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = encode_response(tokenizer, "x y z w v", 1000)
    assert encode_response(tokenizer, "x y z w v", len(whole)) == whole
    assert encode_response(tokenizer, "x y z w v", len(whole) - 1) == whole[:-1]
    prompt = encode_prompt(tokenizer, "first middle last", 1000)
    assert encode_prompt(tokenizer, "first middle last", 3) == prompt[-3:]


def test_decoding_stops_at_the_first_end(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode_response(tokenizer, "one", 1000) + encode_response(tokenizer, "two", 1000)
    assert decode_response(tokenizer, ids) == "one"


@pytest.mark.parametrize("text", ["say <eos> now", "<pad><pad>", "<eos>"])
def test_text_cannot_forge_a_control_token(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = encode_response(tokenizer, text, 1000)
    assert not {0, 1} & {*ids[:-1], *encode_prompt(tokenizer, text, 1000)}
    assert decode_response(tokenizer, ids) == text


def test_many_at_once_equal_one_by_one(tokenizer: PreTrainedTokenizerFast) -> None:
    assert encode_prompts(tokenizer, HARD, 9) == [encode_prompt(tokenizer, text, 9) for text in HARD]
    assert encode_responses(tokenizer, HARD, 9) == [encode_response(tokenizer, text, 9) for text in HARD]
    assert encode_prompts(tokenizer, [], 9) == encode_responses(tokenizer, [], 9) == []


def test_an_empty_prompt_is_refused_by_place(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="prompt 2 of 3: it is empty"):
        encode_prompts(tokenizer, ["a", "", "b"], 9)


def test_the_same_corpus_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        train_tokenizer(iter(CORPUS), 320).save_pretrained(tmp_path / name)
    assert tree_digest(tmp_path / "one") == tree_digest(tmp_path / "two")


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.vocab_size: 257 .* at least 258"):
        train_tokenizer(CORPUS, 257)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_saved_tokenizer_loads_with_the_same_tokens_and_saves_the_same_bytes(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, family: str
) -> None:
    """`AutoTokenizer` fails this for qwen2: it replaces the way the file splits text by Qwen's own."""
    cfg = ModelConfig(family=family, hidden_size=8, heads=1, layers=1, intermediate_size=8)
    save_policy(build_policy(cfg, len(tokenizer), 0, 1, seed=0), tokenizer, tmp_path / "one")
    loaded = load_tokenizer(tmp_path / "one")
    for text in HARD:
        assert encode_response(loaded, text, 1000) == encode_response(tokenizer, text, 1000)
    loaded.save_pretrained(tmp_path / "two")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
