"""A language model as MLflow loads it: a table with `prompt` in, responses out. Logged as code, not pickled."""

from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model

ROWS_AT_ONCE = 32
LARGEST_SEED = 2**63 - 1


class PolicyWriter(mlflow.pyfunc.PythonModel):
    """Writes a response to each prompt."""

    def load_context(self, context: Any) -> None:
        """Load weights and tokenizer from the logged folder."""
        from rlhf_core.models.mixture import load_any_policy, tokenizer_folder
        from rlhf_core.text.tokenizer import load_tokenizer

        self.limits = context.model_config
        self.model = load_any_policy(context.artifacts["model"])
        self.tokenizer = load_tokenizer(tokenizer_folder(context.artifacts["model"]))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[str]:
        """Write a response to each row's `prompt`, in order.

        `params`: temperature (0, the default, takes the likeliest token each time), max_new_tokens (by default what
        the model was trained with), seed (the same seed and rows give the same responses).

        Raises:
            MlflowException: a column or parameter is unknown, out of bounds or no text, or the chat template refuses a
                prompt.
        """
        import torch

        from rlhf_core.errors import DataError
        from rlhf_core.rollout.sampler import Sampling, sample_responses
        from rlhf_core.serving.rows import refuse_unknown, text_rows, within
        from rlhf_core.text.tokenizer import decode_response, encode_prompts

        limit = self.limits["max_response_tokens"]
        settings = {"temperature": 0.0, "max_new_tokens": limit, "seed": 0} | (params or {})
        try:
            refuse_unknown(["prompt"], settings)
            rows = text_rows({"prompt": model_input["prompt"]})
            longest = within(settings, "max_new_tokens", 1, self._room())
            temperature = within(settings, "temperature", 0.0)
            generator = torch.Generator().manual_seed(within(settings, "seed", 0, LARGEST_SEED))
            prompts = encode_prompts(self.tokenizer, [row["prompt"] for row in rows], self.limits["max_prompt_tokens"])
        except DataError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        samples = sample_responses(
            self.model,
            prompts,
            Sampling.of(self.model, self.tokenizer, longest),
            temperature=temperature,
            generator=generator,
            batch_size=ROWS_AT_ONCE,
        )
        return [decode_response(self.tokenizer, ids) for ids in samples.response_ids]

    def _room(self) -> int | None:
        """Tokens that the model's positions leave for a response; None where it has no such bound."""
        config = getattr(self.model, "config", None)
        places = getattr(config, "max_position_embeddings", None)
        return None if places is None else int(places) - int(self.limits["max_prompt_tokens"])


set_model(PolicyWriter())
