"""A language model as MLflow loads it: rows of prompts in, responses out. Logged as code, not pickled."""

from typing import Any

import mlflow
from mlflow.models import set_model

ROWS_AT_ONCE = 32


class PolicyWriter(mlflow.pyfunc.PythonModel):
    """Writes a response to each prompt."""

    def load_context(self, context: Any) -> None:
        """Load weights and tokenizer from the logged folder."""
        from rlhf_core.models.mixture import load_any_policy, tokenizer_folder
        from rlhf_core.models.tokenizer import load_tokenizer

        self.limits = context.model_config
        self.model = load_any_policy(context.artifacts["model"])
        self.tokenizer = load_tokenizer(tokenizer_folder(context.artifacts["model"]))

    def predict(
        self, context: Any, model_input: list[dict[str, str]], params: dict[str, Any] | None = None
    ) -> list[str]:
        """Write a response to each row's `prompt`, in order.

        `params`: temperature (0, the default, takes the likeliest token each time), max_new_tokens (by default what
        the model was trained with), seed (the same seed and rows give the same responses).
        """
        import torch

        from rlhf_core.models.policy import eos_token_ids
        from rlhf_core.models.tokenizer import decode_response, encode_prompts
        from rlhf_core.rollout.sampler import sample_responses

        defaults = {"temperature": 0.0, "max_new_tokens": self.limits["max_response_tokens"], "seed": 0}
        settings = defaults | (params or {})
        samples = sample_responses(
            self.model,
            encode_prompts(self.tokenizer, [row["prompt"] for row in model_input], self.limits["max_prompt_tokens"]),
            max_new_tokens=settings["max_new_tokens"],
            temperature=settings["temperature"],
            generator=torch.Generator().manual_seed(settings["seed"]),
            eos_ids=eos_token_ids(self.model, self.tokenizer),
            pad_id=self.tokenizer.pad_token_id,
            batch_size=ROWS_AT_ONCE,
        )
        return [decode_response(self.tokenizer, ids) for ids in samples.response_ids]


set_model(PolicyWriter())
