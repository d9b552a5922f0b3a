"""The packed forward against transformers' own, and what must not change its numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.smollm3.modeling_smollm3 import SmolLM3RMSNorm

from rlhf_core.engine.batches import RowShapes, SequenceBatch, collate
from rlhf_core.engine.layout import layout_of
from rlhf_core.engine.packed import can_pack
from rlhf_core.engine.states import final_states, hidden_states, predicting_states, response_states
from rlhf_core.state.compute_mode import ComputeMode, computing

VOCABULARY, PAD = 40, 0
PROMPTS = [[5, 6, 7, 8], [9], [10, 11], [5, 6, 7, 8], [12] * 9, [10, 11], [5, 6, 7, 8]]
RESPONSES = [[12, 1], [13, 14, 15, 16, 1], [17], [18, 19, 20, 1], [21] * 11, [22, 23, 24], [1]]
BATCH = collate(PROMPTS, RESPONSES, PAD)
NOISE = 5e-6
"""Largest difference, in float32, between ways to compute hidden states of size 1 to 4 here: about 20 roundings."""

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
}


def tiny(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    match kind:
        case "gpt2":
            sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.2}
            model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes))
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**SIZES))
        case "grouped":
            model = LlamaForCausalLM(
                LlamaConfig(**SIZES, num_key_value_heads=2, attention_bias=True, mlp_bias=True, head_dim=12)
            )
        case "llama3":
            scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            positions = {**scaling, "rope_theta": 100.0, "original_max_position_embeddings": 16}
            model = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=positions))
        case "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True))
        case "mistral":
            model = MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=None))
        case "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=12, attention_bias=True))
        case "smollm3":
            positions = {"no_rope_layers": [1, 0, 1], "use_sliding_window": False}
            model = SmolLM3ForCausalLM(SmolLM3Config(**SIZES, num_key_value_heads=2, **positions, pad_token_id=PAD))
        case "sliding":
            model = Qwen2ForCausalLM(
                Qwen2Config(
                    **SIZES, num_key_value_heads=2, use_sliding_window=True, sliding_window=4, max_window_layers=1
                )
            )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.add_(0.3 * torch.randn_like(parameter))  # where they start, forgetting one would not show
    return model.eval()


PACKED = ["llama", "grouped", "llama3", "qwen2", "mistral", "qwen3", "smollm3"]
OTHERS = ["gpt2", "sliding"]


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes norms in float32 whatever the weights are; in the type of their input they can be exact."""

    def forward(self: torch.nn.Module, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, SmolLM3RMSNorm):
        monkeypatch.setattr(norm, "forward", forward)


def plain_states(model: PreTrainedModel, batch: SequenceBatch, dtype: torch.dtype = torch.float32) -> Tensor:
    """Each row by itself through transformers, no padding: [B, C, D], zeros where a row has no token."""
    prompts, responses, _ = batch.shapes
    width, body = batch.prompt_width, model.get_decoder()
    found = torch.zeros(len(prompts), max(responses) + 1, body.config.hidden_size, dtype=dtype)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids = batch.ids_BS[row : row + 1, width - prompt : width + response]
        found[row, : response + 1] = body(input_ids=ids, use_cache=False).last_hidden_state[0, prompt - 1 :]
    return found


def real_BC(batch: SequenceBatch) -> Tensor:
    return batch.mask_BS[:, batch.prompt_width - 1 :].bool()


def test_what_is_packed() -> None:
    for kind in PACKED:
        assert can_pack(tiny(kind).get_decoder()), kind
    for kind in OTHERS:
        assert not can_pack(tiny(kind).get_decoder()), kind
    for hook in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        hooked = tiny("llama").get_decoder()
        getattr(hooked.layers[1].mlp, f"register_{hook}")(lambda *_: None)
        assert not can_pack(hooked), hook
    activated, stretched = tiny("llama").get_decoder(), tiny("llama").get_decoder()
    activated.config.hidden_act = "gelu"
    assert not can_pack(activated)
    stretched.config.rope_parameters["rope_type"] = "dynamic"  # its angles depend on the length of the text
    assert not can_pack(stretched)
    replaced = tiny("llama").get_decoder()
    replaced.layers[0].mlp = torch.nn.Identity()
    assert not can_pack(replaced)
    dropping = tiny("llama").get_decoder()
    dropping.config.attention_dropout = 0.1
    assert can_pack(dropping)
    assert not can_pack(dropping.train())


