"""The command line: answers, and one clear line for whatever is wrong."""

import json
import math
import sys

import pytest

from verl_hpt import gate
from verl_hpt.cli import main
from verl_hpt.errors import UserError
from verl_hpt.tools.explain import explain

CASE = {
    "hpt": {"method": "hpt", "normalization": "official", "rl_length_scale": 16, "demo_coef": 1.0},
    "questions": [
        {
            "uid": "q1",
            "rollouts": [{"reward": 0, "length": 3, "log_prob": -1.0}],
            "demos": [{"length": 2, "log_prob": -0.5}],
        },
        {"uid": "q2", "rollouts": [{"reward": r, "length": 2, "log_prob": [-1.0, -2.0]} for r in (1, 0)]},
    ],
}


def run(tmp_path, capsys, case) -> tuple[int, str, str]:
    path = tmp_path / "case.json"
    path.write_text(case if isinstance(case, str) else json.dumps(case), encoding="utf-8")
    status = main(["explain", str(path)])
    out, err = capsys.readouterr()
    return status, out, err


def test_explain_prints_rows_dropped_and_loss(tmp_path, capsys):
    status, out, _ = run(tmp_path, capsys, CASE)
    answer = json.loads(out)
    assert status == 0
    demo, first, second = answer["rows"]
    assert (demo["uid"], demo["kind"], demo["zone"], demo["advantage"]) == ("q1", "demo", "demo", None)
    assert demo["weight"] == {"rl": 0.0, "demo": 0.5} and demo["gradient"] == [-0.5, -0.5]
    assert (first["zone"], first["advantage"], second["advantage"]) == ("rl", 0.5, -0.5)
    assert first["coefficient"] == {"rl": [0.5, 0.5], "demo": [0.0, 0.0]}
    assert answer["dropped"] == [
        {"uid": "q1", "kind": "rollout", "index": 0, "why": "the question trains on its demonstration"}
    ]
    assert answer["loss"]["total"] == pytest.approx(answer["loss"]["rl"] + answer["loss"]["demo"])


def change(path, value):
    case = json.loads(json.dumps(CASE))
    node = case
    *way, last = path
    for step in way:
        node = node[step]
    node[last] = value
    return case


@pytest.mark.parametrize(
    ("case", "place"),
    [
        ("{", "is not JSON"),
        ("[]", "case=[]: must be a mapping with keys hpt, questions, stream, buffer, actor, step"),
        ({"questions": []}, "questions=[]: must be a list of at least 1"),
        ({"questions": [{"uid": "a"}]}, "questions[0]: has neither rollouts nor demos"),
        ({"questions": [CASE["questions"][0]] * 2}, "questions[1].uid='q1': an earlier question has it too"),
        (change(["hpt", "method"], "nope"), "hpt.method='nope' is unknown; one of"),
        (change(["hpt", "gate"], {"x": 1}), "hpt.gate.x: unknown key"),
        (
            {"hpt": {"method": "srft"}, "questions": CASE["questions"][1:]},
            "questions[0].rollouts[0].entropy: missing; method 'srft' needs it",
        ),
        (
            change(["questions", 0, "rollout"], []),
            "questions[0].rollout: unknown key (value []); one of uid, source, rollouts",
        ),
        (change(["questions", 0, "rollouts", 0, "length"], 0), "questions[0].rollouts[0].length=0"),
        (change(["questions", 0, "rollouts", 0, "reward"], "1"), "questions[0].rollouts[0].reward='1'"),
        (change(["questions", 0, "rollouts", 0, "log_prob"], [-1.0]), "rollouts[0].log_prob: 1 numbers for a row of 3"),
        (
            change(["questions", 0, "rollouts", 0, "log_prob"], 0.5),
            "log_prob=0.5: must be a number at most 0 or a list",
        ),
        (change(["questions", 0, "demos"], {}), "questions[0].demos={}: must be a list"),
        (change(["actor"], {"clip": 1}), "actor.clip: unknown key (value 1); one of clip_ratio_low"),
        (change(["actor"], {"clip_ratio_low": -1}), "actor.clip_ratio_low=-1: must be a number at least 0"),
        (
            change(["actor"], {"clip_ratio_high": "x"}),
            "actor.clip_ratio_high='x': must be a number at least 0, got str",
        ),
        (change(["actor"], {"clip_ratio_c": 1}), "actor.clip_ratio_c=1: must be a number above 1"),
    ],
)
def test_a_wrong_case_gets_one_line_that_names_the_place(tmp_path, capsys, case, place):
    status, out, err = run(tmp_path, capsys, case)
    assert status == 2 and not out and place in err and len(err.strip().splitlines()) == 1 and "Traceback" not in err


def test_every_problem_of_a_case_comes_at_once(tmp_path, capsys):
    case = change(["questions", 0, "rollouts", 0, "length"], "3") | {
        "hpt": {"seed": "x"},
        "step": -1,
        "actor": {"clip": 1},
    }
    _, _, err = run(tmp_path, capsys, case)
    assert err.count("\n  - ") == 4
    for problem in (
        "hpt.seed='x'",
        "case.step=-1",
        "case.actor.clip: unknown key",
        "rollouts[0].length='3': must be a whole",
    ):
        assert problem in err
    _, _, err = run(tmp_path, capsys, change(["hpt"], {"method": "srft"}))
    assert "questions[0].rollouts[0].entropy" in err and "questions[0].demos[0].entropy" in err, (
        "the first of each kind"
    )


