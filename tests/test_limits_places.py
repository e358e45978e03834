"""Limits in which a method with prefixes, hints, a stream or a buffer must become another one, to the last bit."""

import copy

import pytest
import torch
from placed_rows import Update
from reference.cases import placed_case
from test_methods_placed import CLIP, explained

from verl_hpt.methods import METHODS
from verl_hpt.tools.explain import explain

# What each method is where none of its demonstrations stands anywhere.
LIMIT = {
    **{"prefix_rft": "dr_grpo", "uft": "grpo", "stephint": "grpo", "g2rpo_a": "grpo"},
    **{"questa": "grpo", "pope": "grpo", "guide": "grpo"},
    **{"chord_mu": "grpo", "chord_phi": "grpo", "amft_style": "grpo", "relift": "dr_grpo"},
}
PREFIX = [name for name in LIMIT if METHODS[name].place == "prefix"]
STREAM = [name for name in LIMIT if METHODS[name].place == "stream"]


def case_of(method: str, **hpt) -> dict:
    return placed_case(3, method, METHODS[method].place, METHODS[method].normalization, clip=CLIP, **hpt)


def under(method: str, case: dict, **hpt) -> dict:
    """The same rows under another method, with the case's normalisation."""
    changed = copy.deepcopy(case)
    changed["hpt"] |= {"method": method} | hpt
    return changed


def each_row(case: dict):
    return (row for question in case["questions"] for row in question["rollouts"])


def bare(case: dict) -> dict:
    """The case without prefixes, hints, stream and buffer; its questions keep their demonstrations."""
    case = copy.deepcopy(case)
    for row in each_row(case):
        row.pop("prefix", None)
        row.pop("start", None)
    return {name: value for name, value in case.items() if name not in ("stream", "buffer")}


def on_paper(case: dict) -> dict:
    """Every number of every row that trains, but for its zone."""
    rows = explain(explained(case))["rows"]
    assert any(any(row["gradient"]) for row in rows), "the case exercises nothing"
    return {
        (row.pop("uid"), row.pop("kind"), row.pop("index")): {k: v for k, v in row.items() if k != "zone"}
        for row in rows
    }


@pytest.mark.parametrize("method", LIMIT)
def test_without_any_of_its_demonstrations_a_method_is_its_rollouts_own(method):
    case = bare(case_of(method, demo_coef=0.0 if method in STREAM else 0.7))
    assert on_paper(case) == on_paper(under(LIMIT[method], case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", LIMIT)
def test_without_any_of_its_demonstrations_its_loss_is_that_of_its_rollouts_own_method(method, dtype):
    case = bare(case_of(method, demo_coef=0.0 if method in STREAM else 0.7))
    ours, theirs = (Update(x, 2, dtype).cut(3) for x in (case, under(LIMIT[method], case)))
    assert ours.loss.tolist() == theirs.loss.tolist() and ours.gradients == theirs.gradients
    assert any(any(gradient) for gradient in ours.gradients.values())


@pytest.mark.parametrize("method", PREFIX)
def test_a_prefix_of_no_token_is_none(method):
    case = case_of(method)
    for row in each_row(case):
        row["prefix"] = 0
        row.pop("start", None)
    assert on_paper(case) == on_paper(under(LIMIT[method], bare(case)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", STREAM)
def test_mu_of_0_is_the_rollouts_own_method_with_the_stream_there(method, dtype):
    case = case_of(method, demo_coef=0.0)
    rows, alone = on_paper(case), on_paper(under("grpo", bare(case)))
    of_stream = {key: rows.pop(key) for key in list(rows) if key[0].startswith("stream")}
    assert rows == alone and not any(any(row["gradient"]) for row in of_stream.values())
    ours, theirs = Update(case, 1, dtype).cut(), Update(under("grpo", bare(case)), 1, dtype).cut()
    of_stream = [ours.gradients.pop(key) for key in list(ours.gradients) if key[0].startswith("stream")]
    assert ours.gradients == theirs.gradients and len(of_stream) == 5 and not any(map(any, of_stream))
    assert ours.loss[2] == 0.0


@pytest.mark.parametrize("method", ["chord_mu", "amft_style"])
def test_mu_of_1_is_sft_on_the_stream(method):
    case = case_of(method, demo_coef=1.0)
    as_questions = [{"uid": f"stream[{i}]", "rollouts": [], "demos": [row]} for i, row in enumerate(case["stream"])]
    sft = on_paper({**under("sft", bare(case)), "questions": as_questions})
    rows = on_paper(case)
    assert {key: rows.pop(key) for key in list(rows) if key[0].startswith("stream")} == sft
    assert rows and not any(any(row["gradient"]) for row in rows.values())
    ours = Update(case, 2, torch.float64).cut()
    theirs = Update({**under("sft", case), "questions": as_questions, "stream": []}, 2).cut()
    assert {key: g for key, g in ours.gradients.items() if key[0].startswith("stream")} == theirs.gradients
    assert not any(any(g) for key, g in ours.gradients.items() if not key[0].startswith("stream"))
    assert ours.loss[0] == pytest.approx(theirs.loss[0], abs=1e-12)


def test_rollouts_that_share_one_hint_are_a_group_as_any_other():
    case = case_of("questa")
    for row in each_row(case):
        row["start"] = "the same"
    assert on_paper(case) == on_paper(under("grpo", bare(case)))


def test_guidance_that_learns_as_the_rest_of_the_row_is_part_of_it():
    """G²RPO-A's prefix lies inside the completion: as GRPO on whole rows."""
    case = case_of("g2rpo_a")
    whole, bared = on_paper(case), on_paper(under("grpo", bare(case)))
    assert {key: row["gradient"] for key, row in whole.items()} == {key: row["gradient"] for key, row in bared.items()}


def test_a_frozen_prefix_is_as_if_it_were_not_there():
    case = case_of("stephint")
    cut = bare(case)
    for row, whole in zip(each_row(cut), each_row(case), strict=True):
        given = whole.get("prefix", 0)
        for name in ("log_prob", "old_log_prob", "ref_log_prob", "entropy"):
            row[name] = row[name][given:]
        row["length"] -= given
    rows, alone = on_paper(case), on_paper(under("grpo", cut))
    for key, row in alone.items():
        given = len(rows[key]["gradient"]) - len(row["gradient"])
        assert rows[key]["gradient"] == [0.0] * given + row["gradient"] and rows[key]["weight"] == row["weight"]


@pytest.mark.parametrize("method", ["uft", "relift"])
def test_lambda_of_0_leaves_the_rollouts_own_tokens_alone(method):
    case = case_of(method, demo_coef=0.0)
    imitated = [row["weight"]["demo"] for row in on_paper(case).values()]
    assert len(imitated) > 5 and not any(imitated)
