"""What a demonstration is, and what a dataset's row says of it.

One row of verl's dataset has a prompt and, in the column ``hpt.demo.key``, one demonstration or several. Each is a
string (the answer), or a list of chat messages that continues the prompt: one assistant message, or assistant and tool
messages in turn, ending with the assistant's. ``COLUMNS`` is what further columns may say of each.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

REASONS = {
    "null": "no demonstration in this row",
    "empty": "no text, or nothing but spaces",
    "not_text": "neither text nor chat messages with text",
    "bad_roles": "messages must continue the prompt: assistant first, assistant last, tools or users between",
    "eos_inside": "the EOS token stands in the middle of the text",
    "too_long": "more tokens, EOS included, than a response may have",
    "template": "the chat template cannot say which tokens are the assistant's",
    "bad_column": "a per-demonstration column does not fit the demonstrations",
}

_PLAIN = (str, bool, int, float, type(None))
ROUNDING = 1e-3  # log-probs up to here count as 0


class Unusable(ValueError):
    """A demonstration cannot be trained on; `reason` is a key of `REASONS`, `detail` says what was got."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{REASONS[reason]}{f' ({detail})' if detail else ''}")
        self.reason = reason
        self.detail = detail


@dataclass
class Demonstration:
    """One demonstration of a row: as the dataset has it, what the columns beside it say, and what became of it.

    Attributes:
        content: what the cell has. index: its position there.
        values: of ``COLUMNS``, by name, where the row has them; once read, as training takes them.
        text: what is tokenised; None where only the chat template can say.
        length: tokens, EOS included, those of one that is too long too.
        ids, mask: (tokens,) they follow the prompt's own tokens, the last is EOS; mask is 1 on what the assistant says
            (its EOS included) and 0 on what tools or users say between. Empty until it is encoded.
        unclosed_think: the prompt opens a reasoning tag and the text never closes it: odd, but trainable.
        bad: why it cannot be trained on, or None.
    """

    content: Any
    index: int = 0
    values: Mapping[str, Any] = field(default_factory=dict)
    text: str | None = None
    length: int | None = None
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    unclosed_think: bool = False
    bad: Unusable | None = None


def plain(value: Any) -> Any:
    """The same value in plain Python: NumPy, Arrow and tensordict wrappers opened, keys of dicts that hold None gone.

    A row read back from verl's queue or from Arrow has its lists as arrays, its messages' unused keys as None.
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        # A column with a number a token has thousands: they are not walked through one by one.
        simple = all(issubclass(kind, _PLAIN) for kind in set(map(type, value)))
        return list(value) if simple else [plain(v) for v in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist()) if value.dtype.kind in "OV" else value.tolist()
    if hasattr(value, "as_py"):  # pyarrow scalars
        return plain(value.as_py())
    if type(value).__name__ == "NonTensorData":
        return plain(value.data)
    if hasattr(value, "tolist"):  # tensordict's stacks, torch tensors
        return plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [plain(v) for v in value]
    return value


def demonstrations(cell: Any) -> list[Any]:
    """The raw demonstrations of one row's cell: each a string, a list of message dicts, or something unusable.

    None and an empty list have none; a string, one message, or a list of messages is one; a list of strings or of
    message lists is several.
    """
    cell = plain(cell)
    if cell is None or cell != cell:  # pandas writes a missing text as NaN
        return []
    if isinstance(cell, dict):
        return [[cell]]
    if not isinstance(cell, list):
        return [cell]
    if cell and all(isinstance(item, dict) for item in cell):
        return [cell]
    return [[item] if isinstance(item, dict) else item for item in cell]


def message_text(message: dict) -> str:
    """A message's text, its reasoning in `<think>` tags before it; raises `Unusable` where it is not text."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [p if isinstance(p, str) else p.get("text") if isinstance(p, dict) else None for p in content]
        if not all(isinstance(p, str) for p in parts):
            raise Unusable("not_text", f"content parts {_kinds(content)}")
        content = "".join(parts)
    if content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise Unusable("not_text", f"content is {type(content).__name__}")
    reasoning = message.get("reasoning_content") or message.get("thinking")
    if isinstance(reasoning, str) and reasoning.strip() and "</think>" not in content:
        content = f"<think>\n{reasoning.strip()}\n</think>\n\n{content}"
    return content


