"""Loaded in every process of a training (VERL_USE_EXTERNAL_MODULES=live): switches the method, records the loss.

LIVE_METHODS="hpt;sft;…": each trains ``LIVE_STEPS`` steps, in turn, in one trainer; a name may be followed by settings,
as in ``hpt gate.threshold=0.5``. LIVE_FOLDER: where plans, verl's rows and loss inputs are written, a file a step.
"""

import functools
import json
import os
from pathlib import Path

import torch
import wrapt

FOLDER = Path(os.environ["LIVE_FOLDER"])
# Rewards are on record whatever is said, and random weights seldom end an answer: cut ones count here.
BASE = {"gate": {"finished": False}}


def plan_as_json(step) -> list[dict]:
    """The plan's rows with what names them, in the order of the layout."""
    rows = []
    for row in step.plan.layout:
        if row < 0:
            rows.append({"kind": -1})
            continue
        q = step.plan.question[row]
        names = ("kind", "index", "w_rl", "w_demo", "reward", "tokens")
        told = {name: getattr(step.plan, name)[row].item() for name in names} | {"step": step.plan.step[row].item()}
        beside = q - len(step.groups)
        told["question"] = step.groups[q].key if beside < 0 else step.beside[beside].key
        if beside >= 0:
            told |= {"beside": int(beside), "prompt": step.beside[beside].prompt, "ids": step.beside[beside].ids}
        if told["kind"] == 0:
            told["row"] = step.groups[q].rows[told["index"]]
            told["prefix"] = int(step.questions[q].started_at[told["index"]] != 0 and step.plan.prefix[row])
        rows.append(told)
    return rows


def questions_as_json(step) -> dict[str, dict]:
    """What the gate was told of each question, and what became of it, by key."""
    return {
        question.key: {
            "index": step.groups[q].columns["extra_info"]["index"],
            "rewards": question.rewards.tolist(),
            "prefixes": None if question.prefixes is None else question.prefixes.tolist(),
            "starts": None if question.starts is None else question.starts.tolist(),
            "prompt": [int(token) for token in step.groups[q].prompt],
            "text": step.groups[q].columns["raw_prompt"],
            "target": step.groups[q].columns.get("target"),
            "asked": step.groups[q].columns.get("hpt_start"),
            "lengths": question.lengths.tolist(),
            "truncated": question.truncated.tolist(),
            "skipped_rollouts": question.skipped_rollouts,
            "rows": step.groups[q].rows,
            "zone": step.plan.decisions[q].zone,
            "dropped": [d.index for d in step.plan.dropped if d.question == q and d.kind == 0],
        }
        for q, question in enumerate(step.questions)
    }


# What verl and its engine wrote of each rollout; those that a run has are recorded.
ROLLOUT_FIELDS = (
    "rm_scores", "token_level_rewards", "values", "advantages", "response_mask", "loss_mask", "old_log_probs",
    "rollout_log_probs", "ref_log_prob", "rollout_is_weights", "prompts", "responses",
)  # fmt: skip


def rollouts_as_json(trainer, batch) -> dict:
    """The rows of verl's batch as TransferQueue has them, and the keys of ours that it still has."""
    keys = list(trainer.queue.tq.kv_list(batch.partition_id)[batch.partition_id])
    there = trainer.queue.kv_batch_meta2batch_meta(batch).field_names
    data = trainer.queue.tq.kv_batch_get(
        batch.keys, batch.partition_id, select_fields=[name for name in ROLLOUT_FIELDS if name in there]
    )
    columns = {name: [row.tolist() for row in data[name].unbind()] for name in data.keys()}
    padding = [bool(tag.get("is_padding", False)) for tag in batch.tags]
    ours, sessions = [key for key in keys if key.startswith("hpt")], [int(key.split("_")[-2]) for key in batch.keys]
    return {"ours": ours, "keys": len(keys), "padding": padding, "session": sessions} | columns


