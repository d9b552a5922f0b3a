"""Decoding by replay: the same bits as kernel by kernel, and the tokens of the decoder without buffers that stay."""

import pytest
import torch
from support.device import pretend_gpu
from support.device_jobs import policy
from support.device_tensors import GPU
from support.graphs import PretendCapture
from support.preference import PAD
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_core.engine.batches import collate
from rlhf_core.rollout import graphed_decoder, sampler
from rlhf_core.rollout.decoders import make_decoder
from rlhf_core.rollout.graphed_decoder import GraphedDecoder
from rlhf_core.rollout.sampler import Samples, Sampling, sample_responses
from rlhf_core.rollout.static_decoder import StaticDecoder
from rlhf_core.state.compute_mode import ComputeMode, computing

PROMPTS = [[5, 6, 7], [8], [5, 6, 7], [9, 10, 11, 12, 13, 14], [3, 4], [9], [17, 18, 3, 3], [20, 21]] * 2


def llama() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=24, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, pad_token_id=0, bos_token_id=None, eos_token_id=1, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def sampled(
    monkeypatch: pytest.MonkeyPatch, capture: PretendCapture | None, *, grain: int = 8, ends: tuple[int, ...] = (1,)
) -> Samples:
    """Rows that end at different tokens, in batches of different widths; without a capture by `StaticDecoder`."""
    monkeypatch.setattr(graphed_decoder, "GRAIN_PLACES", grain)
    monkeypatch.setattr(sampler, "GRAIN", 2)
    monkeypatch.setattr(
        sampler,
        "make_decoder",
        lambda model: StaticDecoder(model) if capture is None else GraphedDecoder(model, capture),
    )
    return sample_responses(
        llama(), PROMPTS, Sampling(eos_ids=ends, pad_id=PAD, max_new_tokens=40), temperature=1.0,
        generator=torch.Generator().manual_seed(5), batch_size=10,
    )  # fmt: skip


def test_replayed_tokens_are_those_of_the_static_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    capture = PretendCapture()
    plain, graphed = sampled(monkeypatch, None), sampled(monkeypatch, capture)
    assert len({len(row) for row in plain.response_ids}) > 4, "rows leave the batch at different tokens"
    assert graphed.response_ids == plain.response_ids
    for one, two in zip(graphed.logprobs, plain.logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(two), atol=2e-5, rtol=0)
    assert capture.made > 4
    assert capture.replayed > 40


def test_a_graph_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same steps kernel by kernel, as `compute.cuda_graphs: off` takes them."""
    capture = PretendCapture()
    graphed = sampled(monkeypatch, capture)
    assert capture.replayed
    unused = PretendCapture()
    with computing(ComputeMode(cuda_graphs="off")):
        assert sampled(monkeypatch, unused) == graphed
    assert not unused.made


def test_with_exact_places_every_logit_has_the_bits_of_the_static_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing behind the last token is read then, and the order of sums is the same."""
    monkeypatch.setattr(graphed_decoder, "GRAIN_PLACES", 1)
    model = llama()
    batch = collate(PROMPTS[:4], [[]] * 4, PAD)
    with torch.inference_mode():
        plain, graphed = StaticDecoder(model), GraphedDecoder(model, PretendCapture())
        assert torch.equal(plain.prefill(batch, 9), graphed.prefill(batch, 9))
        for step in range(8):
            tokens = torch.tensor([3, 9, 20, 5]).roll(step)
            if step == 5:
                rows = torch.tensor([3, 0, 0, 2, 1, 1])
                plain.select(rows)
                graphed.select(rows)
            tokens = tokens if step < 5 else torch.cat([tokens, tokens[:2]])
            assert torch.equal(plain.step(tokens), graphed.step(tokens)), step


def test_graphs_of_a_batch_serve_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed_decoder, "GRAIN_PLACES", 16)
    model, capture = llama(), PretendCapture()
    with torch.inference_mode():
        used = GraphedDecoder(model, capture)
        for width, made in ((4, 1), (2, 1), (9, 2)):  # 4 + 5 and 2 + 5 places are in the first 16; 9 + 9 reach the next
            prompts, new = [[7] * width, [8] * (width - 1)], 5 if width < 9 else 9
            batch = collate(prompts, [[]] * 2, PAD)
            fresh = GraphedDecoder(model, PretendCapture())
            assert torch.equal(used.prefill(batch, new), fresh.prefill(batch, new))
            for token in range(2, new):
                tokens = torch.tensor([token, token + 7])
                assert torch.equal(used.step(tokens), fresh.step(tokens))
            assert capture.made == made, width


@pytest.mark.parametrize("fails_at", [1, 3])
def test_where_capturing_fails_the_tokens_are_the_same_and_a_line_says_why(
    fails_at: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(graphed_decoder, "_said", set())
    capture = PretendCapture(fails_at)
    assert sampled(monkeypatch, capture) == sampled(monkeypatch, PretendCapture())
    assert capture.made == fails_at, "no other is tried"
    line = "sampling without CUDA graphs: operation not permitted when stream is capturing\n"
    assert capsys.readouterr().out == line


def test_on_a_pretend_gpu_it_is_the_decoder_and_falls_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(graphed_decoder, "_said", set())
    sampling = Sampling(eos_ids=(1,), pad_id=PAD, max_new_tokens=12)
    drawn = [torch.Generator().manual_seed(7) for _ in range(2)]
    on_cpu = sample_responses(
        policy("cpu"), PROMPTS, sampling, temperature=1.0, generator=drawn[0], batch_size=8
    )  # fmt: skip
    with pretend_gpu():
        model = policy(GPU)
        assert isinstance(make_decoder(model), GraphedDecoder)
        found = sample_responses(model, PROMPTS, sampling, temperature=1.0, generator=drawn[1], batch_size=8)
    assert found.response_ids == on_cpu.response_ids
    assert "sampling without CUDA graphs: " in capsys.readouterr().out


def test_on_a_pretend_gpu_a_recorded_step_stays_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffers of a graph lie where the model does, and nothing of a step waits for the device."""
    monkeypatch.setattr(graphed_decoder, "GRAIN_PLACES", 4)
    batch, capture = collate(PROMPTS[:4], [[]] * 4, PAD), PretendCapture()
    with torch.inference_mode():
        expected = StaticDecoder(policy("cpu"))
        logits = [expected.prefill(batch, 8), *(expected.step(torch.full((4,), token)) for token in range(3, 9))]
    with pretend_gpu() as waits:
        model = policy(GPU)
        with torch.inference_mode():
            decoder = GraphedDecoder(model, capture)
            found = [decoder.prefill(batch.to(GPU), 8)]
            tokens = [torch.full((4,), token).to(GPU) for token in range(3, 9)]
            before = waits.total()
            found += [decoder.step(one).clone() for one in tokens]
            assert waits.total() == before
            found = [one.cpu() for one in found]
    assert capture.replayed
    for one, two in zip(found, logits, strict=True):
        torch.testing.assert_close(one, two, atol=2e-5, rtol=0)
