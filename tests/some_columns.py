"""Every column beside demonstrations under a name of its own, and their check on given tokens."""

from dataclasses import replace

from verl_hpt.demos import demonstration
from verl_hpt.demos.demonstration import COLUMNS, Demonstration

EVERY = {name: f"the_{name}" for name in COLUMNS}
THREE = Demonstration("x", ids=[5, 6, 7], mask=[1, 0, 1])


def check_values(demo: Demonstration, columns: dict, encoded: Demonstration | None = None) -> dict:
    """``demonstration.check_values`` of a demonstration that has another's tokens."""
    tokens = {} if encoded is None else {"ids": encoded.ids, "mask": encoded.mask}
    return demonstration.check_values(replace(demo, **tokens), columns)
