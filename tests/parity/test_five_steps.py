"""The same five training steps in TRL 1.16 and here: same model, data, order and optimiser give the same losses.

TRL's trainers run as a user would run them, on a tiny Llama in float32, over the rows in the order in which ours come.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import trl as trl_support  # noqa: F401  (skips this module where TRL is missing)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from rlhf_core.config import DPOConfig, RewardConfig, SFTConfig
from rlhf_core.data.batching.examples import Example
from rlhf_core.data.batching.pairs import PreferenceGroup, group_batches
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.state.rng import StepRng
from rlhf_core.state.run_context import RunContext
from rlhf_core.state.train_state import TrainState
from rlhf_core.trainers.optimisation import make_optimizer
from rlhf_core.trainers.preference.trainer import train_dpo
from rlhf_core.trainers.reward import plan as reward_plan
from rlhf_core.trainers.reward.trainer import train_reward
from rlhf_core.trainers.sft import epoch_batches, train_sft

pytestmark = pytest.mark.parity

PAD, END, VOCABULARY = 0, 1, 40
STEPS, ROWS, RATE, DECAY = 5, 4, 3e-3, 0.02
PLAIN: dict[str, Any] = {"learning_rate": RATE, "warmup_steps": 0, "min_learning_rate_share": 1.0}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    names = ["<pad>", "<end>", *(f"w{number}" for number in range(2, VOCABULARY))]
    plain = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token="<pad>"))
    plain.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<end>")


@pytest.fixture(scope="module")
def built() -> LlamaForCausalLM:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.2,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def groups() -> list[PreferenceGroup]:
    """Pairs of random tokens, every response with its end token, lengths of all kinds."""
    generator = torch.Generator().manual_seed(11)

    def words(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()

    return [
        PreferenceGroup(prompt=words(2, 9), responses=[[*words(1, 12), END], [*words(1, 12), END]], pairs=[(0, 1)])
        for _ in range(STEPS * ROWS)
    ]


def ours(train: Any, name: str, module: torch.nn.Module, *given: Any) -> list[float]:
    """Losses of our trainer's steps."""
    state = TrainState(modules={name: module}, optimizers={name: make_optimizer(module, RATE, DECAY)})
    train(*given[:1], state, *given[1:], RunContext(seed=5, pad_id=PAD))
    return [row["loss/train"] for row in state.history]


def theirs(trainer: type, arguments: type, folder: Path, rows: list[dict[str, Any]], **more: Any) -> list[float]:
    """Losses of TRL's trainer, step by step and unrounded, over the rows in the order given."""
    from datasets import Dataset

    losses = []

    class Noted(trainer):  # type: ignore[misc]
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.item())
            return loss

    settings = more.pop("settings", {})
    args = arguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=DECAY,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    Noted(args=args, train_dataset=Dataset.from_list(rows), **more).train()
    return losses


def assert_same(first: Sequence[float], second: Sequence[float]) -> None:
    assert len(first) == len(second) == STEPS
    assert first == pytest.approx(second, abs=2e-5)
    assert max(first) - min(first) > 1e-2, "losses that hardly move would agree whatever the steps do"


def text(ids: list[int]) -> str:
    """Words that the tokenizer reads as these tokens; TRL adds the end token of a response itself."""
    return " ".join(f"w{token}" for token in ids if token != END)


def test_supervised_fine_tuning(built: Any, tokenizer: Any, groups: list[PreferenceGroup], tmp_path: Path) -> None:
    from trl import SFTConfig as TRLConfig
    from trl import SFTTrainer

    cfg = SFTConfig(max_steps=STEPS, batch_size=ROWS, max_grad_norm=1.0, **PLAIN)
    examples = [Example(group.prompt, group.responses[0]) for group in groups]
    order = [row for batch in epoch_batches(cfg, examples, 5, 0) for row in batch]
    rows = [
        {
            "input_ids": examples[i].prompt + examples[i].response,
            "completion_mask": [0] * len(examples[i].prompt) + [1] * len(examples[i].response),
        }
        for i in order
    ]
    trls = theirs(
        SFTTrainer,
        TRLConfig,
        tmp_path,
        rows,
        model=copy.deepcopy(built),
        processing_class=tokenizer,
        settings={"completion_only_loss": True},
    )
    assert_same(ours(train_sft, "policy", copy.deepcopy(built), cfg, examples, []), trls)


def test_reward_model(built: Any, tokenizer: Any, groups: list[PreferenceGroup], tmp_path: Path) -> None:
    """With centering as TRL defines it. TRL's head has no bias, so ours is held at 0."""
    from trl import RewardConfig as TRLConfig
    from trl import RewardTrainer

    cfg = RewardConfig(head="last", epochs=1, prompts_per_step=ROWS, centering=0.05, loss={"center": "pairs"}, **PLAIN)
    model = RewardModel.from_policy(built, "last", seed=2)
    (phase,) = reward_plan.phases(cfg, len(groups), 5)
    order = [row for batch in reward_plan.epoch_batches(cfg, groups, phase, 5, 0) for row in batch]
    built.save_pretrained(tmp_path / "model")
    classifier = LlamaForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=1)
    weight, bias = (dict(model.head.named_parameters())[name] for name in ("scalar.weight", "scalar.bias"))
    bias.requires_grad_(False)
    with torch.no_grad():
        classifier.score.weight.copy_(weight)
    rows = [
        {
            "chosen_ids": groups[i].prompt + groups[i].responses[0],
            "rejected_ids": groups[i].prompt + groups[i].responses[1],
        }
        for i in order
    ]
    settings = {"center_rewards_coefficient": 0.05}
    trls = theirs(
        RewardTrainer, TRLConfig, tmp_path, rows, model=classifier, processing_class=tokenizer, settings=settings
    )
    assert_same(ours(train_reward, "reward", model, cfg, groups), trls)


@pytest.mark.parametrize(("loss", "trl_loss"), [("sigmoid", "sigmoid"), ("ipo", "ipo")])
def test_direct_preference_optimisation(
    built: Any, tokenizer: Any, groups: list[PreferenceGroup], tmp_path: Path, loss: Any, trl_loss: str
) -> None:
    from trl import DPOConfig as TRLConfig
    from trl import DPOTrainer

    cfg = DPOConfig(loss=loss, beta=0.2, epochs=1, prompts_per_step=ROWS, **PLAIN)
    batches = group_batches(groups, ROWS, StepRng(5, "dpo")("groups"))
    places = torch.randperm(len(batches), generator=StepRng(5, "dpo", 0)("order")).tolist()
    rows = [
        {
            "prompt": text(groups[i].prompt),
            "chosen": " " + text(groups[i].responses[0]),
            "rejected": " " + text(groups[i].responses[1]),
        }
        for place in places
        for i in batches[place]
    ]
    settings = {"beta": 0.2, "loss_type": [trl_loss]}
    trls = theirs(
        DPOTrainer,
        TRLConfig,
        tmp_path,
        rows,
        model=copy.deepcopy(built),
        ref_model=copy.deepcopy(built),
        processing_class=tokenizer,
        settings=settings,
    )
    assert_same(ours(train_dpo, "policy", copy.deepcopy(built), cfg, copy.deepcopy(built), groups), trls)
