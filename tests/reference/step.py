"""What the references share: reading a case, the gate, group advantages, and adding up one optimizer step.

Settings are read from the case's `hpt` node; beside the product's own keys it may hold `options` (method constants by
name, see `OPTION`) and `clip` {low, high, c} (numbers; `null` for "no such bound").
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

Key = tuple[str, str, int]  # (uid, "rollout" | "demo", index within its list)

OWN = {
    **dict.fromkeys(["ppo", "cispo", "raft", "sft", "dft", "asft", "otr", "psft", "s3ft"], "token"),
    **dict.fromkeys(["grpo", "reinforce", "rloo", "gspo", "srft", "superrl", "poft"], "sequence"),
    **dict.fromkeys(["dr_grpo", "hpt", "hpt_off_on", "hpt_mix_on", "hpt_soft", "luffy"], "question"),
    **dict.fromkeys(["srft_hpt", "srft_code", "trsft", "rl_plus"], "question"),
}

OPTION = {
    "gamma0": 0.1,  # shaping constant of p / (p + gamma0), LUFFY
    "mix_sft": 0.1,  # hpt_mix_on: weight of the SFT term
    "mix_off": 1.0,  # hpt_mix_on: weight of the off-policy term
    "kl_coef": 0.1,  # asft
    "kl_cap": None,  # asft: bound on pi_ref / p
    "otr_beta": 0.0,  # otr: reward of every token but the demonstration's
    "psft_epsilon": 0.28,
    "trsft_alpha": 0.1,
    "rl_plus_power": 0.5,
    "uniform": 1.0,  # rl_plus: the uniform policy's probability (published code 1, paper 1 / vocabulary)
    "baseline": "step",  # reinforce: "step", "group" or a number
    "soft_group": False,  # hpt_soft: is the demonstration a member of its rollouts' group?
}


@dataclass
class Row:
    """One response. `lp` is the leaf; everything else is a constant."""

    key: Key
    lp: Tensor
    old: Tensor
    ref: Tensor
    entropy: Tensor
    reward: float
    given: dict

    def __len__(self) -> int:
        return len(self.lp)


@dataclass
class Question:
    uid: str
    rollouts: list[Row]
    demos: list[Row]


@dataclass
class Term:
    """tokens: loss of each token that the term is made of, before normalisation; those of the row, or of a part."""

    kind: str  # "R" or "S"
    row: Row
    tokens: list[Tensor]


@dataclass
class Settings:
    method: str
    normalization: str
    demo_coef: float
    length_scale: float
    threshold: float
    count: int | None
    success: float
    off: float | None
    soft: list | None
    low: float | None
    high: float | None
    dual: float | None
    options: dict = field(default_factory=dict)


def settings_of(case: dict) -> Settings:
    """The case's settings with their defaults filled in."""
    hpt = case.get("hpt", {})
    method = hpt.get("method", "hpt")
    gate = hpt.get("gate") or {}
    gspo = method == "gspo"
    clip = {"low": 3e-4 if gspo else 0.2, "high": 4e-4 if gspo else 0.2, "c": 3.0, **(hpt.get("clip") or {})}
    return Settings(
        method=method,
        normalization=hpt.get("normalization") or OWN[method],
        demo_coef=hpt.get("demo_coef", 0.1),
        length_scale=hpt.get("rl_length_scale") or 1.0,
        threshold=gate.get("threshold", 0.0),
        count=gate.get("count"),
        success=gate.get("success", 1.0),
        off=gate.get("off"),
        soft=gate.get("soft"),
        low=clip["low"],
        high=clip["high"],
        dual=clip["c"],
        options={**OPTION, **hpt.get("options", {})},
    )


# ---------------------------------------------------------------- the case


def per_token(value, length: int) -> list[float]:
    """A number stands for every token; a list must name each."""
    if isinstance(value, list):
        assert len(value) == length, (len(value), length)
        return [float(v) for v in value]
    return [float(value)] * length


def leaves_of(case: dict) -> dict[Key, Tensor]:
    """Fresh autograd leaves: the log-probabilities of each row."""
    leaves = {}
    for question in case["questions"]:
        for kind in ("rollout", "demo"):
            for index, row in enumerate(question.get(kind + "s") or []):
                values = per_token(row["log_prob"], row["length"])
                leaves[question["uid"], kind, index] = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    return leaves


