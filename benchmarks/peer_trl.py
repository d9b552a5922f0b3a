"""TRL's side of the benchmarks, with the settings that are its best on a CPU.

They are not its defaults: float32, no gradient checkpointing, rows grouped by length, the reference's
log-probabilities computed beforehand. On a GPU the same, with matrix products in bfloat16.
"""

import os
import tempfile
from typing import Any

os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1", WANDB_DISABLED="true")

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from benchmarks.clock import Clock
from benchmarks.worker import Setting
from benchmarks.workload import Subject, make_pairs

RATE, RANK = 1e-4, 16  # of ours too


class _Ticks(TrainerCallback):
    """Tells the clock when training begins and of each step's tokens."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.tokens = clock, 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.clock.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.tick(self.tokens)


def _arguments(setting: Setting, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "max_steps": setting.steps + setting.warmup,
        "per_device_train_batch_size": setting.rows,
        "learning_rate": RATE,
        "bf16": setting.device != "cpu",
        "gradient_checkpointing": False,
        "use_cpu": setting.device == "cpu",
        "train_sampling_strategy": "group_by_length",
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "seed": setting.seed,
    }


def _train(
    trainer_class: type, setting: Setting, clock: Clock, arguments: Any, model: Any, rows: Dataset, **more: Any
) -> None:
    class Counted(trainer_class):  # type: ignore[misc]
        """The trainer, counting the tokens of the step at hand."""

        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
            ticks.tokens = int(inputs["attention_mask"].sum())
            return super().training_step(model, inputs, *args, **kwargs)

    ticks = _Ticks(clock)
    tokenizer = AutoTokenizer.from_pretrained(setting.subject.folder)
    trainer = Counted(
        model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[ticks], **more
    )
    trainer.train()


def as_text(subject: Subject, ids: list[int]) -> str:
    """Words that the subject's tokenizer reads as these tokens: `DPOTrainer` takes no tokens."""
    text = AutoTokenizer.from_pretrained(subject.folder).decode(ids)
    return text if text.startswith(" ") else f" {text}"


def _load(auto_class: Any, setting: Setting, **more: Any) -> Any:
    return auto_class.from_pretrained(setting.subject.folder, dtype=torch.float32, attn_implementation="sdpa", **more)


def sft(setting: Setting, clock: Clock) -> dict[str, Any]:
    """`SFTTrainer` on completions only."""
    return _sft(setting, clock)


def sft_lora(setting: Setting, clock: Clock) -> dict[str, Any]:
    """The same with peft's adapters on all linear layers."""
    from peft import LoraConfig

    return _sft(setting, clock, peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))


def _sft(setting: Setting, clock: Clock, **more: Any) -> dict[str, Any]:
    pairs = make_pairs(setting.num_rows, setting.subject, setting.seed)
    rows = Dataset.from_list(
        [
            {
                "input_ids": pair.prompt + pair.chosen,
                "completion_mask": [0] * len(pair.prompt) + [1] * len(pair.chosen),
            }
            for pair in pairs
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(**_arguments(setting, folder), completion_only_loss=True)
        _train(SFTTrainer, setting, clock, arguments, _load(AutoModelForCausalLM, setting), rows, **more)
    return {}


def reward(setting: Setting, clock: Clock) -> dict[str, Any]:
    """`RewardTrainer`."""
    pairs = make_pairs(setting.num_rows, setting.subject, setting.seed)
    rows = Dataset.from_list(
        [
            {
                "chosen_ids": pair.prompt + pair.chosen,
                "rejected_ids": pair.prompt + pair.rejected,
                "length": len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)),
            }
            for pair in pairs
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = RewardConfig(**_arguments(setting, folder), remove_unused_columns=False)
        model = _load(AutoModelForSequenceClassification, setting, num_labels=1)
        _train(RewardTrainer, setting, clock, arguments, model, rows)
    return {}


def dpo(setting: Setting, clock: Clock) -> dict[str, Any]:
    """`DPOTrainer` with reference log-probabilities computed before training, which the clock does not count."""
    pairs = make_pairs(setting.num_rows, setting.subject, setting.seed)
    rows = Dataset.from_list(
        [
            {
                "prompt": as_text(setting.subject, pair.prompt),
                "chosen": as_text(setting.subject, pair.chosen),
                "rejected": as_text(setting.subject, pair.rejected),
                "length": len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)),
            }
            for pair in pairs
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = folder
        arguments = DPOConfig(**_arguments(setting, folder), remove_unused_columns=False, precompute_ref_log_probs=True)
        _train(DPOTrainer, setting, clock, arguments, _load(AutoModelForCausalLM, setting), rows)
    return {}
