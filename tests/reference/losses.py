"""Every method's published loss, written out slowly and independently of the package.

A case is the JSON that `verl-hpt explain` reads (questions with rollouts and demonstrations). Log-probabilities are
autograd leaves, one float64 tensor a row; a method is the loss of its paper or of its authors' code, token by token;
the gradient is autograd's. No factor "in front of grad log pi" is worked out by hand anywhere in this file, and nothing
is imported from the package: that independence is the whole point.

A method turns a question into terms. A term is a row, its kind and one loss value a token: kind "R" is normalised with
the rollouts, kind "S" with the demonstrations, times demo_coef. `step.normalised` adds them up as one optimizer step
that holds every question of the case. Losses of a whole sequence (GSPO, PoFT) put their value on each of the row's
tokens, so that a sum over tokens with 1/length in front is the sequence's loss once.
"""

import math

import torch
from torch import Tensor

from .step import (
    Key,
    Question,
    Row,
    Settings,
    Term,
    group_advantages,
    leaves_of,
    normalised,
    per_token,
    questions_of,
    settings_of,
    zone,
)

SOFT = [  # (on, off, sft) by the number of solved rows, the demonstration counted; published code, 8 rows
    (1.0, 1.0, 1.0),
    (0.0, 0.0, 1.0),
    (0.125, 0.5, 0.5),
    (0.25, 1.0, 0.25),
    (0.5, 0.5, 0.125),
    (1.0, 0.25, 0.0),
    (1.0, 0.125, 0.0),
    (1.0, 0.0, 0.0),
    (1.0, 0.0, 0.0),
]


# ---------------------------------------------------------------- losses of rows


def bounded(ratio: Tensor, s: Settings) -> Tensor:
    """The ratio within [1 - low, 1 + high]; a bound of None is no bound."""
    low, high = -math.inf if s.low is None else 1 - s.low, math.inf if s.high is None else 1 + s.high
    return torch.clamp(ratio, low, high)


def clipped(row: Row, advantage: list[float], s: Settings) -> Term:
    """PPO's pessimistic minimum (1707.06347, equation 7) with dual clip (1912.09729)."""
    tokens = []
    for t in range(len(row)):
        ratio = torch.exp(row.lp[t] - row.old[t])
        a = advantage[t]
        objective = torch.minimum(ratio * a, bounded(ratio, s) * a)
        if a < 0 and s.dual is not None:
            objective = torch.maximum(objective, torch.tensor(s.dual * a, dtype=torch.float64))
        tokens.append(-objective)
    return Term("R", row, tokens)


def unclipped(row: Row, a: float) -> Term:
    return Term("R", row, [-a * torch.exp(row.lp[t] - row.old[t]) for t in range(len(row))])


def log_likelihood(kind: str, row: Row, factor: float = 1.0) -> Term:
    return Term(kind, row, [-factor * row.lp[t] for t in range(len(row))])


def shaped(row: Row, a: float, gamma0: float, factor: float = 1.0) -> Term:
    """LUFFY's importance weight p, pi_ref = 1, shaped to p / (p + gamma) (2504.14945; its code's `p_div_p_0.1`)."""
    tokens = []
    for t in range(len(row)):
        p = torch.exp(row.lp[t])
        tokens.append(-factor * a * p / (p + gamma0))
    return Term("R", row, tokens)


def dr_grpo_rows(rows: list[Row], s: Settings) -> list[Term]:
    return [clipped(r, [a] * len(r), s) for r, a in zip(rows, group_advantages(rows, std=False), strict=True)]


# ---------------------------------------------------------------- methods on rollouts


def ppo(q: Question, s: Settings, step: list[Question]) -> list[Term]:
    """A critic's advantages, given on the row (number or list)."""
    return [clipped(r, per_token(r.given["advantage"], len(r)), s) for r in q.rollouts]


def grpo(q: Question, s: Settings, step: list[Question]) -> list[Term]:
    return [clipped(r, [a] * len(r), s) for r, a in zip(q.rollouts, group_advantages(q.rollouts, True), strict=True)]


def dr_grpo(q: Question, s: Settings, step: list[Question]) -> list[Term]:
    return dr_grpo_rows(q.rollouts, s)


def reinforce(q: Question, s: Settings, step: list[Question]) -> list[Term]:
    """REINFORCE with a baseline (2402.14740). Its moving average over training is here the step's mean."""
    baseline = s.options["baseline"]
    if baseline in ("step", "group"):
        rewards = [r.reward for other in (step if baseline == "step" else [q]) for r in other.rollouts]
        baseline = math.fsum(rewards) / len(rewards) if rewards else 0.0
    return [log_likelihood("R", r, r.reward - baseline) for r in q.rollouts]


