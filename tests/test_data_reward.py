"""`data check`: whose scorer a run would use, and what it makes of the file's demonstrations."""

import json
import shlex
import sys

import pytest
from test_data_check import checked, rows, say, verl_row, write
from verl_config import compose

from verl_hpt.data.advice import override
from verl_hpt.data.commands import main


def table(source):
    """Rows whose expected answers have no commas: verl's scorer takes them out of the answer that it reads alone."""
    made = [{**row, "data_source": source} for row in rows(20)]
    for row in made:
        row["reward_model"]["ground_truth"] = row["reward_model"]["ground_truth"].replace(",", "")
    return made


def test_verls_default_scorer_grades_what_it_knows(tmp_path):
    from verl.utils.reward_score import default_compute_score

    made = table("openai/gsm8k")
    made[3]["reward_model"]["ground_truth"] = "1,080"
    made[3]["target"] = say("It is so.\n#### 1,080")
    scores = [
        default_compute_score(r["data_source"], r["target"][0]["content"], r["reward_model"]["ground_truth"])
        for r in made
    ]
    status, found, result = checked(tmp_path, write(tmp_path / "a.parquet", made), "--reward", "verl")
    assert status == 1 and found["rejected"]["count"] == 20 - sum(scores) == 1
    assert result["rewards"]["openai/gsm8k"]["mean"] == sum(scores) / 20


def test_a_data_source_that_verls_scorer_does_not_know_is_harm_with_the_remedy(tmp_path, capsys):
    file = write(tmp_path / "a.parquet", table("own"))
    status, found, result = checked(tmp_path, file, "--reward", "verl")
    assert status == 1 and found["reward"]["count"] == 20
    assert (
        "NotImplementedError: Reward function is not implemented for data_source='own'"
        in (found["reward"]["examples"][0]["detail"])
    )
    assert "under verl's default scorer" in capsys.readouterr().out
    (note,) = [note for note in result["notes"] if note.startswith("to grade with the shipped grader: ")]
    reward = compose(*shlex.split(note.partition(": ")[2])).reward.custom_reward_function
    assert reward.name == "compute_score" and reward.path.endswith("verl_hpt/reward.py")
    assert checked(tmp_path, file, "--reward", f"{reward.path}:{reward.name}")[0] == 0


def test_the_check_says_what_a_run_without_a_reward_would_grade_with_and_tries_it(tmp_path):
    unsure = [verl_row(f"{i}?", say("It is 1."), "1", "lighteval/MATH") for i in range(3)]
    code = [verl_row("f?", say("exit()\n#### 1"), "1", "codecontests")]
    file = write(tmp_path / "a.parquet", [*table("openai/gsm8k"), *table("own"), *unsure, *code])
    result = checked(tmp_path, file)[2]
    notes = "\n".join(result["notes"])
    assert "verl's default scorer, which a run uses that names no reward" in notes
    assert "openai/gsm8k: it counts 8 of the first 8 demonstrations as solved" in notes
    assert "own: it does not know this data source and raises NotImplementedError" in notes
    assert "lighteval/MATH: it counts 0 of the first 3 demonstrations as solved" in notes
    assert "codecontests: not tried, it runs the code of the answer" in notes
    assert "to grade with the shipped grader, as here: reward.custom_reward_function.path=" in notes
    assert not any("default scorer" in note for note in checked(tmp_path, file, "--reward", "none")[2]["notes"])


def test_verl_that_cannot_be_imported_is_one_message(tmp_path, capsys, monkeypatch):
    file = write(tmp_path / "a.parquet", rows(2))
    monkeypatch.setitem(sys.modules, "verl.utils.reward_score", None)
    assert main(["check", file, "--reward", "verl"]) == 2
    assert "--reward verl: verl cannot be imported" in capsys.readouterr().err
    assert main(["check", file]) == 0
    assert "note: verl's default scorer could not be tried" in capsys.readouterr().out


def test_rows_without_an_expected_answer_need_a_reward_of_ones_own(tmp_path, capsys):
    file = write(tmp_path / "a.parquet", [verl_row("a?", say("Yes."), "")])
    own = tmp_path / "own.py"
    own.write_text("def compute_score(solution_str, ground_truth, **_):\n    return float(ground_truth == '')\n")
    assert checked(tmp_path, file, "--reward", str(own))[0] == 0
    assert checked(tmp_path, file, "--reward", "none")[0] == 0
    for options in ([], ["--reward", "shipped"], ["--reward", "verl"]):
        status, found, _ = checked(tmp_path, file, *options)
        assert status == 1 and found["schema"]["examples"][0]["field"] == "reward_model.ground_truth"
        assert "a reward of your own (--reward PATH) may do without" in found["schema"]["examples"][0]["detail"]


@pytest.mark.parametrize("value", ["/a/b.py", "a b", "it's", "{x}", "a=b,c", "back\\slash", "$HOME", '"', "ä", "[1]"])
def test_an_override_is_what_was_meant(value):
    (given,) = shlex.split(override("data.train_files", value))
    assert compose(given).data.train_files == value


def test_no_demonstrations_code_is_run_by_a_check(tmp_path, capsys):
    """verl's scorer executes the answers of these data sources; the check says that it does not grade them."""
    marker = tmp_path / "ran"
    row = {
        "data_source": "codecontests",
        "prompt": [{"role": "user", "content": "Write it."}],
        "reward_model": {"style": "rule", "ground_truth": '{"inputs": [""], "outputs": [""]}'},
        "extra_info": {"index": 0},
        "target": f"```python\nopen({str(marker)!r}, 'w')\n```",
    }
    file = tmp_path / "code.jsonl"
    file.write_text(json.dumps(row) + "\n")
    main(["check", str(file), "--reward", "verl"])
    assert "codecontests: not graded, verl's default scorer would run the answer's code" in capsys.readouterr().out
    assert not marker.exists()
