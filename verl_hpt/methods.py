"""Every method of the field as one row of a table.

``METHODS`` says what each does on rollouts, what on demonstrations, where a demonstration stands, and its own
normalisation. A method of your own is one ``register_method(Method(...))`` in a module named in ``hpt.modules``.
"""

from __future__ import annotations

from verl_hpt import parts
from verl_hpt.estimator import Estimator, Method, Term
from verl_hpt.places.schedule import Schedule, Steered
from verl_hpt.places.starts import Adapted, Chunks, Start, Uniform

_DR_GRPO = Estimator(parts.ppo_clip, parts.old)
_GRPO = Estimator(parts.ppo_clip, parts.old, parts.standardized)
_SFT = Estimator(advantage=parts.unit)
_OFF = Estimator(reference=parts.one, advantage=parts.reward, likelihood=parts.shaped)
OFF_ZONE = Term("R", _OFF)
_SHAPED = Estimator(reference=parts.one, likelihood=parts.shaped)
_SRFT_SFT = Estimator(advantage=parts.calm)
_SRFT_ROLLOUTS = Estimator(advantage=parts.excited)

METHODS: dict[str, Method] = {}


def register_method(method: Method) -> Method:
    """Add a row to the table; the name must be free."""
    if METHODS.get(method.name, method) != method:
        raise ValueError(f"method {method.name!r} is already registered: choose another name")
    METHODS[method.name] = method
    return method


_ROLLOUT_METHODS = (
    Method("ppo", Estimator(parts.ppo_clip, parts.old, parts.gae), normalization="token",
           source="1707.06347 eq. 7", formula="1_clip·r·Â, Â from a critic (GAE)"),
    Method("grpo", _GRPO, normalization="sequence", source="2402.03300 eq. 3", formula="1_clip·r·(R−mean)/(std+1e-6)"),
    Method("dr_grpo", _DR_GRPO, source="2503.20783 section 3.2", formula="1_clip·r·(R−mean)"),
    Method("reinforce", Estimator(), normalization="sequence", source="2402.14740 eq. 6", formula="R−mean"),
    Method("rloo", Estimator(advantage=parts.against_others), normalization="sequence", source="2402.14740 eq. 8",
           formula="R − mean of the others"),
    Method("cispo", Estimator(reference=parts.clipped_old, advantage=parts.standardized), normalization="token",
           source="2506.13585 eq. 4", formula="sg(clip(r))·(R−mean)/(std+1e-6)"),
    Method("gspo", Estimator(parts.sequence_clip, parts.sequence_old, parts.standardized), normalization="sequence",
           source="2507.18071 eq. 5, 14", formula="1_seq·s·(R−mean)/(std+1e-6), s = (π_θ(y)/π_old(y))^(1/|y|)"),
    Method("raft", Estimator(parts.correct_only, advantage=parts.unit), normalization="token",
           source="2304.06767 algorithm 1", formula="1[R ≥ success]"),
)  # fmt: skip

