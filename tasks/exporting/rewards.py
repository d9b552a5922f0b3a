"""A reward model as `AutoModelForSequenceClassification` reads it, and both asked for the same scores."""

from pathlib import Path

from rlhf_core.errors import ConfigError, DataError
from rlhf_core.models.scoring.classifier import dialogue, export_classifier, our_scores, why_not_classifier
from rlhf_core.models.scoring.ensemble import load_reward_model
from rlhf_core.text.tokenizer import encode_whole_responses, load_tokenizer
from rlhf_core.text.transcripts import conversation
from tasks.exporting.form import Made, Order, WrittenForm
from tasks.exporting.parity import check_scores

UNCUT = 2**31

LOADING = """```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
turns = [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]
text = tokenizer.apply_chat_template(turns, tokenize=False)
inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
score = model(**inputs).logits[0, 0] + getattr(model.config, "score_shift", 0.0)
```"""


def classifier_of(order: Order, folder: Path) -> Made:
    """Write the reward model of a version as a plain sequence classifier.

    Raises:
        ConfigError: its scores are not those of any such class.
    """
    subject = order.subject
    model, tokenizer = load_reward_model(subject.folder), load_tokenizer(subject.folder)
    if why := why_not_classifier(model, tokenizer):
        raise ConfigError(
            f"{subject.reference}: no sequence classifier has its scores: {why}. Fix: train with reward.head: last and "
            "one member, or read it with rlhf_core"
        )
    whole = encode_whole_responses(tokenizer, [response for _, response in order.texts], UNCUT)
    rows = [
        (prompt, response)  # messages alone, in which a stranger gives its scores, hold no schemas of tools
        for (prompt, response), ids in zip(order.texts, whole, strict=True)
        if ids is not None and not conversation(prompt).tools
    ]
    if not rows:
        raise DataError(
            f"{subject.reference}: its template writes no held-out response whole to a prompt without tools. "
            "Fix: --prompts FILE"
        )
    found = export_classifier(model, tokenizer, folder, rows)
    order.tell(f"{subject.reference} scores {len(rows)} held-out responses, and so does a process without this project")
    ours = our_scores(model.double(), tokenizer, rows)
    parity = check_scores(ours, [dialogue(tokenizer, *row) for row in rows], str(folder))
    limits = (
        f"the score is the class's output plus `score_shift` of `config.json` ({found.shift:.6g}), the same for every "
        "text, which the class has no place for",
        'a pipeline needs `function_to_apply="none"`: the score is no probability',
    )
    return Made(WrittenForm(limits=limits if found.shift else limits[1:], loading=LOADING), parity)
