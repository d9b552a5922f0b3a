"""Text as it grows: the pieces are the whole, and nothing is given out that is taken back."""

import random

import pytest
from support.tokenizer import CHATML, LLAMA2, THINKING, byte_level, sentence_piece

from rlhf_core.serving.text_stream import TextStream, plain_decoder, reply_stream
from rlhf_core.text.tokenizer import decode_response, encode_response

TEXTS = ["An answer, and  another one.\n\nBe kind. ", "naïve 日本語 🙂🙂 end", "  ", "a", "x\n\n y \n z"]
TOKENIZERS = {
    "bytes": lambda: byte_level(),
    "chatml": lambda: byte_level(CHATML),
    "thinking": lambda: byte_level(THINKING),
    "llama2": lambda: sentence_piece(LLAMA2),
    "pieces": lambda: sentence_piece(),
}


def pieces_of(stream, ids):
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.is_stopped:
            break
    return [*pieces, stream.finish()]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_are_the_decoded_response(kind) -> None:
    tokenizer = TOKENIZERS[kind]()
    tokenizer.pad_token = tokenizer.eos_token
    for text in TEXTS if kind in ("bytes", "chatml", "thinking") else TEXTS[:1] + TEXTS[3:]:
        ids = encode_response(tokenizer, text, 1000) if text.strip() else tokenizer(text)["input_ids"]
        ids = [token for token in ids if token not in tokenizer.all_special_ids]
        pieces = pieces_of(reply_stream(tokenizer), ids)
        assert "".join(pieces) == decode_response(tokenizer, ids)
        assert not any("\ufffd" in piece for piece in pieces)
        assert len(text) < 8 or sum(map(bool, pieces)) > 1, "it streams"


def test_the_first_stop_ends_the_text_wherever_tokens_cut_it() -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("ab \n") for _ in range(rng.randrange(1, 20)))
        stops = ["".join(rng.choice("ab \n") for _ in range(rng.randrange(1, 4))) for _ in range(rng.randrange(3))]
        found = [text.find(stop) for stop in stops if stop in text]
        wanted = text[: min(found)] if found else text
        cuts = sorted(rng.sample(range(1, len(text)), min(len(text) - 1, 4)))
        parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, None], strict=True)]
        for strip in (False, True):
            base = text.lstrip() if strip else text
            found = [base.find(stop) for stop in stops if stop in base]
            wanted = base[: min(found)] if found else base
            stream = TextStream(lambda ids, parts=parts: "".join(parts[i] for i in ids), stops, strip=strip)
            got = "".join(pieces_of(stream, range(len(parts))))
            assert got == (wanted.rstrip() if strip else wanted), (text, stops, parts)
            assert stream.is_stopped == bool(found)


def test_what_a_template_writes_around_replies_is_no_part_of_them() -> None:
    parts = ["<thi", "nk>\n", "Yes", " or", " no ", "</d", "one>", "\n"]
    stream = TextStream(lambda ids: "".join(parts[i] for i in ids), strip=True, lead="<think>", trail="</done>")
    given = [stream.push(number) for number in range(len(parts))]
    assert given == ["", "", "Yes", " or", " no", "", "", ""]
    assert stream.finish() == ""
    other = TextStream(lambda ids: "<thick> ice"[: 4 * len(ids)], strip=True, lead="<think>", trail="</done>")
    assert "".join(pieces_of(other, range(3))) == "<thick> ice"


def test_raw_text_keeps_its_white_space() -> None:
    tokenizer = byte_level()
    ids = tokenizer(" a \n b  ")["input_ids"]
    stream = TextStream(plain_decoder(tokenizer))
    assert "".join(pieces_of(stream, ids)) == " a \n b  "
