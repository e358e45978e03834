"""Demonstrations in a rollout, its prompt, a stream and a buffer, in the real trainer: verl, Ray, FSDP2 and vLLM.

One live trainer, whose method is switched every ``STEPS`` steps; every number that it claims is checked against what
verl's rows and the loss were given, and against ``explain``.
"""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from cpu_run import Training
from omegaconf import OmegaConf
from test_methods_live import STEPS, UNUSABLE, check, records_of, rollouts, train
from transformers import AutoTokenizer

from verl_hpt.demos.encode import encode
from verl_hpt.methods import METHODS
from verl_hpt.places.starts import hint_of, hinted
from verl_hpt.tools.explain import explain

N, LIMIT = 4, 24
REPLAY = (
    "hpt buffer.size=2 buffer.content=successes compose.rollouts=dr_grpo compose.place=buffer "
    "compose.demos=[{'kind':S,'estimator':{'mask':psft_clip,'reference':old}}]"
)


def methods_of(folder: Path) -> list[str]:
    stream = f"stream.files={folder / 'run' / 'train.parquet'} stream.batch=3"
    settings = {
        "stephint": "start.share=[0,0.25,0.5,0.9]",
        "pope": "start.after_failures=0 start.rollouts=2",
        "questa": "start.min_length=1",
        "guide": "start.after_failures=0 start.rollouts=2 start.share=0.6",
        "relift": "buffer.size=2",
        **dict.fromkeys(("chord_mu", "chord_phi", "amft_style"), stream),
    }
    placed = [name for name, method in METHODS.items() if method.place not in ("separate", "group")]
    return [*(f"{name} {settings.get(name, '')}".strip() for name in placed), REPLAY]


@pytest.fixture(scope="module")
def live(tmp_path_factory) -> tuple[Path, list[str], Training]:
    folder, patch = tmp_path_factory.mktemp("places"), pytest.MonkeyPatch()
    methods = methods_of(folder)
    try:
        training = train(
            folder,
            methods,
            [
                "actor_rollout_ref.actor.ppo_mini_batch_size=4",
                f"actor_rollout_ref.rollout.n={N}",
                "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8",
                "actor_rollout_ref.rollout.calculate_log_probs=True",
                "actor_rollout_ref.actor.optim.lr_warmup_steps=100",
                f"trainer.validation_data_dir={folder / 'validation'}",
                f"trainer.test_freq={STEPS}",
                "++hpt.method=prefix_rft",
            ],
            patch,
        )
    finally:
        patch.undo()
    return folder, methods, training


def steps_of(methods: list[str], place: str):
    """(step, method's name) of each step whose method has its demonstrations at a place."""
    for turn, text in enumerate(methods):
        name = text.split()[0]
        of_method = "buffer" if text == REPLAY else METHODS[name].place
        if of_method == place:
            yield from ((step, name) for step in range(turn * STEPS + 1, (turn + 1) * STEPS + 1))


def planned(folder: Path, step: int) -> dict:
    return json.loads((folder / "records" / f"plan_{step}.json").read_text())


def test_every_placed_method_trains(live):
    folder, methods, training = live
    check(training, methods)
    metrics = training.metrics()
    for step in range(1, STEPS * len(methods) + 1):
        assert metrics[step]["hpt/questions"] == 4, "no question vanishes"
    lost = {index for index in range(0, 16, 3)}
    for step in range(1, STEPS * len(methods) + 1):
        for seen in planned(folder, step)["questions"].values():
            assert len(seen["rewards"]) == N - (seen["index"] in lost), "no rollout is lost in the agent loop"


