"""The door of the update where demonstrations are collected, and trained on in optimizer steps of their own."""

import pytest
import torch
from batches import TOKENIZER, Rollouts, keys_there, likelihood, make_trainer, step, updated
from started_rows import Started
from test_trainer_run import resumable

from verl_hpt.host.beside import FILE

ACTOR, ROLL = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
PSFT = "{kind: S, estimator: {mask: psft_clip, reference: old, advantage: unit}}"

pytestmark = pytest.mark.usefixtures("queue")


def failing(**targets) -> Rollouts:
    """Questions that no rollout solves, by name; beside them one that is half solved."""
    rollouts = Rollouts()
    for name, target in targets.items():
        rollouts.add(name, [0, 0], target=target, answers=["no", "none"])
    return rollouts.add(f"half of {''.join(targets)}", [1, 0], target="unread", answers=["yes", "no"])


def of_last_step(trainer, ranks) -> list[dict]:
    """The rows of an update's last optimizer step that are no padding."""
    size = trainer.plans[-1].plan.rows_per_step // len(ranks)
    rows = [row for rank in ranks for row in updated([rank])[-size:]]
    return [row for row in rows if row["w_demo"] or row["w_rl"]]


def texts_of(rows) -> list[str]:
    return sorted(TOKENIZER.decode(row["responses"]).removesuffix("<|im_end|>") for row in rows)


def test_a_buffer_waits_for_its_size_and_then_trains_in_an_optimizer_step_of_its_own():
    """size 3: [a, b], then [c, d]; c, d and a are trained on, b waits. token, λ = 1: 1 / (3 + 4 + 2 tokens)."""
    trainer = make_trainer("++hpt.method=relift", "++hpt.buffer.size=3", f"{ACTOR}.ppo_mini_batch_size=2")
    rollouts = failing(a="a", b="bbbbbb")
    meta, ranks, metrics = step(trainer, rollouts.batch())
    assert set(meta.keys) - set(rollouts.keys) == {key for key in meta.keys if key.startswith("hpt")}
    rows = [row for row in updated(ranks) if row["w_rl"]]
    assert len(rows) == 6 and not any(row["w_demo"] for row in updated(ranks)), "rollouts train, those that fail too"
    assert [entry.key for entry in trainer.hpt.beside.buffer.entries] == [g.key for g in trainer.plans[0].groups[:2]]
    expected = {"buffer/entries": 2, "zone/collect": 2 / 3, "zone/rl": 1 / 3, "optimizer_steps": 2, "rows/demos": 0,
                "demo_share": 0, "taught_share": 0, "dropped/demos": 2, "rows/rollouts": 6}  # fmt: skip
    assert {name: metrics[f"hpt/{name}"] for name in expected} == pytest.approx(expected)

    trainer.global_steps = 2
    rollouts = failing(c="cc", d="ddd")
    meta, ranks, metrics = step(trainer, rollouts.batch())
    assert metrics["hpt/optimizer_steps"] == 3 and metrics["hpt/buffer/entries"] == 1
    size = trainer.plans[-1].plan.rows_per_step
    assert len(meta) == 3 * size and meta.extra_info["mini_batch_size"] == size
    trained = of_last_step(trainer, ranks)
    assert texts_of(trained) == ["a", "cc", "ddd"] and metrics["hpt/rows/demos"] == 3
    assert [TOKENIZER.decode(row["prompts"]) for row in trained] == [f"{texts_of([row])[0][0]}:" for row in trained]
    assert [row["w_demo"] for row in trained] == pytest.approx([1 / 9] * 3) and not any(r["w_rl"] for r in trained)
    assert [row["is_demo"] for row in trained] == [1, 1, 1]
    assert keys_there() >= set(rollouts.keys) and not any(key.startswith("hpt") for key in keys_there())
    records = trainer.hpt.lifecycle.history.records.values()
    assert {record.uses for record in records} == {0}, "a use is one at the question's own draw"


