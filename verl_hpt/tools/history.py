"""``verl-hpt history CHECKPOINT``: which questions a run taught, graduated, forgot, or never saw solved.

    verl-hpt history checkpoints/…/global_step_200                           # counts
    verl-hpt history CHECKPOINT --which forgotten --data train.parquet       # the questions themselves

The history has a number a question; ``--data`` finds the question that it stands for in the parquet of the run.
"""

from __future__ import annotations

import argparse
import json
import os

import numpy as np

from verl_hpt.demos import encode as demos
from verl_hpt.errors import UserError
from verl_hpt.history import LISTINGS, History, prompt_number
from verl_hpt.history_file import FILE

SHOWN = ("drawn", "solved", "rollouts", "failures", "uses", "drawn_at", "taught_at")


def names(path: str, prompt_key: str, history: History) -> dict[int, str]:
    """Key of each known question -> where it stands in a parquet file, and its last message."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"{path}: cannot be read as parquet ({error})") from error
    if prompt_key not in file.schema_arrow.names:
        raise UserError(f"{path}: has no column {prompt_key!r}; it has {', '.join(file.schema_arrow.names)}")
    wanted = [name for name in (prompt_key, "data_source") if name in file.schema_arrow.names]
    found, at = {}, 0
    for batch in file.iter_batches(4096, columns=wanted):
        rows = batch.to_pylist()
        prompts = [demos.plain(row[prompt_key]) for row in rows]
        numbers = [prompt_number(str(row.get("data_source") or ""), p) for row, p in zip(rows, prompts, strict=True)]
        known, keys = history.keys_of_prompts(np.array(numbers, dtype=np.uint64))
        for i in np.flatnonzero(known):
            last = prompts[i][-1].get("content") if isinstance(prompts[i], list) and prompts[i] else prompts[i]
            found.setdefault(int(keys[i]), f"row {at + i}: {' '.join(str(last).split())}")
        at += len(rows)
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="verl-hpt history", description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", help=f"a checkpoint's folder (global_step_N), or its {FILE}")
    parser.add_argument("--which", choices=LISTINGS, help="list these questions")
    parser.add_argument(
        "--data", action="append", default=[], help="training parquet, to name the questions; may repeat"
    )
    parser.add_argument("--prompt-key", default="prompt", help="its column of chat messages (data.prompt_key)")
    parser.add_argument("--limit", type=int, default=20, help="questions to list; 0: all")
    parser.add_argument("--json", action="store_true", help="for machines")
    options = parser.parse_args(argv)
    if options.limit < 0:
        raise UserError(f"--limit {options.limit}: give a number of questions, or 0 for all")
    path = options.checkpoint
    history = History.read(os.path.join(path, FILE) if os.path.isdir(path) else path)
    result = {**history.totals(), "tokens_saved": history.tokens_saved}
    rows = []
    if options.which is not None:
        listed = history.listing(options.which)
        order = np.argsort(-listed["drawn_at"], kind="stable")[: options.limit or None]
        named: dict[int, str] = {}
        for file in options.data:
            named |= names(file, options.prompt_key, history)
        for i in order:
            row = {"key": f"{int(listed['key'][i]):016x}", **{name: int(listed[name][i]) for name in SHOWN}}
            rows.append(
                row | ({"question": named.get(int(listed["key"][i]), "not in the data given")} if named else {})
            )
        result["listed"], result[options.which + "_questions"] = len(rows), rows
    if options.json:
        print(json.dumps(result, ensure_ascii=False))
        return 0
    print(" · ".join(f"{name} {value:,.0f}" for name, value in result.items() if isinstance(value, int | float)))
    for row in rows:
        last = f" (last at step {row['taught_at']})" if row["uses"] else ""
        drawn = f"solved {row['solved']} of {row['rollouts']} at step {row['drawn_at']}, drawn {row['drawn']} times"
        text = row.get("question", "")[:100]
        print(f"{row['key']}  {drawn}, taught {row['uses']}{last}, failed {row['failures']} in a row  {text}")
    return 0
