"""A row of a data file, what is wrong with one, and what messages say of their names."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from verl_hpt.errors import UserError


class BadRow(UserError):
    """Something is wrong with one row, or with a whole file (row 0)."""

    def __init__(self, file: str, row: int, field: str, problem: str):
        where = f"row {row}" if row else "the file"
        super().__init__(f"{file}: {where}: field `{field}`: {problem}")
        self.file, self.row, self.field, self.problem = str(file), row, field, problem


class Row(NamedTuple):
    """A row of a file; number from 1, the line of a JSONL file."""

    file: str
    number: int
    values: dict[str, Any]

    def bad(self, field: str, problem: str) -> BadRow:
        return BadRow(self.file, self.number, field, problem)

    def fields(self) -> str:
        return listed(self.values) or "no fields"

    def get(self, path: str | None) -> Any:
        """The value at `a` or `a.b`, None where a part is missing."""
        value = self.values
        for part in (path or "").split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def listed(names: Iterable[str]) -> str:
    """The names for a message, no more than can be read in it."""
    names = list(names)
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(f"`{name[:60]}`" for name in names[:20]) + more


Skip = Callable[[BadRow], None]  # what to do with a row that cannot be read: count it, or raise


def stop(bad: BadRow) -> None:
    raise bad


def first_line(error: BaseException) -> str:
    """The first line of what a library says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
