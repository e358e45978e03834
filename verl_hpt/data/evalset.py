"""`verl-hpt data eval-set`: question/answer files to verl's validation parquet."""

import argparse
from pathlib import Path

from verl_hpt.data.convert import Options, to_verl
from verl_hpt.data.fields import OPTIONS
from verl_hpt.data.formats import detect
from verl_hpt.data.read import read_rows
from verl_hpt.data.rows import BadRow
from verl_hpt.data.write import Writer, schema_of
from verl_hpt.errors import UserError

_BOXED = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
_LETTER = "\n\nPlease reason step by step, and put the letter of your choice within \\boxed{}."


def run(args: argparse.Namespace) -> int:
    """One validation parquet for each file, its data_source the file's name. Raises `BadRow` or `UserError`."""
    written = []
    for source in args.inputs:
        name = Path(source).name.split(".")[0]
        out = str(Path(args.out) / f"{name}.parquet")
        if out in written:
            raise UserError(f"two inputs are called {name}; give them different names")
        layout, rows = None, []
        for row in read_rows(source):
            by_letter = "gpqa" in name.lower() or any(field.lower() in OPTIONS for field in row.values)
            default = _LETTER if by_letter else _BOXED
            suffix = default if args.suffix is None else args.suffix
            options = Options(data_source=name, system=args.system, suffix=suffix)
            layout = layout or detect(row)
            if layout.truth is None:
                raise row.bad("answer", "no expected answer found")
            made, _ = to_verl(row, layout, options)
            rows += [{**made, "target": []}] * args.repeat
        with Writer(out, schema_of([rows], False)) as writer:
            for position, path, problem in writer.write(rows, "test"):
                raise BadRow(source, rows[position]["extra_info"]["row"], path, problem)
        written.append(out)
        print(f"{out}: {len(rows)} rows, data_source {name}")
    print("data.val_files=[" + ",".join(written) + "]")
    return 0
