"""Two hundred hostile or damaged files: each is named by file, row and field; an error status, never a traceback."""

import gzip
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from verl_hpt.data.commands import main


class Case(NamedTuple):
    path: Path
    row: int | None  # None: any row; 0: the file as a whole
    field: str  # regular expression
    options: tuple[str, ...] = ()
    convert: bool = False  # must stop `data convert` too


def verl_row(i=0, **change):
    row = {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": f"What is {i} + {i}?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(2 * i)},
        "extra_info": {"index": i, "split": "train"},
        "target": [{"role": "assistant", "content": f"{i} + {i} = {2 * i}\n#### {2 * i}"}],
    }
    row.update(change)
    return {k: v for k, v in row.items() if v is not ...}


def question_row(i=0, **change):
    row = {"question": f"What is {i} + {i}?", "answer": f"{i} + {i} = {2 * i}\n#### {2 * i}"}
    row.update(change)
    return {k: v for k, v in row.items() if v is not ...}


class Folder:
    """Makes the files, numbered."""

    def __init__(self, path):
        self.path, self.cases = path, []

    def name(self, suffix):
        return self.path / f"f{len(self.cases):03d}{suffix}"

    def add(self, path, row, field, *options, convert=False):
        self.cases.append(Case(path, row, field, options, convert))

    def raw(self, suffix, content, row, field, *options, convert=True):
        path = self.name(suffix)
        path.write_bytes(content)
        self.add(path, row, field, *options, convert=convert)

    def lines(self, rows, row, field, *options, convert=False):
        path = self.name(".jsonl")
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        self.add(path, row, field, *options, convert=convert)

    def parquet(self, rows, row, field, *options, convert=False):
        path = self.name(".parquet")
        pq.write_table(pa.Table.from_pylist(rows), path)
        self.add(path, row, field, *options, convert=convert)


GOOD = [verl_row(i) for i in range(4)]
QUESTIONS = [question_row(i) for i in range(4)]


def whole_parquet(path):
    """A parquet of many pages, with checksums, as `data convert` writes it."""
    texts = "".join(json.dumps(question_row(i, question=f"{i} {'x' * (i % 97)}?")) + "\n" for i in range(3000))
    (path / "whole.jsonl").write_text(texts, encoding="utf-8")
    assert main(["convert", str(path / "whole.jsonl"), str(path / "whole.parquet")]) == 0
    return (path / "whole.parquet").read_bytes()


