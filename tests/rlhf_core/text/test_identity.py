"""One identity of a prompt: hand-made disguises of the same turns, Unicode's own list of what cannot be seen."""

import hashlib
import random
import sys
import unicodedata

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.text.identity import opening, prompt_group, prompt_identity, seen_turns
from rlhf_core.text.normal import normal_form, visible, without_hidden
from rlhf_core.text.transcripts import parse_messages

ASK = "What does the café charge?"
LONGER = "\n\nHuman: Hello.\n\nAssistant: Hi.\n\nHuman: What does it cost?\n\nAssistant:"


def messages(*turns):
    """The prompt of a list of messages whose last one is a reply."""
    roles = [{"role": role, "content": content} for role, content in turns]
    return parse_messages([*roles, {"role": "assistant", "content": "A reply."}]).prompt


def test_every_character_that_unicode_calls_ignorable_is_hidden_and_few_others():
    ignorable = regex.compile(r"\p{Default_Ignorable_Code_Point}")  # the tables of another library
    hidden = {chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000 and not visible(chr(code))}
    expected = {chr(code) for code in range(sys.maxunicode + 1) if ignorable.match(chr(code))}
    white = {character for character in hidden if character.isspace()}
    more = {"\u2800", "\U0001d159", *"\ufff9\ufffa\ufffb", *map(chr, range(0x80, 0xA0))} - white
    assert hidden - white == expected | more


@pytest.mark.parametrize("hidden", ["\u200b", "\ufeff", "\u00ad", "\u2060", "\u202e", "\ufe0f", "\U000e0041", "\u200d"])
def test_a_hidden_character_anywhere_in_latin_text_changes_nothing(hidden):
    for place in range(len(ASK) + 1):
        assert normal_form(ASK[:place] + hidden + ASK[place:]) == normal_form(ASK)
    assert visible(hidden * 3 + " \u2800\n") == ""
    assert without_hidden(f"a{hidden}\n b ") == "a\n b "


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("👩\u200d🚀", "👩🚀"),  # an astronaut, a woman and a rocket
        ("👩🏽\u200d🚀", "👩🏽🚀"),
        ("🙂\u200d↔\ufe0f", "🙂↔"),
        ("क्\u200dष", "क्ष"),  # half form and conjunct
        ("क्\u200cष", "क्ष"),
        ("می\u200cخواهم", "میخواهم"),  # two forms of one Persian letter
        ("🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", "🏴"),  # England
    ],
)
def test_what_joiners_and_tags_make_seen_is_kept(one, other):
    assert visible(one) == unicodedata.normalize("NFC", one).replace("\ufe0f", "") != visible(other)
    assert visible(f"\u200d{one}\u200d \u200c") == visible(one)


def test_another_look_of_the_same_sign_is_the_same_sign():
    assert visible("❤\ufe0f 1\ufe0f⃣") == visible("❤\ufe0e 1⃣") == "❤ 1⃣"
    assert visible("👩\u200d\u200d\u200d🚀") == visible("👩\u200d🚀")


@given(st.text(alphabet=st.one_of(st.characters(), st.sampled_from("\u200c\u200d\u2800👩🚀क्षمی\u0301ẞ")), max_size=20))
def test_both_forms_are_stable(text):
    assert visible(visible(text)) == visible(text)
    assert normal_form(normal_form(text)) == normal_form(text)


DISGUISES = [
    "  what does the CAFÉ\u00a0charge?\n",
    "What\u200b does the cafe\u0301 charge\u2060?",
    f"\n\nHuman: {ASK}\n\nAssistant:",
    f"\n\nHuman:\n{ASK}\t\n\nAssistant:",
    f"\r\n\r\nHuman: {ASK}\r\n\r\nAssistant:",
    f"\n\n\u200bHuman\ufeff: {ASK}\n\nAssistant:",
    messages(("user", ASK)),
    messages(("user", f" {ASK} ")),
]


@pytest.mark.parametrize("disguise", DISGUISES)
def test_one_prompt_has_one_identity_whatever_it_is_written_as(disguise):
    assert prompt_identity(disguise) == prompt_identity(ASK) == prompt_group(disguise)


def test_dialogues_and_messages_with_the_same_turns_are_one_prompt():
    same = messages(("user", "hello."), ("assistant", "Hi. "), ("user", "What  does it cost?"))
    assert prompt_identity(same) == prompt_identity(LONGER)
    assert prompt_identity(LONGER.replace("Hi.", "Yes?")) != prompt_identity(LONGER)
    assert prompt_identity("Be brief." + LONGER) != prompt_identity(LONGER)
    assert prompt_identity("Hello.") != prompt_identity(LONGER)


def test_a_group_is_a_dialogue_whatever_its_length_and_instructions():
    assert opening("Be brief." + LONGER) == opening(LONGER) == "hello."
    assert prompt_group("HELLO.") == prompt_group(LONGER) == prompt_group("Be brief." + LONGER)
    assert prompt_group("What does it cost?") != prompt_group(LONGER)
    greeted = "\n\nAssistant: Welcome!" + LONGER
    assert prompt_group(greeted) == prompt_group(LONGER)


def test_turns_without_anything_to_see_do_not_count():
    assert seen_turns("\n\nHuman: \u200b\n\nHuman: Hello.\n\nAssistant:") == (("user", "hello."),)
    assert prompt_identity("\u200b") == prompt_identity("")


def test_plain_prompts_keep_the_groups_that_they_had():
    """The first 16 hex digits of the SHA-256 of the text in lower case with single blanks, as ever."""
    demo = "Notes: The lamp: aisle A.\nCustomer: Where is it?\nAssistant:"
    plain = "notes: the lamp: aisle a. customer: where is it? assistant:"
    assert prompt_group(demo) == prompt_identity(demo) == hashlib.sha256(plain.encode()).hexdigest()[:16]
    assert prompt_group("abc") == "ba7816bf8f01cfea"  # the published SHA-256 of abc


def test_random_mixtures_of_all_disguises():
    rng = random.Random(5)
    turns = [("user", "Tell me of Ömer."), ("assistant", "He was a poet."), ("user", "And then?")]
    plain = prompt_identity(messages(*turns))
    for _ in range(50):
        disguised = messages(*turns)
        for _ in range(rng.randrange(6)):
            place = rng.randrange(len(disguised) + 1)
            disguised = disguised[:place] + rng.choice("\u200b\u200e\ufeff\u00ad\u2061") + disguised[place:]
        disguised = unicodedata.normalize(rng.choice(["NFC", "NFD"]), disguised)
        assert prompt_identity(disguised) == plain
