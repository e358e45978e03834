"""Which data the tests use: made or real, said aloud, never half of either; and what is made is worth testing on."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import made_data
import pytest
from made_data import EVAL, ROWS, VARIABLE, eval_set, gsm8k
from tiny_tokenizers import STYLES, tiny

ROOT = Path(__file__).resolve().parents[1]


def test_every_file_has_the_rows_it_is_known_for():
    """The real ones' numbers where the variable names them."""
    found = {f"gsm8k/{split}.jsonl": len(gsm8k(split)) for split in ("train", "test")}
    found |= {f"eval/{name}.json": len(eval_set(name)) for name in EVAL}
    assert found == ROWS["real" if os.environ.get(VARIABLE) else "made"]


def test_solutions_are_of_gsm8ks_form_in_all_its_variety():
    rows = gsm8k()
    assert all(set(row) == {"question", "answer"} for row in rows)
    both = [*rows, *gsm8k("test")]
    assert len({row["question"] for row in both}) == len(both)
    answers = [row["answer"] for row in rows]
    ends = [answer.splitlines()[-1] for answer in answers]
    assert all(re.fullmatch(r"#### -?[\d,]+", end) for end in ends) and len(set(ends)) > 200
    assert sum("," in end for end in ends) > 50 and sum("-" in end for end in ends) > 2
    marked = [answer for answer in answers if re.search(r"<<[^<>=]+=[^<>]+>>", answer)]
    assert 0.95 < len(marked) / len(answers) < 1 and sum(answer.count("\n") > 5 for answer in answers) > 100
    assert sum(not (row["question"] + row["answer"]).isascii() for row in rows) > 200
    assert sum("\u2028" in row["question"] + row["answer"] for row in rows) > 0
    lengths = sorted(map(len, answers))
    assert lengths[0] < 100 and lengths[-1] > 1000


@pytest.mark.parametrize("style", STYLES)
def test_tiny_tokenizers_have_merges_and_llama3s_adds_a_begin_token(style):
    tokenizer = tiny(style)
    text = "\n".join(row["answer"] for row in gsm8k()[-200:])
    plain = tokenizer.encode(text, add_special_tokens=False)
    assert len(json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]) > 1000
    assert len(plain) < 0.6 * len(text) and tokenizer.decode(plain) == text
    assert tokenizer.encode(text) == ([tokenizer.bos_token_id, *plain] if style == "llama3" else plain)


def collected(**environment):
    """pytest's own run over one test file, with the variable as given."""
    given = {k: v for k, v in os.environ.items() if k != VARIABLE} | environment
    command = [sys.executable, "-m", "pytest", "--collect-only", "tests/test_rings.py", "-p", "no:cacheprovider"]
    return subprocess.run(command, env=given, cwd=ROOT, capture_output=True, text=True, timeout=120)


def laid_out(folder):
    for name in ROWS["real"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    return folder


@pytest.mark.parametrize("lacking", ["gsm8k/test.jsonl", "eval/minerva.json", None])
def test_a_named_folder_that_lacks_a_file_is_an_error_and_no_skip(tmp_path, lacking):
    folder = laid_out(tmp_path / "data")
    if lacking:
        (folder / lacking).unlink()
    done = collected(**{VARIABLE: str(folder)})
    if lacking:
        assert done.returncode == pytest.ExitCode.USAGE_ERROR
        assert f"{folder / lacking}: no such file. {VARIABLE}={folder} must name a folder with" in done.stderr
        assert f"without {VARIABLE} the tests make their data" in done.stderr
    else:
        assert done.returncode == 0 and f"test data: the real files in {folder} ({VARIABLE})" in done.stdout


def test_header_says_that_data_is_made():
    for environment in ({}, {VARIABLE: ""}):
        done = collected(**environment)
        assert done.returncode == 0
        assert f"test data: made by tests/made_data.py ({VARIABLE} names no folder with the real files)" in done.stdout


def test_made_data_is_the_same_in_every_process():
    code = "import made_data as m; print([m.gsm8k(), m.gsm8k('test'), [m.eval_set(name) for name in m.EVAL]])"
    given, command = {k: v for k, v in os.environ.items() if k != VARIABLE}, [sys.executable, "-X", "utf8", "-c", code]
    told = {
        subprocess.check_output(command, env={**given, "PYTHONHASHSEED": seed}, cwd=ROOT / "tests") for seed in "12"
    }
    assert len(told) == 1 and len(told.pop()) > 1_000_000


@pytest.mark.parametrize("beside, named", [(True, False), (False, False), (True, True), (False, True)])
def test_ci_takes_the_files_beside_the_clone_and_says_what_it_takes(tmp_path, beside, named):
    clone, other = tmp_path / "clone", tmp_path / "other"
    for folder in (clone / ".ci", clone / "tests"):
        folder.mkdir(parents=True)
    (clone / ".ci" / "run").write_text((ROOT / ".ci" / "run").read_text(encoding="utf-8"), encoding="utf-8")
    (clone / "tests" / "run.sh").write_text(f'echo "[${VARIABLE}] $*"\n', encoding="utf-8")
    if beside:
        laid_out(tmp_path / "shared" / "data")
    given = {k: v for k, v in os.environ.items() if k != VARIABLE} | {"CI": "true"}
    given |= {VARIABLE: str(other)} if named else {}
    command = ["bash", str(clone / ".ci" / "run"), "-x", "a b"]
    done = subprocess.run(command, env=given, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    folder = str(other) if named else str(tmp_path / "shared" / "data") if beside else ""
    said, passed = done.stdout.splitlines()
    assert done.returncode == 0 and done.stderr == "" and passed == f"[{folder}] -x a b"
    if folder:
        assert said == f"test data: the real files in {folder} ({VARIABLE})"
    else:
        assert said == f"test data: made by the tests, as there is no {tmp_path / 'shared' / 'data'} and no {VARIABLE}"


def test_the_variable_is_named_where_a_reader_looks():
    for file in ("README.md", "tests/run.sh", ".ci/run"):
        assert made_data.VARIABLE in (ROOT / file).read_text(encoding="utf-8"), file
