"""The file of a history: named arrays, written whole or not at all, each checked when it is read. NumPy only."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping

import numpy as np

from verl_hpt.errors import UserError

VERSION = 2
FILE = "hpt_history.npz"

# Column of a question -> type. Every number stops at the largest of its type.
COLUMNS = {
    "solved": np.uint16,  # rollouts of the last draw that were solved
    "rollouts": np.uint16,  # rollouts of the last draw that came back
    "drawn": np.uint32,  # draws that the update saw
    "failures": np.uint16,  # draws in a row, the last one included, of which no rollout was solved
    "uses": np.uint32,  # draws at which it trained on demonstrations
    "drawn_at": np.int32,  # step of the last draw
    "taught_at": np.int32,  # step at which it last trained on a demonstration; 0: never
    "flags": np.uint8,
}

# Array of the file -> type, and the array that it is as long as (None: a single value).
ARRAYS = {
    "version": (np.int64, None),
    "tokens_saved": (np.float64, None),
    "depends": (np.str_, None),  # JSON, see ``description``
    "keys": (np.uint64, "keys"),
    "prompts": (np.uint64, "prompts"),
    "prompt_rows": (np.int32, "prompts"),
    "demos": (np.uint64, "demos"),
    "demo_uses": (np.uint16, "demos"),
} | {name: (kind, "keys") for name, kind in COLUMNS.items()}


class OtherVersion(UserError):
    """The history was written by a verl-hpt with another version of this file."""


def check(arrays: Mapping[str, np.ndarray]) -> None:
    """Refuse arrays that are not a history's.

    Raises:
        OtherVersion: the version is another one.
        UserError: an array is missing, unknown, of another type or shape, or holds what no history holds.
    """
    if "version" in arrays:
        _check_array("version", arrays)
        if int(arrays["version"]) != VERSION:
            raise OtherVersion(f"a history of version {arrays['version']}; this verl-hpt reads version {VERSION}")
    if lacking := [name for name in ARRAYS if name not in arrays]:
        raise UserError(f"a history without {', '.join(lacking)}")
    if unknown := sorted(arrays.keys() - ARRAYS.keys()):
        raise UserError(f"a history with an unknown array {', '.join(unknown)}")
    for name in ARRAYS:
        _check_array(name, arrays)
    for name in ("keys", "prompts", "demos"):
        in_order = np.sort(arrays[name])
        if twice := int((in_order[1:] == in_order[:-1]).sum()):
            raise UserError(f"a history whose {name} has {twice} of its {len(in_order)} numbers twice")
    rows, questions = arrays["prompt_rows"], len(arrays["keys"])
    if len(rows) and not 0 <= rows.min() <= rows.max() < questions:
        raise UserError(
            f"a history whose prompt_rows go from {rows.min()} to {rows.max()}, its {questions} questions from 0 to "
            f"{questions - 1}"
        )
    saved = float(arrays["tokens_saved"])
    if not (math.isfinite(saved) and saved >= 0):
        raise UserError(f"a history whose tokens_saved is {saved}, not a number of at least 0")
    description(arrays["depends"])


def _check_array(name: str, arrays: Mapping[str, np.ndarray]) -> None:
    array, (kind, of) = arrays[name], ARRAYS[name]
    if not isinstance(array, np.ndarray):
        raise UserError(f"a history whose {name} is no array")
    fits = array.dtype.kind == "U" if kind is np.str_ else array.dtype == kind
    if not fits:
        raise UserError(f"a history whose {name} has type {array.dtype}, not {kind.__name__}")
    if array.ndim != (of is not None):
        wanted = "a single value" if of is None else "one axis"
        raise UserError(f"a history whose {name} has shape {array.shape}, not {wanted}")
    if of is not None and array.shape != arrays[of].shape:
        raise UserError(f"a history whose {name} has shape {array.shape}, its {of} {arrays[of].shape}")


def description(depends: np.ndarray) -> dict[str, dict]:
    """What the history depends on: ``identity``, setting -> value, and ``flags``, gate -> setting -> value.

    Raises:
        UserError: the array does not hold that.
    """
    try:
        told = json.loads(str(depends))
    except (ValueError, RecursionError) as error:
        raise UserError(f"a history whose depends is no JSON ({error})") from None
    parts = (told.get("identity"), told.get("flags")) if isinstance(told, dict) and len(told) == 2 else (None, None)
    if not all(isinstance(part, dict) for part in parts) or not all(isinstance(own, dict) for own in parts[1].values()):
        raise UserError("a history whose depends does not name identity and flags")
    return told


def write(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write to ``path`` whole or not at all: a file beside it takes its place when it is safe on disk."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    partial = f"{path}.partial"
    with open(partial, "wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read(path: str) -> dict[str, np.ndarray]:
    """The arrays that ``write`` wrote, not yet checked.

    Raises:
        UserError: no such file, or no such archive; names it.
    """
    arrays, at = {}, ""
    try:
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("one array, not an archive of several")
            for name in archive.files:
                at = f"array {name}: "
                arrays[name] = archive[name]
    except Exception as error:  # a damaged file raises whatever it likes: zlib's and struct's errors, MemoryError …
        said = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: no history of verl-hpt can be read from it ({at}{said})") from error
    return arrays