def test_every_started_rollout_begins_with_exactly_its_demonstration(live):
    folder, methods, _ = live
    tokenizer = AutoTokenizer.from_pretrained(folder / "run" / "model")
    eos, begun, whole = tokenizer.eos_token_id, 0, 0
    for step, name in steps_of(methods, "prefix"):
        verl, plan = rollouts(folder, step), planned(folder, step)
        for seen in plan["questions"].values():
            usable = seen["index"] not in UNUSABLE
            ids = encode(seen["target"][0], tokenizer, eos, max_length=LIMIT).ids if usable else []
            for row, length in zip(seen["rows"], seen["prefixes"], strict=True):
                asked = seen["asked"][verl["session"][row]]
                response, mask = verl["responses"][row], verl["response_mask"][row]
                share = asked if name != "g2rpo_a" else float(asked > 0)  # of 3,072 tokens
                expected = min(int(share * (len(ids) - 1) + 1e-9), len(ids) - 2) if usable else 0
                assert length == max(expected, 0), (step, name, seen)
                assert response[:length] == ids[:length] and verl["prompts"][row] == seen["prompt"]
                assert mask == [0] * length + [1] * (len(response) - length) == verl["loss_mask"][row]
                assert verl["rollout_log_probs"][row][:length] == [0.0] * length
                assert all(-50 < x < 0 for x in verl["old_log_probs"][row][:length])
                pairs = zip(verl["rollout_log_probs"][row][length:], verl["old_log_probs"][row][length:], strict=True)
                assert max(abs(a - b) for a, b in pairs) <= 1e-4, "vLLM continued from the prefix"
                assert len(response) <= LIMIT
                begun += length > 0
                whole += length == 0 and len(response) == LIMIT
    assert begun > 30 and whole > 10, "siblings without a prefix have the whole length"


def test_a_hint_stands_in_the_prompt_and_is_never_cut(live):
    folder, methods, _ = live
    tokenizer = AutoTokenizer.from_pretrained(folder / "run" / "model")
    seen_hints = 0
    for step, name in steps_of(methods, "hint"):
        verl, start = rollouts(folder, step), replace(METHODS[name].start, min_length=1)
        for seen in planned(folder, step)["questions"].values():
            for row, started in zip(seen["rows"], seen["starts"], strict=True):
                if not started:
                    assert verl["prompts"][row] == seen["prompt"]
                    continue
                text, asked = seen["text"][-1]["content"], seen["asked"][verl["session"][row]]
                wanted = hinted("{question}\n\n## Hint.{hint}", text, hint_of(asked, start, seen["target"][0]))
                assert f"{wanted}<|im_end|>" in tokenizer.decode(verl["prompts"][row]), (step, name)
                seen_hints += 1
                assert verl["response_mask"][row] == [1] * len(verl["responses"][row])
    assert seen_hints > 8


def test_rescored_rollouts_train_on_the_plain_prompt_with_the_log_probs_that_they_had(live):
    folder, methods, _ = live
    compared = 0
    for step, name in steps_of(methods, "hint"):
        verl, plan = rollouts(folder, step), planned(folder, step)
        (record,) = records_of(folder, step)
        starts = {}
        for seen in plan["questions"].values():
            starts |= dict(zip(seen["rows"], seen["starts"], strict=True))
        for place, row in enumerate(plan["rows"]):
            if row["kind"] != 0:
                continue
            n = row["tokens"]
            old, new = record["old_log_probs"][place][:n], record["log_prob"][place][:n]
            assert old == pytest.approx(verl["old_log_probs"][row["row"]], abs=1e-6)
            if name == "guide" and starts[row["row"]]:
                assert max(abs(a - b) for a, b in zip(old, new, strict=True)) > 1e-4, "another prompt"
                compared += 1
            else:
                assert new == pytest.approx(old, abs=2e-5)
    assert compared > 4


def test_validation_is_never_started(live):
    folder, methods, _ = live
    files = sorted((folder / "validation").glob("*.jsonl"))
    assert len(files) == len(methods)
    for file in files:
        for line in file.read_text().splitlines():
            told = json.loads(line)
            assert "Hint" not in told["input"] and not told["output"].startswith(told["gts"][:3])


