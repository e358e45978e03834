"""The command line: answers, and one clear line for whatever is wrong."""

import json

import pytest

from verl_hpt.cli import main

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
        ("[]", "case: must be an object"),
        ({"questions": []}, "questions: must be a list"),
        ({"questions": [{"uid": "a"}]}, "questions[0]: has neither rollouts nor demos"),
        ({"questions": [CASE["questions"][0]] * 2}, "questions[1].uid='q1': an earlier question has it too"),
        (change(["hpt", "method"], "nope"), "hpt.method='nope' is unknown; one of"),
        (change(["hpt", "gate"], {"x": 1}), "hpt.gate.x: unknown key"),
        (change(["hpt", "method"], "srft"), "questions[0].rollouts[0].entropy: method 'srft' needs it"),
        (change(["questions", 0, "rollout"], []), "questions[0].rollout: unknown key; one of"),
        (change(["questions", 0, "rollouts", 0, "length"], 0), "questions[0].rollouts[0].length=0"),
        (change(["questions", 0, "rollouts", 0, "reward"], "1"), "questions[0].rollouts[0].reward='1'"),
        (change(["questions", 0, "rollouts", 0, "log_prob"], [-1.0]), "rollouts[0].log_prob: 1 numbers for a row of 3"),
        (change(["questions", 0, "rollouts", 0, "log_prob"], 0.5), "a log-probability is at most 0"),
        (change(["questions", 0, "demos"], {}), "questions[0].demos: must be a list"),
        (change(["actor"], {"clip": 1}), "actor.clip: unknown key; one of clip_ratio_c"),
    ],
)
def test_a_wrong_case_gets_one_line_that_names_the_place(tmp_path, capsys, case, place):
    status, out, err = run(tmp_path, capsys, case)
    assert status == 2 and not out and place in err and len(err.strip().splitlines()) == 1 and "Traceback" not in err


def test_a_file_that_is_not_there_and_an_unknown_command(capsys):
    assert main(["explain", "no-such-file.json"]) == 2
    assert "no-such-file.json: cannot be read" in capsys.readouterr().err
    assert main(["explian"]) == 2
    assert "one of explain" in capsys.readouterr().err