def single_text(demo: Any) -> str | None:
    """The text of a one-turn demonstration, or None where only the chat template can render it; raises `Unusable`."""
    if demo is None or demo != demo:
        raise Unusable("null")
    if isinstance(demo, str):
        return demo
    if not isinstance(demo, list) or not all(isinstance(m, dict) for m in demo):
        raise Unusable("not_text", f"got {_kinds(demo)}")
    if not demo:
        raise Unusable("empty")
    roles = [m.get("role", "assistant") for m in demo]
    if roles[0] != "assistant" or roles[-1] != "assistant":
        raise Unusable("bad_roles", f"got {', '.join(map(str, roles))[:200]}")
    if any(a == b == "assistant" for a, b in itertools.pairwise(roles)):
        raise Unusable("bad_roles", "two assistant messages in a row; several demonstrations are a list of lists")
    if len(demo) == 1 and not demo[0].get("tool_calls"):
        return message_text(demo[0])
    return None


# --- columns beside the demonstrations -------------------------------------------------------------------------------


def log_probs(numbers: np.ndarray, values: list, mask: np.ndarray | None) -> str | None:
    """What is wrong with them, or None."""
    return f"must hold log-probabilities, at most 0, got {max(values)}" if (numbers > ROUNDING).any() else None


def weights(numbers: np.ndarray, values: list, mask: np.ndarray | None) -> str | None:
    """What is wrong with them, or None."""
    if (numbers < 0).any() or not numbers.any():
        return "must hold weights of 0 or more, and one above 0"
    if mask is not None and not (numbers * mask).any():
        return "has no weight above 0 on what the assistant says"
    return None