@wrapt.when_imported("verl_hpt.host.trainer")
def _switch(trainer):
    hybrid = trainer.hybrid

    def live(base):
        class Live(hybrid(base)):
            def on_step_begin(self):
                super().on_step_begin()
                methods = os.environ["LIVE_METHODS"].split(";")
                turn, rest = divmod(self.global_steps - 1, int(os.environ["LIVE_STEPS"]))
                if rest or turn >= len(methods):
                    return
                name, *settings = methods[turn].split()
                print(f"LIVE step {self.global_steps}: {methods[turn]}", flush=True)
                with trainer.open_dict(self.config):
                    own = trainer.OmegaConf.from_dotlist(settings)
                    self.config.hpt = trainer.OmegaConf.merge({"method": name, **BASE}, own)
                served = (trainer.need_reference_policy(self.config), trainer.need_critic(self.config))
                self.hpt = trainer.Run(
                    self.config,
                    verl=trainer.contract.check(),
                    kl_penalty=trainer.kl_penalty,
                    has_reference=served[0],
                    has_critic=served[1],
                )
                self.hpt.bind_tokenizer(self.tokenizer)
                self._open_stream()
                self.actor_rollout_wg.set_loss_fn(trainer.partial(trainer.hpt_loss, spec=self.hpt.loss_spec()))

            def _update_actor(self, batch, metrics):
                out = super()._update_actor(batch, metrics)
                whole = trainer.queue.KVBatchMeta(
                    partition_id=batch.partition_id, keys=batch.keys, tags=[{} for _ in batch.keys]
                )
                whole.tags[:] = batch.tags
                (FOLDER / f"rollouts_{self.global_steps}.json").write_text(json.dumps(rollouts_as_json(trainer, whole)))
                return out

            def _write(self, batch, step, written):
                out = {"method": self.hpt.method.name, "rows": plan_as_json(step), "questions": questions_as_json(step)}
                (FOLDER / f"plan_{self.global_steps}.json").write_text(json.dumps(out))
                return super()._write(batch, step, written)

        return Live

    trainer.hybrid = live


@wrapt.when_imported("verl_hpt.host.start_loop")
def _switch_loop(start_loop):
    made = {}

    def settings_for(verl_config, tokenizer, step):
        methods = os.environ["LIVE_METHODS"].split(";")
        turn = min((step - 1) // int(os.environ["LIVE_STEPS"]), len(methods) - 1)
        if turn not in made:
            name, *settings = methods[turn].split()
            own = start_loop.OmegaConf.from_dotlist(settings)
            node = start_loop.OmegaConf.merge({"method": name, **BASE}, own)
            config = start_loop.OmegaConf.create(start_loop.OmegaConf.to_container(verl_config))
            config.hpt = node
            made[turn] = start_loop._Settings(config, tokenizer)
        return made[turn]

    start_loop.settings_for = settings_for


@wrapt.when_imported("verl_hpt.host.loss_fn")
def _record(loss):
    inner = loss.hpt_loss

    @functools.wraps(inner)  # same name, so that it is pickled by name and each process has its own
    def recorder(model_output, data, dp_group=None, *, spec):
        out = model_output
        flat = out["log_probs"].values().detach().requires_grad_()
        with torch.enable_grad():
            again = {name: value.detach() for name, value in out.items()}
            again["log_probs"] = torch.nested.nested_tensor_from_jagged(flat, out["log_probs"].offsets())
            inner(again, data, spec=spec)[0].backward()
        gradient = torch.nested.nested_tensor_from_jagged(flat.grad, out["log_probs"].offsets())
        columns = {"log_prob": out["log_probs"], "gradient": gradient, "entropy": out.get("entropy")}
        padded = {k: loss.no_padding_2_padding(v.detach(), data) for k, v in columns.items() if v is not None}
        rows = data.select(*spec.fields).to_padded_tensor()
        record = {k: v.tolist() for k, v in padded.items()}
        record |= {k: rows[k].tolist() for k in spec.fields} | {"clip": vars(spec.constants)}
        if "temperature" in data.keys() and isinstance(data["temperature"], torch.Tensor):
            record["temperature"] = data["temperature"].tolist()
        number = len(list(FOLDER.glob(f"loss_{os.getpid()}_*.json")))
        (FOLDER / f"loss_{os.getpid()}_{number:03d}.json").write_text(json.dumps(record))
        return inner(model_output, data, dp_group, spec=spec)

    loss.hpt_loss = recorder
