"""What the benchmarks run on: model sizes, the law that lengths follow, and folders that both sides load."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

PAD, END, FIRST_WORD = 0, 1, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """A Llama of the benchmark.

    `kv_heads` is the number of heads of keys and values, None where it is that of queries.
    """

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    kv_heads: int | None = None

    @property
    def kv_width(self) -> int:
        """Width of a token's keys, and of its values."""
        return self.hidden * (self.kv_heads or self.heads) // self.heads


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """The model that is measured, and the tokens that its rows are made of.

    Attributes:
        folder: what both sides load.
        size: its numbers.
        pad, end: tokens.
        words: tokens of rows; as text, one after the other, the model's tokenizer reads the same tokens again.
    """

    folder: Path
    size: Size
    pad: int
    end: int
    words: Sequence[int]


SIZES = {
    "tiny": Size(hidden=32, layers=2, heads=2, intermediate=64, vocabulary=64),  # for the tests of the benchmarks
    "S": Size(hidden=128, layers=4, heads=4, intermediate=512, vocabulary=2048),
    "M": Size(hidden=256, layers=6, heads=8, intermediate=1024, vocabulary=8192),
    "L": Size(hidden=768, layers=12, heads=12, intermediate=2048, vocabulary=32000),  # 0.13 B parameters
    "XL": Size(hidden=1280, layers=20, heads=20, intermediate=3456, vocabulary=32000),  # 0.48 B
}

PROMPT_TOKENS = (16, 64)  # uniform, both included
RESPONSE_MEDIAN, RESPONSE_SPREAD, RESPONSE_MOST = 48, 0.6, 192  # log-normal, the end token included


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Tokens of a prompt and of two responses, each with its end token; one-response tasks read `chosen`."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def make_pairs(count: int, subject: Subject, seed: int) -> list[Pair]:
    """Random words of a subject in rows of realistic lengths; the same arguments give the same rows."""
    generator = torch.Generator().manual_seed(seed)

    def words(length: int) -> list[int]:
        drawn = torch.randint(len(subject.words), (length,), generator=generator).tolist()
        return [subject.words[number] for number in drawn]

    def response() -> list[int]:
        drawn = math.exp(math.log(RESPONSE_MEDIAN) + RESPONSE_SPREAD * torch.randn((), generator=generator).item())
        return [*words(min(max(round(drawn), 2), RESPONSE_MOST) - 1), subject.end]

    low, high = PROMPT_TOKENS
    pairs = []
    for _ in range(count):
        length = int(torch.randint(low, high + 1, (), generator=generator))
        pairs.append(Pair(prompt=words(length), chosen=response(), rejected=response()))
    return pairs


@cache
def subject_of(name: str, kept: Path) -> Subject:
    """The subject of a name: a size, whose random model is made below `kept` on first use, or a model folder."""
    if name not in SIZES:
        return _given(Path(name))
    folder = kept / f"model-{name}"
    if not (folder / "done").is_file():
        _write_model(SIZES[name], folder)
        (folder / "done").touch()
    size = SIZES[name]
    return Subject(folder=folder, size=size, pad=PAD, end=END, words=range(FIRST_WORD, size.vocabulary))


def _given(folder: Path) -> Subject:
    """A pretrained Llama in a folder; its words are a space and small letters, each a token of its own.

    Raises:
        SystemExit: the tokenizer has no such words, or the model is no Llama.
    """
    from transformers import AutoConfig, AutoTokenizer

    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if config.model_type != "llama":
        raise SystemExit(f"{folder}: a {config.model_type}; the benchmarks count operations of a llama alone")
    size = Size(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
    )
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    words = [token for token, text in enumerate(texts) if re.fullmatch(" [a-z]{2,}", text)]
    again = tokenizer([texts[token] for token in words], add_special_tokens=False)["input_ids"]
    words = [token for token, read in zip(words, again, strict=True) if read == [token]]
    if not words:
        raise SystemExit(f"{folder}: its tokenizer has no token of a space and small letters to make rows of")
    return Subject(folder=folder, size=size, pad=tokenizer.pad_token_id, end=tokenizer.eos_token_id, words=tuple(words))


def _write_model(size: Size, folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names = ["<pad>", "<end>", *(f"w{number}" for number in range(FIRST_WORD, size.vocabulary))]
    plain = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token="<pad>"))
    plain.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<end>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=size.intermediate,
        max_position_embeddings=512,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_json(path: Path, content: object) -> None:
    """Write JSON that people can read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