def test_two_full_buffers_are_two_optimizer_steps_more_the_newest_first():
    trainer = make_trainer("++hpt.method=relift", "++hpt.buffer.size=2")
    step(trainer, failing(a="a").batch())
    _, ranks, metrics = step(trainer, failing(b="b", c="c", d="d").batch())
    assert metrics["hpt/optimizer_steps"] == 3 and metrics["hpt/buffer/entries"] == 0
    size = trainer.plans[-1].plan.rows_per_step
    rows = updated(ranks)
    of_steps = [texts_of(row for row in rows[s * size : (s + 1) * size] if row["w_demo"]) for s in range(3)]
    assert of_steps[0] == [] and len(of_steps[1]) == 2 and "a" in of_steps[2], "the older one in the last step"
    assert sorted(of_steps[1] + of_steps[2]) == [*"abcd"]


def test_a_question_that_fails_again_waits_once_with_its_newest_demonstration():
    trainer = make_trainer("++hpt.method=relift", "++hpt.buffer.size=9")
    step(trainer, failing(a="old", b="b").batch())
    trainer.global_steps = 2
    rollouts = Rollouts().add("a2", [0, 0], prompt="a:", target="new")
    step(trainer, rollouts.batch())
    found = [(TOKENIZER.decode(entry.ids[:-1]), entry.step) for entry in trainer.hpt.beside.buffer.entries]
    assert found == [("new", 2), ("b", 1)]


def test_a_question_without_a_usable_demonstration_keeps_its_rollouts_and_nothing_waits():
    trainer = make_trainer("++hpt.method=relift")
    _, _, metrics = step(trainer, Rollouts().add("a", [0, 0], target="").add("b", [0, 0]).batch())
    assert metrics["hpt/buffer/entries"] == 0 and metrics["hpt/zone/rl"] == 1
    assert metrics["hpt/unusable_demos"] == 2 and metrics["hpt/rows/rollouts"] == 4


SUCCESSES = "++hpt.buffer={size: 2, content: successes}"


def test_own_successes_of_partly_solved_questions_are_stored_with_their_log_probs():
    """The first correct rollout of each; of one that is solved wholly or not at all, none. No pass is run for them."""
    compose = f"++hpt.compose={{rollouts: dr_grpo, demos: [{PSFT}], place: buffer, normalization: token}}"
    trainer = make_trainer(compose, SUCCESSES, f"{ROLL}.n=3", "++hpt.demo_coef=1.0", f"{ROLL}.temperature=0.7")
    rollouts = Started().begun("a", [(0, 0, "no"), (1, 0, "yes"), (1, 0, "also")], target=None)
    rollouts.begun("whole", [(1, 0, "y"), (1, 0, "y")], target=None).begun("none", [(0, 0, "n")], target=None)
    mask = [1, 1, 0, 1, 1]
    rollouts.session("b", 0, 0, "b:", "nnnn", [1] * 5, None, {}, None)
    rollouts.session("b", 1, 0.75, "b:", "tool", mask, None, {}, None)
    rollouts.session("b", 2, 1, "b:", "call", mask, None, {}, None)
    _, ranks, metrics = step(trainer, rollouts.batch())
    assert not trainer.actor_rollout_wg.passes
    expected = {"zone/keep": 0.5, "zone/rl": 0.5, "optimizer_steps": 2, "rows/rollouts": 9, "rows/demos": 2}
    assert {name: metrics[f"hpt/{name}"] for name in expected} == expected
    first, second = sorted(of_last_step(trainer, ranks), key=lambda row: len(row["responses"]))
    for row, key, session, learns in ((first, "a_1_0", 1, [1] * 4), (second, "b_2_0", 2, mask)):
        said = torch.tensor(rollouts.answers[key])
        assert row["responses"].tolist() == said.tolist() and TOKENIZER.decode(row["prompts"]) == f"{key[0]}:"
        assert row["response_mask"].tolist() == row["loss_mask"].tolist() == learns
        assert torch.equal(row["old_log_probs"], (likelihood(said) - 0.25 * session).bfloat16())
        assert (row["is_demo"], row["w_rl"], row["reward"]) == (1, 0, 1)
        assert row["w_demo"] == pytest.approx(1 / (4 + 4))
        assert row["temperature"].item() == pytest.approx(0.7), "the policy wrote it at that temperature"