def rloo(q: Question, s: Settings, step: list[Question]) -> list[Term]:
    """Leave-one-out baseline (2402.14740). One rollout alone keeps its reward, as verl."""
    terms = []
    for r in q.rollouts:
        others = [o.reward for o in q.rollouts if o is not r]
        terms.append(log_likelihood("R", r, r.reward - (math.fsum(others) / len(others) if others else 0.0)))
    return terms


def cispo(q: Question, s: Settings, step: list[Question]) -> list[Term]:
    """-sg(clip(r)) A log pi (2506.13585, equations 4-5). Paper: upper bound only; verl clips below too, as here."""
    terms = []
    for r, a in zip(q.rollouts, group_advantages(q.rollouts, True), strict=True):
        tokens = []
        for t in range(len(r)):
            weight = bounded(torch.exp(r.lp[t] - r.old[t]), s).detach()
            tokens.append(-weight * a * r.lp[t])
        terms.append(Term("R", r, tokens))
    return terms


def gspo(q: Question, s: Settings, step: list[Question]) -> list[Term]:
    """Sequence ratio s = (pi / pi_old)^(1/length), clipped as a whole (2507.18071, equations 5-7); no dual clip."""
    terms = []
    for r, a in zip(q.rollouts, group_advantages(q.rollouts, True), strict=True):
        ratio = torch.exp(sum(r.lp[t] - r.old[t] for t in range(len(r))) / len(r))
        objective = torch.minimum(ratio * a, bounded(ratio, s) * a)
        terms.append(Term("R", r, [-objective] * len(r)))
    return terms


def raft(q: Question, s: Settings, step: list[Question]) -> list[Term]:
    """Likelihood of the accepted samples (2304.06767). Rejected rows stay in the counts with loss 0."""
    return [log_likelihood("R", r, float(r.reward >= s.success)) for r in q.rollouts]


# ---------------------------------------------------------------- methods with demonstrations


def sft(q: Question, s: Settings, step: list[Question]) -> list[Term]:
    return [log_likelihood("S", d) for d in q.demos]


def off_policy(q: Question, s: Settings, step: list[Question]) -> list[Term]:
    """The `off` zone: rollouts leave, the demonstration is a group of one, so its advantage is its reward."""
    return [shaped(d, d.reward, s.options["gamma0"]) for d in q.demos]


def hpt(q: Question, s: Settings, step: list[Question]) -> list[Term]:
    """2509.04419: imitate where too few rollouts solve the question, reinforce elsewhere."""
    return {"demo": sft, "off": off_policy, "rl": dr_grpo}[zone(q, s)](q, s, step)


def hpt_off_on(q: Question, s: Settings, step: list[Question]) -> list[Term]:
    return {"demo": off_policy, "off": off_policy, "rl": dr_grpo}[zone(q, s)](q, s, step)


def hpt_mix_on(q: Question, s: Settings, step: list[Question]) -> list[Term]:
    where = zone(q, s)
    if where != "demo":
        return {"off": off_policy, "rl": dr_grpo}[where](q, s, step)
    o = s.options
    return [log_likelihood("S", d, o["mix_sft"]) for d in q.demos] + [
        shaped(d, d.reward, o["gamma0"], o["mix_off"]) for d in q.demos
    ]


def soft_coefficients(solved: int, n: int, table: list | None) -> tuple[float, float, float]:
    """(on, off, sft). A given table has one entry for each solved count 0..n; the published one is stretched to n.

    The published index counts the demonstration among 8 rows, so 7 rollouts are its native group.
    """
    if table is not None:
        assert len(table) == n + 1, (len(table), n)
        return tuple(table[solved])
    return SOFT[1 + math.floor(7 * solved / n + 0.5)] if n else SOFT[1]


def hpt_soft(q: Question, s: Settings, step: list[Question]) -> list[Term]:
    """Weighted blend of the three losses; a row whose coefficients are all 0 leaves the step."""
    if not q.demos:
        return dr_grpo(q, s, step)
    solved = sum(r.reward >= s.success for r in q.rollouts)
    on, off, imitation = soft_coefficients(solved, len(q.rollouts), s.soft)
    group = q.rollouts + (q.demos if s.options["soft_group"] and off else [])
    advantages = dict(zip([r.key for r in group], group_advantages(group, False), strict=True)) if group else {}
    terms = []
    for r in q.rollouts if on else []:
        weighted = clipped(r, [advantages[r.key]] * len(r), s)
        terms.append(Term("R", r, [on * x for x in weighted.tokens]))
    for d in q.demos:
        if off:
            terms.append(shaped(d, advantages.get(d.key, d.reward), s.options["gamma0"], off))
        if imitation:
            terms.append(log_likelihood("S", d, imitation))
    return terms


