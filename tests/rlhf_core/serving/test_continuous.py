"""Continuous batching: who else is in the batch changes nothing, and the tokens are those of transformers."""

import threading
from dataclasses import dataclass, field

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rlhf_core.engine.batches import collate
from rlhf_core.errors import Diverged, EnvironmentProblem
from rlhf_core.models.mixture import PolicyMixture
from rlhf_core.rollout.logprobs import response_logprobs
from rlhf_core.rollout.token_draw import CutOff
from rlhf_core.serving.continuous import ContinuousSampler, Request
from rlhf_core.serving.slots import CacheSlots, MixedSlots, SeparateRows, make_slots, places_after
from rlhf_core.serving.worker import SamplingThread

VOCABULARY, PAD, END = 50, 0, 1
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15], [16] * 30, [17, 18, 19], [5, 6, 7], [20, 21]]


def tiny(kind: str):
    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 400}
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, initializer_range=0.4, **sizes)).eval()
    shared = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": END,
    }
    if kind == "mixture":
        return PolicyMixture([tiny("llama"), tiny("qwen2")], [0.4, 0.6])
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**shared, head_dim=8)).eval()
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**shared)).eval()
    return LlamaForCausalLM(LlamaConfig(**shared)).eval()


@dataclass
class Heard:
    """A listener that notes what it is told, and leaves after `most` tokens where that is given."""

    most: int | None = None
    tokens: list = field(default_factory=list)
    reason: str = ""
    error: Exception | None = None
    over: threading.Event = field(default_factory=threading.Event)

    def token(self, sampled) -> bool:
        self.tokens.append(sampled)
        return self.most is None or len(self.tokens) < self.most

    def end(self, reason) -> None:
        self.reason = reason
        self.over.set()

    def fail(self, error) -> None:
        self.error = error
        self.over.set()

    @property
    def ids(self) -> list[int]:
        return [sampled.token for sampled in self.tokens]


def request(prompt, **more) -> Request:
    return Request(**{"prompt": prompt, "max_new_tokens": 40, "eos_ids": (END,), **more})


def run(sampler, most_steps=2000):
    for _ in range(most_steps):
        if sampler.is_idle:
            return
        sampler.step()
    raise AssertionError("it goes on and on")


def alone(model, one: Request) -> list[int]:
    sampler, heard = ContinuousSampler(model, PAD), Heard()
    sampler.submit(one, heard)
    run(sampler)
    return heard.ids


REQUESTS = [
    request(prompt, seed=number, temperature=(0.0, 1.0, 0.7)[number % 3], max_new_tokens=10 + 17 * number,
            cut_off=CutOff(top_p=0.9) if number % 2 else CutOff())
    for number, prompt in enumerate(PROMPTS)
]  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2", "mixture"])
def test_a_response_is_the_same_alone_and_among_others_that_come_and_go(kind) -> None:
    model = tiny(kind)
    expected = [alone(model, one) for one in REQUESTS]
    assert len({tuple(ids) for ids in expected}) == len(expected), "a test with different responses"
    assert len({len(ids) for ids in expected}) > 3, "rows that end at different times"
    sampler = ContinuousSampler(model, PAD, most_rows=4, most_read=8)
    heard = [Heard() for _ in REQUESTS]
    for one, listener in zip(REQUESTS, heard, strict=True):  # each joins while the others are under way
        sampler.submit(one, listener)
        sampler.step()
        sampler.step()
    run(sampler)
    assert [listener.ids for listener in heard] == expected
    ends = [(listener.reason, ids[-1] == END) for listener, ids in zip(heard, expected, strict=True)]
    assert all(reason == ("stop" if ended else "length") for reason, ended in ends)


