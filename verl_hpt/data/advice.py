"""What `data convert` says at its end: what the prompts lack, whose reward the rows need, the overrides to paste."""

import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from verl_hpt import reward
from verl_hpt.data import fields

_PLAIN_VALUE = re.compile(r"[\w./+@%-]+", re.ASCII)  # Hydra reads it as it stands, and so does the shell


@dataclass
class Seen:
    """What was seen of the rows that were written, by file where the file matters."""

    left_out: dict[str, Counter] = field(default_factory=dict)  # file → field → rows
    graded: dict[str, Counter] = field(default_factory=dict)  # file → field → rows whose first demonstration is wrong
    unanswered: int = 0  # rows without an expected answer
    letters: int = 0  # rows of multiple choice
    rows: int = 0

    def warnings(self) -> list[str]:
        """What may make training worse than its file."""
        lines = []
        for file, names in self.left_out.items():
            for name, count in names.items():
                remedy = f"put it into the question, or say --drop {name}"
                lines.append(f"WARNING: {file}: {left_out_text(name)} ({count} rows); {remedy}")
        for file, names in self.graded.items():
            for name, count in names.items():
                what = f"{file}: `{name}` calls the first demonstration wrong in {count} rows"
                lines.append(f"WARNING: {what}; --best-of-graded takes the first that the grader accepts")
        if self.unanswered:
            what = f"{self.unanswered} of {self.rows} rows have no expected answer"
            lines.append(f"warning: {what}: training on them needs your own reward (see below)")
        return lines


def left_out_text(name: str) -> str:
    """What to do about a field that no prompt has."""
    return f"no prompt has `{name}`: {fields.NEEDED[name.lower()]}"


def override(key: str, value: str) -> str:
    """One override of a verl command, quoted for Hydra and for the shell."""
    if not _PLAIN_VALUE.fullmatch(value):
        quoted = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + match[2].replace("'", "\\'"), value)
        value = f"'{quoted}'"  # Hydra reads a backslash as one, but for those before a quote
    return shlex.quote(f"{key}={value}")


def grader_overrides(name: str = "compute_score") -> list[str]:
    """The overrides that make a run use the shipped grader."""
    path = os.path.abspath(reward.__file__)
    keys = "reward.custom_reward_function"
    return [override(f"{keys}.path", path), override(f"{keys}.name", name)]


def overrides(out: str, val: str | None, seen: Seen, with_demos: bool) -> list[str]:
    """What a verl command needs to train on the files that were written."""
    lines = ["algorithm.adv_estimator=hpt", override("data.train_files", os.path.abspath(out))]
    lines += [override("data.val_files", os.path.abspath(val))] if val else []
    lines += ["++hpt.demo.key=target"] if with_demos else []
    if not seen.unanswered:
        lines += grader_overrides("multiple_choice" if seen.letters == seen.rows else "compute_score")
    return lines


def ending(out: str, val: str | None, seen: Seen, with_demos: bool) -> Iterable[str]:
    """The lines that `data convert` prints last."""
    yield "Add to the verl command:"
    yield " \\\n".join(f"  {line}" for line in overrides(out, val, seen, with_demos))
    if not val:
        yield "and data.val_files=FILE; `--val FILE` here makes one of these questions"
    if seen.unanswered:
        yield "and reward.custom_reward_function.path=FILE.py: a reward of your own, which needs no expected answer"
    yield f"First see what would happen: {shlex.join(['verl-hpt', 'data', 'check', out])}"