@pytest.mark.parametrize("kind", PACKED + OTHERS)
def test_states_equal_those_of_each_row_alone(kind: str) -> None:
    model = tiny(kind)
    expected, body = plain_states(model, BATCH), model.get_decoder()
    found = response_states(body, BATCH)
    assert found.isfinite().all()
    torch.testing.assert_close(found[real_BC(BATCH)], expected[real_BC(BATCH)], atol=NOISE, rtol=0)
    before = expected[:, :-1][BATCH.response_mask_BR.bool()]
    torch.testing.assert_close(predicting_states(body, BATCH), before, atol=NOISE, rtol=0)
    last = torch.tensor([len(response) for response in RESPONSES])
    torch.testing.assert_close(final_states(body, BATCH), expected[range(len(last)), last], atol=NOISE, rtol=0)
    everything = hidden_states(body, BATCH)[:, BATCH.prompt_width - 1 :]
    torch.testing.assert_close(everything[real_BC(BATCH)], expected[real_BC(BATCH)], atol=NOISE, rtol=0)


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.usefixtures("exact_norms")
def test_states_and_gradients_in_float64_equal_transformers_to_1e_10(kind: str) -> None:
    """The rows share prompts here and stand alone there, so this is also the proof of the shared prompt."""
    weights = torch.randn(BATCH.ids_BS.shape[0], max(map(len, RESPONSES)) + 1, 32, dtype=torch.float64)
    weights *= real_BC(BATCH)[..., None]
    states, gradients = [], []
    for packed in (True, False):
        model = tiny(kind).double()
        found = response_states(model.get_decoder(), BATCH) if packed else plain_states(model, BATCH, torch.float64)
        (found * weights).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        states.append(found.detach()[real_BC(BATCH)])
    torch.testing.assert_close(*states, atol=1e-10, rtol=0)
    assert gradients[0].keys() == gradients[1].keys()
    for name, one in gradients[0].items():
        two = gradients[1][name]
        assert (one is None) == (two is None), name
        if one is not None:
            torch.testing.assert_close(one, two, atol=1e-10, rtol=1e-9, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "grouped", "qwen3", "gpt2"])
def test_n04_gradients_on_or_off_give_the_same_bits(kind: str, checkpointing: bool) -> None:
    """Old and new log-probabilities come from the same path: a first ratio that is not exactly 1 would be a bug."""
    body = tiny(kind).get_decoder()
    with computing(ComputeMode(activation_checkpointing=checkpointing)):
        with_gradients = [f(body, BATCH) for f in (response_states, predicting_states, final_states)]
        with torch.no_grad():
            without = [f(body, BATCH) for f in (response_states, predicting_states, final_states)]
        with torch.inference_mode():
            inferred = [f(body, BATCH) for f in (response_states, predicting_states, final_states)]
    assert all(tensor.requires_grad for tensor in with_gradients)
    for one, two, three in zip(with_gradients, without, inferred, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_a_batch_knows_its_lengths_and_which_prompts_are_the_same() -> None:
    assert BATCH.shapes == RowShapes((4, 1, 2, 4, 9, 2, 4), (2, 5, 1, 4, 11, 3, 1), (0, 1, 2, 0, 4, 2, 0))


def wide_model() -> PreTrainedModel:
    """Wide enough that products go through oneDNN."""
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "initializer_range": 0.1}
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


WIDE = wide_model()
ROWS = st.lists(
    st.tuples(
        st.sampled_from([[5, 6, 7], [5, 6, 7], [8] * 9, [9], list(range(10, 35))]),
        st.lists(st.integers(2, VOCABULARY - 1), min_size=1, max_size=25),
    ),
    min_size=1,
    max_size=12,
)


def states_of_rows(rows: list[tuple[list[int], list[int]]], pad_id: int = PAD) -> list[Tensor]:
    prompts, responses = zip(*rows, strict=True)
    with torch.no_grad():
        found = response_states(WIDE.get_decoder(), collate(list(prompts), list(responses), pad_id))
    return [states[: len(response) + 1] for states, response in zip(found, responses, strict=True)]