_DEMO_METHODS = (
    Method("sft", None, (Term("S", _SFT),), when="always", normalization="token", source="maximum likelihood",
           formula="– / S: 1"),
    Method("hpt", _DR_GRPO, (Term("S", _SFT),), when="gate", source="2509.04419 eq. 11–13",
           formula="1_clip·r·(R−mean) / S: 1 where solved ≤ γ·n"),
    Method("hpt_off_on", _DR_GRPO, (Term("R", _OFF),), when="gate", source="2509.04419 section 5 (ablation)",
           formula="1_clip·r·(R−mean) / R: R·γ₀p/(p+γ₀)² where solved ≤ γ·n"),
    Method("hpt_mix_on", _DR_GRPO, (Term("S", _SFT, 0.1), Term("R", _OFF)), when="gate",
           source="2509.04419 section 5 (ablation)",
           formula="1_clip·r·(R−mean) / S: 0.1 and R: R·γ₀p/(p+γ₀)² where solved ≤ γ·n"),
    Method("hpt_soft", _DR_GRPO, (Term("S", _SFT), Term("R", _OFF)), when="soft", source="2509.04419, published code",
           formula="on·1_clip·r·(R−mean) / S: sft·1 and R: off·R·γ₀p/(p+γ₀)², shares by number solved",
           unverified="what each share of the published table multiplies is inferred from its names"),
    Method("luffy", Estimator(reference=parts.old), (Term("R", _SHAPED),), place="group", when="always",
           source="2504.14945 eq. 4–6", formula="r·(R−mean) / R: (R−mean)·γ₀p/(p+γ₀)²"),
    Method("srft", _SRFT_ROLLOUTS,
           (Term("S", _SRFT_SFT), Term("R", Estimator(reference=parts.one, advantage=parts.standardized))),
           place="group", when="always", normalization="sequence", source="2506.19767 eq. 5–10",
           formula="0.1·e^H̄ or −1 / S: 0.5·e^−H̄ and R: p·(R−mean)/(std+1e-6)"),
    Method("srft_hpt", _SRFT_ROLLOUTS, (Term("S", _SRFT_SFT), Term("R", _SHAPED)), place="group", when="always",
           source="2509.04419 (the SRFT it compares with)",
           formula="0.1·e^H̄ or −1 / S: 0.5·e^−H̄ and R: (R−mean)·γ₀p/(p+γ₀)²"),
    Method("srft_code", Estimator(reference=parts.old, advantage=parts.centered_excited),
           (Term("S", Estimator(advantage=parts.excited_tokens)), Term("R", _SHAPED)), place="group", when="always",
           source="published SRFT code", formula="r·Â·(0.1·e^H_t where Â > 0) / S: 0.5·e^H_t and R: Â·γ₀p/(p+γ₀)²",
           unverified="read at second hand"),
    Method("dft", None, (Term("S", Estimator(reference=parts.one, advantage=parts.unit)),), when="always",
           normalization="token", source="2508.05629 eq. 9", formula="– / S: sg(p)"),
    Method("asft", None,
           (Term("S", Estimator(advantage=parts.unit, likelihood=parts.anchored)),),
           when="always", normalization="token", source="2509.23753 eq. 8",
           formula="– / S: sg(p) + λ_kl·(π_ref/p − 1), capped",
           approximate="KL(ref‖θ) in its k3 log-prob form on the demonstration's tokens, π_ref/p capped at "
           "options.max_ratio; the exact form needs the logits of both models"),
    Method("otr", None,
           (Term("S", Estimator(reference=parts.one, advantage=parts.unit, likelihood=parts.expected_match)),),
           when="always", normalization="token", source="2509.26313 section 3",
           formula="– / S: (1−β)·p, in expectation at κ = 1", unverified="κ and β of the published runs",
           approximate="expectation over the sampled token at temperature κ = 1; κ ≠ 1 is no multiple of ∇ log π and "
           "needs the logits"),
    Method("psft", None, (Term("S", Estimator(parts.psft_clip, parts.old, parts.unit)),), when="always",
           normalization="token", source="2508.17784 eq. 6", formula="– / S: r·1[r ≤ 1+ε]"),
    Method("trsft", _DR_GRPO, (Term("R", Estimator(reference=parts.trust_region, advantage=parts.unit)),),
           when="always", source="2512.17636 (TRAPO)", formula="1_clip·r·(R−mean) / R: min(1, p/α)"),
    Method("superrl", _GRPO, (Term("S", _SFT),), when="unrewarded", normalization="sequence",
           source="2506.01096 section 3", formula="1_clip·r·(R−mean)/(std+1e-6) / S: 1 where max R = 0"),
    Method("rl_plus", Estimator(reference=parts.old),
           (Term("R", Estimator(reference=parts.mixture, likelihood=parts.exploring)),), place="group",
           when="always", source="2508.00222 eq. 5–8", formula="r·(R−mean) / R: (R−mean)·(1−p)^½·2p/(π̂+π_old)"),
    Method("s3ft", None, (Term("S", _SFT),), when="own", normalization="token", source="2502.08130 section 3",
           formula="S: 1 on the question's own correct rollout if there is one, else on the demonstration"),
    Method("poft", None, (Term("S", Estimator(advantage=parts.preference)),), when="always",
           normalization="sequence", source="2412.12865 eq. 5", formula="– / S: σ(m̄ − m) a sequence"),
)  # fmt: skip

