"""A language model as MLflow loads it: rows of prompts in, responses out. Logged as code, not pickled."""

from typing import Any

import mlflow
from mlflow.models import set_model

ROWS_AT_ONCE = 32
DEFAULTS = {"temperature": 0.0, "max_new_tokens": 64, "seed": 0}


class PolicyWriter(mlflow.pyfunc.PythonModel):
    """Writes a response to each prompt."""

    def load_context(self, context: Any) -> None:
        """Load weights and tokenizer from the logged folder."""
        from transformers import AutoTokenizer

        from rlhf_core.models.policy import load_policy

        folder = context.artifacts["model"]
        self.model = load_policy(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def predict(
        self, context: Any, model_input: list[dict[str, str]], params: dict[str, Any] | None = None
    ) -> list[str]:
        """Write a response to each row's `prompt`, in order.

        `params`: temperature (0 is greedy), max_new_tokens, seed (the same seed and rows give the same responses).
        """
        import torch
        from rlhf_core.rollout.sampler import sample_responses

        from rlhf_core.models.tokenizer import decode_response, encode_prompt

        settings = DEFAULTS | (params or {})
        room = self.model.config.max_position_embeddings - settings["max_new_tokens"]
        samples = sample_responses(
            self.model,
            [encode_prompt(self.tokenizer, row["prompt"], room) for row in model_input],
            max_new_tokens=settings["max_new_tokens"],
            temperature=settings["temperature"],
            generator=torch.Generator().manual_seed(settings["seed"]),
            eos_ids=[self.tokenizer.eos_token_id],
            pad_id=self.tokenizer.pad_token_id,
            batch_size=ROWS_AT_ONCE,
        )
        return [decode_response(self.tokenizer, ids) for ids in samples.response_ids]


set_model(PolicyWriter())
