"""Tables line up whatever stands in them; a picture that cannot be written is one sentence."""

import pytest

from verl_hpt.errors import UserError
from verl_hpt.tools import report, show


def test_a_table_is_as_wide_as_its_widest_cells_and_combining_marks_take_no_room():
    assert show.table([["run", "H\u0304"], ["a longer one", "1"], ["b", "–"]]) == (
        "run           H\u0304\n────────────  ─\na longer one  1\nb             –"
    )


def test_cells_wrap_at_the_widths_given_and_stand_at_the_top_of_their_row():
    assert show.table([["name", "what"], ["a", "one two three"], ["b", ""]], [4, 8]).splitlines() == [
        "name  what",
        "────  ────────",
        "a     one two",
        "      three",
        "b",
    ]


def test_a_picture_that_cannot_be_written_is_named_with_its_option(tmp_path):
    run = tmp_path / "run"
    (run / "report.png").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step":1,"data":{"hpt/solve_rate":0.5}}\n')
    with pytest.raises(UserError, match=r"^--out .*run/report\.png: cannot be written \(Is a directory\)$"):
        report.main([str(run)])
