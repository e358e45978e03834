"""`verl-hpt methods` says what METHODS holds, draws what trains, and takes in a user's own method."""

import json
import math
import sys
import unicodedata

import numpy as np
import pytest

from verl_hpt import cli
from verl_hpt.errors import UserError
from verl_hpt.estimator import Estimator, Method, Term
from verl_hpt.methods import METHODS
from verl_hpt.parts import PARTS, one, unit
from verl_hpt.tools import methods as table
from verl_hpt.tools import show
from verl_hpt.tools.explain import explain

A_ALONE = 1 - 1 / table.GROUP  # R − mean of the one right row of its group


@pytest.fixture
def own_method(monkeypatch):
    """tests/example_method.py on the path; what it registers is gone afterwards."""
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])
    yield "example_method"
    METHODS.pop("squared", None)
    PARTS["likelihood"].pop("squared", None)
    sys.modules.pop("example_method", None)


def curve(curves, name):
    (found,) = [c for c in curves if name in c.names]
    return found.w


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_table_fits_120_columns_and_names_every_method_its_source_and_its_notes(capsys):
    assert table.main([]) == 0
    printed = capsys.readouterr().out
    for line in printed.splitlines():
        assert sum(not unicodedata.combining(c) for c in line) <= 120, line
    lines = printed.splitlines()
    squeezed = "".join(printed.split())
    for method in METHODS.values():
        assert any(line.startswith(f"{method.name} ") for line in lines), method.name
        for label, note in (("unverified", method.unverified), ("approximate", method.approximate)):
            assert not note or "".join(f"{method.name}, {label}: {note}".split()) in squeezed
        assert all(word in printed for word in method.source.split())