def hostile(path):
    folder = Folder(path)
    whole = whole_parquet(path)
    # Truncated parquet.
    for i in range(20):
        folder.raw(".parquet", whole[: len(whole) * (i + 1) // 21], 0, r"\(file\)")
    # Damage inside the data pages.
    data = len(whole) - int.from_bytes(whole[-8:-4], "little") - 8
    for i in range(20):
        at = 64 + (data - 256) * i // 20
        hurt = whole[:at] + bytes(b ^ 0x5A for b in whole[at : at + 48]) + whole[at + 48 :]
        folder.raw(".parquet", hurt, None, r"\(row\)|\(file\)|[\w.]+")
    # A broken footer.
    for i in range(6):
        at = data + (len(whole) - 8 - data) * i // 6
        folder.raw(".parquet", whole[:at] + b"\xff" * 24 + whole[at + 24 :], None, r"\(row\)|\(file\)")
    # Empty, or nothing in it.
    for suffix in (".parquet", ".jsonl", ".json", ".jsonl.gz", ".txt"):
        folder.raw(suffix, b"", 0, r"\(file\)")
    folder.raw(".jsonl", b"\n\n  \n", 0, r"\(file\)")
    folder.raw(".json", b"[]", 0, r"\(file\)")
    folder.raw(".json", b"[ \n ]", 0, r"\(file\)")
    folder.raw(".parquet", b"PAR1", 0, r"\(file\)")
    folder.raw(".parquet", b"PAR1PAR1", 0, r"\(file\)")
    path_ = folder.name(".parquet")
    pq.write_table(pa.Table.from_pylist(GOOD).slice(0, 0), path_)
    folder.add(path_, 0, r"\(file\)", convert=True)
    # Half lines, half lists.
    text = "".join(json.dumps(r) + "\n" for r in QUESTIONS).encode()
    last = len(text) - len(json.dumps(QUESTIONS[-1])) - 1
    for i in range(18):
        folder.raw(".jsonl", text[: last + 1 + (len(text) - last - 4) * i // 18], 4, r"\(line\)")
    for i in range(8):
        listed = json.dumps(QUESTIONS).encode()
        cut = len(json.dumps(QUESTIONS[:2])) + 3 + i * (len(listed) - len(json.dumps(QUESTIONS[:2])) - 5) // 8
        folder.raw(".json", listed[:cut], None, r"\(row\)")
    folder.raw(".json", json.dumps(QUESTIONS).encode() + b"{}", None, r"\(file\)")
    folder.raw(".jsonl.gz", gzip.compress(text * 50)[:-40], None, r"\(line\)")
    folder.raw(".jsonl.gz", gzip.compress(text)[:20], 0, r"\(file\)|\(line\)")
    # Not what it is called, or nothing known.
    folder.raw(".csv", b"question,answer\n1,2\n", 0, r"\(file\)")
    folder.raw(".xml", b"<rows><row/></rows>", 0, r"\(file\)")
    folder.raw(".html", b"<!doctype html><p>404", 0, r"\(file\)")
    folder.raw(".parquet", text, 0, r"\(file\)")
    folder.raw(".jsonl", b"\x80\x04\x95pickle", 1, r"\(line\)")
    folder.raw(".jsonl", b"\x00" * 500, 1, r"\(line\)")
    folder.raw(".jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", 1, r"\(line\)")
    for value in (b"5", b"null", b'"text"', b"[1, 2]", b"true"):
        folder.raw(".jsonl", text + value + b"\n", 5, r"\(line\)")
    folder.raw(".jsonl", text + b"[" * 100_000 + b"\n", 5, r"\(line\)")
    folder.raw(".jsonl", text + b'{"question": ' + b"9" * 5000 + b', "answer": "#### 1"}\n', 5, r"\(line\)|question")
    folder.raw(".json", b"[1, 2]", 1, r"\(row\)")
    folder.raw(".json", b'[{"question": "1", "answer": "#### 1"}, nonsense]', 2, r"\(row\)")
    # Encodings.
    for encoding in ("latin-1", "cp1252", "iso8859-15"):
        folder.raw(".jsonl", text + '{"question": "Wie groß?", "answer": "#### 1"}\n'.encode(encoding), 5, "question")
        folder.raw(".jsonl", text + '{"question": "1?", "answer": "groß #### 1"}\n'.encode(encoding), 5, "answer")
    for encoding in ("utf-16", "utf-16-le", "utf-32"):
        folder.raw(".jsonl", text.decode().encode(encoding), 1, r"\(line\)|question")
    for encoding in ("gbk", "shift_jis"):
        folder.raw(".jsonl", text + '{"question": "一加一?", "answer": "#### 2"}\n'.encode(encoding), 5, "question")
    folder.raw(".json", ('[{"question": "Wie groß?", "answer": "#### 1"}]').encode("latin-1"), 1, r"\(row\)")
    folder.lines([*QUESTIONS, question_row(9, question="half \ud800 pair")], 5, "question", convert=True)
    folder.lines([*QUESTIONS, question_row(9, answer="half \udfff pair #### 1")], 5, "answer", convert=True)
    folder.lines([*GOOD, verl_row(9, target="half \ud800 pair #### 18")], 5, "target", convert=True)
    # Wrong types in fields of raw questions.
    for value in (None, 5, "", "   ", [], {}, ["x"], [{"content": "no role"}], True):
        folder.lines([*QUESTIONS, question_row(9, question=value)], 5, r"question\S*", convert=True)
    for value in (None, 5, "", "no mark", [], {}, "#### ", math.nan):
        folder.lines([*QUESTIONS, question_row(9, answer=value)], 5, r"answer\S*", convert=True)
    folder.lines([*QUESTIONS, question_row(9, question=...)], 5, "question", convert=True)
    folder.lines([*QUESTIONS, question_row(9, answer=...)], 5, "answer", convert=True)
    folder.lines([{"text": "only text"}], 1, "prompt", convert=True)
    # Wrong types in verl's form.
    prompts = (None, 5, [], {}, [5], [{"role": 1, "content": "x"}], [{"role": "user", "content": None}])
    for value in (*prompts, [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]):
        folder.lines([*GOOD, verl_row(9, prompt=value)], 5, r"prompt\S*", convert=True)
    for value in (None, 5, {}, {"ground_truth": None}, {"ground_truth": ""}, {"ground_truth": math.nan}):
        folder.lines([*GOOD, verl_row(9, reward_model=value)], 5, r"reward_model\S*", convert=True)
    for value in (None, 5, ""):
        folder.lines([*GOOD, verl_row(9, data_source=value)], 5, "data_source")
    folder.lines([*GOOD, verl_row(9, extra_info="text")], 5, "extra_info")
    # Demonstrations.
    say = {"role": "assistant", "content": "#### 18"}
    ask = {"role": "user", "content": "And then?"}
    targets = ("", " \n", 5, True, [5], {"x": 1}, [ask], [ask, say], [say, ask], [say, say], [{**say, "content": 5}])
    for value in (*targets, [[]], [["x"]], [[say], 5], [None, "#### 18"], [{**say, "content": [{"type": "image"}]}]):
        folder.lines([*GOOD, verl_row(9, target=value)], 5, r"target\S*")
    folder.parquet([verl_row(i, target=...) for i in range(4)], 1, "target")
    folder.parquet([verl_row(i, target=None) for i in range(4)], 0, "target")
    folder.parquet([verl_row(i, target=i) for i in range(4)], 1, "target", convert=True)
    folder.parquet([verl_row(i, target=b"bytes") for i in range(4)], 1, "target", convert=True)
    folder.parquet([verl_row(i, prompt="text") for i in range(4)], 1, "prompt")
    folder.parquet([verl_row(i, prompt=...) for i in range(4)], 1, "prompt", convert=True)
    folder.parquet([verl_row(i, reward_model=...) for i in range(4)], 1, r"reward_model|target")
    # Rewards and other columns that are no numbers.
    for value in (math.nan, math.inf, -math.inf, "one", [1.0, 1.0], True, [math.nan]):
        folder.lines(
            [verl_row(i, r=1.0) for i in range(4)] + [verl_row(9, r=value)], 5, "target", "--demo-reward-key", "r"
        )
    folder.parquet(
        [*[verl_row(i, r=1.0) for i in range(4)], verl_row(9, r=math.nan)], 5, "target", "--demo-reward-key", "r"
    )
    folder.parquet([verl_row(i, w=[1.0, math.nan]) for i in range(4)], 1, "target", "--token-weights-key", "w")
    folder.parquet([verl_row(i, w=[1.0, -1.0]) for i in range(4)], 1, "target", "--token-weights-key", "w")
    folder.parquet([verl_row(i, w=[0.0, 0.0]) for i in range(4)], 1, "target", "--token-weights-key", "w")
    folder.parquet([verl_row(i, lp=[0.5]) for i in range(4)], 1, "target", "--teacher-log-prob-key", "lp")
    folder.parquet([verl_row(i, s=7) for i in range(4)], 1, "target", "--demo-source-key", "s")
    folder.parquet(GOOD, 1, "r", "--demo-reward-key", "r")
    for body in ("float('nan')", "float('inf')", "None", "{}", "{'score': None}", "'x'", "1 / 0", "exit(3)"):
        function = path / f"reward{len(folder.cases)}.py"
        function.write_text(f"def compute_score(**kwargs):\n    return {body}\n", encoding="utf-8")
        folder.parquet(GOOD, 1, "target", "--reward", str(function))
    # Rows beyond any sense.
    row = json.dumps(question_row(9, answer="x" * (66 * 2**20) + "#### 18"))
    folder.raw(".jsonl", text + row.encode() + b"\n", 5, r"\(line\)")
    folder.raw(".jsonl", text + b"x" * (70 * 2**20), 5, r"\(line\)")
    folder.parquet([*GOOD, verl_row(9, target="x" * (66 * 2**20))][4:], 1, "target", convert=True)
    return folder.cases


def said(capsys, arguments):
    status = main(arguments)
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def names(case, output):
    """Whether the output has the file, the row and the field in one line."""
    row = r"(row \d+|the file)" if case.row is None else "the file" if case.row == 0 else rf"row {case.row}"
    return re.search(rf"{re.escape(case.path.name)}: {row}: field `({case.field})`", output)


def test_two_hundred_hostile_files_are_named_by_file_row_and_field(tmp_path, capsys):
    cases = hostile(tmp_path)
    capsys.readouterr()
    assert len(cases) >= 200
    failures = []
    for case in cases:
        runs = [(["check", str(case.path), *case.options], (1, 2))]
        if case.convert:
            runs.append((["convert", str(case.path), str(tmp_path / "out.parquet")], (2,)))
        for arguments, expected in runs:
            status, output = said(capsys, arguments)
            if status not in expected or "Traceback" in output or not names(case, output):
                failures.append(f"{case}\n{arguments[0]}: exit {status}\n{output[-600:]}")
    assert not failures, f"{len(failures)} of {len(cases)}:\n" + "\n\n".join(failures[:40])
    assert not list(tmp_path.glob("out.parquet*"))


def test_folder_and_missing_file_are_named(tmp_path, capsys):
    for path in (tmp_path, tmp_path / "none.jsonl"):
        status, output = said(capsys, ["check", str(path)])
        assert status == 2 and str(path) in output and "Traceback" not in output
        status, output = said(capsys, ["convert", str(path), str(tmp_path / "o.parquet")])
        assert status == 2 and str(path) in output and "Traceback" not in output


@pytest.mark.parametrize(
    "options",
    [
        ["--tokenizer", "none/at/all"],
        ["--reward", "none.py"],
        ["--reward-kwargs", "[]"],
        ["--template-kwargs", "{"],
        ["--model", "./nowhere"],
        ["--limit", "0"],
        ["--val", "nowhere.parquet"],
        ["--nonsense"],
        ["--demo-key", "demos", "--tolerance", "x"],
    ],
    ids=" ".join,
)
def test_wrong_use_is_one_message(tmp_path, capsys, options):
    path = tmp_path / "good.parquet"
    pq.write_table(pa.Table.from_pylist(GOOD), path)
    status, output = said(capsys, ["check", str(path), *options])
    assert status == 2 and "Traceback" not in output and output.strip()
