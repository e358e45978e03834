"""Rows of a test as `verl-hpt data convert` writes them, and what it says."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

from verl_hpt.data.commands import main


def say(content):
    return {"role": "assistant", "content": content}


def ask(content):
    return {"role": "user", "content": content}


def converted(tmp_path, rows, *options, suffix=".jsonl"):
    path, out = tmp_path / f"in{suffix}", tmp_path / "out.parquet"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    assert main(["convert", str(path), str(out), *options]) == 0
    return pq.read_table(out).to_pylist()


def said(tmp_path, capsys, rows, *options):
    """(exit status, rows written or None, standard output, standard error) of a conversion of rows or raw text."""
    path, out = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    out.unlink(missing_ok=True)
    text = rows if isinstance(rows, str) else "".join(json.dumps(r) + "\n" for r in rows)
    path.write_text(text, encoding="utf-8")
    status = main(["convert", str(path), str(out), *options])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and not list(tmp_path.glob("*.part"))
    return status, pq.read_table(out).to_pylist() if out.exists() else None, captured.out, captured.err


def asked(**more):
    return {"question": "a?", "answer": "It is 1.\n#### 1", **more}
