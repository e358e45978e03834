"""Prompts and demonstrations as the run's tokenizer sees them, many at a time."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from verl_hpt.demos.demonstration import Demonstration, Unusable
from verl_hpt.demos.encode import end_of_answers
from verl_hpt.errors import UserError


class Renderer:
    """The run's tokenizer: prompts, and demonstrations many at a time."""

    def __init__(
        self,
        path: str,
        *,
        option: str = "--tokenizer",
        eos: str | None = None,
        max_length: int | None = None,
        kwargs: dict | None = None,
    ):
        if not Path(path).exists() and ("/" not in path or path.startswith((".", "/"))):
            raise UserError(f"{option} {path}: no such folder or file")
        from transformers import AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path)
        except Exception as error:  # whatever transformers raises for a folder that holds no tokenizer
            problem = str(error).splitlines()[0][:300]
            raise UserError(f"{option} {path}: its tokenizer cannot be loaded: {problem}") from None
        self.kwargs = kwargs or {}
        self.max_length = max_length
        self.eos_id, _, self.eos_problem = end_of_answers(self.tokenizer, path, self._eos(eos, path))
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            backend.no_truncation()
            backend.no_padding()
        self._backend = backend

    def _eos(self, given: str | None, path: str) -> int | None:
        if given is None:
            return None
        tokenizer = self.tokenizer
        eos = int(given) if given.lstrip("-").isdigit() else tokenizer.convert_tokens_to_ids(given)
        if eos is None or eos == tokenizer.unk_token_id or not 0 <= eos < len(tokenizer):
            raise UserError(f"--eos {given}: the tokenizer at {path} has no such token")
        return eos

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
        return {
            "row": row,
            "prompt_ids": ids,
            "prompt_tokens": self._spelled(ids),
            "ids": demo.ids,
            "tokens": self._spelled(demo.ids),
            "trained": demo.mask,
            "eos": self.eos_id,
            "eos_count": sum(i == self.eos_id and m == 1 for i, m in zip(demo.ids, demo.mask, strict=True)),
        }

    def _spelled(self, ids: Sequence[int]) -> list[str]:
        return [self.tokenizer.decode([i], skip_special_tokens=False) for i in ids]


def renderer(args: argparse.Namespace) -> Renderer:
    """The renderer that the options ask for: --tokenizer, else the tokenizer of --model."""
    option = "--tokenizer" if args.tokenizer else "--model"
    limit, kwargs = args.max_response_length, args.template_kwargs
    return Renderer(args.tokenizer or args.model, option=option, eos=args.eos, max_length=limit, kwargs=kwargs)


def difference(a: str, b: str) -> str:
    """Where two texts part, with a few characters of both."""
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return f"at character {at}: {a[at : at + 20]!r} comes back as {b[at : at + 20]!r}"
