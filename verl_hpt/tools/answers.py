"""avg@n and pass@k of validation sets, exact, from the answers that verl's validation writes down.

verl's own `best@k` draws k of the n answers with replacement, so it lies below pass@k: where 1 of 8 answers is right,
best@8 is 1 − (7/8)^8 = 0.66 and pass@8 is 1. Here pass@k is the unbiased estimator of arXiv 2107.03374, eq. 1.
"""

import json
import math
import os
from collections import defaultdict

from verl_hpt.errors import UserError

FOLDER = "answers"  # in the run's directory: `trainer.validation_data_dir=RUN_DIR/answers`


def pass_at(k: int, n: int, right: int) -> float:
    """Chance that k of the n answers, drawn without replacement, have a right one among them: 1 − C(n−c, k)/C(n, k)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def answers(run_dir: str) -> dict[str, dict[str, list[bool]]] | None:
    """Validation set → question → whether each of its answers is right, at the last step; None where none are there.

    The set's name is the row's `data_source`, which `verl_hpt.reward.score_and_source` adds; else all stand together.
    Raises `UserError` for a line that is none of verl's, by file and number.
    """
    folder = os.path.join(run_dir, FOLDER)
    steps = [f[: -len(".jsonl")] for f in os.listdir(folder) if f.endswith(".jsonl")] if os.path.isdir(folder) else []
    steps = [step for step in steps if step.isdigit()]
    if not steps:
        return None
    path = os.path.join(folder, f"{max(steps, key=int)}.jsonl")
    found: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                question = row["uid"].rsplit("_", 2)[0]
                score = row["acc"] if row.get("acc") is not None else row["score"]
                found[row.get("data_source") or "all"][question].append(float(score) >= 1.0)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{path}, line {number}: not an answer of verl's validation ({error!r})") from None
    return {name: dict(questions) for name, questions in sorted(found.items())}


def table(found: dict[str, dict[str, list[bool]]]) -> list[list[str]]:
    """Head and one row a set, in percent: avg@n, then pass@k for k = 2, 4, … up to n.

    n is the most answers that a question has; a lost one counts as wrong, as it does in verl's own mean@n.
    """
    most = {name: max(map(len, questions.values())) for name, questions in found.items()}
    ks = [2**i for i in range(1, max(most.values()).bit_length())]
    ks += [n for n in sorted(set(most.values())) if n > 1 and n not in ks]
    rows = [["set", "questions", "answers", "avg@n", *(f"pass@{k}" for k in sorted(ks))]]
    for name, questions in found.items():
        n, right = most[name], [sum(each) for each in questions.values()]
        cells = [
            f"{100 * sum(pass_at(k, n, c) for c in right) / len(right):.1f}" if k <= n else "–" for k in sorted(ks)
        ]
        rows.append([name, str(len(right)), str(n), f"{100 * sum(right) / (n * len(right)):.1f}", *cells])
    return rows
