"""`verl-hpt history`: questions by what became of them, named by the run's own data."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from test_lifecycle import Trainer

from verl_hpt import history_report
from verl_hpt.errors import UserError


def test_the_command_lists_forgotten_questions_with_their_text(tmp_path, capsys):
    trainer = Trainer()
    for scores in ([1, 0, 0, 0], [0] * 4):
        trainer.step({"what is 2+2?": scores, "other": [0] * 4})
    trainer.lifecycle.save(str(tmp_path))
    rows = [{"data_source": "src", "prompt": trainer.prompt(name)} for name in ("unknown", "what is 2+2?", "other")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    arguments = [str(tmp_path), "--which", "forgotten", "--data", str(tmp_path / "train.parquet")]
    assert history_report.main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["questions"], told["graduated"], told["forgotten"], told["hopeless"]) == (2, 0, 1, 1)
    assert [row["question"] for row in told["forgotten_questions"]] == ["row 1: what is 2+2?"]
    assert history_report.main(arguments) == 0
    assert "solved 0 of 4 at step 2, drawn 2 times, taught 1 (last at step 2)" in capsys.readouterr().out
    with pytest.raises(UserError, match="has no column 'question'; it has data_source, prompt"):
        history_report.main([*arguments, "--prompt-key", "question"])
    with pytest.raises(UserError, match=r"nothing.npz: no history"):
        history_report.main([str(tmp_path / "nothing.npz")])