def luffy(q: Question, s: Settings, step: list[Question]) -> list[Term]:
    """Mixed-policy advantages over rollouts and demonstrations (2504.14945); no std, no clip, as its scripts."""
    rows = q.rollouts + q.demos
    return [
        unclipped(r, a) if r.key[1] == "rollout" else shaped(r, a, s.options["gamma0"])
        for r, a in zip(rows, group_advantages(rows, False), strict=True)
    ]


def mean_entropy(row: Row) -> float:
    return math.fsum(row.entropy.tolist()) / len(row)


def srft_rows(q: Question, s: Settings, std: bool, shape: bool) -> list[Term]:
    """SRFT (2506.19767, section 4): three losses, entropies under stop-gradient, no ratio on rollouts."""
    group = q.rollouts + q.demos
    terms = []
    for r, a in zip(group, group_advantages(group, std), strict=True):
        if r.key[1] == "rollout":
            factor = 0.1 * math.exp(mean_entropy(r)) if r.reward >= s.success else -1.0
            terms.append(log_likelihood("R", r, factor))
            continue
        terms.append(log_likelihood("S", r, 0.5 * math.exp(-mean_entropy(r))))
        plain = Term("R", r, [-a * torch.exp(r.lp[t]) for t in range(len(r))])  # pi_theta / pi_beta with pi_beta = 1
        terms.append(shaped(r, a, s.options["gamma0"]) if shape else plain)
    return terms


def srft(q: Question, s: Settings, step: list[Question]) -> list[Term]:
    return srft_rows(q, s, std=True, shape=False)


def srft_hpt(q: Question, s: Settings, step: list[Question]) -> list[Term]:
    return srft_rows(q, s, std=False, shape=True)


def srft_code(q: Question, s: Settings, step: list[Question]) -> list[Term]:
    """The authors' own code at second hand (unverified): token entropies, their sign turned on the SFT term."""
    rows = q.rollouts + q.demos
    terms = []
    for r, a in zip(rows, group_advantages(rows, False), strict=True):
        weights = [math.exp(h) for h in r.entropy.tolist()]
        if r.key[1] == "rollout":
            plain = unclipped(r, a).tokens
            terms.append(Term("R", r, [0.1 * w * x if a > 0 else x for w, x in zip(weights, plain, strict=True)]))
        else:
            terms.append(Term("S", r, [-0.5 * weights[t] * r.lp[t] for t in range(len(r))]))
            terms.append(shaped(r, a, s.options["gamma0"]))
    return terms


def dft(q: Question, s: Settings, step: list[Question]) -> list[Term]:
    """-sg(p) log p (2508.05629; published fsdp_dft_trainer.py:371)."""
    return [Term("S", d, [-torch.exp(d.lp[t]).detach() * d.lp[t] for t in range(len(d))]) for d in q.demos]


def asft(q: Question, s: Settings, step: list[Question]) -> list[Term]:
    """DFT plus an anchor KL (2509.23753), in log-prob form: k3 = ref/p - 1 - log(ref/p) on the demonstration's token.

    The published code (train_v2.py:146-173) takes the exact KL(ref || theta) over the vocabulary instead. With a cap
    the ratio stops growing: beyond it the penalty goes on as a straight line with the slope it has there.
    """
    coefficient, cap = s.options["kl_coef"], s.options["kl_cap"]
    terms = []
    for d in q.demos:
        tokens = []
        for t in range(len(d)):
            log_ratio = d.ref[t] - d.lp[t]
            k3 = torch.exp(log_ratio) - 1 - log_ratio
            if cap is not None and log_ratio.item() > math.log(cap):
                k3 = (cap - 1) * log_ratio
            tokens.append(-torch.exp(d.lp[t]).detach() * d.lp[t] + coefficient * k3)
        terms.append(Term("S", d, tokens))
    return terms


def otr(q: Question, s: Settings, step: list[Question]) -> list[Term]:
    """One-token rollout at kappa = 1 in expectation: minus the mean reward, 1 on the demo's token, beta on the rest."""
    beta = s.options["otr_beta"]
    terms = []
    for d in q.demos:
        p = [torch.exp(d.lp[t]) for t in range(len(d))]
        terms.append(Term("S", d, [-(1.0 * x + beta * (1 - x)) for x in p]))
    return terms


def psft(q: Question, s: Settings, step: list[Question]) -> list[Term]:
    """PPO's objective with advantage 1: -min(r, clip(r, 1 - e, 1 + e)) (2508.17784; so in its code)."""
    e = s.options["psft_epsilon"]
    terms = []
    for d in q.demos:
        ratios = [torch.exp(d.lp[t] - d.old[t]) for t in range(len(d))]
        terms.append(Term("S", d, [-torch.minimum(x, torch.clamp(x, 1 - e, 1 + e)) for x in ratios]))
    return terms


