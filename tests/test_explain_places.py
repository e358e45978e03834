"""``verl-hpt explain`` with prefixes, hints, a stream and a buffer: what a case may say, and what it is told."""

import pytest

from verl_hpt.errors import UserError
from verl_hpt.tools.explain import explain


def row(length=4, **numbers) -> dict:
    return {"length": length, "log_prob": -1.0} | numbers


def rollout(reward, prefix=0, **numbers) -> dict:
    return row(4 + prefix, reward=reward, entropy=0.5, **({"prefix": prefix} if prefix else {})) | numbers


def case(method, *rollouts, demos=(), **beside) -> dict:
    question = {"uid": "q", "rollouts": [*rollouts], "demos": [*demos]}
    return {"hpt": {"method": method, "rl_length_scale": 8}, "questions": [question], **beside}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (case("grpo", rollout(1), rollout(0, 3)),
         r"questions\[0\]\.rollouts\[1\]\.prefix=3: method 'grpo' does not start rollouts so \(its demonstrations' "
         r"place is 'separate'\)"),
        (case("guide", rollout(1), rollout(0, 3)), r"rollouts\[1\]\.prefix=3: method 'guide' does not start rollouts"),
        (case("hpt", rollout(1, start="a")), r"rollouts\[0\]\.start='a': method 'hpt' does not start rollouts so"),
        (case("chord_mu", rollout(1), buffer=[row()]), r"case\.buffer: method 'chord_mu' has none .* 'stream'"),
        (case("relift", rollout(1), stream=[row()]), r"case\.stream: method 'relift' has none .* place is 'buffer'"),
        (case("grpo", rollout(1), stream=[row()]), r"case\.stream: method 'grpo' has none"),
        (case("uft", rollout(1, prefix=4, length=4)), r"prefix=4: must leave a token of the 4 to the rollout"),
        (case("uft", rollout(1, prefix=-1)), r"prefix=-1: must be a whole number at least 0"),
        (case("prefix_rft", {"reward": 1, **row(5, prefix=2)}), r"rollouts\[0\]\.entropy: missing; method 'prefix"),
        (case("chord_mu", rollout(1), stream=[row(reward="x")]), r"case\.stream\[0\]\.reward='x': must be"),
        (case("chord_mu", rollout(1), stream=[row(length=0)]), r"case\.stream\[0\]\.length=0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(given, says):
    with pytest.raises(UserError, match=says):
        explain(given)


def test_a_start_of_0_is_from_nothing():
    named = [rollout(0, start=0), rollout(0), rollout(1, start=0)]
    for method in ("hpt", "questa"):
        assert explain(case(method, *named)) == explain(case(method, rollout(0), rollout(0), rollout(1)))
    assert explain(case("hpt", *named, demos=[row()]))["rows"][0]["zone"] == "rl", "the gate counts them"


def test_rollouts_with_one_label_started_alike_and_so_did_those_with_one_length():
    labelled = case("questa", rollout(1, start="a"), rollout(0, start="a"), rollout(1, start=7), rollout(0))
    assert [told["advantage"] for told in explain(labelled)["rows"]][2:] == pytest.approx([1, 0], abs=1e-5)
    assert explain(labelled)["rows"][0]["advantage"] == pytest.approx(0.7071, abs=1e-4)
    prefixed = case("prefix_rft", rollout(1, 2), rollout(0, 2), rollout(1, 3), rollout(1, 2, start="b"))
    told = [told["advantage"] for told in explain(prefixed)["rows"]]
    assert told[0] == 0.5 and told[1] == [0, 0, -0.5, -0.5, -0.5, -0.5], "prefix (1 − 0)/2, own ±1/2"
    assert told[2] == told[3] == 1.0, "alone in their starts"


def test_zones_and_names_of_what_stands_beside():
    told = explain(case("chord_mu", rollout(1), rollout(0), stream=[row(2), row(8)]))
    named = [(row["uid"], row["kind"], row["index"], row["zone"]) for row in told["rows"]]
    assert named == [
        ("q", "rollout", 0, "rl"), ("q", "rollout", 1, "rl"), ("stream[0]", "demo", 0, "stream"),
        ("stream[1]", "demo", 0, "stream"),
    ]  # fmt: skip
    told = explain(case("relift", rollout(0), rollout(0), demos=[row()], buffer=[row(2)]))
    assert [row["zone"] for row in told["rows"]] == ["collect", "collect", "buffer"]
    assert [(row["kind"], row["why"]) for row in told["dropped"]] == [("demo", "it waits in the buffer")]


def test_a_buffer_of_successes_is_read():
    given = case("relift", rollout(1), rollout(0))
    given["hpt"]["buffer"] = {"content": "successes"}
    assert [row["zone"] for row in explain(given)["rows"]] == ["keep", "keep"]


def test_a_demonstration_that_rollouts_start_from_is_dropped_with_a_reason():
    told = explain(case("uft", rollout(1, 3), rollout(0), demos=[row(9)]))
    assert [row["kind"] for row in told["rows"]] == ["rollout", "rollout"]
    assert told["dropped"][0]["why"] == "rollouts start from it, it is no row of its own"


def test_the_loss_is_told_by_who_wrote_a_token():
    """uft, λ = 0.001: the hint's 3 tokens at NLL 2 are the demonstration's, the 4 + 4 own ones the rollouts'."""
    numbers = {"log_prob": [-2.0, -2.0, -2.0, -1.0, -1.0, -1.0, -1.0]}
    told = explain(case("uft", rollout(1, 3, **numbers), rollout(0)))
    assert told["loss"]["demo"] == pytest.approx(0.002) and told["loss"]["rl"] == pytest.approx(0)
    first = told["rows"][0]
    assert first["coefficient"]["demo"] == [1, 1, 1, 0, 0, 0, 0] and first["coefficient"]["rl"][:3] == [0, 0, 0]
    frozen = explain(case("stephint", rollout(1, 3, **numbers), rollout(0)))
    assert frozen["rows"][0]["gradient"][:3] == [0, 0, 0] and frozen["loss"]["demo"] == 0
    assert frozen["rows"][0]["weight"]["rl"] == 1 / 4 / 2, "sequence: a mean over own tokens"


def test_schedules_and_steered_numbers_are_read_at_the_cases_step():
    def weights(step, **hpt):
        given = case("chord_mu", rollout(1), rollout(0), stream=[row(10)], step=step)
        given["hpt"] |= hpt
        rows = explain(given)["rows"]
        return rows[0]["weight"]["rl"] * 8, rows[2]["weight"]["demo"] * 10

    assert weights(100) == pytest.approx((1 - 0.475, 0.475)) and weights(200) == pytest.approx((0.95, 0.05))
    assert weights(9, demo_coef={"start": 0.25, "target": 1}) == pytest.approx((0.75, 0.25)), "where it starts"
