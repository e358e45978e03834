"""``verl-hpt history CHECKPOINT``: which questions a run taught, graduated, forgot, or never saw solved.

    verl-hpt history checkpoints/…/global_step_200                           # counts
    verl-hpt history CHECKPOINT --which forgotten --data train.parquet       # the questions themselves

The history knows a question by its identity; ``--data`` finds it in the parquet of the run.
"""

from __future__ import annotations

import argparse
import json

from verl_hpt.demos.demonstration import plain
from verl_hpt.errors import UserError
from verl_hpt.history import FILE, KEY, LISTINGS, History, identity

SHOWN = ("drawn", "solved", "rollouts", "failures", "uses", "drawn_at", "taught_at")


def names(path: str, prompt_key: str, history: History) -> dict[str, str]:
    """Key of each known question -> where it stands in a parquet file, and its last message."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"{path}: cannot be read as parquet ({error})") from error
    question_key, columns = history.settings.get(KEY), file.schema_arrow.names
    if lacking := [name for name in (prompt_key, question_key) if name is not None and name not in columns]:
        raise UserError(f"{path}: has no column {lacking[0]!r}; it has {', '.join(columns)}")
    wanted = [name for name in columns if name in (prompt_key, question_key, "data_source")]
    found, batches = {}, file.iter_batches(4096, columns=wanted)
    for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
        try:
            key = identity(row, question_key, prompt_key)
        except UserError as error:
            raise UserError(f"{path}, row {number}: {error}") from None
        if key in history.records and key not in found:
            prompt = plain(row[prompt_key])
            last = prompt[-1].get("content") if isinstance(prompt, list) and prompt else prompt
            found[key] = f"row {number}: {' '.join(str(last).split())}"
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="verl-hpt history", description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", help=f"a checkpoint's folder (global_step_N), or its {FILE}")
    parser.add_argument("--which", choices=LISTINGS, help="list these questions")
    parser.add_argument(
        "--data", action="append", default=[], help="training parquet, to name the questions of --which; may repeat"
    )
    parser.add_argument("--prompt-key", default="prompt", help="its column of chat messages (data.prompt_key)")
    parser.add_argument("--limit", type=int, default=20, help="questions to list; 0: all")
    parser.add_argument("--json", action="store_true", help="for machines")
    options = parser.parse_args(argv)
    if options.limit < 0:
        raise UserError(f"--limit {options.limit}: give a number of questions, or 0 for all")
    if options.data and options.which is None:
        parser.error("--data names the questions that --which lists; set --which too")
    history = History.read(options.checkpoint)
    result = {**history.totals(), "tokens_saved": history.tokens_saved}
    rows = []
    if options.which is not None:
        listed = sorted(history.listing(options.which).items(), key=lambda item: -item[1].drawn_at)
        texts: dict[str, str] = {}
        for file in options.data:
            texts |= names(file, options.prompt_key, history)
        for key, record in listed[: options.limit or None]:
            question = {"question": texts.get(key, "not in the data given")} if texts else {}
            rows.append({"key": key, **{name: getattr(record, name) for name in SHOWN}, **question})
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
