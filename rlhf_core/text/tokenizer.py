"""Text to tokens and back, the same way in every stage.

Prompt and response are tokenised apart, so no merge crosses the border between them, and a response has the same
tokens whatever it answers. Text never becomes a control token: `<eos>` typed by a user is spelled out in letters.

A tokenizer with a chat template writes prompts and responses as the template does. One without it writes a prompt as
it stands, after the token that the tokenizer itself puts before a text (BOS), where it has one; earlier replies in a
dialogue end with the end token, as they did when they were written.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_core.errors import ConfigError, DataError
from rlhf_core.model_folder import check_model_folder
from rlhf_core.text.chat import fix_template, render_prompts, render_responses, reply_form
from rlhf_core.text.control import as_letters, encode_marked, has_control, spelled
from rlhf_core.text.encoded import Encoded, TextCounts
from rlhf_core.text.transcripts import conversation, earlier_replies

PAD_TOKEN, EOS_TOKEN = "<pad>", "<eos>"
SMALLEST_VOCABULARY = 2 + 256

ChatMode = Literal["auto", "plain", "template"]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (Sennrich et al. 2016, on bytes): any text round-trips, nothing is unknown.

    `<pad>` is 0, `<eos>` is 1.

    Args:
        texts: the corpus; the same texts in the same order give the same tokenizer.
        vocab_size: the most entries there may be; a small corpus gives fewer.

    Raises:
        ConfigError: `vocab_size` has no room for the 256 bytes and the two control tokens.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"params.yaml: model.vocab_size: {vocab_size} has no room for 256 bytes and 2 control tokens. "
            f"Fix: at least {SMALLEST_VOCABULARY}"
        )
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN, EOS_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(folder: Path | str, chat: ChatMode = "auto") -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local model folder, as `tokenizer.json` defines it where there is one.

    `AutoTokenizer` would go by the architecture instead: for a folder of type `qwen2` it puts Qwen's own splitting
    of text in the place of the file's, and the tokens are no longer those the model was trained on.
    A tokenizer without a pad token pads with its end token: batches carry masks made from lengths, so the two are
    never confused.

    Args:
        folder: model folder.
        chat: `plain` takes the chat template away, `template` insists on one, `auto` uses one that is there. A saved
            tokenizer has the template or has it not, so later stages read it with `auto`.

    Raises:
        EnvironmentProblem: files are missing.
        ConfigError: the folder asks for code of its own, its tokenizer cannot be read or has no end token, or its chat
            template is missing or cannot be used.
    """
    check_model_folder(folder)
    tokenizer = read_tokenizer(Path(folder))
    for how_it_was_loaded in ("is_local", "local_files_only", "trust_remote_code"):
        tokenizer.init_kwargs.pop(how_it_was_loaded, None)  # would be saved with it
    if chat == "plain":
        tokenizer.chat_template = None
    elif chat == "template" and tokenizer.chat_template is None:
        raise ConfigError(f"params.yaml: model.chat: {folder} has no chat template. Fix: auto, or plain")
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token  # before a template names another end token: two tokens are clearer
    fix_template(tokenizer, str(folder))
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{Path(folder) / 'tokenizer_config.json'}: eos_token: there is none, so no response could end. "
            "Fix: name the token that ends a response"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder that was checked, as its files have it; see `load_tokenizer`.

    Raises:
        ConfigError: it cannot be read.
    """
    loader = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    try:
        return loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each kind of file has its own
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{folder}: its tokenizer cannot be read ({type(error).__name__}: {reason}). Fix: copy tokenizer.json "
            "again, or save the tokenizer again with `save_pretrained`"
        ) from error


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int) -> list[int]:
    """Tokens of a prompt; one longer than `max_tokens` loses its beginning, since the request stands at the end.

    Raises:
        DataError: there is no token at all; a response needs one to be predicted from.
    """
    return encode_prompts(tokenizer, [text], max_tokens)[0]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int, counts: TextCounts | None = None
) -> list[list[int]]:
    """`encode_prompt` for many at once, which is faster; `counts` is told what they lost."""
    if not texts:
        return []
    if tokenizer.chat_template is None:
        opening, encoded = opening_tokens(tokenizer), _plain_prompts(tokenizer, texts)
    else:
        opening, encoded = [], render_prompts(tokenizer, [conversation(text) for text in texts], max_tokens)
    if not all(prompt.ids for prompt in encoded):
        place = [bool(prompt.ids) for prompt in encoded].index(False)
        raise DataError(f"prompt {place + 1} of {len(texts)}: it is empty. Fix: remove the row")
    cut = [_cut_beginning([*opening, *prompt.ids], tokenizer.bos_token_id, max_tokens) for prompt in encoded]
    if counts is not None:
        before = len(opening)
        counts.add_prompts(
            prompt._replace(is_cut=prompt.is_cut or len(ids) < before + len(prompt.ids))
            for prompt, ids in zip(encoded, cut, strict=True)
        )
    return cut


def encode_response(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int) -> list[int]:
    """Tokens of a response and the end token; one cut to `max_tokens` has no end token.

    Without a chat template they are those of a space and the stripped text.

    Raises:
        DataError: chat template or tokenizer do not write the response whole.
    """
    return encode_responses(tokenizer, [text], max_tokens)[0]


def encode_responses(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """`encode_response` for many at once, which is faster."""
    encoded = encode_whole_responses(tokenizer, texts, max_tokens)
    whole = [ids for ids in encoded if ids is not None]
    if len(whole) < len(encoded):
        place = encoded.index(None)
        raise DataError(
            f"response {place + 1} of {len(texts)}: the {_writer(tokenizer)} leaves out or rewrites part of it: "
            f"{texts[place][:80]!r}. Fix: model.chat: plain, another template or tokenizer, or a response without such "
            "parts"
        )
    return whole


def encode_whole_responses(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int, counts: TextCounts | None = None
) -> list[list[int] | None]:
    """`encode_responses`, with None for a response that chat template or tokenizer do not write whole.

    What is left of such a response is another one, which nobody wrote or judged. `counts` is told of them, and of
    those that were cut.
    """
    encoded = _encoded_responses(tokenizer, texts)
    if counts is not None:
        counts.add_responses(response._replace(is_cut=len(response.ids) > max_tokens) for response in encoded)
    return [response.ids[:max_tokens] if response.is_whole else None for response in encoded]


def encode_samples(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int, counts: TextCounts | None = None
) -> list[list[int]]:
    """`encode_responses` for what a model wrote and another is to read, which no template may shorten.

    Where the template would not write it whole it stands there as the model wrote it: its text, and the end token.
    What no tokens of letters can say is missing in it, and counted.
    """
    encoded = [
        response if response.is_whole else _as_written(tokenizer, text)
        for text, response in zip(texts, _encoded_responses(tokenizer, texts), strict=True)
    ]
    if counts is not None:
        counts.add_responses(response._replace(is_cut=len(response.ids) > max_tokens) for response in encoded)
    return [response.ids[:max_tokens] for response in encoded]


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of response tokens up to the end token, stripped."""
    kept = list(ids)
    if tokenizer.eos_token_id in kept:
        kept = kept[: kept.index(tokenizer.eos_token_id)]
    text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
    if tokenizer.chat_template is None:
        return text
    form = reply_form(tokenizer)
    return text.removeprefix(form.lead).removesuffix(form.trail).strip()


