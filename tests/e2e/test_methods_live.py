"""Every method trains in the real trainer: real verl, Ray, FSDP2 and vLLM on the CPU.

One live trainer whose method is switched serves most; a second has a critic and a reference model, and with them the
extremes: entropy bonus, KL loss, two epochs an update, temperature 0.8, dynamic batches, critic warm-up.
"""

import glob
import json
import os
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from cpu_run import Training, question
from omegaconf import OmegaConf

from verl_hpt.loss import ROW_COLUMNS, ROW_FIELD, TEACHER, WEIGHTS
from verl_hpt.methods import METHODS
from verl_hpt.tools.explain import explain

HERE = Path(__file__).parent
SERVED = ("ppo", "asft")
PLAIN = [name for name, method in METHODS.items() if name not in SERVED and method.place in ("separate", "group")]
PLAIN = [name if name != "poft" else "poft demo.other_log_prob=others" for name in PLAIN]
STEPS = 3
UNUSABLE = (5, 9)  # questions without a usable demonstration
EXTREMES = [
    "hpt gate.threshold=-1", "hpt gate.threshold=1", "hpt gate.off=0.9", "hpt normalization=official",
    "hpt gate.finished=true rollouts.truncated=mask",
]  # fmt: skip
COLUMNS = [
    "sft demo.select=likelihood demo.likelihood_of=policy demo.token_weights=weights demo.source=writer",
    "sft demo.select=likelihood demo.log_likelihood=likelihoods demo.per_question=2 demo.token_weights=weights",
    "hpt gate.threshold=0.5 demo.teacher_log_prob=teacher compose.rollouts=dr_grpo "
    "compose.demos=[{'kind':R,'estimator':{'reference':teacher,'advantage':reward}}]",
]


def rows() -> list[dict]:
    """Questions that are never, sometimes and nearly always solved; some without a usable demonstration."""
    made = []
    for index in range(16):
        rule = {"rule": "never"} if index % 4 == 0 else {"rule": "random", "chance": 0.3 * (index % 4)}
        made.append(question(index, rule, "live", demos=2))
    made[UNUSABLE[0]]["target"] = ["x" * 200]  # too long
    made[UNUSABLE[1]]["target"] = [""]
    for row in made:
        lengths = [len(text) + 1 for text in row["target"]]  # bytes and EOS
        row["others"], row["writer"] = [-2.0 for _ in lengths], ["someone" for _ in lengths]
        row["likelihoods"] = [-2.0 + i for i, _ in enumerate(lengths)]
        row["weights"] = [[1.0 + t % 3 for t in range(n)] for n in lengths]
        row["teacher"] = [[-0.1 - t / 10 for t in range(n)] for n in lengths]
    for index in range(0, 16, 3):  # a session that fails: its group comes back smaller
        made[index]["extra_info"]["lost"] = 0
    return made


def train(folder: Path, methods: list[str], overrides: list[str], monkeypatch) -> Training:
    (folder / "records").mkdir(parents=True)
    monkeypatch.setenv("LIVE_FOLDER", str(folder / "records"))
    monkeypatch.setenv("LIVE_METHODS", ";".join(methods))
    monkeypatch.setenv("LIVE_STEPS", str(STEPS))
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "live")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
    steps = STEPS * len(methods)
    training = Training(
        folder / "run",
        rows(),
        [
            "data.train_batch_size=4",
            "actor_rollout_ref.rollout.n=3",
            f"trainer.total_training_steps={steps}",
            f"trainer.save_freq={STEPS}",
            "actor_rollout_ref.actor.checkpoint.save_contents=[model]",
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16",
            "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=6",
            *overrides,
        ],
    )
    training.run(limit=1500)
    return training


def weights(training: Training, step: int) -> torch.Tensor:
    """All parameters of a checkpoint as one vector."""
    (file,) = glob.glob(str(training.checkpoints / f"global_step_{step}" / "actor" / "model_world_size_1_rank_0.pt"))
    state = torch.load(file, weights_only=False)
    return torch.cat([getattr(x, "_local_tensor", x).flatten().float() for x in state.values()])


