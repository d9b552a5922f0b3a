"""The reward model as MLflow loads it: rows of prompt and response in, scores out. Logged as code, not pickled."""

from typing import Any

import mlflow
from mlflow.models import set_model

ROWS_AT_ONCE = 32
LONGEST_PROMPT_TOKENS = 2048  # rows that the model's own limit cuts are cut there


class RewardScorer(mlflow.pyfunc.PythonModel):
    """Scores responses; standardised so that 0 is the training data's mean and 1 its standard deviation."""

    def load_context(self, context: Any) -> None:
        """Load weights and tokenizer from the logged folder."""
        from transformers import AutoTokenizer

        from rlhf_core.models.reward import RewardModel

        folder = context.artifacts["model"]
        self.model = RewardModel.load(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def predict(
        self, context: Any, model_input: list[dict[str, str]], params: dict[str, Any] | None = None
    ) -> list[float]:
        """Score each row's `response` to its `prompt`, in order."""
        import torch

        from rlhf_core.data.batches import collate
        from rlhf_core.models.tokenizer import encode_prompt, encode_response

        scores: list[float] = []
        for start in range(0, len(model_input), ROWS_AT_ONCE):
            rows = model_input[start : start + ROWS_AT_ONCE]
            prompts = [encode_prompt(self.tokenizer, row["prompt"], LONGEST_PROMPT_TOKENS) for row in rows]
            responses = [encode_response(self.tokenizer, row["response"], LONGEST_PROMPT_TOKENS) for row in rows]
            with torch.no_grad():
                scores += self.model(collate(prompts, responses, self.tokenizer.pad_token_id)).tolist()
        return scores


set_model(RewardScorer())
