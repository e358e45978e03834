"""Time what per-token columns cost a step: 512 demonstrations of 8,000 tokens, beside `np.asarray` of the same cells.

    python tests/bench/columns.py [--demos 512] [--tokens 8000] [--runs 5]

Each demonstration has weights and a teacher's log-probs. In turns: the cells opened (`plain`, `unpacked`), given to
their demonstrations (`of_row`), checked and scaled (`check_values`), and made into jagged tensors
(`columns_of_tokens`),
for cells that are lists, arrays or tensors; tokenising is not in it. The peer makes float64 arrays of the same cells
and nothing else. Seconds are the process's own CPU time, medians of the runs, on one thread.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from measure import medians, table

from verl_hpt.config import Demo
from verl_hpt.demos.demonstration import Demonstration, check_values, of_row, plain
from verl_hpt.demos.read import unpacked
from verl_hpt.host.batch import Reader
from verl_hpt.host.rows import columns_of_tokens

COLUMNS = ("token_weights", "teacher_log_prob")
KINDS = {"lists": np.ndarray.tolist, "arrays": np.array, "tensors": torch.tensor}


def ours(reader: Reader, rows: list[dict], encoded: Demonstration):
    """From the cells of a batch to the columns of an update."""
    length = len(encoded.ids)

    def step():
        found = []
        for row in rows:
            row = {name: unpacked(plain(cell)) for name, cell in row.items()}
            (demo,) = of_row(row, "target", reader.columns)
            demo.ids, demo.mask = encoded.ids, encoded.mask
            found.append(check_values(demo, reader.columns))
        return columns_of_tokens(COLUMNS, [length] * len(found), found)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demos", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    draw = np.random.default_rng(0)
    encoded = Demonstration("x", ids=[5] * args.tokens, mask=[1] * args.tokens)
    settings = Demo(**{name: name for name in COLUMNS})
    reader = Reader(None, 0, settings, args.tokens)
    values = [{"token_weights": draw.exponential(1, args.tokens), "teacher_log_prob": -draw.exponential(1, args.tokens)}
              for _ in range(args.demos)]  # fmt: skip
    ways = {}
    for kind, made in KINDS.items():
        rows = [{"target": "text", **{name: made(column) for name, column in row.items()}} for row in values]
        ways[kind] = ours(reader, rows, encoded)
        ways[f"{kind}, np.asarray"] = lambda rows=rows: [
            np.asarray(row[name], dtype=np.float64) for row in rows for name in COLUMNS
        ]
    seconds = medians(ways, args.runs, warm_up=1)
    print(f"{args.demos} demonstrations of {args.tokens} tokens, {len(COLUMNS)} columns, medians of {args.runs} runs\n")
    lines = []
    for kind in KINDS:
        mine, peer = seconds[kind], seconds[f"{kind}, np.asarray"]
        lines.append([kind, f"{mine:.3f}", f"{peer:.3f}", f"{mine - peer:.3f}"])
    print(table(["cells", "ours s", "np.asarray s", "more s"], lines))


if __name__ == "__main__":
    main()