def test_the_likeliest_tokens_are_those_of_transformers() -> None:
    model = tiny("llama")
    sampler, heard = ContinuousSampler(model, PAD, most_rows=3), []
    for prompt in PROMPTS:
        heard.append(Heard())
        sampler.submit(request(prompt, temperature=0.0), heard[-1])
        sampler.step()
    run(sampler)
    for prompt, listener in zip(PROMPTS, heard, strict=True):
        theirs = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), do_sample=False,
            max_new_tokens=40, eos_token_id=END, pad_token_id=PAD,
        )  # fmt: skip
        assert listener.ids == theirs[0, len(prompt) :].tolist()


def test_logprobs_are_those_of_the_model_at_the_temperature_and_name_the_likeliest() -> None:
    model = tiny("llama")
    sampler, heard = ContinuousSampler(model, PAD), [Heard(), Heard()]
    sampler.submit(request(PROMPTS[0], temperature=0.7, alternatives=VOCABULARY), heard[0])
    sampler.submit(request(PROMPTS[1], temperature=1.0), heard[1])
    run(sampler)
    for prompt, listener, temperature in ((PROMPTS[0], heard[0], 0.7), (PROMPTS[1], heard[1], 1.0)):
        wanted = response_logprobs(model, collate([prompt], [listener.ids], PAD), temperature)[0].tolist()
        assert [sampled.logprob for sampled in listener.tokens] == pytest.approx(wanted, abs=1e-5)
    for sampled in heard[0].tokens:
        named = dict(sampled.alternatives)
        assert len(named) == VOCABULARY
        assert named[sampled.token] == pytest.approx(sampled.logprob, abs=1e-5)
        assert list(named.values()) == sorted(named.values(), reverse=True)
    assert all(not sampled.alternatives for sampled in heard[1].tokens)


def test_rows_that_are_cancelled_or_end_leave_at_once_and_make_room() -> None:
    model = tiny("llama")
    sampler = ContinuousSampler(model, PAD, most_rows=2)
    stays, cancelled, satisfied, late = Heard(), Heard(), Heard(most=3), Heard()
    sampler.submit(request(PROMPTS[0], seed=5, max_new_tokens=30, eos_ids=()), stays)
    row = sampler.submit(request(PROMPTS[1], max_new_tokens=30, eos_ids=()), cancelled)
    waits = sampler.submit(request(PROMPTS[1], eos_ids=()), satisfied)
    sampler.submit(request(PROMPTS[2], max_new_tokens=5, eos_ids=()), late)
    for _ in range(4):
        sampler.step()
    assert len(sampler.rows) == 2
    assert len(cancelled.tokens) == 4
    assert not satisfied.tokens
    row.cancel()
    sampler.step()
    assert len(cancelled.tokens) == 4
    assert len(satisfied.tokens) == 1
    run(sampler)
    assert not cancelled.over.is_set()
    assert (satisfied.reason, len(satisfied.tokens)) == ("stop", 3)
    assert (late.reason, len(late.tokens)) == ("length", 5)
    assert stays.ids == alone(model, request(PROMPTS[0], seed=5, max_new_tokens=30, eos_ids=()))
    waits.cancel()
    assert sampler.is_idle


def test_a_longer_response_begins_as_the_shorter_one_with_the_same_seed() -> None:
    model = tiny("llama")
    short = alone(model, request(PROMPTS[0], seed=3, max_new_tokens=5, eos_ids=()))
    longer = alone(model, request(PROMPTS[0], seed=3, max_new_tokens=200, eos_ids=()))
    assert len(longer) == 200
    assert longer[:5] == short
    assert alone(model, request(PROMPTS[0], seed=4, max_new_tokens=5, eos_ids=())) != short
    assert alone(model, request(PROMPTS[0], seed=3, number=1, max_new_tokens=5, eos_ids=())) != short


