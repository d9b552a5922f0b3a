"""Chat templates in the form of six families of models, small, and the dialogues that they are tried on.

What matters for prompts and masks is kept of each: where the system's turn goes, what becomes of thoughts, of tools,
calls and answers, what ends a reply. Around what the assistant writes stand the `generation` tags of transformers.
"""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from support.tokenizer import byte_level

# ChatML. Tools in the system's turn, calls and answers in tags, answers in a turn of the user's; thoughts of replies
# before the last question are dropped, and the last reply has a thought, if an empty one.
QWEN3 = """
{%- if tools %}{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- '# Tools\\n<tools>' }}{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- set asked = namespace(last=-1) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{%- set asked.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{%- set thought = '' %}{%- set said = message.content or '' %}
{%- if '</think>' in said %}
{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set said = said.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{{- '<|im_start|>assistant\\n' }}{%- generation %}
{%- if loop.index0 > asked.last and (loop.last or thought) %}
{{- '<think>\\n' + thought + '\\n</think>\\n\\n' + said }}{%- else %}{{- said }}{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- ('\\n' if said or not loop.first else '') + '<tool_call>\\n' }}
{{- '{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}
{%- elif message.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# The system's turn is the beginning of the first question; roles must alternate, so that tools are refused.
GEMMA3 = """
{{- bos_token }}
{%- set before = '' %}{%- set turns = messages %}
{%- if messages[0].role == 'system' %}
{%- set before = messages[0].content + '\\n\\n' %}{%- set turns = messages[1:] %}{%- endif %}
{%- for message in turns %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif %}
{%- if message.role == 'assistant' %}{{- '<start_of_turn>model\\n' }}
{%- generation %}{{- message.content | trim }}{{- '<end_of_turn>' }}{%- endgeneration %}{{- '\\n' }}
{%- else %}
{{- '<start_of_turn>user\\n' + (before if loop.first else '') + (message.content | trim) + '<end_of_turn>\\n' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

# The date in a system's turn that is always there; tools before the first question; one call a turn, and nothing said
# beside it; answers as JSON.
LLAMA3 = """
{{- bos_token }}
{%- set before = '' %}
{%- if messages[0]['role'] == 'system' %}
{%- set before = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + strftime_now('%d %b %Y') + '\\n\\n' + before }}
{{- '<|eot_id|>' }}
{%- if tools %}
{{- '<|start_header_id|>user<|end_header_id|>\\n\\nGiven the following functions, respond with JSON.\\n\\n' }}
{%- for tool in tools %}{{- (tool | tojson(indent=4)) + '\\n\\n' }}{%- endfor %}
{{- (messages[0]['content'] | trim) + '<|eot_id|>' }}{%- set messages = messages[1:] %}{%- endif %}
{%- for message in messages %}
{%- if 'tool_calls' in message %}
{%- if message.tool_calls | length != 1 %}
{{- raise_exception('This model only supports single tool-calls at once!') }}{%- endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- generation %}
{{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}<|eot_id|>' }}{%- endgeneration %}
{%- elif message.role == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (message.content | tojson) + '<|eot_id|>' }}
{%- elif message.role == 'assistant' %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- generation %}{{- (message.content | trim) + '<|eot_id|>' }}{%- endgeneration %}
{%- else %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + (message.content | trim) + '<|eot_id|>' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

# Turns of other roles than these three are left out without a word, tools and calls too; one more token at the end.
PHI3 = """
{%- for message in messages %}
{%- if message['role'] == 'system' %}{{- '<|system|>\\n' + message['content'] + '<|end|>\\n' }}
{%- elif message['role'] == 'user' %}{{- '<|user|>\\n' + message['content'] + '<|end|>\\n' }}
{%- elif message['role'] == 'assistant' %}{{- '<|assistant|>\\n' }}
{%- generation %}{{- message['content'] + '<|end|>' }}{%- endgeneration %}{{- '\\n' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}"""

# Names of roles are plain text, a reply ends with the end token; tools are left out without a word.
OLMO2 = """
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'system' %}{{- '<|system|>\\n' + message['content'] + '\\n' }}
{%- elif message['role'] == 'user' %}{{- '<|user|>\\n' + message['content'] + '\\n' }}
{%- elif message['role'] == 'assistant' %}{{- '<|assistant|>\\n' }}
{%- generation %}{{- message['content'] + eos_token }}{%- endgeneration %}
{%- if not loop.last %}{{- '\\n' }}{%- endif %}
{%- endif %}
{%- if loop.last and add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}
{%- endfor %}"""

# A system's turn with the date and a switch for thoughts, which is taken out of what the system says; answers of tools
# in a turn of the user's, calls left out without a word.
SMOLLM3 = """
{%- set mode = '/think' %}{%- set before = '' %}
{%- if messages[0].role == 'system' %}
{%- if '/no_think' in messages[0].content %}{%- set mode = '/no_think' %}{%- endif %}
{%- set before = messages[0].content.replace('/no_think', '').replace('/think', '').rstrip() %}{%- endif %}
{{- '<|im_start|>system\\nToday Date: ' + strftime_now('%d %B %Y') + '\\nReasoning Mode: ' + mode + '\\n\\n' }}
{{- (before or 'You are a helpful AI assistant.') + '\\n\\n' }}
{%- if tools %}{{- '<tools>\\n' }}
{%- for tool in tools %}{{- (tool | tojson) + '\\n' }}{%- endfor %}{{- '</tools>' }}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- set thought = '' if mode == '/think' else '<think>\\n\\n</think>\\n' %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}{{- '<|im_start|>assistant\\n' + thought }}
{%- generation %}{{- message.content.lstrip('\\n') + '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}
{%- elif message.role == 'tool' %}{{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' + thought }}{%- endif %}"""

FAMILIES: Mapping[str, str] = {
    "Qwen3": QWEN3,
    "Gemma 3": GEMMA3,
    "Llama 3": LLAMA3,
    "Phi 3": PHI3,
    "OLMo 2": OLMO2,
    "SmolLM3": SMOLLM3,
}
_SPECIAL = ["<start_of_turn>", "<end_of_turn>", "<|end|>"]
_ADDED = ["<tool_call>", "</tool_call>", "<think>", "</think>", "<tool_response>", "</tool_response>"]

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "stock",
            "description": "How many are left.",
            "parameters": {"type": "object", "properties": {"item": {"type": "string"}}, "required": ["item"]},
        },
    }
]
CALL: dict[str, Any] = {"type": "function", "function": {"name": "stock", "arguments": {"item": 'a "big" lamp'}}}
ANSWER = '{"left": 3, "of": "é"}'
PLAIN: list[dict[str, Any]] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Where is the lamp?"},
    {"role": "assistant", "content": "In aisle F."},
    {"role": "user", "content": "And the price of it?"},
    {"role": "assistant", "content": "12 for a broom."},
]
WITH_TOOLS: list[dict[str, Any]] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "How many lamps?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": ANSWER},
    {"role": "assistant", "content": "3 of them."},
]


def tokenizer_of(family: str) -> PreTrainedTokenizerBase:
    """A tokenizer with the template of a family, and the control tokens of all."""
    tokenizer = byte_level(FAMILIES[family])
    tokenizer.bos_token = "<|begin|>"
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in _SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in _ADDED])
    return tokenizer
