"""The reward model as MLflow loads it: rows of prompt and response in, scores out. Logged as code, not pickled."""

from typing import Any

import mlflow
from mlflow.models import set_model

ROWS_AT_ONCE = 32


class RewardScorer(mlflow.pyfunc.PythonModel):
    """Scores responses; standardised so that 0 is the mean of the responses it was trained on and 1 their deviation."""

    def load_context(self, context: Any) -> None:
        """Load weights and tokenizer from the logged folder."""
        from rlhf_core.models.reward_ensemble import load_reward_model, tokenizer_folder
        from rlhf_core.models.tokenizer import load_tokenizer

        self.limits = context.model_config
        self.model = load_reward_model(context.artifacts["model"])
        self.tokenizer = load_tokenizer(tokenizer_folder(context.artifacts["model"]))

    def predict(
        self, context: Any, model_input: list[dict[str, str]], params: dict[str, Any] | None = None
    ) -> list[float]:
        """Score each row's `response` to its `prompt`, in order."""
        import torch

        from rlhf_core.data.batches import collate
        from rlhf_core.models.tokenizer import encode_prompts, encode_responses

        prompts = encode_prompts(
            self.tokenizer, [row["prompt"] for row in model_input], self.limits["max_prompt_tokens"]
        )
        responses = encode_responses(
            self.tokenizer, [row["response"] for row in model_input], self.limits["max_response_tokens"]
        )
        scores: list[float] = []
        with torch.inference_mode():
            for start in range(0, len(model_input), ROWS_AT_ONCE):
                rows = slice(start, start + ROWS_AT_ONCE)
                scores += self.model(collate(prompts[rows], responses[rows], self.tokenizer.pad_token_id)).tolist()
        return scores


set_model(RewardScorer())
