"""Whether a model reads in one direction: what comes later in a text must change nothing that was said before it.

Everything here rests on it: a response's log-probabilities are read in one pass, and a sampled token was chosen by
what stood before it. An encoder with an output layer loads as readily as a decoder, and trains to a low loss by
copying what it should predict.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from rlhf_core.errors import ConfigError

LENGTH = 8
LEAST_CHANGE = 1e-4
"""Share of the outputs' own spread: rounding of float32 stays below 1e-5 of it, an encoder's change is above 1e-2."""
SMALL_VOCABULARY = 64
LAYERS = 2
TRIED_WHOLE = 50_000_000  # parameters: some seconds


def check_direction(model: PreTrainedModel, place: str) -> None:
    """Hold that later tokens change no earlier logit (or state, for a model without output layer).

    One pass over two rows that are the same in their first half.

    Args:
        model: in evaluation mode.
        place: named where it is refused.

    Raises:
        ConfigError: they do, or there are numbers that are not finite.
    """
    outputs_2SV = _outputs(model, _two_rows(model))
    first_half_2SV = outputs_2SV[:, : LENGTH // 2]
    if not outputs_2SV.isfinite().all() or not _angles_are_finite(model):
        raise ConfigError(
            f"{place}: {type(model).__name__}: its configuration makes numbers that are not finite (epsilons, rotary "
            "positions). Fix: copy config.json again"
        )
    change = (first_half_2SV[0] - first_half_2SV[1]).abs().max()
    spread = outputs_2SV.std()
    if change > LEAST_CHANGE * spread:
        raise ConfigError(
            f"{place}: {type(model).__name__}: what it says of a text's first tokens changes with the tokens after "
            f"them (by {change / spread:.1e} of its spread): it reads in both directions. Fix: a decoder; where this "
            "is one, its configuration must say so (is_decoder: true)"
        )


def check_direction_of(outline: PreTrainedModel, auto_class: Any, place: str) -> None:
    """`check_direction` of an architecture, with random weights: its first layers with a small vocabulary.

    One that cannot be made smaller in this way is tried as it is; of a large one nothing is said then, and the loaded
    model is asked.

    Args:
        outline: the model, without numbers.
        auto_class: `AutoModelForCausalLM` or `AutoModel`.
        place: named where it is refused.

    Raises:
        ConfigError: see `check_direction`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _built(auto_class, _smaller(outline.config))
        if model is None and outline.num_parameters() <= TRIED_WHOLE:
            model = _built(auto_class, copy.deepcopy(outline.config))
    if model is not None:
        check_direction(model, place)


def _built(auto_class: Any, config: PretrainedConfig | None) -> PreTrainedModel | None:
    """A model with random weights that answers; None where the configuration makes none."""
    if config is None:
        return None
    try:
        model: PreTrainedModel = auto_class.from_config(config, dtype=torch.float32).eval()
        _outputs(model, _two_rows(model))
    except Exception:  # whatever an architecture makes of numbers that it was not made for
        return None
    return model


def _two_rows(model: PreTrainedModel) -> Tensor:
    """ids_2S: any tokens but those with a meaning of their own."""
    config = model.config
    meaning = {getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")}
    rows = model.get_input_embeddings().weight.shape[0]
    free = [token for token in range(min(rows, 8 * LENGTH)) if token not in meaning]
    first = [free[place % len(free)] for place in range(LENGTH)]
    second = first[: LENGTH // 2] + [free[(place + LENGTH) % len(free)] for place in range(LENGTH // 2)]
    return torch.tensor([first, second], device=model.device)


def _angles_are_finite(model: PreTrainedModel) -> bool:
    """Whether rotary positions are; attention kernels may hide where they are not."""
    return all(angles.isfinite().all() for name, angles in model.named_buffers() if name.endswith("inv_freq"))


@torch.no_grad()
def _outputs(model: PreTrainedModel, ids_2S: Tensor) -> Tensor:
    said = model(input_ids=ids_2S, use_cache=False)
    logits = getattr(said, "logits", None)
    return (said.last_hidden_state if logits is None else logits).float()


def _smaller(config: PretrainedConfig) -> PretrainedConfig | None:
    """The configuration with a small vocabulary and its first layers: two, or as many as show every type of layer.

    None where the configuration does not let itself be changed.
    """
    small, layers = copy.deepcopy(config), LAYERS
    try:
        small.vocab_size = SMALL_VOCABULARY
        for number, name in enumerate(("pad", "bos", "eos")):
            if getattr(small, f"{name}_token_id", None) is not None:
                setattr(small, f"{name}_token_id", number)
        if kinds := getattr(small, "layer_types", None):
            layers = max(LAYERS, *(kinds.index(kind) + 1 for kind in set(kinds)))
            small.layer_types = kinds[:layers]
        small.num_hidden_layers = min(layers, small.num_hidden_layers)
    except AttributeError:
        return None
    return small