@settings(max_examples=25, deadline=None)
@given(rows=ROWS, seed=st.integers(0, 99))
def test_n09_n10_padding_order_company_and_cuts_change_nothing_beyond_noise(
    rows: list[tuple[list[int], list[int]]], seed: int
) -> None:
    """Each row alone, in another order, cut into micro-batches, and under much more padding of either side."""
    together = states_of_rows(rows)
    alone = [states_of_rows([row])[0] for row in rows]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = states_of_rows([rows[place] for place in order])
    cuts = [part for part in (rows[: len(rows) // 2], rows[len(rows) // 2 :]) if part]
    halves = [states for part in cuts for states in states_of_rows(part)]
    padded = states_of_rows([*rows, ([3] * 40, [4] * 20)], pad_id=33)[: len(rows)]
    for row, expected in enumerate(alone):
        for found in (together[row], shuffled[order.index(row)], halves[row], padded[row]):
            torch.testing.assert_close(found, expected, atol=NOISE, rtol=0)


@settings(max_examples=25, deadline=None)
@given(rows=ROWS)
def test_a_layout_has_every_token_once_and_every_prompt_once(rows: list[tuple[list[int], list[int]]]) -> None:
    prompts, responses = zip(*rows, strict=True)
    batch = collate(list(prompts), list(responses), PAD)
    layout = layout_of(batch)
    ids_T = batch.ids_BS.flatten()[layout.source_T]
    assert len(ids_T) == sum(map(len, {tuple(prompt) for prompt in prompts})) + sum(map(len, responses))
    assert layout.groups[0].tokens[0] == 0
    assert layout.groups[-1].tokens[1] == len(ids_T)
    seen = []
    for group in layout.groups:
        assert len(group.reads) == group.rows * group.length
        first, end = group.tokens
        assert group.reads[group.takes].tolist() == list(range(first, end))
        assert torch.equal(group.reads[group.again_places], group.again)
        seen += [tuple(ids_T[row].tolist()) for row in group.reads.view(group.rows, group.length)]
    wanted = [tuple(prompt + response) for prompt, response in rows]
    for text in wanted:  # padding follows a row's own tokens
        assert any(row[: len(text)] == text for row in seen)
    final = layout.final()
    picked = final.wanted if final.pick is None else final.wanted[final.pick]
    assert ids_T[picked].tolist() == [response[-1] for response in responses]
    assert layout.positions_T[picked].tolist() == [len(text) - 1 for text in wanted]


def test_a_response_sees_its_prompt_and_itself_and_no_other_response() -> None:
    """Changing one of three responses to a prompt leaves the states of the others as they are."""
    rows = [([5, 6, 7], [8, 9]), ([5, 6, 7], [10, 11, 12]), ([5, 6, 7], [13])]
    before = states_of_rows(rows)
    after = states_of_rows([rows[0], ([5, 6, 7], [30, 31, 32]), rows[2]])
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert not torch.isclose(before[1][1:], after[1][1:]).all(-1).any()
    prompt = states_of_rows([([5, 6, 20], [8, 9]), ([5, 6, 20], [10, 11, 12]), ([5, 6, 20], [13])])
    assert not any(torch.isclose(one, two).all(-1).any() for one, two in zip(before, prompt, strict=True))


def test_empty_responses_have_the_state_of_their_prompt() -> None:
    batch = collate([[5, 6], [5, 6], [7]], [[], [], []], PAD)
    body = WIDE.get_decoder()
    assert response_states(body, batch).shape == (3, 1, 64)
    assert predicting_states(body, batch).shape == (0, 64)
    torch.testing.assert_close(final_states(body, batch), response_states(body, batch)[:, 0])


def test_adapters_work_in_the_packed_forward() -> None:
    """Adapters on some projections: those are called as they are, the others stay in their blocks."""
    model = wide_model()
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model.add_adapter(config)
    body = model.get_decoder()
    assert can_pack(body)
    found = response_states(body, BATCH)
    expected = plain_states(model, BATCH)
    torch.testing.assert_close(found[real_BC(BATCH)], expected[real_BC(BATCH)], atol=NOISE, rtol=0)
    assert not torch.allclose(found, response_states(WIDE.get_decoder(), BATCH), atol=1e-3)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    pull = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)) * real_BC(BATCH)[..., None]
    packed, plain = (torch.autograd.grad((states * pull).sum(), learning) for states in (found, expected))
    for one, two in zip(packed, plain, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5 * two.abs().max().item(), rtol=0)