def trsft(q: Question, s: Settings, step: list[Question]) -> list[Term]:
    """Trust-region SFT: 1/p of SFT's gradient becomes 1/max(p, alpha) (2512.17636). Integrated: -log p inside, a line
    in p outside. The demonstration stands beside its question's rollouts, not in their group."""
    alpha = s.options["trsft_alpha"]
    terms = dr_grpo(q, s, step)
    for d in q.demos:
        tokens = []
        for t in range(len(d)):
            p = torch.exp(d.lp[t])
            tokens.append(-torch.log(p) if p.item() >= alpha else -(math.log(alpha) + (p - alpha) / alpha))
        terms.append(Term("R", d, tokens))
    return terms


def superrl(q: Question, s: Settings, step: list[Question]) -> list[Term]:
    """SFT exactly where no rollout has any reward (2506.01096), GRPO elsewhere."""
    nothing = all(r.reward <= 0 for r in q.rollouts)
    return sft(q, s, step) if nothing and q.demos else grpo(q, s, step)


def rl_plus(q: Question, s: Settings, step: list[Question]) -> list[Term]:
    """Multiple importance sampling and exploration advantage (2508.00222; published rlplus_core_alg.py:136-167)."""
    rows = q.rollouts + q.demos
    terms = []
    for r, a in zip(rows, group_advantages(rows, False), strict=True):
        if r.key[1] == "rollout":
            terms.append(unclipped(r, a))
            continue
        tokens = []
        for t in range(len(r)):
            p, old = torch.exp(r.lp[t]), torch.exp(r.old[t])
            estimated = 0.5 * old + 0.5 * s.options["uniform"]
            explored = a * (1 - p.detach()) ** s.options["rl_plus_power"]
            tokens.append(-explored * 2 * p / (estimated + old))
        terms.append(Term("R", r, tokens))
    return terms


def s3ft(q: Question, s: Settings, step: list[Question]) -> list[Term]:
    """The model's own correct answer where it has one, here the first by index, else the demonstration (2502.08130)."""
    own = [r for r in q.rollouts if r.reward >= s.success]
    return [log_likelihood("S", r) for r in (own[:1] or q.demos)]


def poft(q: Question, s: Settings, step: list[Question]) -> list[Term]:
    """-log sigmoid(m - mbar), m the mean log-prob, mbar that of the aligned models (2412.12865; run_poft.py:226)."""
    terms = []
    for d in q.demos:
        m = sum(d.lp[t] for t in range(len(d))) / len(d)
        preference = -torch.log(torch.sigmoid(m - float(d.given["model_log_prob"])))
        terms.append(Term("S", d, [preference] * len(d)))
    return terms


METHODS = {
    f.__name__: f
    for f in (
        *(ppo, grpo, dr_grpo, reinforce, rloo, cispo, gspo, raft),
        *(sft, hpt, hpt_off_on, hpt_mix_on, hpt_soft, luffy, srft, srft_hpt, srft_code),
        *(dft, asft, otr, psft, trsft, superrl, rl_plus, s3ft, poft),
    )
}


def shares(case: dict, leaves: dict[Key, Tensor]) -> dict[Key, Tensor]:
    """Loss of each row that takes part; rows that left the step are absent."""
    s = settings_of(case)
    questions = questions_of(case, leaves, s)
    terms = [term for q in questions for term in METHODS[s.method](q, s, questions)]
    return normalised(terms, len(questions), s)


def loss(case: dict, leaves: dict[Key, Tensor]) -> Tensor:
    """Total loss of the step, differentiable in `leaves`."""
    return sum(shares(case, leaves).values(), torch.zeros((), dtype=torch.float64))


def loss_parts(case: dict) -> dict[str, float]:
    """`rl` sums rollout rows, `demo` demonstration rows, whatever the kind of their terms."""
    of = shares(case, leaves_of(case))
    rl = math.fsum(v.item() for k, v in of.items() if k[1] == "rollout")
    demo = math.fsum(v.item() for k, v in of.items() if k[1] == "demo")
    return {"rl": rl, "demo": demo, "total": rl + demo}


def gradients(case: dict) -> dict[Key, list[float]]:
    """d loss / d log_prob of every token of every row; zeros for a row that is not in the loss."""
    leaves = leaves_of(case)
    total = loss(case, leaves)
    if total.requires_grad:
        total.backward()
    return {key: [0.0] * len(x) if x.grad is None else x.grad.tolist() for key, x in leaves.items()}
