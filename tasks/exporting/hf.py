"""A policy as plain `transformers` reads it: the files of the registered version as they are, without adapters."""

import shutil
from pathlib import Path

from rlhf_core.errors import ConfigError
from rlhf_core.models.mixture import is_mixture
from tasks.exporting.form import Source, WrittenForm

NEUTRAL = frozenset({
    "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config", "use_cache",
    "output_attentions", "output_hidden_states", "output_logits", "output_scores", "return_dict_in_generate",
})  # fmt: skip
"""Keys of a generation configuration that change nothing of what is written greedily or drawn."""


def write_hf(source: Source, folder: Path) -> WrittenForm:
    """Copy the files of the version: they are what `save_pretrained` wrote."""
    for path in sorted(source.subject.folder.iterdir()):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    return WrittenForm(limits=generation_limits(source), loading=_loading(source))


def refuse_mixture(folder: Path, reference: str) -> None:
    """Refuse what is no single model.

    Raises:
        ConfigError: the version mixes the probabilities of several.
    """
    if is_mixture(folder):
        raise ConfigError(
            f"{reference}: mixes the next-token probabilities of several policies, which no other tool does. "
            "Fix: export its members, or a version of combine@weights"
        )


def generation_limits(source: Source) -> tuple[str, ...]:
    """What the folder's own generation settings change, of which neither training nor evaluation knew."""
    config = source.model.generation_config
    more = sorted(set(config.to_diff_dict()) - NEUTRAL) if config else []
    if not more:
        return ()
    return (
        f"`generation_config.json` sets {', '.join(more)}, as the pretrained model had it; figures and check are "
        "without",
    )


def _loading(source: Source) -> str:
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
{prompt_lines(source)}
written = model.generate(**inputs, do_sample=False, max_new_tokens={source.subject.limit("max_response_tokens")})
print(tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""


def prompt_lines(source: Source) -> str:
    """Lines of Python that make `inputs` of a prompt."""
    if source.tokenizer.chat_template is None:
        return 'inputs = tokenizer("…", return_tensors="pt")  # the prompt as in the training data'
    return (
        'turns = [{"role": "user", "content": "…"}]\n'
        "inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, "
        'return_tensors="pt")'
    )
