"""TRL's side of the PPO benchmark: `trl.experimental.ppo` of TRL 1.12, which later versions do not have.

Unpack it beside the installed TRL and say where (see `python -m benchmarks --help`):

    pip download trl==1.12.0 --no-deps --dest trl-1.12 && unzip -q trl-1.12/*.whl -d trl-1.12
    export BENCHMARK_TRL_PPO=trl-1.12
"""

import os
import sys
import tempfile
from typing import Any

os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1", WANDB_DISABLED="true")
os.environ.update(TRL_EXPERIMENTAL_SILENCE="1")

import torch

from benchmarks.clock import Clock
from benchmarks.rollouts import EPOCHS, MINIBATCHES, NEW_TOKENS, RATE, load, make_prompts
from benchmarks.worker import TRL_PPO, Setting

if TRL_PPO in os.environ:
    sys.path.insert(0, os.environ[TRL_PPO])


def fixed(setting: Setting, clock: Clock) -> dict[str, Any]:
    """Whole rollouts; no response ends."""
    return _ppo(setting, clock, ends=False)


def ending(setting: Setting, clock: Clock) -> dict[str, Any]:
    """The same where responses end by themselves."""
    return _ppo(setting, clock, ends=True)


def _ppo(setting: Setting, clock: Clock, *, ends: bool) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    subject, many = setting.subject, setting.responses
    folder, end = subject.folder, subject.end
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    policy, reference = (load(subject, ends=ends) for _ in range(2))
    scorer, value = (AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1) for _ in range(2))
    steps = setting.num_steps
    prompts = make_prompts(steps * many, subject, setting.seed)
    seen = {"tokens": 0, "lengths": 0.0}
    batch_generation = ppo_trainer.batch_generation

    def counted(model: Any, queries: torch.Tensor, *args: Any) -> Any:
        written, logits = batch_generation(model, queries, *args)
        responses = written[:, queries.shape[1] :]
        lengths = [row.index(end) + 1 if ends and end in row else len(row) for row in responses.tolist()]
        seen.update(tokens=int((queries != subject.pad).sum()) + sum(lengths), lengths=sum(lengths) / len(lengths))
        return written, logits

    class Ticks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick(int(seen["tokens"]))

    ppo_trainer.batch_generation = counted
    with tempfile.TemporaryDirectory() as output:
        arguments = PPOConfig(
            output_dir=output,
            total_episodes=steps * many,
            # one gradient step a minibatch: with accumulation in its place TRL would take one a rollout and epoch
            per_device_train_batch_size=many,
            gradient_accumulation_steps=1,
            num_mini_batches=MINIBATCHES,
            num_ppo_epochs=EPOCHS,
            local_rollout_forward_batch_size=many,
            response_length=NEW_TOKENS,
            stop_token="eos" if ends else None,
            temperature=1.0,
            learning_rate=RATE,
            num_sample_generations=0,
            bf16=setting.device != "cpu",
            gradient_checkpointing=False,
            use_cpu=setting.device == "cpu",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            seed=setting.seed,
        )
        rows = Dataset.from_dict({"input_ids": prompts})
        trainer = PPOTrainer(
            args=arguments, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=scorer,
            value_model=value, train_dataset=rows, eval_dataset=rows.select(range(many)), callbacks=[Ticks()],
        )  # fmt: skip
        clock.begin()
        trainer.train()
    return {"response_tokens": seen["lengths"]}