# Demonstrations elsewhere than beside the rollouts of their question or in their group.
_FADING = Schedule(0.95, 0.05, 300, "cosine")
_CHORD = dict(place="stream", when="always", normalization="token", convex=True)
_PLACED_METHODS = (
    Method("prefix_rft", _DR_GRPO, (Term("R", Estimator(parts.uncertain_clip, parts.old, parts.against_plain)),),
           place="prefix", when="always", source="2507.01679 eq. 2–3, published code",
           start=Start(Uniform(Schedule(0.95, 0.0, 300, "cosine"), 0.95), rollouts=1),
           formula="1_clip·r·(R−mean), continuations 1_clip·r·R / prefix R: 1_clip·r·(R−mean)/k, top 20% entropy",
           unverified="steps of the cosine; which of the three estimators of its published code the paper ran"),
    Method("uft", _GRPO, (Term("S", _SFT),), place="prefix", when="always", normalization="token",
           baseline="group", demo_coef=0.001, source="2505.16984, published code",
           start=Start(Chunks(5, _FADING), rollouts="all", until=300),
           formula="1_clip·r·(R−mean)/(std+1e-6) / prefix S: 1",
           approximate="fifths of the tokens, where the published code cuts between sentences"),
    Method("stephint", _GRPO, place="prefix", normalization="sequence", baseline="group",
           start=Start([0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75], rollouts="all"), source="2507.02841",
           formula="1_clip·r·(R−mean)/(std+1e-6) / prefix frozen",
           unverified="levels, baseline and where steps are cut"),
    Method("g2rpo_a", _GRPO, (Term("R", _GRPO),), place="prefix", when="always", normalization="sequence",
           baseline="group", start=Start(Adapted(3072), rollouts=2), source="2508.13023, published code",
           formula="1_clip·r·(R−mean)/(std+1e-6) / prefix R: the same"),
    Method("questa", _GRPO, place="hint", normalization="sequence", source="2507.13266, published code",
           start=Start(0.5, rollouts="all", min_length=10), formula="1_clip·r·(R−mean)/(std+1e-6) with a hint",
           unverified="the step at which half of the solution becomes a quarter"),
    Method("pope", _GRPO, place="hint", normalization="sequence", source="2601.18779",
           start=Start(0.5, rollouts=4, after_failures=1), formula="1_clip·r·(R−mean)/(std+1e-6), hints if hard",
           unverified="all numbers"),
    Method("guide", _GRPO, place="hint", normalization="sequence", baseline="group", rescored=True,
           source="2506.13923; 2607.19313", start=Start(1.0, rollouts=4, after_failures=1),
           formula="1_clip·r·(R−mean)/(std+1e-6), hinted: r = π_θ(y|x)/π_old(y|x,h)",
           unverified="the ratio, of two independent notes",
           approximate="hints come at the next draw of a failed question, where the paper samples again at once"),
    Method("chord_mu", _GRPO, (Term("S", _SFT),), demo_coef=Schedule(0.9, 0.05, 200, "cosine"), **_CHORD,
           source="2508.11408 eq. 1–3, published code", formula="(1−μ)·1_clip·r·(R−mean)/(std+1e-6) / stream S: μ",
           unverified="steps of the cosine: 200 in section 4.3, 30 in appendix A.1"),
    Method("chord_phi", _GRPO, (Term("S", Estimator(reference=parts.one, advantage=parts.doubt)),), demo_coef=0.1,
           **_CHORD, source="2508.11408 eq. 5–6, published code",
           formula="(1−μ)·1_clip·r·(R−mean)/(std+1e-6) / stream S: μ·sg(p(1−p))"),
    Method("amft_style", _GRPO, (Term("S", _SFT),), demo_coef=Steered(0.5, 0.3), **_CHORD, source="2508.06944",
           formula="(1−μ)·1_clip·r·(R−mean)/(std+1e-6) / stream S: μ, which follows the entropy",
           approximate="experimental: the entropy half of its controller alone, without the meta-gradient",
           unverified="target and rate; the sign is disputed"),
    Method("relift", _DR_GRPO, (Term("S", _SFT),), place="buffer", when="gate", normalization="official", demo_coef=1.0,
           source="2506.07527, published code", formula="1_clip·r·(R−mean) / buffer S: 1, in steps of its own",
           unverified="whether its rollouts' loss is a token mean or a sum over L; Adam makes both nearly the same",
           approximate="one optimizer for both, where the published code has a second one; one entry a question"),
)  # fmt: skip

for _method in (*_ROLLOUT_METHODS, *_DEMO_METHODS, *_PLACED_METHODS):
    register_method(_method)
