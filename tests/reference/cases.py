"""Random cases for the references: seeded, plain JSON, with every zone and every clip branch in them."""

import random

# Group of each question: rewards of its rollouts, number of demonstrations. One rollout alone, groups of unequal size,
# rewards between 0 and 1, and a question without a demonstration are all there.
QUESTIONS = [
    ("none-solved", [0.0, 0.0, 0.0, 0.0], 1),
    ("one-of-four", [1.0, 0.0, 0.0, 0.0], 1),
    ("half-solved", [1.0, 0.0, 1.0, 0.0, 1.0, 0.0], 2),
    ("all-solved", [1.0, 1.0, 1.0], 1),
    ("alone-wrong", [0.0], 1),
    ("alone-right", [1.0], 1),
    ("two-demos", [0.0, 0.0, 0.0], 2),
    ("no-demo", [0.0, 1.0, 0.0, 0.0], 0),
]
PARTIAL = ("partly-right", [0.0, 0.5, 0.25, 0.0, 1.0], 1)

# Rollouts that start from a demonstration: (reward, tokens of its prefix, label where that is not enough to tell which
# of them started alike) or (reward, label of its hint).
PREFIXED = {
    "several-lengths": [(1.0, 0), (0.0, 0), (0.0, 0), (1.0, 2), (0.0, 7)],
    "shared": [(0.0, 0), (1.0, 0), (1.0, 4), (0.0, 4), (0.0, 4), (1.0, 11)],
    "none-started": [(1.0, 0), (0.0, 0), (0.0, 0)],
    "all-started": [(1.0, 3), (0.0, 3), (0.0, 6), (0.5, 1)],
    "one-plain": [(0.25, 0), (1.0, 5)],
    "two-demonstrations": [(0.0, 0), (1.0, 0), (1.0, 6, "a"), (0.0, 6, "a"), (0.0, 6, "b"), (1.0, 6)],
    "alone": [(1.0, 0)],
    "alone-started": [(1.0, 8)],
    "failed": [(0.0, 0), (0.0, 0), (0.0, 4), (0.0, 4)],
    "partly": [(0.5, 0), (0.25, 0), (0.75, 10), (0.0, 9), (1.0, 9)],
}
HINTED = {
    "plain": [(1.0, None), (0.0, None), (0.0, None)],
    "all-alike": [(1.0, "a"), (0.0, "a"), (1.0, "a"), (0.0, "a")],
    "two-hints": [(1.0, "a"), (0.0, "a"), (0.5, "b"), (0.0, "b")],
    "half": [(0.0, None), (0.0, None), (1.0, 1), (0.0, 1)],
    "one-alone": [(0.0, None), (1.0, None), (1.0, 2)],
    "failed": [(0.0, None), (0.0, 1), (0.0, 1)],
}


def random_case(
    seed: int,
    method: str,
    normalization: str | None = None,
    *,
    binary: bool = False,
    rejected_demos: bool = True,
    spread: float = 1.6,
    **hpt,
) -> dict:
    """A case with all kinds of questions, shuffled.

    `binary` keeps every reward 0 or 1. `rejected_demos` lets a grader give some demonstrations reward 0. `spread`
    bounds |log_prob - old_log_prob| of most tokens (log space); 1.6 reaches both clips and the dual clip, since
    e^1.6 = 4.95 > 3. Half of the rows are within 3e-4 of their old policy, where GSPO's clip leaves them alone.
    `hpt` adds or overrides settings.
    """
    rng = random.Random(f"{seed}/{method}")
    questions = []
    for uid, rewards, demos in [*QUESTIONS, *([] if binary else [PARTIAL])]:
        rollouts = [_row(rng, reward, spread) for reward in rewards]
        for row in rollouts:
            row["advantage"] = [rng.uniform(-1.5, 1.5) for _ in range(row["length"])]  # a critic's, for ppo
        demonstrations = []
        for _ in range(demos):
            row = _row(rng, 0.0 if rejected_demos and rng.random() < 0.25 else 1.0, spread)
            row["model_log_prob"] = rng.uniform(-2.0, -0.1)  # aligned models' mean log-prob of a token, for poft
            demonstrations.append(row)
        questions.append({"uid": uid, "source": "random", "rollouts": rollouts, "demos": demonstrations})
    rng.shuffle(questions)
    settings = {
        "method": method,
        "normalization": normalization,
        "rl_length_scale": 16,
        "demo_coef": 0.7,
        "gate": {"threshold": 0.0},
    }
    return {"hpt": {**settings, **hpt}, "questions": questions}


def placed_case(
    seed: int, method: str, place: str, normalization: str | None = None, *, spread: float = 1.6, **hpt
) -> dict:
    """A case for a method whose demonstrations stand elsewhere; place: prefix, hint, stream or buffer."""
    case = random_case(seed, method, normalization, spread=spread, **hpt)
    rng = random.Random(f"{seed}/{method}/{place}")
    if place in ("stream", "buffer"):
        case[place] = [_row(rng, 1.0, spread) for _ in range(5)]
        return case
    case["questions"] = []
    for uid, rows in (PREFIXED if place == "prefix" else HINTED).items():
        rollouts = []
        for reward, *given in rows:
            given = dict(zip(("prefix", "start") if place == "prefix" else ("start",), given, strict=False))
            row = _row(rng, reward, spread, given.get("prefix", 0))
            row["entropy"] = [rng.choice([x, 0.5, 1.0]) for x in row["entropy"]]  # some are equal
            rollouts.append(row | given)
        case["questions"].append({"uid": uid, "rollouts": rollouts, "demos": [_row(rng, 1.0, spread)]})
    rng.shuffle(case["questions"])
    return case


def _row(rng: random.Random, reward: float, spread: float, prefix: int = 0) -> dict:
    length = prefix + rng.randint(1, 9)
    log_prob = [-rng.expovariate(0.9) - 0.01 for _ in range(length)]
    near = rng.random() < 0.5
    width = 3e-4 if near else spread
    old = [min(x + rng.uniform(-width, width), -1e-6) for x in log_prob]
    return {
        "reward": reward,
        "length": length,
        "log_prob": log_prob,
        "old_log_prob": old,
        "ref_log_prob": [min(x + rng.uniform(-1.0, 1.0), -1e-6) for x in log_prob],
        "entropy": [rng.uniform(0.0, 2.0) for _ in range(length)],
    }
