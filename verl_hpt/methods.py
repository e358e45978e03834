"""Every method of the field as one row of a table.

``METHODS`` says what each does on rollouts, what on demonstrations, where a demonstration stands, and its own
normalisation. A method of your own is one ``register_method(Method(...))`` in a module named in ``hpt.modules``.
"""

from __future__ import annotations

from verl_hpt import parts
from verl_hpt.estimator import Estimator, Method, Term

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

for _method in (*_ROLLOUT_METHODS, *_DEMO_METHODS):
    register_method(_method)