def _encoded_responses(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Encoded]:
    if tokenizer.chat_template is None:
        return _plain_responses(tokenizer, texts)
    return render_responses(tokenizer, texts)


def _plain_prompts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Encoded]:
    """Tokens of prompts as they stand, but that each earlier reply of a dialogue is written as a response is."""
    encoded = _plain_typed(tokenizer, texts)
    for place, text in enumerate(texts):
        if spans := earlier_replies(text):
            starts, ends = zip(*spans, strict=True)
            between = _plain_typed(tokenizer, [text[a:b] for a, b in zip((0, *ends), (*starts, None), strict=True)])
            replies = _plain_responses(tokenizer, [text[start:end] for start, end in spans])
            pieces = [*chain(*zip(between, replies, strict=False)), between[-1]]
            ids = list(chain(*(piece.ids for piece in pieces)))
            encoded[place] = Encoded(ids, is_whole=all(piece.is_whole for piece in pieces))
    return encoded


def _plain_responses(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Encoded]:
    return [_ended(tokenizer, ids) for ids in _plain_ids(tokenizer, [f" {text.strip()}" for text in texts])]


def _writer(tokenizer: PreTrainedTokenizerBase) -> str:
    return "tokenizer" if tokenizer.chat_template is None else "chat template"


def _as_written(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoded:
    """A response that no chat template wraps: its text, and the end token."""
    return _ended(tokenizer, _plain_ids(tokenizer, [text.strip()])[0])


def _ended(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> Encoded:
    reply = as_letters(tokenizer, ids, "assistant")
    return reply._replace(ids=[*reply.ids, tokenizer.eos_token_id])


def opening_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before a text: its BOS token, or nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _cut_beginning(ids: list[int], bos: int | None, max_tokens: int) -> list[int]:
    """The last of the tokens; a BOS token before them stays."""
    if len(ids) <= max_tokens:
        return ids
    kept = ids[:1] if ids[0] == bos else []
    return kept + ids[len(ids) - max_tokens + len(kept) :]


def _plain_typed(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Encoded]:
    """Tokens of texts that others than the assistant wrote: no control token among them, special or merely added."""
    encoded = [as_letters(tokenizer, ids, "user") for ids in _plain_ids(tokenizer, texts)]
    for place, text in enumerate(texts):
        if has_control(tokenizer, text):
            ids = encode_marked(tokenizer, spelled(tokenizer, text, "user"))
            encoded[place] = as_letters(tokenizer, ids, "user") if ids is not None else encoded[place]
    return encoded


def _plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