def rollouts(folder: Path, step: int) -> dict:
    """verl's rows of a step, see ``live.rollouts_as_json``."""
    return json.loads((folder / "records" / f"rollouts_{step}.json").read_text())


def check(training: Training, methods: list[str]) -> None:
    metrics = training.metrics()
    records = training.folder.parent
    for step in range(1, STEPS * len(methods) + 1):
        if (records / "records" / f"rollouts_{step}.json").exists():
            left = rollouts(records, step)
            assert left["ours"] == [] and left["keys"] > 0, f"step {step}: rows of ours are left in TransferQueue"
    before = None
    for turn, name in enumerate(methods):
        steps = range(turn * STEPS + 1, (turn + 1) * STEPS + 1)
        # A step whose groups all agree has no gradient, and there are such steps; never three in a row.
        norms = [metrics[s]["actor/grad_norm"] for s in steps if "actor/grad_norm" in metrics[s]]
        assert all(0 <= norm < float("inf") for norm in norms) and max(norms) > 0, name
        # One rollout a question is sampled where all are on demonstrations: a session that fails takes its question.
        fewest = 1 if name == "hpt gate.threshold=1" else 4
        for s in steps:
            assert fewest <= metrics[s]["hpt/questions"] <= 4 if "hpt/questions" in metrics[s] else s == 1
        after = weights(training, (turn + 1) * STEPS)
        assert torch.isfinite(after).all()
        assert before is None or (after - before).abs().max() > 0, f"{name} left every parameter as it was"
        before = after


def test_every_method_without_a_critic_or_reference_trains_and_explain_agrees(tmp_path, monkeypatch):
    methods = PLAIN + EXTREMES + COLUMNS
    overrides = ["actor_rollout_ref.actor.ppo_mini_batch_size=4"]
    training = train(tmp_path, methods, overrides, monkeypatch)
    check(training, methods)
    metrics = training.metrics()
    at = {name: metrics[(turn + 1) * STEPS] for turn, name in enumerate(methods)}
    assert at["hpt gate.threshold=1"]["hpt/demo_share"] >= 0.5 and at["hpt gate.threshold=-1"]["hpt/demo_share"] == 0
    assert at["sft"]["hpt/gradient_share/demos"] == pytest.approx(1)
    assert any(m.get("hpt/unusable_demos") for m in metrics.values())
    explained = compare_with_explain(tmp_path / "records", methods)
    assert all(explained[name] for name in methods), explained
    weighted, two = (metrics[STEPS * (methods.index(name) + 1)] for name in COLUMNS[:2])
    assert weighted["hpt/demo_source/someone"] == weighted["hpt/rows/demos"] > 0
    assert two["hpt/rows/demos"] > two["hpt/questions"], "two demonstrations a question, where there are two"


