"""The door of the update where rollouts begin with a demonstration's tokens, and which rollouts are asked to."""

import hashlib
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transfer_queue as tq
from batches import EOS, PARTITION, TOKENIZER, keys_there, likelihood, make_trainer, step, updated
from started_rows import DEMO, Started, by_key, with_n
from test_trainer_run import drawn

from verl_hpt.errors import UserError
from verl_hpt.history import identity
from verl_hpt.host.started import START
from verl_hpt.host.trainer import AGENT, ROLLOUTS

ACTOR, ROLL, REF = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.ref"

pytestmark = pytest.mark.usefixtures("queue")


# --- prefixes ---------------------------------------------------------------------------------------------------------

ONE_OF_FOUR = [(1, 2, "own"), (1, 0, "yes"), (0, 0, "no"), (0, 0, "never")]  # score, tokens of the prefix, own text


def test_a_prefix_that_is_reinforced_by_hand():
    """Plain rollouts 1, 0, 0: Â 2/3, −1/3, −1/3. The started one is alone in its start: Â = R; its prefix has
    (R − 1/3)/1. w_rl = 1/(Q·n·L), n = 4, L = 64."""
    rollouts = Started().begun("a", ONE_OF_FOUR)
    meta, ranks, _ = step(make_trainer("++hpt.method=prefix_rft", with_n(4)), rollouts.batch([2, 0, 3, 1]))
    found = by_key(meta, ranks)
    named = ("is_demo", "prefix", "advantage", "demo_advantage", "w_rl", "w_demo", "w_entropy", "correct")
    weight = 1 / (4 * 64)
    assert {key: [row[name] for name in named] for key, row in found.items()} == {
        "a_0_0": pytest.approx([0, 2, 1, 2 / 3, weight, 0, weight, 1]),
        "a_1_0": pytest.approx([0, 0, 2 / 3, 0, weight, 0, weight, 1]),
        "a_2_0": pytest.approx([0, 0, -1 / 3, 0, weight, 0, weight, 0]),
        "a_3_0": pytest.approx([0, 0, -1 / 3, 0, weight, 0, weight, 0]),
    }
    begun = found["a_0_0"]
    assert begun["responses"].tolist() == [*TOKENIZER.encode("abown"), EOS]
    assert begun["response_mask"].tolist() == [0, 0, 1, 1, 1, 1], "verl's mask stays as it is"
    assert torch.equal(begun["old_log_probs"], likelihood(begun["responses"]).bfloat16())
    assert "entropy" in make_trainer("++hpt.method=prefix_rft", with_n(4)).hpt.method.needs


def test_a_prefix_that_is_imitated_by_hand():
    """uft: GRPO over all four; every own token 1/(all own tokens), every prefix token λ/(all prefix tokens)."""
    rollouts = Started().begun("a", [(1, 2, "own"), (0, 5, ""), (0, 0, "no"), (1, 3, "y")])
    meta, ranks, _ = step(make_trainer("++hpt.method=uft", with_n(4)), rollouts.batch())
    rows = by_key(meta, ranks).values()
    own, imitated, std = 4 + 1 + 3 + 2, 2 + 5 + 3, math.sqrt(1 / 3)
    assert [row["prefix"] for row in rows] == [2, 5, 0, 3]
    assert [row["w_rl"] for row in rows] == pytest.approx([1 / own] * 4)
    assert [row["w_demo"] for row in rows] == pytest.approx([0.001 / imitated] * 2 + [0] + [0.001 / imitated])
    expected = [sign * 0.5 / (std + 1e-6) for sign in (1, -1, -1, 1)]
    assert [row["advantage"] for row in rows] == pytest.approx(expected)
    assert [row["demo_advantage"] for row in rows] == [0] * 4, "an S term has none"