def test_a_stream_and_a_buffer_train_what_they_say(live):
    folder, methods, training = live
    metrics, tokenizer = training.metrics(), AutoTokenizer.from_pretrained(folder / "run" / "model")
    for step, _ in steps_of(methods, "stream"):
        beside = [row for row in planned(folder, step)["rows"] if "beside" in row]
        assert len(beside) == 3 and all("Reverse" in tokenizer.decode(row["prompt"]) for row in beside)
        assert metrics[step]["hpt/optimizer_steps"] == 1 and metrics[step]["hpt/rows/demos"] == 3
    waiting, trained = 0, 0
    for step, _ in steps_of(methods, "buffer"):
        plan = planned(folder, step)
        beside = [row for row in plan["rows"] if "beside" in row]
        assert metrics[step]["hpt/optimizer_steps"] == 1 + len(beside) // 2 and len(beside) % 2 == 0
        assert {row["step"] for row in beside} == set(range(1, 1 + len(beside) // 2)), "in steps of their own"
        waiting += metrics[step]["hpt/buffer/entries"]
        trained += len(beside)
    assert trained >= 4


def test_the_learning_rate_goes_by_updates_whatever_optimizer_steps_they_have(live):
    _, methods, training = live
    metrics = training.metrics()
    steps = range(1, STEPS * len(methods) + 1)
    rates = [metrics[step]["actor/lr"] for step in steps]
    assert [b - a for a, b in pairwise(rates)] == pytest.approx([1e-3 / 100] * (len(rates) - 1))
    assert {metrics[step]["hpt/optimizer_steps"] for step in steps} > {1}


def test_explain_decides_and_weighs_as_training_does(live):
    folder, methods, training = live
    for turn, text in enumerate(methods):
        name, *settings = text.split()
        compared = 0
        for step in range(turn * STEPS + 1, (turn + 1) * STEPS + 1):
            compared += compare(folder, step, name, settings, training.metrics()[step])
        assert compared, text


def compare(folder: Path, step: int, name: str, settings: list[str], metrics: dict) -> int:
    """Gradients of ``explain`` are those that the loss had. Returns how many rows were compared."""
    plan, records = planned(folder, step), records_of(folder, step)
    size = len(plan["rows"]) // len(records)
    node = OmegaConf.merge({"method": name, "rl_length_scale": LIMIT, "gate": {"finished": False}},
                           OmegaConf.from_dotlist(settings))  # fmt: skip
    node = OmegaConf.to_container(node)
    node.pop("stream", None), node.pop("buffer", None)
    if "hpt/demo_coef" in metrics:
        node["demo_coef"] = metrics["hpt/demo_coef"]
    at = {(row["question"], row["index"], "beside" in row, row.get("beside")): i
          for i, row in enumerate(plan["rows"]) if row["kind"] >= 0}  # fmt: skip

    def case(place: int, length: int, **more) -> dict:
        record, inner = records[place // size], place % size
        columns = {"log_prob": "log_prob", "old_log_prob": "old_log_probs", "entropy": "entropy"}
        own = {told: record[of][inner][:length] for told, of in columns.items() if of in record}
        return {"length": length, **own, **more}

    questions = []
    for key, seen in plan["questions"].items():
        rollouts = []
        for i, (reward, own) in enumerate(zip(seen["rewards"], seen["lengths"], strict=True)):
            prefix = seen["prefixes"][i] if seen["prefixes"] else 0
            start = {"start": seen["starts"][i]} if seen["starts"] and seen["starts"][i] else {}
            rollouts.append(case(at[key, i, False, None], prefix + own, reward=reward, prefix=prefix, **start))
        questions.append({"uid": key, "source": "live", "rollouts": rollouts})
    beside = sorted((row["beside"], i) for i, row in enumerate(plan["rows"]) if "beside" in row)
    entries = [case(i, plan["rows"][i]["tokens"], reward=plan["rows"][i]["reward"]) for _, i in beside]
    place = "stream" if METHODS[name].place == "stream" else "buffer"
    if place == "buffer":
        entries = entries[:2]  # explain has one step of the buffer
    told = explain({"hpt": node, "questions": questions, **({place: entries} if entries else {})})
    compared = 0
    for row in told["rows"]:
        if row["kind"] == "demo":
            number = int(row["uid"].split("[")[1][:-1])
            where = dict(beside)[number]
        else:
            where = at[row["uid"], row["index"], False, None]
        expected = records[where // size]["gradient"][where % size][: len(row["gradient"])]
        assert row["gradient"] == pytest.approx(expected, rel=1e-5, abs=1e-5 * max(map(abs, expected)) + 1e-9), (
            name, step, row["uid"], row["index"],
        )  # fmt: skip
        compared += 1
    return compared
