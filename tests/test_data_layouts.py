"""`data convert` on the layouts of public datasets, at the first try, row by row as a reader of the tests' own."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_layouts import CHAT_LAYOUTS
from layouts import MATH_LAYOUTS, ask, chat, say, sums

from verl_hpt.data.commands import main
from verl_hpt.demos.demonstration import demonstrations, plain

LAYOUTS = MATH_LAYOUTS | CHAT_LAYOUTS


def converted(path, *options):
    """(rows, standard output and error) of a conversion at the first try."""
    out = path.parent / "out.parquet"
    assert main(["convert", str(path), str(out), *options]) == 0
    return [plain(row) for row in pq.read_table(out).to_pylist()]


def as_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)


def as_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("write", [as_jsonl, as_parquet], ids=["jsonl", "parquet"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_converted_at_the_first_try(tmp_path, name, write):
    rows, options, read = LAYOUTS[name]
    path = tmp_path / f"in.{'parquet' if write is as_parquet else 'jsonl'}"
    write(path, rows)
    made = converted(path, *options)
    assert len(made) == len(rows)
    for row, back in zip(rows, made, strict=True):
        prompt, demos, truth = read(row)
        assert back["prompt"] == plain(prompt)
        assert [demo for demo in demonstrations(back.get("target")) if demo] == [plain(demo) for demo in demos if demo]
        assert back["reward_model"]["ground_truth"] == truth
        for name in row.keys() - {"prompt", "target", "reward_model", "extra_info"}:  # read, or carried over unchanged
            assert name not in back or back[name] == plain(row[name])


GSM8K = [{"question": q, "answer": f"{s}\n#### {a}"} for q, s, a in sums()]
CHATS = [chat(q, s) for q, s, _ in sums()]
SHAPES = {  # how a file holds its rows
    "one object around a list": json.dumps({"version": 1, "data": GSM8K}, indent=2),
    "the same in one line": json.dumps({"version": 1, "data": GSM8K}),
    "objects over many lines": "\n".join(json.dumps(row, indent=2) for row in GSM8K),
    "rows by id": json.dumps({f"id-{i}": row for i, row in enumerate(GSM8K)}, indent=1),
    "rows by id in one line": json.dumps({f"id-{i}": row for i, row in enumerate(GSM8K)}),
    "columns": json.dumps({key: [row[key] for row in GSM8K] for key in GSM8K[0]}),
    "columns of pandas": json.dumps({key: {str(i): row[key] for i, row in enumerate(GSM8K)} for key in GSM8K[0]}),
    "a pretty list": json.dumps(GSM8K, indent=4),
    "chats, one a line": "".join(json.dumps(messages) + "\n" for messages in CHATS),
    "a list of chats": json.dumps(CHATS),
}


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_read_however_the_file_holds_them(tmp_path, shape, suffix):
    path = tmp_path / f"in{suffix}"
    path.write_text(SHAPES[shape], encoding="utf-8")
    made = converted(path)
    assert [row["prompt"] for row in made] == [ask(q) for q, *_ in sums()]
    assert [row["reward_model"]["ground_truth"] for row in made] == [a for *_, a in sums()]
    assert [row.get("id") for row in made] == [f"id-{i}" if "by id" in shape else None for i in range(len(made))]


def test_one_row_over_many_lines_is_one_row(tmp_path):
    path = tmp_path / "in.json"
    for row in (GSM8K[0], {"messages": CHATS[0], "tags": ["a", "b"]}, {**GSM8K[0], "hints": [{"text": "x"}]}):
        path.write_text(json.dumps(row, indent=1), encoding="utf-8")
        (made,) = converted(path)
        assert made["prompt"] == ask(sums()[0][0])


@pytest.mark.parametrize("indent", [None, 1])
def test_a_row_of_objects_is_not_taken_for_a_file_of_rows(tmp_path, capsys, indent):
    path = tmp_path / "in.jsonl"
    row = {"quiz": {"ask": "1?", "key": "1"}, "steps": [{"text": "x"}]}
    path.write_text(json.dumps(row, indent=indent), encoding="utf-8")
    assert main(["convert", str(path), str(tmp_path / "out.parquet")]) == 2
    assert "row 1: field `prompt`: no question found" in capsys.readouterr().err
    (made,) = converted(path, "--prompt-key", "quiz.ask", "--answer-key", "quiz.key")
    assert made["prompt"] == ask("1?") and made["steps"] == row["steps"]


def said(tmp_path, capsys, rows, *options):
    """(status, rows, standard output, standard error)"""
    path, out = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    out.unlink(missing_ok=True)
    as_jsonl(path, rows)
    status = main(["convert", str(path), str(out), *options])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, pq.read_table(out).to_pylist() if out.exists() else None, captured.out, captured.err


def test_a_file_of_headings_is_not_called_gsm8k(tmp_path, capsys):
    text = "#### Step 1: read\nx\n#### Step 2: compute\nSo $\\boxed{42}$.\n#### Remark"
    for row in (
        {"question": "a?", "answer": text},
        {"question": "a?", "solution": text},
        {"messages": chat("a?", text)},
    ):
        status, (made,), out, _ = said(tmp_path, capsys, [row])
        assert status == 0 and made["reward_model"]["ground_truth"] == "42" and made["data_source"] == "in"
        assert "format gsm8k" not in out and made["target"] == say(text)
    status, _, _, err = said(tmp_path, capsys, [{"messages": chat("a?", "#### Step 2: compute\nIt is 42.")}])
    assert status == 2 and "row 1: field `messages`: no expected answer" in err and "--no-answer" in err


def test_without_no_answer_a_chat_is_refused_and_the_remedy_is_named(tmp_path, capsys):
    row = {"messages": chat("a?", "Yes.")}
    status, made, _, err = said(tmp_path, capsys, [row])
    assert status == 2 and made is None and "--no-answer` writes an empty one (for a reward of your own)" in err
    status, (made,), out, err = said(tmp_path, capsys, [row], "--no-answer")
    assert status == 0 and made["reward_model"] == {"style": "rule", "ground_truth": ""}
    assert "1 of 1 rows have no expected answer: training on them needs your own reward" in err
    assert "verl_hpt/reward.py" not in out and "reward.custom_reward_function.path=FILE.py" in out


def test_an_answer_that_there_is_is_kept_under_no_answer(tmp_path, capsys):
    rows = [{"question": "a?", "solution": "x", "answer": "1"}, {"question": "b?", "solution": "x", "answer": None}]
    _, made, *_ = said(tmp_path, capsys, rows, "--no-answer")
    assert [row["reward_model"]["ground_truth"] for row in made] == ["1", ""]


def test_empty_texts_are_no_demonstrations(tmp_path, capsys):
    rows = [{"question": "a?", "solution": text, "answer": "1"} for text in ("It is 1.", "", " \n", None)]
    rows.append({"question": "a?", "solution": [], "answer": "1"})
    _, made, out, _ = said(tmp_path, capsys, rows)
    assert "1 demonstrations; 4 questions without one" in out
    assert [row["target"] for row in made] == [say("It is 1.")] + [None] * 4
    out = said(tmp_path, capsys, [{"messages": chat("a?", ""), "answer": "1"}])[2]
    assert "0 demonstrations; 1 questions without one" in out


def test_a_demonstration_that_begins_with_the_question_loses_it(tmp_path, capsys):
    row = {"prompt": "a?", "messages": chat("a?", "Yes."), "answer": "1"}
    for options in ([], ["--demo-key", "messages"], ["--demo-key", "messages", "--prompt-key", "prompt"]):
        _, (made,), *_ = said(tmp_path, capsys, [row], *options)
        assert made["prompt"] == ask("a?") and made["target"] == say("Yes.")
    other = {**row, "messages": chat("b?", "Yes.")}
    status, _, _, err = said(tmp_path, capsys, [other], "--demo-key", "messages")
    assert status == 2 and "field `messages`: begins with the user's turn, but not with this row's question" in err


@pytest.mark.parametrize("name", ["gt", "gt_answer", "Reference_Answer", "golden_answers", "answerKey"])
def test_names_of_the_expected_answer(tmp_path, capsys, name):
    _, (made,), *_ = said(tmp_path, capsys, [{"question": "a?", "solution": "x", name: "1"}])
    assert made["reward_model"]["ground_truth"] == "1" and name not in made


LEFT_OUT = {
    "images": (["x.png"], "a run trains on text alone"),
    "tools": ([{"name": "f"}], "multi_turn.tool_config_path alone"),
    "choices": ([[1], [2]], "a question may refer to it"),
    "context": ({"title": ["x"]}, "a question may refer to it"),
    "history": ([["a"]], "a question may refer to it"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_no_prompt_has_is_a_weighty_warning_and_drop_ends_it(tmp_path, capsys, name):
    value, says = LEFT_OUT[name]
    rows = [
        {"question": "a?", "solution": "x", "answer": "1", name: value},
        {"question": "b?", "solution": "x", "answer": "1"},
    ]
    status, made, _, err = said(tmp_path, capsys, rows)
    assert (
        status == 0 and f"WARNING: {tmp_path}/in.jsonl: no prompt has `{name}`: " in err and f"{says} (1 rows)" in err
    )
    assert f"or say --drop {name}" in err and made[0][name] is not None
    assert "WARNING" not in said(tmp_path, capsys, rows, "--drop", name)[3]
    as_jsonl(tmp_path / "in.jsonl", rows)
    assert main(["check", str(tmp_path / "in.jsonl"), "--reward", "none"]) == 0
    out = capsys.readouterr().out
    assert "warning: fields beside the question that no prompt has: rollouts do not see them: 1\n" in out
    assert f"{tmp_path}/in.jsonl: row 1: field `{name}`: no prompt has `{name}`" in out


def test_a_passage_that_the_question_has_already_is_not_put_twice(tmp_path, capsys):
    row = {"question": "It rains.\nDoes it?", "context": "It rains.", "answer": "yes"}
    _, (made,), _, err = said(tmp_path, capsys, [row])
    assert made["prompt"] == ask(row["question"]) and "WARNING" not in err


def test_options_with_letters_of_their_own(tmp_path, capsys):
    for options, listed, answer, letter in (
        ({"A": "one", "B": "two"}, "A. one\nB. two", "B", "B"),
        ([{"label": "A", "text": "one"}, {"label": "B", "text": "two"}], "A. one\nB. two", "two", "B"),
        (["(A) one", "(B) two"], "(A) one\n(B) two", 0, "A"),
        ("a ) one , b ) two", "a ) one , b ) two", "b", "B"),
        (["one", "two"], "A. one\nB. two", ["two"], "B"),
    ):
        _, (made,), out, _ = said(tmp_path, capsys, [{"question": "a?", "options": options, "answer": answer}])
        assert made["prompt"] == ask(f"a?\n\n{listed}") and made["reward_model"]["ground_truth"] == letter
        assert "reward.custom_reward_function.name=multiple_choice" in out


EIGHT = {
    "problem": "1+1?",
    "answer": "2",
    "generations": ["It is \\boxed{3}.", "It is \\boxed{2}.", "So \\boxed{2}."],
    "correctness_math_verify": [False, True, True],
}


def test_the_first_of_several_that_is_graded_wrong_is_said_and_can_be_passed_over(tmp_path, capsys):
    rows = [EIGHT, {**EIGHT, "problem": "1+2?"}, {**EIGHT, "answer": "3", "correctness_math_verify": [True] * 3}]
    _, made, _, err = said(tmp_path, capsys, rows)
    assert "`correctness_math_verify` calls the first demonstration wrong in 2 rows; --best-of-graded" in err
    assert len(made[0]["target"]) == 3
    rows[1]["answer"] = "7"
    status, made, _, err = said(tmp_path, capsys, rows, "--best-of-graded")
    assert status == 0 and [row["target"] for row in made] == [say("It is \\boxed{2}."), None, say("It is \\boxed{3}.")]
    assert "the grader accepts no demonstration of 1 questions: they are left without" in err and "WARNING" not in err
    (tmp_path / "long.py").write_text("def compute_score(solution_str, **_):\n    return float('So' in solution_str)\n")
    _, made, *_ = said(tmp_path, capsys, rows, "--best-of-graded", "--reward", str(tmp_path / "long.py"))
    assert [row["target"] for row in made] == [say("So \\boxed{2}.")] * 3
    single = {"question": "a?", "deepseek_attempt": "It is 1.", "deepseek_grade": "No", "answer": "2"}
    assert "`deepseek_grade` calls the first demonstration wrong in 1 rows" in said(tmp_path, capsys, [single])[3]


def test_a_grader_that_fails_is_said_and_one_that_is_not_used_is_refused(tmp_path, capsys):
    status, made, _, err = said(tmp_path, capsys, [EIGHT], "--best-of-graded", "--reward", "verl")
    assert status == 0 and made[0]["target"] is None
    assert "the grader fails on 3 demonstrations: NotImplementedError: Reward function is not implemented" in err
    for options in (["--reward", "verl"], ["--best-of-graded", "--reward", "none"]):
        status, made, _, err = said(tmp_path, capsys, [EIGHT], *options)
        assert status == 2 and made is None and "--reward names the grader of --best-of-graded" in err


def test_true_and_false_are_no_expected_answer_and_a_label_is_one_of_a_completion_alone(tmp_path, capsys):
    row = {"question": "a?", "solution": "So \\boxed{1}.", "correct": True, "label": False}
    _, (made,), *_ = said(tmp_path, capsys, [row])
    assert made["reward_model"]["ground_truth"] == "1" and made["target"] == say(row["solution"])
    assert made["correct"] is True and made["label"] is False
    rows = [{"prompt": f"{i}?", "completion": "x", "label": i > 0} for i in range(2)]
    _, made, out, _ = said(tmp_path, capsys, rows, "--no-answer")
    assert "demonstrations `completion` where `label` is true" in out and [r["target"] for r in made] == [
        None,
        say("x"),
    ]


def test_an_evaluation_set_of_multiple_choice_asks_for_the_letter(tmp_path):
    (tmp_path / "mmlu.jsonl").write_text(json.dumps({"question": "a?", "choices": ["x", "y"], "answer": 1}))
    assert main(["eval-set", str(tmp_path), str(tmp_path / "mmlu.jsonl")]) == 0
    (row,) = pq.read_table(tmp_path / "mmlu.parquet").to_pylist()
    assert (
        row["prompt"][0]["content"].startswith("a?\n\nA. x\nB. y\n\n") and "the letter" in row["prompt"][0]["content"]
    )
    assert row["reward_model"]["ground_truth"] == "B"


@pytest.mark.parametrize("content", [SHAPES["one object around a list"], SHAPES["chats, one a line"]])
def test_a_damaged_archive_of_any_shape_is_one_message(tmp_path, capsys, content):
    whole = gzip.compress((content * 50).encode(), 0)
    for cut in (200, len(whole) // 2, len(whole) - 4):
        (tmp_path / "in.json.gz").write_bytes(whole[:cut])
        assert main(["convert", str(tmp_path / "in.json.gz"), str(tmp_path / "out.parquet")]) == 2
        assert "in.json.gz: " in capsys.readouterr().err


def test_the_overrides_compose_as_verl_reads_them(tmp_path, capsys):
    import shlex

    from verl_config import compose

    folder = tmp_path / "a folder, it's {odd}=1"
    folder.mkdir()
    as_jsonl(folder / "in.jsonl", GSM8K * 20)
    out, val = folder / "out.parquet", folder / "val.parquet"
    assert main(["convert", str(folder / "in.jsonl"), str(out), "--val", str(val), "--val-share", "0.5"]) == 0
    printed = capsys.readouterr().out.partition("Add to the verl command:\n")[2].partition("\nFirst")[0]
    config = compose(*shlex.split(printed.replace("\\\n", " ")))
    assert (config.data.train_files, config.data.val_files) == (str(out), str(val))
    assert config.reward.custom_reward_function.path.endswith("verl_hpt/reward.py")
    assert config.reward.custom_reward_function.name == "compute_score"
    assert config.hpt.demo.key == "target" and config.algorithm.adv_estimator == "hpt"


def test_names_in_a_message_are_few_and_examples_differ(tmp_path, capsys):
    row = {f"field {i} {'x' * 100}": i for i in range(500)}
    status, _, _, err = said(tmp_path, capsys, [row])
    assert status == 2 and "and 480 more" in err and len(err) < 3000
    wide = {f"field {i}": i for i in range(1000)}
    status, _, _, err = said(tmp_path, capsys, [{**GSM8K[0], "r": wide}, {**GSM8K[0], "r": "x"}])
    assert status == 2 and "row 2: field `r`: fits no one type" in err and len(err) < 2000
    rows = [{"question": f"{i}?", "answer": None} for i in range(50)]
    status, _, out, _ = said(tmp_path, capsys, [*GSM8K, *rows], "--skip-bad")
    assert status == 0 and out.count("for example") == 1
    as_jsonl(tmp_path / "in.jsonl", [*GSM8K, *rows])
    assert main(["check", str(tmp_path / "in.jsonl"), "--reward", "none"]) == 1
    out = capsys.readouterr().out
    assert out.count("row 8: field `answer`") == 1 and "… and 49 more: rows 9, 10, 11" in out