def test_a_success_waits_over_steps_with_its_log_probs_whatever_the_policy_says_later():
    compose = f"++hpt.compose={{rollouts: dr_grpo, demos: [{PSFT}], place: buffer, normalization: token}}"
    trainer = make_trainer(compose, SUCCESSES)
    step(trainer, Started().begun("a", [(0, 0, "no"), (1, 0, "yes")]).batch())
    (entry,) = trainer.hpt.beside.buffer.entries
    assert entry.old_log_probs == (likelihood(torch.tensor(entry.ids)) - 0.25).tolist() and entry.reward == 1
    trainer.global_steps = 2
    _, ranks, _ = step(trainer, Started().begun("b", [(1, 0, "first"), (0, 0, "no")]).batch())
    found = {texts_of([row])[0]: row["old_log_probs"] for row in of_last_step(trainer, ranks)}
    assert found["yes"].tolist() == entry.old_log_probs and set(found) == {"yes", "first"}


def test_demonstrations_of_a_buffer_get_their_log_probs_by_a_pass_at_a_temperature_of_one():
    compose = f"++hpt.compose={{rollouts: dr_grpo, demos: [{PSFT}], place: buffer, normalization: token}}"
    trainer = make_trainer(compose, "++hpt.buffer.size=1", f"{ROLL}.temperature=0.7")
    _, ranks, _ = step(trainer, failing(a="ab").batch())
    (row,) = of_last_step(trainer, ranks)
    assert torch.equal(row["old_log_probs"], likelihood(row["responses"]).bfloat16())
    assert row["temperature"].item() == 1.0
    ((passed, given),) = trainer.actor_rollout_wg.passes
    assert len(passed) == 1 and [rank["temperature"].tolist() for rank in given] == [[1.0]]


def test_a_buffer_over_two_ranks_and_what_an_update_that_fails_leaves_behind():
    cut = f"{ACTOR}.ppo_micro_batch_size_per_gpu=2"
    trainer = make_trainer("++hpt.method=relift", "++hpt.buffer.size=3", cut, ranks=2)
    rollouts = failing(a="a", b="bb", c="ccc").padding()
    batch = rollouts.batch([8, 0, 7, 1, 6, 2, 5, 3, 4])
    _, ranks, metrics = step(trainer, batch)
    assert [len(rank) for rank in ranks] == [8, 8] and metrics["hpt/rows/padding"] == 5
    assert texts_of(of_last_step(trainer, ranks)) == ["a", "bb", "ccc"] and keys_there() == set(rollouts.keys)

    def fail():
        raise OSError("out of memory")

    trainer.actor_rollout_wg.during = fail
    with pytest.raises(OSError, match="out of memory"):
        trainer._update_actor(batch, {})
    assert keys_there() == set(rollouts.keys)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_what_waits_is_in_the_checkpoint_that_verl_writes_and_comes_back_from_the_one_it_reads(tmp_path):
    overrides = ("++hpt.method=relift", "++hpt.buffer.size=3")
    trainer = resumable(tmp_path, *overrides)
    for number, name in ((1, "a"), (2, "b")):
        trainer.global_steps = number
        step(trainer, failing(**{name: name}).batch())
        trainer._save_checkpoint()
        assert FILE in trainer.actor_rollout_wg.found[0], "before verl's marker file"

    def waiting(*more) -> list[str]:
        resumed = resumable(tmp_path, *overrides, *more)
        resumed._load_checkpoint()
        return [TOKENIZER.decode(entry.ids[:-1]) for entry in resumed.hpt.beside.buffer.entries]

    assert waiting() == ["b", "a"]
    path = f"trainer.resume_from_path={tmp_path}/global_step_1"
    assert waiting("trainer.resume_mode=resume_path", path) == ["a"]
    assert waiting("trainer.resume_mode=disable") == []


def test_a_run_without_a_place_of_its_own_writes_no_state_of_it(tmp_path):
    trainer = resumable(tmp_path)
    trainer._save_checkpoint()
    assert FILE not in trainer.actor_rollout_wg.found[0]
