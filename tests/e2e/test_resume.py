"""A real training on a CPU is killed and resumed: it goes on with the same questions, demonstrations and history.

Two starts, about two and a half minutes on two cores. ``tests/bench/kills.py`` kills one training twenty times.
"""

import random
import time

from cpu_run import Training, kill, question
from recorded_rewards import score

from verl_hpt import config
from verl_hpt.history import History, identity

# All that depends on the history at once: gates by source and by step, several demonstrations by turns of use, their
# retirement and rest, and the early gate.
OVERRIDES = [
    "data.train_batch_size=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.rollout.n=4",
    "++hpt.gate.threshold={start: 0.6, end: 0.1, steps: 20, shape: cosine}",
    "++hpt.gate.finished=false",  # the rewards are on record; whether an answer is cut differs from run to run
    "++hpt.per_source={mix/b: {gate: {threshold: 0.3}}}",
    "++hpt.demo={per_question: 2, select: unseen_first}",
    "++hpt.history={retire_after: 4, cooldown: 1, early_gate: {after_failures: 2, rollouts: 1}}",
]
_SMALL = [*OVERRIDES[:3], "++hpt.gate.finished=false", "data.shuffle=True"]
# Demonstrations beside the questions: what a step takes depends on what earlier ones took. The stream's file is the
# training file; the buffer is seldom full when a step ends.
BESIDE = {
    "stream": [*_SMALL, "++hpt.method=chord_mu", "++hpt.stream={files: ${data.train_files}, batch: 3}"],
    "buffer": [*_SMALL, "++hpt.method=relift", "++hpt.buffer.size=5"],
}


def rows() -> list[dict]:
    """28 questions, so that a batch of 8 ends in the middle of an epoch; a third of them are never solved."""
    return [
        question(
            index,
            {"rule": "never"} if index % 3 == 0 else {"rule": "random", "chance": 0.15 * (index % 5)},
            "mix/a" if index % 2 else "mix/b",
            demos=3 if index % 4 else 1,
        )
        for index in range(28)
    ]


def same_history(one, other) -> bool:
    """Every record of two history files equal; only the tokens saved depend on what was sampled."""
    first, second = (History.read(str(path)) for path in (one, other))
    return first.settings == second.settings and list(first.records.items()) == list(second.records.items())


def test_a_killed_run_goes_on_with_the_same_questions_demonstrations_and_history(tmp_path):
    overrides = [*OVERRIDES, "trainer.save_freq=2", "trainer.total_training_steps=40"]
    first = Training(tmp_path / "first", rows(), overrides)
    process = first.start()
    try:
        first.wait_for(process, lambda: first.checkpoint() >= 10)
        time.sleep(random.uniform(0, 4))
    finally:
        kill(process)

    # Had it been killed earlier, checkpoint 4 would have been its last; the steps after it are done again, and what the
    # first run wrote of them before it died is what an uninterrupted run does. The checkpoint is named by its path.
    resume = ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={first.checkpoints / 'global_step_4'}"]
    second = Training(tmp_path / "second", rows(), [*overrides, *resume])
    process = second.start()
    try:
        second.wait_for(process, lambda: second.checkpoint() >= 10)
    finally:
        kill(process)

    for step in (6, 8, 10):
        assert same_history(first.history(step), second.history(step)), f"step {step}"
    before, after = first.metrics(), second.metrics()
    assert min(after) == 5, "resumed at the step after the checkpoint"
    compared = [name for name in before[6] if name.startswith(("hpt/zone", "hpt/demo_share", "hpt/solve_rate"))]
    assert compared
    for step in (5, 6, 7, 8, 9):
        for name in compared:
            assert before[step].get(name) == after[step].get(name), f"{name} at step {step}"
    follows_the_record(second)


def follows_the_record(training: Training) -> None:
    """Each question's last draw: solved as the record says, taught only under its own source's gate at that step."""
    history, made = History.read(str(training.history(10))), rows()
    keys = [identity(row, prompt_key="prompt") for row in made]
    settings = config.load(
        {
            "gate": {"threshold": {"start": 0.6, "end": 0.1, "steps": 20, "shape": "cosine"}},
            "per_source": {"mix/b": {"gate": {"threshold": 0.3}}},
        }
    )
    assert len(history.records) > 20 and history.records.keys() <= set(keys)
    for i, key in enumerate(keys):
        if key in history.records:
            last, rule, source = history.of(key), made[i]["extra_info"], made[i]["data_source"]
            assert last.solved == sum(score(rule, i, last.drawn_at, session) for session in range(last.rollouts))
            own = settings.per_source.get(source, settings)
            if last.taught_at == last.drawn_at:
                assert last.solved <= own.gate.at(last.drawn_at).threshold * last.rollouts + 1e-9
    assert {1, 4} == {record.rollouts for record in history.records.values()}, "the early gate fired for some"
    assert history.listing("graduated")
