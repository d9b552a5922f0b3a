"""The reward model as MLflow loads it: columns `prompt` and `response` in, scores out. Logged as code, not pickled."""

from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model

ROWS_AT_ONCE = 32


class RewardScorer(mlflow.pyfunc.PythonModel):
    """Scores responses; standardised so that 0 is the mean of the responses it was trained on and 1 their deviation."""

    def load_context(self, context: Any) -> None:
        """Load weights and tokenizer from the logged folder."""
        from rlhf_core.models.scoring.ensemble import load_reward_model, tokenizer_folder
        from rlhf_core.text.tokenizer import load_tokenizer

        self.limits = context.model_config
        self.model = load_reward_model(context.artifacts["model"])
        self.tokenizer = load_tokenizer(tokenizer_folder(context.artifacts["model"]))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[float]:
        """Score each row's `response` to its `prompt`, in order.

        Raises:
            MlflowException: a column or parameter is unknown or no text, or the chat template refuses a row.
        """
        import torch

        from rlhf_core.engine.batches import collate
        from rlhf_core.errors import DataError
        from rlhf_core.serving.rows import refuse_unknown, text_rows
        from rlhf_core.text.tokenizer import encode_prompts, encode_responses

        try:
            refuse_unknown(["prompt", "response"], {})
            rows = text_rows({name: model_input[name] for name in ("prompt", "response")}, may_be_empty=["response"])
            prompts = encode_prompts(self.tokenizer, [row["prompt"] for row in rows], self.limits["max_prompt_tokens"])
            responses = encode_responses(
                self.tokenizer, [row["response"] for row in rows], self.limits["max_response_tokens"]
            )
        except DataError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        scores: list[float] = []
        with torch.inference_mode():
            for start in range(0, len(rows), ROWS_AT_ONCE):
                some = slice(start, start + ROWS_AT_ONCE)
                scores += self.model(collate(prompts[some], responses[some], self.tokenizer.pad_token_id)).tolist()
        return scores


set_model(RewardScorer())
