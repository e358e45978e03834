"""Tiny tokenizers in the style of Qwen2.5, Qwen3 and Llama 3: their special tokens and their templates' habits."""

import functools

from made_data import gsm8k
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

STYLES = ("qwen2.5", "qwen3", "llama3")

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# A system message of its own where there is none; a newline after every end of turn; tools' answers as the user's.
_QWEN25 = """\
{%- if messages[0].role != 'system' -%}
<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n
{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- else -%}
{{ '<|im_start|>' + m.role + '\n' + m.content }}
{%- for call in m.tool_calls or [] -%}
{%- set function = {'name': call.function.name, 'arguments': call.function.arguments} -%}
{{ '\n<tool_call>\n' + (function | tojson) + '\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""

# No system message of its own; reasoning of earlier questions dropped; an empty reasoning block where it is off.
_QWEN3 = """\
{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- elif m.role == 'assistant' -%}
{%- set content = m.content.split('</think>')[-1].lstrip('\n') if loop.index0 < ns.last else m.content -%}
{{ '<|im_start|>assistant\n' + content }}
{%- for call in m.tool_calls or [] -%}
{%- set function = {'name': call.function.name, 'arguments': call.function.arguments} -%}
{{ '\n<tool_call>\n' + (function | tojson) + '\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\n' }}
{%- else -%}
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}
{%- if open_thinking is defined and open_thinking -%}{{ '<think>\n' }}{%- endif -%}
{%- endif -%}
"""

# A begin-of-text token in the template, and one more from the post-processor wherever special tokens are asked for, as
# Llama 3's own has it; headers; nothing after the end of a turn; messages trimmed.
_LLAMA3 = """\
{{ '<|begin_of_text|>' }}
{%- for m in messages -%}
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + (m.content | trim) + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}
"""

_STYLE = {
    "qwen2.5": (_QWEN25, 1, "<|im_end|>", "<|endoftext|>", ["<|im_start|>"], None),
    "qwen3": (_QWEN3, 1, "<|im_end|>", "<|endoftext|>", ["<|im_start|>", "<think>", "</think>"], None),
    "llama3": (
        _LLAMA3,
        3,
        "<|eot_id|>",
        "<|finetune_right_pad_id|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"],
        "<|begin_of_text|>",
    ),
}


@functools.cache
def tiny(style: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of two thousand tokens, trained on a few GSM8K rows, with the style's template."""
    return byte_pairs(style, 2000)


def byte_pairs(style: str, size: int) -> PreTrainedTokenizerFast:
    """The same of another size."""
    template, digits, eos, pad, special, bos = _STYLE[style]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS % digits), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((r["question"] + r["answer"] for r in gsm8k()[:1000]), trainer)
    # The reasoning tags are ordinary tokens in Qwen3: seen in decoded text, unlike special ones.
    tokenizer.add_tokens([t for t in special if "think" in t])
    names = {"bos_token": bos} if bos else {}
    if bos:
        tokenizer.add_special_tokens([bos])
        begins = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=begins
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=pad, **names)
    fast.add_special_tokens({"additional_special_tokens": [t for t in special if "think" not in t]})
    fast.chat_template = template
    return fast