def test_a_prefix_that_is_frozen_leaves_its_row_a_rollout():
    """stephint: Â over all four, weights over own tokens alone."""
    rollouts = Started().begun("a", [(0, 0, "no"), (1, 2, "own"), (1, 4, "y"), (0, 6, "")])
    trainer = make_trainer("++hpt.method=stephint", "++hpt.start.share=[0, 0.25, 0.5, 0.75]", with_n(4))
    meta, ranks, metrics = step(trainer, rollouts.batch())
    rows = by_key(meta, ranks).values()
    assert [row["prefix"] for row in rows] == [row["w_demo"] for row in rows] == [0] * 4
    assert [row["w_rl"] for row in rows] == pytest.approx([1 / (4 * own) for own in (3, 4, 2, 1)])
    expected = [sign * 0.5 / (math.sqrt(1 / 3) + 1e-6) for sign in (-1, 1, 1, -1)]
    assert [row["advantage"] for row in rows] == pytest.approx(expected)
    assert set(meta.keys) == set(rollouts.keys) and metrics["hpt/start/tokens"] == 2 + 4 + 6


def test_guidance_inside_the_completion_is_reinforced_as_the_rest():
    """g2rpo_a: the prefix has the row's own Â and counts among its tokens; its length follows the solve rates."""
    rollouts = Started().begun("a", [(1, 3, "own"), (0, 0, "no")])
    trainer = make_trainer("++hpt.method=g2rpo_a", "++hpt.start={share: {tokens: 3}, rollouts: 1}")
    meta, ranks, metrics = step(trainer, rollouts.batch())
    first, second = by_key(meta, ranks).values()
    expected = 0.5 / (math.sqrt(0.5) + 1e-6)
    assert first["prefix"] == 3 and first["advantage"] == first["demo_advantage"] == pytest.approx(expected)
    assert (first["w_rl"], second["w_rl"]) == pytest.approx((1 / (2 * 7), 1 / (2 * 3)))
    assert metrics["hpt/start/length"] == 3 and trainer.hpt.beside.solve_rates == [0.0]


def test_rollouts_that_start_alike_share_the_prefixs_advantage_and_are_compared_with_each_other():
    rollouts = Started().begun("a", [(1, 2, "x"), (0, 2, "y"), (1, 0, "z"), (0, 0, "w")])
    trainer = make_trainer("++hpt.method=prefix_rft", "++hpt.start={share: 0.25, rollouts: 2}", with_n(4))
    meta, ranks, _ = step(trainer, rollouts.batch())
    rows = by_key(meta, ranks).values()
    assert [row["advantage"] for row in rows] == [0.5, -0.5, 0.5, -0.5]
    assert [row["demo_advantage"] for row in rows] == [0.25, -0.25, 0, 0]


def test_starts_from_two_demonstrations_differ_though_they_are_as_long():
    rollouts = Started()
    for session, (place, prefix) in enumerate([(0, "ab"), (1, "AB"), (1, "AB")]):
        told = {"tokens": 2, "place": place, "missed": False, "longer": 0}
        rollouts.session("a", session, session % 2, "a:", f"{prefix}x", [0, 0, 1, 1], ["abcd", "ABCD"], {}, told)
    trainer = make_trainer("++hpt.method=prefix_rft", "++hpt.start={share: 0.5, rollouts: 2}", with_n(3))
    meta, ranks, _ = step(trainer, rollouts.batch())
    rows = by_key(meta, ranks).values()
    assert [row["advantage"] for row in rows] == [0, 0.5, -0.5], "the first is alone in its start"
    assert [row["demo_advantage"] for row in rows] == [0, 0.5, 0], "nothing is plain: R/k, k = 1, 2, 2"


