"""Training prompts that ask what held-out ones ask, in every disguise; and those that do not."""

import random

import pytest

from rlhf_core.data.cleaning.leakage import leaking_prompts
from rlhf_core.data.cleaning.one_word import OneWord, one_word_apart
from rlhf_core.text.transcripts import parse_messages

LONG = " ".join(f"word{chr(97 + i // 10)}{chr(97 + i % 10)}" for i in range(80))
ASK = "How do I get red wine out of a white carpet?"


def dialogue(*contents, system=None):
    start = [{"role": "system", "content": system}] if system else []
    roles = ["user", "assistant"] * len(contents)
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return parse_messages([*start, *turns, {"role": "assistant", "content": "Well."}]).prompt


def test_leaks_are_near_duplicates_of_held_out_prompts():
    heldout = [LONG + " and what does it cost", "Is the lamp 15 dollars?"]
    train = [LONG.upper() + "  and what does it cost", LONG[::-1], "Is the lamp 25 dollars?", LONG + " and what is it"]
    assert leaking_prompts(train, heldout, 0.95) == {train[0]}
    assert leaking_prompts(train, heldout, 0.9) == {train[0], train[3]}
    assert leaking_prompts(train, [], 0.9) == set()
    assert leaking_prompts([], heldout, 0.9) == set()


@pytest.mark.parametrize(
    "other",
    [
        "How do I get red wine out of a grey carpet?",
        "How can I get red wine out of a white carpet?",
        "Now how do I get red wine out of a white carpet?",
        "How do I get wine out of a white carpet?",
        "How do I get red wine out of a white carpet please",
        "how do\u200b I get RED wine  out of a white rug",
    ],
)
def test_one_word_put_in_taken_out_or_exchanged_leaks(other):
    assert leaking_prompts([other, "What is a carpet?"], [ASK], 0.95) == {other}
    assert leaking_prompts([other], [ASK], 0.95, one_word=False) == set()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ASK, "How do I get red paint out of a grey carpet?"),  # two words
        (ASK, ASK + " Or a blue one?"),
        ("What is 3 + 4 in words?", "What is 3 + 5 in words?"),
        ("What is a + b in words?", "What is a * b in words?"),
        ("Where is aisle A in here?", "Where is aisle B in here?"),
        ("What is love?", "What is hate?"),  # three words
        ("今天天气", "今天心情"),
    ],
)
def test_what_is_not_one_word_apart(one, other):
    assert leaking_prompts([other], [one], 0.95) == set()
    assert OneWord([one]).close([other]) == set()


def test_up_to_two_characters_of_a_script_without_spaces_are_a_word():
    asked = "请告诉我北京今天的天气怎么样"
    one, three = asked.replace("北京", "上海"), asked.replace("北京今", "上海明")
    assert leaking_prompts([one, three], [asked], 0.95) == {one}
    assert one_word_apart(asked, asked.replace("今天的", "今天"))
    assert not one_word_apart(asked, three)


def test_the_frame_of_twenty_questions_is_a_template():
    animals = ["cat", "dog", "cow", "hen", "fox", "owl", "elk", "emu", "yak", "ape", "bee", "ant", "eel", "cod", "ram"]
    ask = "Write a short poem about my {} today".format
    assert leaking_prompts([ask(name) for name in animals[1:]], [ask("cat")], 0.95) == set(map(ask, animals[1:]))
    many = [ask(f"{name}{end}") for name in animals for end in ("s", "let")]
    assert leaking_prompts(many, [ask("cat")], 0.95) == set()


def test_every_short_prompt_with_one_word_changed_is_found():
    """The found ones are counted against a brute force over all pairs of prompts, word by word."""
    rng = random.Random(2)
    words = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnr"]
    heldout = [" ".join(rng.choices(words, k=rng.randrange(2, 20))) for _ in range(150)]

    def change(prompt):
        cut = prompt.split()
        cut[rng.randrange(len(cut))] = "changed"
        return " ".join(cut)

    train = [change(prompt) for prompt in heldout]
    expected = {new for new, old in zip(train, heldout, strict=True) if len(old.split()) >= 4}
    assert leaking_prompts(train, heldout, 0.95) == expected


INSTRUCTIONS = " ".join(f"rule{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(500))


def test_shared_instructions_are_no_evidence_and_hide_no_leak():
    tools = ["saw", "drill", "hammer", "wrench", "ladder", "rope", "bucket", "broom", "lamp", "kettle"]
    asks = [f"{verb} {tool} {place}" for tool in tools for verb in ("Where is the", "How much is a", "Do I need a")
            for place in ("in your shop by the river", "for my new house and garden")]  # fmt: skip
    heldout, train = asks[::6], [ask for place, ask in enumerate(asks) if place % 6]
    for frame in (lambda ask: dialogue(ask, system=INSTRUCTIONS), lambda ask: f"{INSTRUCTIONS} {ask}"):
        found = leaking_prompts(map(frame, [*train, heldout[3] + "!"]), map(frame, heldout), 0.95, one_word=False)
        assert found == {frame(heldout[3] + "!")}


def test_a_held_out_question_with_other_instructions_or_asked_later_leaks():
    other_instructions = dialogue(ASK, system="Be brief.")
    later = dialogue("Good morning.", "Hello!", ASK)
    longer = dialogue(ASK, "With salt.", "And out of wool?")
    harmless = dialogue("Good morning.", "Hello!", "Tell me more.")
    found = leaking_prompts([other_instructions, later, longer, harmless], [ASK, "Tell me more."], 0.95)
    assert found == {other_instructions, later, longer}


def test_dialogues_that_are_alike_as_a_whole_leak_though_they_open_otherwise():
    heldout, alike = dialogue("Hi", LONG, LONG[::-1]), dialogue("Hey you", LONG, LONG[::-1])
    assert leaking_prompts([alike, dialogue("Hi all", "No.", "Oh.")], [heldout], 0.9) == {alike}
