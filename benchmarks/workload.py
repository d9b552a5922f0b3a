"""What the benchmarks run on: model sizes, the law that lengths follow, and folders that both sides load."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

PAD, END, FIRST_WORD = 0, 1, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """A Llama of the benchmark."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int


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


def make_pairs(count: int, vocabulary: int, seed: int) -> list[Pair]:
    """Random tokens in rows of realistic lengths; the same arguments give the same rows."""
    generator = torch.Generator().manual_seed(seed)

    def words(length: int) -> list[int]:
        return torch.randint(FIRST_WORD, vocabulary, (length,), generator=generator).tolist()

    def response() -> list[int]:
        drawn = math.exp(math.log(RESPONSE_MEDIAN) + RESPONSE_SPREAD * torch.randn((), generator=generator).item())
        return [*words(min(max(round(drawn), 2), RESPONSE_MOST) - 1), END]

    low, high = PROMPT_TOKENS
    pairs = []
    for _ in range(count):
        length = int(torch.randint(low, high + 1, (), generator=generator))
        pairs.append(Pair(prompt=words(length), chosen=response(), rejected=response()))
    return pairs


def model_folder(size: str, cache: Path) -> Path:
    """A folder with a random model of `size` and a word tokenizer, made on first use."""
    folder = cache / f"model-{size}"
    if not (folder / "done").is_file():
        _write_model(SIZES[size], folder)
        (folder / "done").touch()
    return folder


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