@pytest.mark.parametrize("method", ["prefix_rft", "uft"])
def test_only_rollouts_that_started_from_nothing_are_counted(method):
    rollouts = Started().begun("a", ONE_OF_FOUR).begun("b", [(1, 3, "y"), (0, 0, "n"), (0, 0, "n"), (0, 0, "n")])
    trainer = make_trainer(f"++hpt.method={method}", with_n(4))
    _, _, metrics = step(trainer, rollouts.batch())
    expected = {
        "solve_rate": 1 / 6, "rl_solve_rate": 1 / 6, "all_fail_share": 1 / 2, "start/solve_rate": 1,
        "start/share": 2 / 8, "start/tokens": 5, "start/cut": 0, "start/missed": 0, "rows/rollouts": 8, "rows/demos": 0,
        "demo_share": 0, "taught_share": 0, "history/questions": 2,
    }  # fmt: skip
    assert {name: metrics[f"hpt/{name}"] for name in expected} == pytest.approx(expected)
    records = [trainer.hpt.lifecycle.history.of(group.key) for group in trainer.plans[0].groups]
    assert [(record.solved, record.rollouts, record.failures) for record in records] == [(1, 3, 0), (0, 3, 1)]
    assert [decision.zone for decision in trainer.plans[0].plan.decisions] == ["both", "both"]


def test_a_question_all_of_whose_rollouts_started_says_nothing():
    trainer = make_trainer("++hpt.method=uft")
    step(trainer, Started().begun("a", [(0, 2, "x"), (0, 0, "y")]).batch())
    (key,) = trainer.hpt.lifecycle.history.records
    before = replace(trainer.hpt.lifecycle.history.of(key))
    assert (before.drawn, before.failures, before.rollouts) == (1, 1, 1)
    trainer.global_steps = 2
    rollouts = Started().begun("a", [(1, 2, "x"), (1, 3, "y")]).begun("b", [(1, 2, "x"), (1, 3, "y")])
    _, _, metrics = step(trainer, rollouts.batch())
    assert trainer.hpt.lifecycle.history.records == {key: before} and before.drawn_at == 1
    assert "hpt/solve_rate" not in metrics and metrics["hpt/all_fail_share"] == 0
    assert metrics["hpt/start/solve_rate"] == 1 == metrics["hpt/start/share"]


def test_sessions_that_could_not_start_are_counted_and_why():
    rollouts = Started().begun("a", [(0, 0, "x"), (0, 0, "y")], target="", missed=(0,))
    rollouts.begun("b", [(0, 0, "x"), (1, 0, "y")], missed=(0, 1)).begun("c", [(0, 0, "x")])
    trainer = make_trainer("++hpt.method=prefix_rft", "++hpt.start.share=0.5")
    _, ranks, metrics = step(trainer, rollouts.batch())
    expected = {"start/missed": 3, "start/share": 0, "start/tokens": 0, "unusable_demos": 1, "unusable/empty": 1}
    assert {name: metrics[f"hpt/{name}"] for name in expected} == expected
    assert "hpt/start/solve_rate" not in metrics and metrics["hpt/solve_rate"] == 1 / 5
    assert [decision.zone for decision in trainer.plans[0].plan.decisions] == ["rl"] * 3
    assert [row["prefix"] for row in updated(ranks)] == [0] * 5


def test_an_unusable_demonstration_stops_where_the_settings_say_so():
    rollouts = Started().begun("a", [(0, 0, "x"), (0, 0, "y")], target="", missed=(0,))
    trainer = make_trainer("++hpt.method=prefix_rft", "++hpt.demo.on_unusable=error")
    with pytest.raises(UserError, match="column 'target' is unusable: no text"):
        trainer._update_actor(rollouts.batch(), {})


def test_a_continuation_that_fills_the_limit_is_cut_prefix_included():
    """62 + 2 tokens fill the limit of 64; 61 + 2 do not, nor 63 and EOS."""
    rollouts = Started()
    for session, (length, own, end) in enumerate([(2, "x" * 62, ()), (2, "x" * 61, ()), (0, "x" * 63, (EOS,))]):
        told = {"tokens": length, "place": 0, "missed": False, "longer": 0}
        mask = [0] * length + [1] * (len(own) + len(end))
        rollouts.session("a", session, 1, "a:", DEMO[:length] + own, mask, DEMO, {}, told if length else None, end)
    trainer = make_trainer("++hpt.method=uft", with_n(3))
    _, _, metrics = step(trainer, rollouts.batch())
    assert trainer.plans[0].questions[0].truncated.tolist() == [True, False, False]
    assert metrics["hpt/start/cut"] == 0.5 and metrics["hpt/start/solve_rate"] == 0.5, "one that was cut is not solved"
    assert metrics["hpt/response_length"] == pytest.approx((62 + 61 + 64) / 3), "own tokens"