def test_logits_that_are_no_numbers_end_their_own_row_alone() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[40] = torch.nan
        model.lm_head.weight[40] = 0.0
    good = request(PROMPTS[0], seed=1, eos_ids=(40,), cut_off=CutOff(top_k=3))
    expected = alone(model, good)
    longer = request(PROMPTS[4] * 2, seed=1, eos_ids=(), cut_off=CutOff(top_k=3))
    sampler, bad = ContinuousSampler(model, PAD), Heard()
    heard = [Heard() for _ in range(4)]
    sampler.submit(request([40] * 70, cut_off=CutOff(top_k=3)), bad)
    run(sampler)
    assert isinstance(bad.error, Diverged)
    assert "NaN" in str(bad.error)
    for one, listener in ((good, heard[0]), (good, heard[1]), (longer, heard[2])):  # in the slot that held them
        sampler.submit(one, listener)
    run(sampler)
    sampler.submit(request([40] * 70, cut_off=CutOff(top_k=3)), Heard())
    for one, listener in ((longer, Heard()), (good, heard[3])):  # and moved into it
        sampler.submit(one, listener)
    run(sampler)
    assert heard[0].ids == heard[1].ids == heard[3].ids == expected
    assert heard[2].ids == alone(model, longer)


def test_prompts_are_read_a_limited_number_of_tokens_at_a_time_and_a_longer_one_alone() -> None:
    sampler = ContinuousSampler(tiny("llama"), PAD, most_read=10)
    for size in (5, 5, 5, 30, 1):
        sampler.submit(request([7] * size, eos_ids=()), Heard())
    seen = []
    for _ in range(4):
        sampler.step()
        seen.append(len(sampler.rows))
    assert seen == [2, 3, 4, 5]


def test_what_breaks_a_step_is_told_to_those_under_way_and_those_who_wait_go_on(monkeypatch) -> None:
    model = tiny("llama")
    sampler, first, second = ContinuousSampler(model, PAD, most_rows=1), Heard(), Heard()
    sampler.submit(request(PROMPTS[0]), first)
    sampler.submit(one := request(PROMPTS[1], seed=2), second)
    sampler.step()

    def out_of_memory(tokens_B):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sampler.slots, "step", out_of_memory)
    run(sampler)
    assert str(first.error) == "out of memory"
    assert second.error is None
    assert second.ids == alone(model, one)


def test_each_model_gets_the_best_slots_there_are() -> None:
    assert isinstance(make_slots(tiny("llama")), CacheSlots)
    assert isinstance(make_slots(tiny("qwen3")), CacheSlots)
    assert isinstance(make_slots(tiny("gpt2")), SeparateRows)
    mixed = make_slots(tiny("mixture"))
    assert isinstance(mixed, MixedSlots)
    assert all(isinstance(member, CacheSlots) for member in mixed.members)


@pytest.mark.parametrize(
    ("count", "gone", "order"),
    [(4, {1}, [0, 3, 2]), (4, {0, 3}, [2, 1]), (3, {2}, [0, 1]), (3, {0, 1, 2}, []), (5, {0, 1}, [3, 4, 2])],
)
def test_the_last_rows_fill_the_holes(count, gone, order) -> None:
    assert places_after(count, gone) == order


def test_a_thread_answers_requests_from_many_and_fails_what_is_left_when_it_closes() -> None:
    model = tiny("llama")
    expected = [alone(model, one) for one in REQUESTS]
    thread = SamplingThread(ContinuousSampler(model, PAD, most_rows=4))
    heard = [Heard() for _ in REQUESTS]
    callers = [
        threading.Thread(target=thread.submit, args=(one, listener))
        for one, listener in zip(REQUESTS, heard, strict=True)
    ]
    for caller in callers:
        caller.start()
    assert all(listener.over.wait(60) for listener in heard)
    assert [listener.ids for listener in heard] == expected
    endless = Heard()
    thread.submit(request(PROMPTS[0], max_new_tokens=10**6, eos_ids=()), endless)
    while not endless.tokens:
        pass
    thread.close()
    assert "going down" in str(endless.error)
    with pytest.raises(EnvironmentProblem, match="going down"):
        thread.submit(request(PROMPTS[0]), Heard())
