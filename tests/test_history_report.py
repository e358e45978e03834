"""`verl-hpt history`: questions by what became of them, named by the run's own data."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from test_lifecycle import Trainer

from verl_hpt import cli
from verl_hpt.errors import UserError
from verl_hpt.history import FILE, Draw, identity
from verl_hpt.tools import history as history_report


class Hashed(Trainer):
    hashed = True


def test_the_command_lists_forgotten_questions_with_their_text(tmp_path, capsys):
    trainer = Hashed()
    for scores in ([1, 0, 0, 0], [0] * 4):
        trainer.step({"what is 2+2?": scores, "other": [0] * 4})
    trainer.lifecycle.save(str(tmp_path))
    rows = [{"data_source": "src", "prompt": trainer.prompt(name)} for name in ("unknown", "what is 2+2?", "other")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    arguments = [str(tmp_path), "--which", "forgotten", "--data", str(tmp_path / "train.parquet")]
    assert history_report.main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["questions"], told["graduated"], told["forgotten"], told["never_solved"]) == (2, 0, 1, 1)
    assert [row["question"] for row in told["forgotten_questions"]] == ["row 1: what is 2+2?"]
    assert history_report.main(arguments) == 0
    assert "solved 0 of 4 at step 2, drawn 2 times, taught 1 (last at step 2)" in capsys.readouterr().out
    with pytest.raises(UserError, match="has no column 'question'; it has data_source, prompt"):
        history_report.main([*arguments, "--prompt-key", "question"])
    with pytest.raises(UserError, match=r"nothing.jsonl: no history"):
        history_report.main([str(tmp_path / "nothing.jsonl")])


def parquet(path, *names, **columns) -> str:
    """Training data: a row a name; further columns, or None for one that is left out."""
    rows = [
        {"data_source": "src", "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": name}]}
        for name in names
    ]
    table = [{k: v for k, v in (row | columns).items() if v is not None} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
    return str(path)


@pytest.fixture
def run(tmp_path):
    """Five questions, drawn last at steps 1 to 5, every second one taught; two of its files of data."""
    trainer = Hashed(n=2)
    trainer.prompt = lambda name: [{"role": "system", "content": "s"}, {"role": "user", "content": name}]
    for i in range(5):
        trainer.step({f"question\n {i} {'x' * 90}": [i % 2, 0]})
    trainer.lifecycle.history.tokens_saved = 1234.6
    trainer.lifecycle.save(str(tmp_path))
    return tmp_path


def told(capsys, *arguments) -> dict:
    assert cli.main(["history", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_counts_alone_without_a_listing(run, capsys):
    counts = {"questions": 5, "graduated": 0, "forgotten": 0, "never_solved": 3, "tokens_saved": 1234.6}
    assert told(capsys, run) == told(capsys, run / FILE) == counts
    assert cli.main(["history", str(run)]) == 0
    line = "questions 5 · graduated 0 · forgotten 0 · never_solved 3 · tokens_saved 1,235"
    assert capsys.readouterr().out.splitlines() == [line]


@pytest.mark.parametrize(
    ("limit", "steps"), [(None, [5, 4, 3, 2, 1]), (0, [5, 4, 3, 2, 1]), (2, [5, 4]), (1, [5]), (9, [5, 4, 3, 2, 1])]
)
def test_the_latest_draws_come_first_and_so_many_are_listed(run, capsys, limit, steps):
    found = told(capsys, run, "--which", "all", *([] if limit is None else ["--limit", limit]))
    assert [row["drawn_at"] for row in found["all_questions"]] == steps
    assert found["listed"] == len(steps) and found["questions"] == 5
    assert set(found["all_questions"][0]) == {"key", *history_report.SHOWN}, "no data, no text"


def test_twenty_are_listed_where_nothing_is_said(tmp_path, capsys):
    trainer = Trainer(n=2)
    trainer.step({f"q{i}": [0, 0] for i in range(25)})
    trainer.lifecycle.save(str(tmp_path))
    listed = told(capsys, tmp_path, "--which", "never_solved")["never_solved_questions"]
    keys = list(trainer.lifecycle.history.listing("never_solved"))[:20]
    assert [row["key"] for row in listed] == keys, "of one step: in the history's order"


def test_a_limit_below_zero_is_refused(run, capsys):
    assert cli.main(["history", str(run), "--which", "all", "--limit", "-1"]) == 2
    assert "--limit -1: give a number of questions, or 0 for all" in capsys.readouterr().err


def test_questions_are_named_by_the_rows_of_several_files(run, capsys):
    names = [f"question\n {i} {'x' * 90}" for i in range(5)]
    one = parquet(run / "one.parquet", "unknown", names[4], names[4], names[3])
    two = parquet(run / "two.parquet", names[3], names[2])
    found = told(capsys, run, "--which", "all", "--data", one, "--data", two)
    texts = [f"question {i} {'x' * 90}" for i in range(5)]
    assert [row["question"] for row in found["all_questions"]] == [
        f"row 1: {texts[4]}", f"row 0: {texts[3]}", f"row 1: {texts[2]}", *["not in the data given"] * 2,
    ]  # fmt: skip
    assert cli.main(["history", str(run), "--which", "all", "--data", one]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("tokens_saved 1,235 · listed 5") and len(lines) == 6
    key = f"{found['all_questions'][0]['key']}"
    shown = f"row 1: {texts[4]}"[:100]
    assert lines[1] == (
        f"{key}  solved 0 of 2 at step 5, drawn 1 times, taught 1 (last at step 5), failed 1 in a row  {shown}"
    )
    assert "solved 1 of 2 at step 4, drawn 1 times, taught 0, failed 0 in a row  row 3: question 3" in lines[2]


def test_rows_beyond_the_first_four_thousand_keep_their_number(run, capsys):
    name = f"question\n 4 {'x' * 90}"
    data = parquet(run / "long.parquet", *map(str, range(4100)), name)
    found = told(capsys, run, "--which", "all", "--data", data, "--limit", 1)
    assert found["all_questions"][0]["question"].startswith("row 4100: question 4 xx")


def test_data_without_a_source_has_the_empty_one_and_another_column_may_hold_the_prompt(tmp_path, capsys):
    lifecycle, messages = Trainer().lifecycle, [{"role": "user", "content": "plain"}]
    lifecycle.history.observe(1, [Draw(identity({"data_source": None, "raw_prompt": messages}), 0, 2, (0,), False)])
    lifecycle.save(str(tmp_path))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"asked": messages}]), tmp_path / "data.parquet")
    listing = ["--which", "never_solved", "--data", tmp_path / "data.parquet", "--prompt-key", "asked"]
    assert told(capsys, tmp_path, *listing)["never_solved_questions"][0]["question"] == "row 0: plain"


def test_questions_that_a_column_names_are_found_by_it(tmp_path, capsys):
    lifecycle = Trainer({"question_key": "id"}).lifecycle
    lifecycle.history.observe(1, [Draw(key, 0, 2, (0,), False) for key in ("7", "q ä")])
    lifecycle.save(str(tmp_path))
    rows = [{"id": key, "prompt": [{"role": "user", "content": "the same"}]} for key in ("6", "7", "q ä")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    listing = ["--which", "all", "--data", tmp_path / "data.parquet"]
    assert [(row["key"], row["question"]) for row in told(capsys, tmp_path, *listing)["all_questions"]] == [
        ("7", "row 1: the same"), ("q ä", "row 2: the same"),
    ]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"prompt": rows[0]["prompt"]}]), tmp_path / "data.parquet")
    assert cli.main(["history", str(tmp_path), *map(str, listing)]) == 2
    assert "data.parquet: has no column 'id'; it has prompt" in capsys.readouterr().err
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([rows[0], rows[1] | {"id": None}]), tmp_path / "data.parquet")
    assert cli.main(["history", str(tmp_path), *map(str, listing)]) == 2
    assert "data.parquet, row 1: its column 'id' (hpt.question_key) names no question" in capsys.readouterr().err


def test_data_without_a_listing_is_refused(run, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["history", str(run), "--data", parquet(run / "one.parquet", "q")])
    assert left.value.code == 2
    assert "--data names the questions that --which lists; set --which too" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"no parquet"])
def test_data_that_is_no_parquet_is_named(run, capsys, content):
    data = run / "data.parquet"
    if content is not None:
        data.write_bytes(content)
    assert cli.main(["history", str(run), "--which", "all", "--data", str(data)]) == 2
    assert f"{data}: cannot be read as parquet" in capsys.readouterr().err
