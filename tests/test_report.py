"""`verl-hpt report`: every number comes from verl's metrics, damaged input is named."""

import itertools
import json

import pytest
import quickstart_task

from verl_hpt.errors import UserError
from verl_hpt.tools import answers as report_answers
from verl_hpt.tools import report

ACC = "val-core/verl-hpt/reverse/acc/mean@1"


def write(directory, lines):
    directory.mkdir(exist_ok=True)
    text = "".join(json.dumps({"step": step, "data": data}) + "\n" for step, data in lines)
    (directory / "metrics.jsonl").write_text(text)
    return str(directory)


def hpt_run(directory, steps=12):
    lines = [(0, {ACC: 0.0})]
    for step in range(1, steps + 1):
        share = step / steps
        data = {"hpt/solve_rate": share / 2, "hpt/demo_share": 1 - share, "critic/score/mean": 99.0, "timing_s/step": 2}
        if share > 0.5:
            data["hpt/rl_solve_rate"] = share
        if step % 2 == 0:
            data[ACC] = share
        lines.append((step, data))
    return write(directory, lines)


def test_summary_is_recomputable_from_the_metrics(tmp_path, capsys):
    run = hpt_run(tmp_path / "run")
    assert report.main([run]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for curve, key in (
        ("validation_accuracy", ACC),
        ("solve_rate", "hpt/solve_rate"),
        ("rl_solve_rate", "hpt/rl_solve_rate"),
        ("demo_share", "hpt/demo_share"),
    ):
        assert summary[curve] == [[e["step"], e["data"][key]] for e in entries if key in e["data"]]
    assert summary["validation_accuracy"][0] == [0, 0.0]
    assert (summary["steps"], summary["seconds_of_steps"]) == (12, 24.0)
    assert (tmp_path / "run" / "report.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "0.667" in out  # mean of the last five validations: (4 + 6 + 8 + 10 + 12) / 12 / 5
    assert "1.00" not in out.split("0.667")[0]


def test_stock_run_takes_the_mean_score_for_its_solve_rate(tmp_path):
    run = write(tmp_path / "grpo", [(1, {"critic/score/mean": 0.25}), (2, {"critic/score/mean": 0.5, ACC: 0.1})])
    summary = report.summarize(run)
    assert summary["solve_rate"] == [[1, 0.25], [2, 0.5]]
    assert summary["demo_share"] == summary["rl_solve_rate"] == []


def test_several_runs_stand_side_by_side(tmp_path, capsys):
    a, b = hpt_run(tmp_path / "a"), write(tmp_path / "b", [(0, {ACC: 0.0}), (1, {"critic/score/mean": 0.0})])
    assert report.main([a, b, "--out", str(tmp_path / "both")]) == 0
    assert list(json.loads((tmp_path / "both" / "summary.json").read_text())) == ["a", "b"]
    assert (tmp_path / "both" / "report.png").exists()
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[2:4]] == ["a", "b"]


def test_runs_of_one_name_keep_their_paths():
    assert report.names(["x/run", "y/run/", "z/other"]) == ["x/run", "y/run/", "other"]


def test_validation_is_the_mean_over_sources_of_the_largest_k():
    data = {
        "val-core/math/acc/mean@1": 0.9,
        "val-core/math/acc/mean@32": 0.4,
        "val-core/math/reward/mean@64": 0.0,
        "val-core/aime/2024/reward/mean@8": 0.2,
        "val-core/math/acc/best@32/mean": 1.0,
        "val-aux/math/score/mean@32": 1.0,
    }
    assert report.validation(data) == {"aime/2024": 0.2, "math": 0.4}
    assert report.curves([(3, data)])["validation_accuracy"] == [[3, pytest.approx(0.3)]]


def test_nan_and_null_are_left_out(tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "metrics.jsonl").write_text(
        '{"step":1,"data":{"hpt/solve_rate":null,"critic/score/mean":0.5}}\n{"step":2,"data":{"hpt/solve_rate":NaN}}\n'
    )
    assert report.summarize(str(directory))["solve_rate"] == [[1, 0.5]]


def test_a_line_that_is_being_written_is_left_out_and_a_broken_one_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":1,"data":{"hpt/solve_rate":0.5}}\n{"step":2,"da')
    assert quickstart_task.latest(str(path)) == {"step": 1, "solve_rate": 0.5}
    path.write_text('{"step":1,"data":{}}\n{"step":2,"da\n{"step":3,"data":{}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        report.read(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist.*VERL_FILE_LOGGER_PATH"),
        (b"", r"holds no validation.*lines: 0"),
        (b'{"step":1,"data":{"loss":1}}\n', r"holds no validation.*lines: 1"),
        (b"[1]\n", "line 1"),
        (b'{"step":1,"data":3}\n', "line 1"),
        (b"\xff\xfe\n", "cannot be read"),
    ],
)
def test_unusable_input_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        report.main([str(tmp_path)])


