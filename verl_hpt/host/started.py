"""How the rollouts of a batch started, as their agent loop told it; checked against the demonstrations' own tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from verl_hpt.demos.demonstration import Demonstration
from verl_hpt.host.batch import Group, Reader

START = "hpt_start"  # column of a drawn question: how much of its demonstration each of its sessions starts from
STARTED = "hpt_started"  # in a row's extra_fields: what came of that


@dataclass
class Starts:
    """Of the rows of a batch, (rows,) each.

    prefixes: tokens of a demonstration that the response begins with. starts: 0 where it started from nothing, equal
    where two of a question started alike. longer: tokens that the prompt has beyond its question's, of a hint. shown:
    the demonstration of each row that has a prefix. counts: ``start/missed``, sessions that should have started from a
    demonstration and could not, and why their demonstrations are unusable.
    """

    prefixes: np.ndarray
    starts: np.ndarray
    longer: np.ndarray
    shown: dict[int, Demonstration]
    counts: Counter


def starts_of(rows: int, groups: Sequence[Group], told: Mapping[int, Mapping | None], reader: Reader) -> Starts:
    """From what the agent loop told of each row; None where it started from nothing, as was planned.

    The prompt of a question whose first rollout has a hint becomes the one without it.

    Raises:
        UserError: ``hpt.demo.on_unusable=error`` and a demonstration is unusable.
    """
    found = Starts(*np.zeros((3, rows), dtype=int), {}, Counter())
    for group in groups:
        of_group = {row: told[row] for row in group.rows if told.get(row)}
        plain_prompt = next((one["prompt"] for one in of_group.values() if "prompt" in one), None)
        if plain_prompt is not None:
            group.prompt = np.asarray(plain_prompt)
        missed = sum(bool(one["missed"]) for one in of_group.values())
        found.counts["start/missed"] += missed
        begun = any(one["tokens"] for one in of_group.values())
        demos = {demo.index: demo for demo in reader.usable(group, found.counts)} if begun or missed else {}
        for row, one in of_group.items():
            found.prefixes[row] = one["tokens"]
            hinted = "prompt" in one
            if hinted:
                found.longer[row] = one["longer"]
            if one["tokens"] or hinted:
                found.starts[row] = 1 + (one["hint"] if hinted else one["tokens"]) + (one["place"] << 32)
            if one["tokens"]:
                found.shown[row] = demos.get(one["place"])
    return found


def check_prefixes(groups: Sequence[Group], started: Starts, responses: Mapping[int, Sequence[int]]) -> None:
    """Raise RuntimeError where a response does not begin with its demonstration's tokens; names the question."""
    for group in groups:
        for row in group.rows:
            length, demo = int(started.prefixes[row]), started.shown.get(row)
            if length and (demo is None or np.asarray(responses[row][:length]).tolist() != demo.ids[:length]):
                raise RuntimeError(
                    f"{group.named()}: a rollout that should begin with {length} tokens of its demonstration does not. "
                    "An agent loop, a reward or a dataset of your own may have changed it on the way; else please "
                    "report this with the run's config"
                )
