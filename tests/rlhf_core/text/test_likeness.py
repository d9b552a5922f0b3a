"""Tokens, signs and similarity, each worked by hand."""

import itertools
import random
import tracemalloc

import pytest

from rlhf_core.text.likeness import marks, num_words, shared_runs, shingles, similarity, tokens
from rlhf_core.text.normal import normal_form

PROSE = " ".join(f"word{chr(97 + i // 10)}{chr(97 + i % 10)}" for i in range(80))


@pytest.mark.parametrize(
    "family",
    [
        [f"{{}} x {sign} y {sign} z" for sign in "+-*/%^|&~=<>×÷±≤∈"],
        [f"{{}} a {sign} b" for sign in ("<", ">", "<=", ">=", "==", "!=", "===", "=", "->", "=>", "**", "//")],
        [f"{{}} {sign}5" for sign in ("", "-", "+", "$", "€", "£", "₹", "#", "@", "~")],
        [f"{{}} {sign} what a day" for sign in ("", "👍", "👎", "👍👍", "👍🏽", "👩\u200d🚀", "👩🚀", "🇫🇷", "🇩🇪")],
        ["{} 5%", "{} 5", "{} 5‰", "{} 5°", "{} 5!"],
        ["{} if !ready", "{} if ready", "{} if ~ready"],
        ["{} (a + b) * c", "{} a + (b * c)", "{} a + b * c"],
        ["{} f & g", "{} f @ g", "{} f # g", "{} f \\ g"],
        ["{} from 3 to 5", "{} from 5 to 3"],
        ["{} x²", "{} x³", "{} ½", "{} ¼"],
    ],
)  # fmt: skip
def test_texts_that_differ_in_a_sign_are_never_alike(family):
    texts = [pattern.format(start) for start in (PROSE,) for pattern in family]
    for one, other in itertools.combinations(texts, 2):
        assert similarity(shingles(one), shingles(other)) == 0.0, (one[-20:], other[-20:])
        assert similarity(shingles(one), shingles(one.upper())) == 1.0


def test_punctuation_hyphens_and_quotes_are_no_signs():
    assert marks(normal_form("Well-known, isn't it? “Yes” (he said); GPT-4 … it`s: so. What a day!")) == ("4",)
    assert marks("a - b") == marks("a − b") == marks("a – b") == ("-",)
    assert marks("pages 3–5") == marks("pages 3-5") == ("3", "-", "5")
    assert marks("1,000.5 and ½") == ("1,000.5", "½")


def test_words_keep_their_combining_marks():
    hindi = normal_form("कि की कु")  # three words that differ in a vowel sign alone
    assert tokens(hindi) == ("कि", "की", "कु")
    assert tokens(normal_form("Don’t ‘quote’ Google's")) == ("don't", "quote", "google's")
    assert tokens(normal_form("ÉTÉ cafe\u0301 می\u200cخواهم")) == ("été", "café", "می\u200cخواهم")


def test_scripts_without_spaces_are_cut_into_characters():
    chinese, one_other = "今天北京的天气怎么样", "今天北京的天气怎么办"
    assert tokens(chinese) == tuple(chinese)
    # ten characters are eight runs, and the last character stands in one of them
    assert similarity(shingles(chinese), shingles(one_other)) == 7 / 9
    assert tokens(normal_form("น้ำใจ")) == ("น้", "ำ", "ใ", "จ")
    assert tokens("これはpython 3です") == ("こ", "れ", "は", "python", "3", "で", "す")
    assert num_words("今天天气") == pytest.approx(8 / 3)
    assert num_words("how are you 👍") == 3


def test_what_a_template_says_is_no_evidence():
    template = "please answer the following question in a friendly way and keep it short"
    texts = [f"{template} {name} lives in town" for name in ("ann", "bob", *(f"some{chr(97 + i)}" for i in range(20)))]
    shared = shared_runs(("", text) for text in texts)
    assert {"answer the following", "lives in town"} <= shared
    ann, bob = shingles(texts[0]), shingles(texts[1])
    # 15 words and so 14 + 1 runs: 12 + 1 in common, all shared; 3 differ on each side
    assert similarity(ann, bob) == pytest.approx(12 / 18)
    assert similarity(ann, bob, shared) == 0.0
    assert similarity(ann, shingles(texts[0]), shared) == 1.0
    assert shared_runs(("", text) for text in texts[:19]) == frozenset(), "nineteen texts are no template yet"
    refused = [(str(number), "I cannot help with that.") for number in range(20)]
    assert shared_runs(refused) == {"i cannot help", "cannot help with", "help with that"}
    assert shared_runs(("0", text) for _, text in refused) == frozenset()


def test_a_run_in_few_of_many_texts_is_not_shared():
    many = [f"quite unlike the others is {i:03d} of them" for i in range(300)]
    some = [f"seldom told story number {i}" for i in range(19)]
    assert "quite unlike the" in shared_runs(("", text) for text in (*many, *some))
    assert "seldom told story" not in shared_runs(("", text) for text in (*many, *some))


def test_the_short_way_of_plain_texts_gives_what_the_long_way_does():
    """A full stop of another script has no part in anything, and only texts without such letters go the short way."""
    rng = random.Random(11)
    letters = "abz09_'’‘“”!-=<>$`~^|()[]{}*/%&@# .,:;?\\\"\t\n"
    texts = ["".join(rng.choices(letters, k=rng.randrange(1, 14))) for _ in range(4000)]
    texts += ["well-known", "a-1", "ab-1", "1-2", "x!", "5!", "!x", "not!=is", "a'b'c''d", "don’t", "(a<b)", "3.14,5"]
    for text in texts:
        assert tokens(text) == tokens(f"{text} 。"), text
        assert marks(text) == marks(f"{text} 。"), text
        assert num_words(text) == num_words(f"{text} 。"), text


def test_runs_of_few_tokens():
    assert shingles("one").runs == {"one"}
    assert shingles("one two").runs == {"one two"}
    assert shingles("one two three four").runs == {"one two three", "two three four"}
    assert shingles("...").runs == {"..."}


def test_long_texts_do_not_stay_in_memory():
    """500 texts of 600 words of their own: 300,000 runs, which are 100 MB where texts and counts are kept."""
    tracemalloc.start()
    try:
        texts = (("", " ".join(f"{place}x{word}" for word in range(600))) for place in range(500))
        assert shared_runs(texts) == set()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60e6