def compare_with_explain(folder: Path, methods: list[str]) -> dict[str, int]:
    """Each recorded step as a CASE: decisions, dropped rows and gradients of ``explain`` are those of the training.

    Returns methods -> rows compared.
    """
    compared = defaultdict(int)
    records = sorted(folder.glob("loss_*.json"), key=lambda p: (p.stat().st_mtime_ns, p.name))
    plans = sorted(folder.glob("plan_*.json"), key=lambda p: int(p.stem.split("_")[1]))
    assert len(records) == len(plans)
    for step, (plan_file, record_file) in enumerate(zip(plans, records, strict=True), 1):
        plan, record = json.loads(plan_file.read_text()), json.loads(record_file.read_text())
        trained = methods[(step - 1) // STEPS]
        name, *settings = trained.split()
        settings = [setting for setting in settings if not setting.startswith("demo.")]
        base = {"method": name, "rl_length_scale": 24, "gate": {"finished": False}}
        places = {(r["question"], r["kind"], r["index"]): (i, r) for i, r in enumerate(plan["rows"]) if r["kind"] >= 0}
        told = explain(
            {
                "hpt": OmegaConf.to_container(OmegaConf.merge(base, OmegaConf.from_dotlist(settings))),
                "questions": [case_of(key, seen, places, record) for key, seen in plan["questions"].items()],
            }
        )
        for key, seen in plan["questions"].items():
            dropped = {d["index"] for d in told["dropped"] if d["uid"] == key and d["kind"] == "rollout"}
            assert dropped == set(seen["dropped"]), (trained, step, seen)
            assert {row["zone"] for row in told["rows"] if row["uid"] == key} <= {seen["zone"]}, (trained, step, seen)
        assert len(told["rows"]) == len(places), (trained, step)
        for row in told["rows"]:
            place, _ = places[row["uid"], int(row["kind"] == "demo"), row["index"]]
            expected = record["gradient"][place][: len(row["gradient"])]
            assert row["gradient"] == pytest.approx(expected, rel=1e-5, abs=1e-5 * max(map(abs, expected)) + 1e-9)
            compared[trained] += 1
    return compared


def case_of(key: str, seen: dict, places: dict, record: dict) -> dict:
    """A question as it was told to the gate. Rows that did not train have no log-probs on record, and need none."""
    anything = {"log_prob": -1.0, "entropy": 1.0, "other_log_prob": -2.0, "teacher_log_prob": -1.0, "reward": 1.0}

    def row(kind: int, index: int, length: int, **more):
        if (key, kind, index) not in places:
            return anything | {"length": length} | more
        place, planned = places[key, kind, index]
        columns = {"log_prob": "log_prob", "old_log_prob": "old_log_probs", "entropy": "entropy"}
        if kind == 1:
            columns |= {"token_weights": WEIGHTS, "teacher_log_prob": TEACHER}
        own = {told: record[name][place][: planned["tokens"]] for told, name in columns.items() if name in record}
        return {"length": planned["tokens"], "reward": planned["reward"], "other_log_prob": -2.0} | own | more

    rollouts = [
        row(0, i, seen["lengths"][i], reward=reward, truncated=seen["truncated"][i])
        for i, reward in enumerate(seen["rewards"])
    ]
    shown = [index for question, kind, index in places if question == key and kind == 1]
    demos = [row(1, index, 7) for index in (sorted(shown) or ([] if seen["index"] in UNUSABLE else [0]))]
    skipped = {"skipped_rollouts": seen["skipped_rollouts"]}
    return {"uid": key, "source": "live", "rollouts": rollouts, "demos": demos} | skipped


def test_methods_with_critic_and_reference_train_with_every_extreme_on(tmp_path, monkeypatch):
    choosing = ["sft demo.select=likelihood demo.likelihood_of=" + whose for whose in ("reference", "policy")]
    methods = [*SERVED, "hpt", "psft", "rl_plus", "srft", *choosing]
    overrides = [
        "critic.enable=True",
        f"critic.model.path={tmp_path / 'run' / 'model'}",
        "critic.model.use_remove_padding=False",
        "++critic.model.override_config.attn_implementation=sdpa",
        "critic.strategy=fsdp2",
        "critic.fsdp.strategy=fsdp2",
        "critic.ppo_micro_batch_size_per_gpu=6",
        "critic.ppo_mini_batch_size=4",
        "actor_rollout_ref.actor.use_kl_loss=True",
        # The two models write the same field, and one in another dtype would vanish in TransferQueue.
        "++actor_rollout_ref.ref.fsdp_config.mixed_precision.param_dtype=fp32",
        "actor_rollout_ref.actor.entropy_coeff=0.001",
        "actor_rollout_ref.actor.ppo_epochs=2",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "actor_rollout_ref.rollout.temperature=0.8",
        "actor_rollout_ref.rollout.calculate_log_probs=True",
        "actor_rollout_ref.actor.use_dynamic_bsz=True",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=200",
        "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True",
        "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=400",
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=6",
        "trainer.critic_warmup=2",
        "++hpt.method=ppo",
    ]
    training = train(tmp_path, methods, overrides, monkeypatch)
    check(training, methods)
    metrics = training.metrics()
    assert "hpt/questions" not in metrics[1], "the critic warms up before the actor trains"
    with_rollouts = metrics[3 * STEPS]  # hpt; sessions on record as lost leave groups of two
    assert with_rollouts["hpt/kl_loss"] > 0 and with_rollouts["hpt/entropy_bonus"] > 0
    assert any(m.get("hpt/rows/rollouts", 0) % 3 for m in metrics.values())
    ppo_trains_on_generalised_advantages(tmp_path, range(2, STEPS + 1))
    every_row_is_scored_at_its_own_temperature(tmp_path)


def ppo_trains_on_generalised_advantages(folder: Path, steps: range) -> None:
    """Â of each token that the loss got is GAE with γ = λ = 1 of verl's values and scores, whitened over the batch."""
    for step in steps:
        verl = rollouts(folder, step)
        raw = {}
        for row, pads in enumerate(verl["padding"]):
            if not pads:  # with γ = λ = 1 the advantage is the return to come less the value
                to_come = torch.tensor(verl["rm_scores"][row]).flip(0).cumsum(0).flip(0)
                raw[row] = to_come - torch.tensor(verl["values"][row])
        tokens = torch.cat(list(raw.values()))
        whitened = {row: (x - tokens.mean()) / (tokens.var() + 1e-8).sqrt() for row, x in raw.items()}
        seen = 0
        for plan, record in updates(folder, step):
            for planned, place in plan:
                expected = whitened[planned["row"]]
                assert record["advantages"][place][: len(expected)] == pytest.approx(expected.tolist(), abs=1e-4)
                assert len(set(expected.tolist())) > 1 or len(expected) == 1, "a number a token"
                seen += 1
        assert seen >= 2 * len(raw), "two epochs"


def updates(folder: Path, step: int):
    """(rollouts of the plan with their place in the record, record) of each call of the loss at a step.

    A call has the rows of one micro-batch; a row is known by its score, its old log-probs and its tokens.
    """
    plan = json.loads((folder / "records" / f"plan_{step}.json").read_text())["rows"]
    verl = rollouts(folder, step)
    for record in records_of(folder, step):
        found = []
        for place, mask in enumerate(record["response_mask"]):
            n = int(sum(mask))
            for planned in plan:
                if planned["kind"] == 0 and n == planned["tokens"]:
                    old = verl["old_log_probs"][planned["row"]]
                    if record["old_log_probs"][place][:n] == pytest.approx(old[:n], abs=1e-7):
                        found.append((planned, place))
                        break
        yield found, record


def records_of(folder: Path, step: int) -> list[dict]:
    """Calls of the loss at a step, in order: those written after the step's plan and before its rows."""
    records = folder / "records"
    begin = (records / f"plan_{step}.json").stat().st_mtime_ns
    end = (records / f"rollouts_{step}.json").stat().st_mtime_ns
    made = sorted((p.stat().st_mtime_ns, p) for p in records.glob("loss_*.json"))
    return [json.loads(p.read_text()) for at, p in made if begin <= at <= end]


def every_row_is_scored_at_its_own_temperature(folder: Path) -> None:
    """Rollouts at T = 0.8, demonstrations at T = 1: as the column says, and as the log-probs of two passes agree."""
    compared = {0.8: 0, 1.0: 0}
    for step in range(2, STEPS * 6 + 1):
        first, *rest = records_of(folder, step)
        for record in (first, *rest):
            if "temperature" in record:
                wanted = [1.0 if row[ROW_COLUMNS.index("is_demo")] else 0.8 for row in record[ROW_FIELD]]
                assert record["temperature"] == pytest.approx(wanted)
        # Before the first optimizer step π_θ is π_old, whose pass was made at the row's temperature too.
        for place, mask in enumerate(first["response_mask"]):
            n, old = int(sum(mask)), first["old_log_probs"][place]
            if n and any(old[:n]):  # methods that read no old log-probs of demonstrations have zeros there
                assert first["log_prob"][place][:n] == pytest.approx(old[:n], abs=2e-5)
                compared[round(first["temperature"][place], 3) if "temperature" in first else 0.8] += 1
    assert min(compared.values()) > 0, compared