def test_json_holds_every_method_with_its_parts(capsys):
    assert table.main(["--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == list(METHODS)
    luffy = rows["luffy"]
    assert (luffy["place"], luffy["when"], luffy["normalization"]) == ("group", "always", "question")
    assert luffy["rollouts"] == {
        "mask": "everywhere",
        "reference": "old",
        "advantage": "centered",
        "likelihood": "plain",
    }
    assert luffy["demos"] == [
        {"kind": "R", "scale": 1.0, "mask": "everywhere", "reference": "one", "advantage": "centered",
         "likelihood": "shaped"}
    ]  # fmt: skip
    assert rows["sft"]["rollouts"] is None and rows["grpo"]["place"] is None
    assert rows["ppo"]["critic"] and not rows["grpo"]["critic"]
    assert rows["asft"]["needs"] == ["ref_log_prob"] and rows["asft"]["approximate"]


def test_only_the_methods_asked_for_are_shown(capsys):
    assert table.main(["hpt", "dft", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["hpt", "dft"]


def test_a_method_without_a_formula_shows_its_parts():
    method = Method("own", None, (Term("S", Estimator(reference=one, advantage=unit), 0.5),), when="always")
    assert table.formulas(method) == (
        "–", "S: 0.5·[mask everywhere, reference one, advantage unit, likelihood plain]"
    )  # fmt: skip


@pytest.mark.parametrize(
    "argv, says",
    [
        (["no_such"], "no method 'no_such'; one of ppo, "),
        (["--modules", "no_such_module"], "cannot import 'no_such_module'"),
        (["--plot", "/no/such/folder/w.png"], "/no/such/folder/w.png: cannot be written"),
        (["--plot", "w.docx"], "--plot w.docx: Format 'docx' is not supported"),
    ],
)
def test_what_cannot_be_done_is_one_line_without_a_traceback(argv, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["methods", *argv]) == 2
    assert says in capsys.readouterr().err
    with pytest.raises(UserError):
        table.main(argv)


# --- the curves ------------------------------------------------------------------------------------------------------


def test_curves_on_demonstrations_are_the_methods_formulas():
    """Written out by hand from the papers, for a right demonstration; in a group the seven rollouts are wrong."""
    p, shaped = table.P, 0.1 * table.P / (table.P + 0.1) ** 2
    sft_shaped = table.demo_curves(list(METHODS.values()), "S")
    rl_shaped = table.demo_curves(list(METHODS.values()), "R")
    expected = {
        ("S", "sft"): np.ones_like(p),
        ("S", "hpt"): np.ones_like(p),
        ("S", "psft"): np.ones_like(p),  # r = 1 at the first update
        ("S", "hpt_mix_on"): 0.1 * np.ones_like(p),
        ("S", "srft"): 0.5 * math.exp(-table.ENTROPY) * np.ones_like(p),
        ("S", "dft"): p,
        ("S", "asft"): p,  # π_ref = π_θ
        ("S", "otr"): p,  # β = 0
        ("S", "poft"): 1 / (1 + p / table.OTHER_P),
        ("R", "hpt_off_on"): shaped,
        ("R", "hpt_mix_on"): shaped,
        ("R", "luffy"): A_ALONE * shaped,
        ("R", "srft_hpt"): A_ALONE * shaped,
        ("R", "srft"): p * A_ALONE / math.sqrt(1 / table.GROUP),  # the sample std of 1, 0, 0, … is 1/√8
        ("R", "trsft"): np.minimum(1, p / 0.1),
        ("R", "rl_plus"): A_ALONE * np.sqrt(1 - p) * 2 * p / (0.5 * p + 0.5 + p),
    }
    for (kind, name), w in expected.items():
        got = curve(sft_shaped if kind == "S" else rl_shaped, name)
        np.testing.assert_allclose(got, w, atol=1e-5, err_msg=f"{name}, {kind}")


def test_curves_on_rollouts_show_the_clip():
    right, wrong = (table.rollout_curves(list(METHODS.values()), correct) for correct in (True, False))
    r = table.RATIO
    inside = np.all([abs(r - edge) > 1e-6 for edge in (0.8, 1.2, 3.0)], axis=0)  # at an edge itself rounding decides
    up, down = np.where(r > 1.2, 0, r * A_ALONE), np.where((r < 0.8) | (r > 3), 0, -r / table.GROUP)
    np.testing.assert_allclose(curve(right, "dr_grpo")[inside], up[inside], atol=1e-9)
    np.testing.assert_allclose(curve(wrong, "dr_grpo")[inside], down[inside], atol=1e-9)
    np.testing.assert_allclose(curve(right, "luffy"), r * A_ALONE, atol=1e-9)
    np.testing.assert_allclose(curve(right, "reinforce"), A_ALONE, atol=1e-9)
    np.testing.assert_allclose(curve(wrong, "srft"), -1, atol=1e-9)
    assert not [c for c in right if "ppo" in c.names], "a critic's advantage was made up"


def test_methods_that_do_the_same_share_one_curve_and_every_term_is_drawn():
    for kind in "SR":
        curves = table.demo_curves(list(METHODS.values()), kind)
        names = [name for c in curves for name in c.names]
        assert sorted(names) == sorted(m.name for m in METHODS.values() if m.term(kind))
        for i, this in enumerate(curves):
            assert all(not np.allclose(this.w, other.w, atol=1e-9) for other in curves[:i])


def test_no_two_curves_look_the_same():
    """Enough pairs of colour and line for the longest legend."""
    assert len({tuple(show.look(i).values()) for i in range(28)}) == 28


def test_the_picture_is_written(tmp_path, capsys):
    file = tmp_path / "w.png"
    assert table.main(["--plot", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 50_000
    assert capsys.readouterr().out == "", "the table came with the picture unasked"


@pytest.mark.parametrize("reference", PARTS["reference"])
def test_a_method_of_your_own_is_drawn_whatever_reference_it_names(tmp_path, monkeypatch, reference):
    """A column that a part may ask for is there on paper too; a teacher's p is the one that other models have."""
    estimator = Estimator(reference=PARTS["reference"][reference], advantage=unit)
    mine = Method("mine", METHODS["hpt"].rollouts, (Term("S", estimator),), when="gate")
    monkeypatch.setitem(METHODS, "mine", mine)
    assert table.main(["mine", "--plot", str(tmp_path / "w.png")]) == 0
    if reference == "teacher":
        np.testing.assert_allclose(curve(table.demo_curves([mine], "S"), "mine"), table.P / 0.5, atol=1e-9)


# --- a method of your own --------------------------------------------------------------------------------------------


def test_a_method_of_your_own_trains_by_its_name_and_stands_in_the_table(own_method, capsys):
    case = {
        "hpt": {"method": "squared", "modules": [own_method], "demo_coef": 1.0, "normalization": "token"},
        "questions": [
            {"rollouts": [{"reward": 0, "length": 1, "log_prob": -1.0}],
             "demos": [{"length": 2, "log_prob": [math.log(0.5), math.log(0.1)]}]}
        ],
    }  # fmt: skip
    (row,) = explain(case, import_modules=True)["rows"]
    assert row["kind"] == "demo" and row["zone"] == "demo"
    assert row["coefficient"]["demo"] == pytest.approx([0.25, 0.01])
    assert row["gradient"] == pytest.approx([-0.25 / 2, -0.01 / 2])  # two demonstration tokens in the step
    assert table.main(["--modules", own_method, "squared"]) == 0
    assert "S: p²" in capsys.readouterr().out
    np.testing.assert_allclose(curve(table.demo_curves([METHODS["squared"]], "S"), "squared"), table.P**2)


def test_the_example_is_one_function_and_one_row():
    with open(__file__.replace("test_methods_table.py", "example_method.py")) as file:
        text = file.read()
    code = [line for line in text.split('"""', 2)[2].splitlines() if line.strip() and "import" not in line]
    assert len(code) <= 10