def test_a_row_with_thousands_of_wrong_numbers_gets_a_message_that_can_be_read(tmp_path, capsys):
    row = {"reward": 0, "length": 4000, "log_prob": [0.5] * 4000}
    _, _, err = run(tmp_path, capsys, {"questions": [{"rollouts": [row]}]})
    assert err.count("must be a number at most 0") == 50 and "... and 3950 more" in err


@pytest.mark.parametrize(
    ("weights", "problem"),
    [([1.0], "token_weights: 1 numbers for a row of 2"), ([0, 0], "token_weights=[0.0, 0.0]: one must be above 0"),
     ([1, -1], "token_weights[1]=-1: must be a number at least 0")],
)  # fmt: skip
def test_token_weights_of_a_case_are_checked(tmp_path, capsys, weights, problem):
    _, _, err = run(tmp_path, capsys, change(["questions", 0, "demos", 0, "token_weights"], weights))
    assert problem in err
    _, _, err = run(tmp_path, capsys, change(["questions", 0, "rollouts", 0, "token_weights"], 1.0))
    assert "rollouts[0].token_weights=1.0: must be null: a demonstration's alone" in err


def test_a_file_that_is_not_there_and_an_unknown_command(capsys):
    assert main(["explain", "no-such-file.json"]) == 2
    assert "no-such-file.json: cannot be read" in capsys.readouterr().err
    assert main(["explian"]) == 2
    assert "one of explain" in capsys.readouterr().err


def test_a_composed_s_term_without_an_advantage_trains_as_the_named_method_does():
    """DFT's weight of a token is p, −0.5 nats: gradient −λ·p/|τ| with λ = 1, |τ| = 2, one question a demonstration."""
    composed = {"rollouts": "dr_grpo", "demos": [{"kind": "S", "estimator": {"reference": "one"}}]}
    (demo, *_) = explain(change(["hpt", "compose"], composed))["rows"]
    assert demo["kind"] == "demo" and demo["gradient"] == pytest.approx([-math.exp(-0.5) / 2] * 2)


def test_the_clip_range_of_a_case_is_read():
    """A rollout with Â = 0.5 and ratio e^0.2 = 1.22: it learns below a bound of 1.3 and stands still above 1.1."""
    rows = [{"reward": r, "length": 1, "log_prob": -1.0, "old_log_prob": -1.2} for r in (1, 0)]
    for high, coefficient in ((0.3, 0.5 * math.exp(0.2)), (0.1, 0.0)):
        case = {"hpt": {"method": "dr_grpo"}, "actor": {"clip_ratio_high": high}, "questions": [{"rollouts": rows}]}
        assert explain(case)["rows"][0]["coefficient"]["rl"] == pytest.approx([coefficient])


MODULE = """
from pathlib import Path
import verl_hpt.gate as gate
Path(__file__).with_name("imported").touch()

@gate.register_gate
def never_on_a_demonstration(solved, n, settings):
    return gate.RL
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's that leaves a trace when it is imported."""
    from verl_hpt.gate import GATES

    (tmp_path / "a_case_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield change(["hpt"], {"modules": ["a_case_module"], "gate": {"function": "never_on_a_demonstration"}})
    GATES.pop("never_on_a_demonstration", None)
    sys.modules.pop("a_case_module", None)


def test_a_cases_modules_are_not_imported_unless_asked(tmp_path, capsys, module):
    status, out, err = run(tmp_path, capsys, module)
    assert status == 2 and not out
    assert "hpt.modules=['a_case_module']: explaining this case would import them and so run their code" in err
    assert "add --import-modules" in err and not (tmp_path / "imported").exists()
    with pytest.raises(UserError, match="--import-modules"):
        explain(module)
    assert not (tmp_path / "imported").exists()


def test_a_cases_modules_are_imported_with_the_flag(tmp_path, capsys, module):
    path = tmp_path / "case.json"
    path.write_text(json.dumps(module))
    assert main(["explain", str(path), "--import-modules"]) == 0
    zones = {row["uid"]: row["zone"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert zones == {"q1": "rl", "q2": "rl"} and (tmp_path / "imported").exists()
    assert explain(module, import_modules=True)["rows"]


def test_the_flag_is_told_by_help(capsys):
    with pytest.raises(SystemExit):
        main(["explain", "--help"])
    assert "--import-modules" in capsys.readouterr().out


def test_a_gate_reads_the_history_that_the_case_gives(monkeypatch):
    monkeypatch.setitem(gate.GATES, "rested", lambda outcome: gate.RL if outcome.history["uses"] else gate.DEMO)
    row = {"length": 1, "log_prob": -1.0}

    def zones(**question):
        question = {"rollouts": [{**row, "reward": 0}], "demos": [row], **question}
        return {r["zone"] for r in explain({"hpt": {"gate": {"function": "rested"}}, "questions": [question]})["rows"]}

    assert (zones(), zones(history={"drawn": 2}), zones(history={"uses": 1})) == ({"demo"}, {"demo"}, {"rl"})
    with pytest.raises(UserError, match=r"questions\[0\].history.use: unknown key .* did you mean uses"):
        zones(history={"use": 1})
    with pytest.raises(UserError, match=r"questions\[0\].history.uses=-1: must be"):
        zones(history={"uses": -1})