@pytest.mark.parametrize(
    ("told", "answer"),
    [
        ({"tokens": 3, "place": 0}, "abX"),
        ({"tokens": 2, "place": 1}, "abX"),
        ({"tokens": 9, "place": 0}, "abcdefghX"),
    ],
    ids=["another token", "no such demonstration", "beyond its end"],
)
def test_a_response_that_does_not_begin_with_its_demonstration_stops_with_the_question(told, answer):
    rollouts = Started().begun("a", [(0, 0, "x")])
    mask = [0] * told["tokens"] + [1] * (len(answer) + 1 - told["tokens"])
    rollouts.session("b", 0, 0, "b:", answer, mask, DEMO, {}, {"missed": False, "longer": 0} | told)
    trainer = make_trainer("++hpt.method=prefix_rft")
    message = rf"question \w{{16}} \(data source 'src', index 1\): a rollout that should begin with {told['tokens']} "
    with pytest.raises(RuntimeError, match=message):
        trainer._update_actor(rollouts.batch(), {})
    assert keys_there() == set(rollouts.keys) and not trainer.actor_rollout_wg.updates


def test_prefixes_over_two_ranks_and_padding():
    rollouts = Started().begun("a", ONE_OF_FOUR).begun("b", [(0, 4, "x"), (0, 0, "y"), (1, 0, "z")]).padding()
    trainer = make_trainer("++hpt.method=prefix_rft", with_n(4), f"{ACTOR}.ppo_micro_batch_size_per_gpu=3", ranks=2)
    meta, ranks, metrics = step(trainer, rollouts.batch([7, 6, 0, 5, 1, 4, 2, 3]))
    assert [len(rank) for rank in ranks] == [6, 6] and metrics["hpt/rows/padding"] == 5
    rows = dict(zip(meta.keys, updated(ranks), strict=True))
    assert {key: row["prefix"] for key, row in rows.items() if row["prefix"]} == {"a_0_0": 2, "b_0_0": 4}
    assert rows["b_0_0"]["demo_advantage"] == -0.5 and rows["b_0_0"]["w_rl"] == pytest.approx(1 / (2 * 3 * 64))
    assert all(row["is_demo"] and not row["prefix"] for key, row in rows.items() if key.startswith("hpt"))
    assert keys_there() == set(rollouts.keys)


def test_a_step_whose_update_fails_leaves_the_queue_as_it_was():
    rollouts = Started().begun("a", ONE_OF_FOUR)
    trainer = make_trainer("++hpt.method=prefix_rft", with_n(4), f"{ACTOR}.ppo_micro_batch_size_per_gpu=3")

    def fail():
        assert len(keys_there()) == 6, "two rows of padding beside four rollouts"
        raise OSError("out of memory")

    trainer.actor_rollout_wg.during = fail
    with pytest.raises(OSError, match="out of memory"):
        trainer._update_actor(rollouts.batch(), {})
    assert keys_there() == set(rollouts.keys)


# --- questions on their way to the rollouts ---------------------------------------------------------------------------


def uniform(low: float, high: float, *parts) -> float:
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return low + int.from_bytes(digest, "big") / 2**64 * (high - low)


