"""Prompts and demonstrations as the run's tokenizer sees them, many at a time."""

import argparse
from pathlib import Path

from verl_hpt.data.rows import first_line
from verl_hpt.demos.demonstration import Demonstration, Unusable
from verl_hpt.demos.encode import end_of_answers
from verl_hpt.errors import UserError


class Renderer:
    """The run's tokenizer: prompts, and demonstrations many at a time."""

    def __init__(
        self,
        path: str,
        option: str = "--tokenizer",
        eos: str | None = None,
        max_length: int | None = None,
        kwargs: dict | None = None,
    ):
        if not Path(path).exists() and ("/" not in path or path.startswith((".", "/"))):
            raise UserError(f"{option} {path}: no such folder or file")
        from transformers import AutoTokenizer

        try:
            self.tokenizer = tokenizer = AutoTokenizer.from_pretrained(path)
        except Exception as error:  # whatever transformers raises for a folder that holds no tokenizer
            raise UserError(f"{option} {path}: its tokenizer cannot be loaded: {first_line(error)}") from None
        end = eos
        if eos is not None:
            end = int(eos) if eos.lstrip("-").isdigit() else tokenizer.convert_tokens_to_ids(eos)
            if end is None or end == tokenizer.unk_token_id or not 0 <= end < len(tokenizer):
                raise UserError(f"--eos {eos}: the tokenizer at {path} has no such token")
        self.kwargs, self.max_length = kwargs or {}, max_length
        self.eos_id, _, self.eos_problem = end_of_answers(tokenizer, path, end)
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()

    def prompt(self, messages: list[dict]) -> str:
        """The text that a rollout starts from; raises `Unusable` where the template refuses the messages."""
        try:
            kwargs = {**self.kwargs, "tokenize": False, "add_generation_prompt": True}
            text = self.tokenizer.apply_chat_template(messages, **kwargs)
        except Exception as error:  # templates raise whatever they like
            raise Unusable("template", f"{type(error).__name__}: {str(error)[:200]}") from None
        for call in (call for message in messages for call in message.get("tool_calls") or []):
            name = (call.get("function") or call).get("name") if isinstance(call, dict) else None
            if isinstance(name, str) and name not in text:
                raise Unusable("template", f"it leaves out the call of tool {name!r}")
        return text

    def tokens(self, texts: list[str]) -> list[list[int]]:
        """Token ids of many texts, as `tokenizer.encode(text, add_special_tokens=False)` gives them one by one."""
        if self._backend is None:
            return [self.tokenizer.encode(t, add_special_tokens=False) for t in texts]
        return [e.ids for e in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    @property
    def encoding(self) -> tuple:
        """What ``demos.read.read`` is given, many texts at a time."""
        return self.tokenizer, self.eos_id, self.max_length, self.kwargs, self.tokens

    def texts(self, ids: list[list[int]]) -> list[str]:
        """What verl's reward loop sees of each response."""
        if self._backend is None:
            return [self.tokenizer.decode(i, skip_special_tokens=True) for i in ids]
        return self._backend.decode_batch(ids, skip_special_tokens=True)

    def special(self, text: str) -> bool:
        """Whether special tokens stand in the text: verl's reward loop does not see those."""
        return any(token in text for token in self.tokenizer.all_special_tokens)

    def beside(self, row: int, ids: list[int], demo: Demonstration) -> dict:
        """One demonstration beside the prompt that its rollouts start from, token for token."""
        prompt, tokens = ([self.tokenizer.decode([i], skip_special_tokens=False) for i in of] for of in (ids, demo.ids))
        ends = sum(i == self.eos_id and m == 1 for i, m in zip(demo.ids, demo.mask, strict=True))
        shown = {"row": row, "prompt_ids": ids, "prompt_tokens": prompt, "ids": demo.ids, "tokens": tokens}
        return {**shown, "trained": demo.mask, "eos": self.eos_id, "eos_count": ends}


def renderer(args: argparse.Namespace) -> Renderer:
    """The renderer that the options ask for: --tokenizer, else the tokenizer of --model."""
    option = "--tokenizer" if args.tokenizer else "--model"
    path = args.tokenizer or args.model
    return Renderer(path, option, args.eos, args.max_response_length, args.template_kwargs)


def difference(a: str, b: str) -> str:
    """Where two texts part, with a few characters of both."""
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return f"at character {at}: {a[at : at + 20]!r} comes back as {b[at : at + 20]!r}"