def test_latest_of_a_run_that_has_not_begun_is_none(tmp_path):
    assert quickstart_task.latest(str(tmp_path / "metrics.jsonl")) is None


def test_running_mean_keeps_length_and_constants():
    assert report.smooth([1.0] * 7) == [1.0] * 7
    assert report.smooth([0.0, 3.0]) == [1.5, 1.5]
    assert report.smooth([5.0]) == [5.0]


def test_several_validation_sets_make_the_papers_table_with_a_mean_only_over_all_of_them():
    full = {"validation_by_source": {"aime24": [[0, 0.1], [9, 0.25]], "math-500": [[9, 0.5]]}}
    part = {"validation_by_source": {"math-500": [[9, 0.8]]}}
    lines = report.benchmarks({"one": full, "two": part}).splitlines()
    assert lines[0].split() == ["run", "aime24", "math-500", "mean"]
    assert lines[2].split() == ["one", "25.0", "50.0", "37.5"] and lines[3].split() == ["two", "–", "80.0", "–"]
    assert report.benchmarks({"two": part}) == ""


# --- answers of a validation ------------------------------------------------------------------------------------------


def write_answers(run, lines, step=0):
    (run / "answers").mkdir(parents=True, exist_ok=True)
    (run / "answers" / f"{step}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def answer(question, session, right, source="aime24"):
    uid = f"{question}_{session}_0"
    return {"input": "?", "output": "!", "score": right, "step": 0, "acc": right, "uid": uid, "data_source": source}


def test_pass_at_k_is_the_share_of_draws_with_a_right_answer():
    """Every subset of k of n answers, counted."""
    for n, right in itertools.product(range(1, 7), range(7)):
        for k in range(1, n + 1):
            if right <= n:
                draws = list(itertools.combinations([True] * right + [False] * (n - right), k))
                assert report_answers.pass_at(k, n, right) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_answers_become_avg_and_pass_of_each_set_and_a_lost_one_counts_as_wrong(tmp_path, capsys):
    run = tmp_path / "run"
    write(run, [(0, {ACC: 0.5})])
    lines = [answer("a", s, float(s == 0)) for s in range(4)] + [answer("b", s, 1.0) for s in range(3)]
    write_answers(run, [*lines, answer("c", 0, 1.0, "amc")])
    write_answers(run, [answer("a", 0, 0.0)], step=-1)
    assert report.main([str(run)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["set", "questions", "answers", "avg@n", "pass@2", "pass@4"] in rows
    assert ["aime24", "2", "4", "50.0", "75.0", "100.0"] in rows and ["amc", "1", "1", "100.0", "–", "–"] in rows


def test_a_line_that_is_no_answer_is_named(tmp_path):
    write_answers(tmp_path, [answer("a", 0, 1.0), {"output": "x"}])
    with pytest.raises(UserError, match=r"0\.jsonl, line 2: not an answer of verl's validation"):
        report_answers.answers(str(tmp_path))
    assert report_answers.answers(str(tmp_path / "nothing")) is None


def test_alarms_of_a_run_are_told_since_when_and_what_to_set(tmp_path, capsys):
    lines = [
        {"step": step, "data": {"hpt/solve_rate": 0.5, "hpt/alarm/length": float(step > 3), "hpt/alarm/entropy": 0.0}}
        for step in range(1, 7)
    ]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report.main([str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["alarms"] == {
        "length": {"first_step": 4, "steps": 3}
    }
    out = capsys.readouterr().out
    assert "run: alarm length since step 4 (3 steps): rollouts are more than twice as long" in out
    assert "To mend it, set hpt.rollouts.truncated" in out and "entropy" not in out