@pytest.mark.parametrize(("at", "low"), [(1, 0.95 * (1 + math.cos(math.pi / 300)) / 2), (150, 0.475), (300, 0.0)])
def test_a_drawn_question_brings_how_much_each_session_starts_from(at, low):
    trainer = make_trainer("++hpt.method=prefix_rft", "++hpt.seed=5", with_n(3))
    trainer.global_steps = at
    batch = drawn(trainer, ["a", "b"])
    for row, name in enumerate("ab"):
        key = identity({"data_source": "src", "raw_prompt": [{"role": "user", "content": f"{name}:"}]})
        assert batch[row][START] == pytest.approx([uniform(low, 0.95, 5, key, at, 0), 0, 0])
        assert batch[row][AGENT] == "hpt_start"


def test_what_sessions_start_from_is_stored_with_the_questions_that_verl_can_recover():
    """Its asynchronous modes keep drawn questions in TransferQueue until their rollouts are there."""
    trainer, sent = make_trainer("++hpt.method=prefix_rft", "++hpt.start.share=0.5", with_n(3)), []
    batch = drawn(trainer, ["a", "b"])
    trainer.trainer_mode, trainer.agent_loop_manager = "separate_async", SimpleNamespace(generate_sequences=sent.append)
    trainer._submit_batch_to_rollout(batch)
    stored = tq.kv_batch_get(list(batch["uid"]), PARTITION, select_fields=[START, AGENT])
    assert [stored[START][row] for row in range(2)] == [[0.5, 0, 0]] * 2 and sent == [batch]
    assert [stored[AGENT][row] for row in range(2)] == ["hpt_start"] * 2


def test_starts_are_drawn_for_the_rollouts_that_are_left():
    """A column of the dataset's own says how many; what is skipped is taken off before, and one stays plain."""
    trainer = make_trainer("++hpt.method=prefix_rft", "++hpt.start={share: 0.5, rollouts: 3}", with_n(4))
    own = {ROLLOUTS: np.array([4, 2, 1, 4], dtype=object)}
    batch = drawn(trainer, "abcd", **own)
    assert [batch[row][START] for row in range(4)] == [[0.5, 0.5, 0.5, 0], [0.5, 0], [0], [0.5, 0.5, 0.5, 0]]
    trainer.hpt.skipped_rollouts = lambda step, questions, full: [0, 0, 0, 2]
    assert drawn(trainer, "abcd", **own)[3][START] == [0.5, 0.0]


def test_an_adapted_length_is_that_of_the_next_step():
    """every = 2: at the second step 8 · (0.5 before) / (1 now) = 4."""
    trainer = make_trainer("++hpt.method=g2rpo_a", "++hpt.start={share: {tokens: 8, every: 2}, rollouts: 1}", with_n(3))
    lengths = []
    for score in (0, 1, 1):
        lengths.append(drawn(trainer, ["a"])[0][START])
        step(trainer, Started().begun(f"u{score}", [(0, 1, "x"), (1, 0, "y"), (score, 0, "z")]).batch())
        trainer.global_steps += 1
    assert lengths == [[8, 0, 0], [8, 0, 0], [4, 0, 0]]


@pytest.mark.parametrize("method", ["hpt", "grpo", "chord_mu", "relift"])
def test_questions_of_other_methods_are_left_alone(method):
    files = ["++hpt.stream.files=x.parquet"] if method == "chord_mu" else []
    batch = drawn(make_trainer(f"++hpt.method={method}", *files), ["a"])
    assert START not in batch and AGENT not in batch


def test_validation_never_starts_from_a_demonstration():
    class Seen(Exception):
        pass

    def generate(batch):
        seen.append(set(batch.keys()))
        raise Seen

    trainer, seen = make_trainer("++hpt.method=questa"), []
    row = {"raw_prompt": np.array([[{"role": "user", "content": "a:"}], None], dtype=object)[:1]}
    trainer.val_dataloader, trainer.agent_loop_manager = [row], SimpleNamespace(generate_sequences=generate)
    with pytest.raises(Seen):
        trainer._validate()
    assert seen == [{"raw_prompt", "uid", "global_steps", "validate"}]
    tq.kv_clear(keys=list(tq.kv_list("val")["val"]), partition_id="val")