def questions_of(case: dict, leaves: dict[Key, Tensor], s: Settings) -> list[Question]:
    demo_reward = (case.get("hpt", {}).get("demo") or {}).get("reward")
    demo_reward = s.success if demo_reward is None else float(demo_reward)

    def row(uid: str, kind: str, index: int, given: dict) -> Row:
        leaf, length = leaves[uid, kind, index], given["length"]

        def constant(name: str, default) -> Tensor:
            return torch.tensor(per_token(given.get(name, default), length), dtype=torch.float64)

        reward = given.get("reward")
        reward = demo_reward if reward is None and kind == "demo" else float(reward)
        old = constant("old_log_prob", given["log_prob"])
        ref = constant("ref_log_prob", given["log_prob"])
        return Row((uid, kind, index), leaf, old, ref, constant("entropy", 0.0), reward, given)

    return [
        Question(
            q["uid"],
            [row(q["uid"], "rollout", i, r) for i, r in enumerate(q.get("rollouts") or [])],
            [row(q["uid"], "demo", i, r) for i, r in enumerate(q.get("demos") or [])],
        )
        for q in case["questions"]
    ]


# ---------------------------------------------------------------- gate and advantages


def zone(question: Question, s: Settings) -> str:
    """Where the gate puts a question: "rl", "demo" or "off" (between the two thresholds of the published code)."""
    n = len(question.rollouts)
    solved = sum(r.reward >= s.success for r in question.rollouts)
    if not question.demos:
        return "rl"
    threshold, limit = (s.threshold, s.threshold * n) if s.count is None else (s.count, s.count)
    if threshold >= 0 and solved <= limit + 1e-9:
        return "demo"
    if s.off is not None and solved <= s.off * n + 1e-9:
        return "off"
    return "rl"


def group_advantages(rows: list[Row], std: bool) -> list[float]:
    """GRPO's advantage (arXiv 2402.03300, section 4.1.2), without `std` Dr. GRPO's (2503.20783, section 3).

    A group of one row keeps its reward: mean 0, deviation 1, as verl's compute_grpo_outcome_advantage.
    """
    rewards = [r.reward for r in rows]
    if len(rewards) == 1:
        mean, deviation = 0.0, 1.0
    else:
        mean = math.fsum(rewards) / len(rewards)
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in rewards) / (len(rewards) - 1))
    return [(x - mean) / (deviation + 1e-6) if std else x - mean for x in rewards]


# ---------------------------------------------------------------- one optimizer step


def normalised(terms: list[Term], questions: int, s: Settings) -> dict[Key, Tensor]:
    """Each row's share of the loss of one optimizer step, by the table of normalisations."""
    rows: dict[str, dict[str, dict[Key, int]]] = {"R": {}, "S": {}}  # kind -> question -> row -> tokens
    for term in terms:
        rows[term.kind].setdefault(term.row.key[0], {})[term.row.key] = len(term.tokens)
    tokens = {kind: sum(sum(of.values()) for of in rows[kind].values()) for kind in rows}

    shares: dict[Key, Tensor] = {}
    for term in terms:
        length = len(term.tokens)
        siblings = len(rows[term.kind][term.row.key[0]])
        share = torch.zeros((), dtype=torch.float64)
        for value in term.tokens:
            if term.kind == "R":
                share = (
                    share
                    + {
                        "question": value / questions / siblings / s.length_scale,
                        "sequence": value / questions / siblings / length,
                        "token": value / tokens["R"],
                        "paper": value / siblings,
                        "official": value / s.length_scale,
                    }[s.normalization]
                )
            else:
                share = (
                    share
                    + s.demo_coef
                    * {
                        "question": value / questions / siblings / length,
                        "sequence": value / questions / siblings / length,
                        "token": value / tokens["S"],
                        "paper": value / siblings / length,
                        "official": value / tokens["S"],
                    }[s.normalization]
                )
        key = term.row.key
        shares[key] = shares[key] + share if key in shares else share
    return shares
