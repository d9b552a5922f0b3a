"""Prompts with tools are asked of a stranger as they are of us: with the schemas that its template writes."""

import pytest
from support.templates import TOOLS, WITH_TOOLS, tokenizer_of

from rlhf_core.text.chat import fix_template
from rlhf_core.text.transcripts import render_turns
from tasks.exporting.reference import _rows
from tasks.exporting.stranger import prompt_tokens


@pytest.mark.parametrize("family", ["Qwen3", "Llama 3"])
def test_a_stranger_makes_the_same_tokens_of_a_prompt_with_tools(family: str) -> None:
    tokenizer = tokenizer_of(family)
    fix_template(tokenizer, family)
    prompts = [render_turns(WITH_TOOLS[:4], TOOLS), render_turns(WITH_TOOLS[:2]), "How many?"]
    rows = _rows(tokenizer, prompts, 10_000)
    assert prompt_tokens(tokenizer, {"rows": rows}) == [row["ids"] for row in rows]
    assert "stock" in tokenizer.decode(rows[0]["ids"])
