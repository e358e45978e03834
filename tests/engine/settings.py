"""The updates that run through verl's engine, and the ways in which each is cut into micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

VOCABULARY, ROWS = 64, 16
# Rewards of each question's rollouts, and its demonstrations; one group lost a session.
MIXED = [([1, 0, 0], 1), ([0, 0, 0], 1), ([1, 1, 0], 1), ([0, 0], 1)]
FAILED = [([0, 0, 0], 1), ([0, 0, 0], 1), ([0, 0], 1)]
SOLVED = [([1, 0, 0], 1), ([1, 1, 0], 1), ([1, 0], 1)]
# Some rollouts begin with so many tokens of a demonstration.
STARTED = [([1, 0, 0], 0, (0, 0, 5)), ([0, 0, 1, 1], 0, (0, 3, 3, 7)), ([1, 0, 1], 0, (2, 6, 6)), ([0, 1], 0)]


@dataclass(frozen=True)
class Setting:
    """One update. questions_per_step below their number: several optimizer steps. rows: a step's, all ranks. stream,
    buffer: demonstrations beside the questions."""

    method: str = "hpt"
    groups: tuple = tuple(MIXED)
    normalization: str | None = None
    questions_per_step: int = 8
    rows: int = ROWS
    entropy_coeff: float = 0.0
    kl_coef: float = 0.0
    temperature: float = 1.0
    stream: int = 0
    buffer: int = 0


@dataclass(frozen=True)
class Cut:
    """How verl cuts a step into micro-batches: a number of equal ones, or by tokens (about that number)."""

    count: int
    dynamic: bool = False


SETTINGS = {
    "hpt": Setting(),
    "hpt_off_on": Setting("hpt_off_on"),
    "hpt_mix_on": Setting("hpt_mix_on"),
    "srft": Setting("srft"),
    "luffy": Setting("luffy"),
    "hpt, official": Setting(normalization="official"),
    "hpt, entropy bonus and KL loss": Setting(entropy_coeff=0.01, kl_coef=0.1),
    "hpt at temperature 0.7": Setting(temperature=0.7),
    "two optimizer steps": Setting(questions_per_step=2),
    "demonstrations only": Setting(groups=tuple(FAILED)),
    "rollouts only": Setting(groups=tuple(SOLVED)),
    "one demonstration": Setting(groups=(([0, 0], 1),)),
    "prefix_rft, entropy bonus and KL loss": Setting(
        "prefix_rft", groups=tuple(STARTED), entropy_coeff=0.01, kl_coef=0.1
    ),
    "uft": Setting("uft", groups=tuple(STARTED)),
    "chord_mu": Setting("chord_mu", stream=4),
    "relift": Setting("relift", buffer=3),
    "no active token": Setting("sft", groups=(([0, 0], 0),)),
}
CUTS = {f"{n} {'dynamic' if d else 'fixed'}": Cut(n, d) for d in (False, True) for n in (1, 2, 4, 8)}