def relative(numbers: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Weights of one row's tokens, scaled to a mean of 1 over those that learn: they say what matters within a row.

    So the row's own weight stays what ``normalize.weights`` gives it, and Σ_t over it is Σ w·x / Σ w times its tokens
    (TL-Training, arXiv 2412.15495, divides by Σ w too).

    Args:
        numbers: (tokens,) at least 0, one above 0 where mask is 1. mask: (tokens,) 1 where the token learns.
    """
    mask = np.asarray(mask)
    counted = np.asarray(numbers, dtype=np.float64) * mask
    counted /= counted.max()  # so that the sum of huge weights is finite
    return counted * mask.sum() / counted.sum()


class Column(NamedTuple):
    """A column that says something of each demonstration, named in ``hpt.demo.<name>``.

    It holds one value for a row with one demonstration, or a list with one for each of several.

    Attributes:
        meaning: for people, in the settings and on the command line.
        holds: a number, text, or a number for each token, EOS included.
        required: a demonstration without a value cannot be trained on.
        problem: (numbers, values as they stand, mask) -> what is wrong with them.
        trained: (numbers, mask) -> what training takes them as. blank: the number on every other row's tokens.
    """

    meaning: str
    holds: Literal["number", "text", "number a token"] = "number"
    required: bool = False
    problem: Callable[[np.ndarray, list, np.ndarray | None], str | None] = lambda numbers, values, mask: None
    trained: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda numbers, mask: numbers
    blank: float = 0.0


# All of them; a further one is one entry more.
COLUMNS = {
    "reward": Column("what each demonstration counts as", required=True),
    "log_likelihood": Column(
        "its mean log-prob a token, which select=likelihood compares; `verl-hpt data likelihood` writes it",
        problem=log_probs,
    ),
    "other_log_prob": Column("the same under other models, for poft", required=True, problem=log_probs),
    "token_weights": Column(
        "a weight for each token, EOS included; they are relative (mean 1 over what learns)",
        "number a token",
        problem=weights,
        trained=relative,
        blank=1.0,
    ),
    "teacher_log_prob": Column(
        "log π of its author for each token, EOS included (any number on what tools say)",
        "number a token",
        required=True,
        problem=log_probs,
        trained=lambda numbers, mask: np.minimum(numbers, 0.0),
    ),
    "source": Column("who wrote it, counted in hpt/demo_source/<name>", "text"),
}


def of_row(row: Mapping, key: str, columns: Mapping[str, str] | None = None) -> list[Demonstration]:
    """The demonstrations of a row, each with its own columns' values, not yet checked.

    columns: names of ``COLUMNS`` -> the dataset's columns. Raises `Unusable("bad_column")` where one has another number
    of values than there are demonstrations.
    """
    raw = demonstrations(row.get(key))
    if not raw:
        return []
    values = {name: _spread(row.get(column), len(raw), name, column) for name, column in (columns or {}).items()}
    return [
        Demonstration(content, i, {name: of[i] for name, of in values.items() if of[i] is not None})
        for i, content in enumerate(raw)
    ]


def _spread(cell: Any, count: int, name: str, column: str) -> list:
    kinds = set(map(type, cell)) if isinstance(cell, list) else set()
    if not kinds or not kinds <= {float, int, type(None)}:  # plain already: thousands of numbers are looked at once
        cell = plain(cell)
        kinds = set(map(type, cell)) if isinstance(cell, list) else set()
    if cell is None or (isinstance(cell, list) and kinds <= {type(None)}):
        return [None] * count
    one = not isinstance(cell, list) or (COLUMNS[name].holds == "number a token" and list not in kinds)
    if one and count != 1:
        raise Unusable("bad_column", f"{column} has one value for {count} demonstrations")
    values = [cell] if one else cell
    if len(values) != count:
        raise Unusable("bad_column", f"{column} has {len(values)} values for {count} demonstrations")
    return values


def check_values(demo: Demonstration, columns: Mapping[str, str]) -> dict[str, Any]:
    """The columns' values as training takes them; those with a number a token as (tokens,) float64.

    Raises `Unusable("bad_column")` for a value that is not what its column holds, or, where the demonstration is
    encoded, has another number of tokens.
    """
    mask, taken = np.frombuffer(bytes(demo.mask), np.uint8) if demo.ids else None, {}
    for name, column in columns.items():
        rule, value = COLUMNS[name], demo.values.get(name)
        if value is None:
            if rule.required:
                raise Unusable("bad_column", f"{column} has no value for demonstration {demo.index + 1}")
            continue
        taken[name] = value
        if rule.holds == "text":
            if not isinstance(value, str):
                raise Unusable("bad_column", f"{column} must hold text, got {str(value)[:80]}")
            continue
        a_token = rule.holds == "number a token"
        numbers = _finite(values := value if a_token else [value])
        if numbers is None:
            raise Unusable("bad_column", f"{column} must hold finite numbers, got {str(value)[:80]}")
        fits = a_token and mask is not None and len(numbers) == len(mask)
        if (problem := rule.problem(numbers, values, mask if fits else None)) is not None:
            raise Unusable("bad_column", f"{column} {problem}")
        if a_token and mask is not None and not fits:
            detail = f"{column} has {len(numbers)} values for {len(mask)} tokens, EOS included"
            raise Unusable("bad_column", detail)
        if a_token:
            taken[name] = numbers if mask is None else rule.trained(numbers, mask)
    return taken


def _finite(values: Any) -> np.ndarray | None:
    """A list's values as float64, or None where one of them is no finite number (a bool is none)."""
    if not isinstance(values, list):
        return None
    if not all(issubclass(kind, int | float) and kind is not bool for kind in set(map(type, values))):
        return None
    try:
        numbers = np.array(values, dtype=np.float64)
    except OverflowError:  # an int of more than three hundred digits
        return None
    return numbers if np.isfinite(numbers).all() else None


def _kinds(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {', '.join(sorted({type(v).__name__ for v in value})) or 'nothing'}"
    return type(value).__name__
