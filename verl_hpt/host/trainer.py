"""Demonstrations join at the door of the update: verl runs every stage on all rollouts, untouched, till then.

In ``_update_actor`` the gate decides, the plan is made, demonstration and padding rows are written beside the rollouts,
verl's own update runs on the planned rows, what was written is cleared, and verl goes on with its own batch. So its
metrics, critic, rollout correction, dumps and clean-up never meet a demonstration. The only file that imports
``verl.trainer.*`` or ``transfer_queue``.
"""

from __future__ import annotations

import os
import uuid
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import transfer_queue as tq
from omegaconf import OmegaConf, open_dict
from tensordict import NonTensorData, NonTensorStack, TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.core_algos import kl_penalty
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.transferqueue_utils import kv_batch_meta2batch_meta

from verl_hpt.demos import encode as demos
from verl_hpt.demos.columns import packed
from verl_hpt.errors import UserError
from verl_hpt.host import contract
from verl_hpt.host.batch import (
    SKIPPED,
    Candidate,
    Group,
    Scored,
    gate_metric,
    group_rows,
    questions_of,
    row_sums,
)
from verl_hpt.host.loss_fn import hpt_loss
from verl_hpt.host.rows import ENGINE_FIELDS, OwnRow, padding_row, token_fields
from verl_hpt.host.run import Run
from verl_hpt.metrics import of_plan, of_update
from verl_hpt.plan import DEMO, PADDING, Plan, Question, plan

ROLLOUTS = "__rollout_n__"  # verl's column: rollouts of a question, where they differ


@dataclass
class Step:
    """What one update is made of. demos: (questions, those shown); scored: of the batch's rows."""

    groups: list[Group]
    questions: list[Question]
    demos: list[list[Candidate]]
    counts: Counter
    scored: Scored
    plan: Plan

    def demo(self, row: int) -> Candidate | None:
        """The demonstration that stands in a row of the plan, None where a rollout or padding does."""
        if row == PADDING or self.plan.kind[row] != DEMO:
            return None
        return self.demos[self.plan.question[row]][self.plan.index[row]]

    def own_row(self, row: int, eos: int) -> OwnRow:
        """A row that is ours: a demonstration's prompt, answer and mask, or padding."""
        if row == PADDING:
            return padding_row(eos)
        encoded, _ = self.demo(row)
        return self.groups[self.plan.question[row]].prompt, encoded.ids, encoded.mask

    def length(self, row: int) -> int:
        """Tokens of a row's response."""
        if row == PADDING:
            return 1
        if (demo := self.demo(row)) is not None:
            return len(demo[0].ids)
        return self.scored.lengths[self.groups[self.plan.question[row]].rows[self.plan.index[row]]]

    def other_log_probs(self) -> np.ndarray:
        """Mean log-prob of each row of the plan under other models; 0 where there is none. -> (rows,)"""
        other = np.zeros(len(self.plan))
        for row in np.flatnonzero(self.plan.kind == DEMO):
            other[row] = self.demo(row)[1].get("other_log_prob", 0.0)
        return other


class RowTemperature(dict):
    """Batch-wide values without a temperature: the engine then takes each row's own from the column.

    verl writes the rollouts' temperature here before each pass, and its critic leaves one in the batch that we get; it
    would win over the column.
    """

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.update(*args, **kwargs)

    def update(self, *args, **kwargs):
        super().update({key: value for key, value in dict(*args, **kwargs).items() if key != "temperature"})


@contextmanager
def settings_for_now(config, changes: dict):
    """verl's config with other values, by dotted path, for the length of a call."""
    kept = {path: OmegaConf.select(config, path) for path in changes}
    try:
        with open_dict(config):
            for path, value in changes.items():
                OmegaConf.update(config, path, value)
        yield
    finally:
        with open_dict(config):
            for path, value in kept.items():
                OmegaConf.update(config, path, value)


class HybridMixin:
    """Over any of verl's trainers. The only changes: the actor's loss, and which rows the actor update sees."""

    def __init__(self, config):
        has = {"has_reference": need_reference_policy(config), "has_critic": need_critic(config)}
        self.hpt = Run(config, verl=contract.check(), kl_penalty=kl_penalty, **has)
        super().__init__(config=config)

    def _init_dataloader(self):
        super()._init_dataloader()
        self.hpt.check_columns(self.train_dataset)
        for loader in (self.train_dataloader, self.val_dataloader):
            loader.collate_fn = partial(packed, collate=loader.collate_fn)
        self.hpt.meet(self.tokenizer)

    def on_init_end(self):
        super().on_init_end()
        self.actor_rollout_wg.set_loss_fn(partial(hpt_loss, spec=self.hpt.loss_spec()))

    def _next_train_batch(self, *args, **kwargs):
        """verl's next questions; fewer rollouts for those whose rollouts teach nothing (``skipped_rollouts``)."""
        batch = super()._next_train_batch(*args, **kwargs)
        n = self.config.actor_rollout_ref.rollout.n
        full = demos.plain(batch[ROLLOUTS]) if ROLLOUTS in batch else [n] * len(batch)
        names = [name for name in self.hpt.sampling_fields() if name in batch]
        questions = [Group("", []) for _ in full]
        for question, cells in zip(questions, zip(*(batch[name] for name in names), strict=True), strict=True):
            self.hpt.read_question(question, dict(zip(names, cells, strict=True)))
        skipped = self.hpt.skipped_rollouts(self.global_steps, questions, full)
        if skipped is not None:
            left = [now - less for now, less in zip(full, skipped, strict=True)]
            for name, values in ((ROLLOUTS, left), (SKIPPED, skipped)):
                batch[name] = NonTensorStack.from_list([NonTensorData(value) for value in values])
        return batch

    def _save_checkpoint(self):
        # Before verl's marker file: a checkpoint that counts has its history.
        trainer = self.config.trainer
        folder = os.path.join(trainer.default_local_dir, f"global_step_{self.global_steps}")
        self.hpt.lifecycle.save(folder)
        self.hpt.alarms.save(folder)
        super()._save_checkpoint()

    def _load_checkpoint(self):
        super()._load_checkpoint()
        if self.global_steps > 0:
            trainer = self.config.trainer
            latest = os.path.join(trainer.default_local_dir, f"global_step_{self.global_steps}")
            folder = trainer.resume_from_path if trainer.resume_mode == "resume_path" else latest
            self.hpt.lifecycle.load(folder)
            self.hpt.alarms.load(folder)

    def _compute_advantage(self, batch, metrics):
        own = {"algorithm.adv_estimator": "gae"} if self.hpt.method.uses_critic else {}
        with settings_for_now(self.config, own):
            return super()._compute_advantage(batch, metrics)

    def _update_actor(self, batch, metrics):
        settings = self.hpt.plan_settings(self.global_steps, self._ranks())
        step = self._plan_step(batch, settings)
        metrics.update(of_plan(step.plan, step.questions, settings, step.counts))
        written = []
        try:
            mixed = self._write(batch, step, written)
            with settings_for_now(self.config, self.hpt.update_settings(step.plan)):
                super()._update_actor(mixed, metrics)
        finally:
            if written:
                tq.kv_clear(keys=written, partition_id=batch.partition_id)
        of_update(metrics)
        metrics.update(
            self.hpt.lifecycle.remember(
                self.global_steps, step.groups, step.questions, step.demos, step.plan, step.counts
            )
        )
        self.hpt.alarms.scored(step.questions, settings)
        metrics.update(self.hpt.alarms.watch(self.global_steps, metrics))
        return batch

    # --- one step ----------------------------------------------------------------------------------------------

    def _plan_step(self, batch, settings) -> Step:
        """Read what the gate needs, decide, plan."""
        groups = group_rows(batch.keys, [bool(tag.get("is_padding", False)) for tag in batch.tags])
        self._read_questions(batch, groups)
        scored = self._read_rows(batch, groups)
        past = self.hpt.lifecycle.past(groups, self.global_steps)
        likelihoods = partial(self._likelihoods, batch) if self.hpt.choosing_pass else None
        questions, read, counts = questions_of(
            groups, scored, self.hpt.reader, settings, self.global_steps, past, likelihoods
        )
        return Step(groups, questions, read, counts, scored, plan(questions, settings))

    def _read_rows(self, batch, groups) -> Scored:
        """What is known of each row; 0 where it is verl's padding."""
        rows = np.array([row for group in groups for row in group.rows], dtype=int)
        in_reward = self.config.algorithm.use_kl_in_reward
        names = ["rm_scores", "loss_mask", *(["token_level_rewards"] if in_reward else [])]
        data = tq.kv_batch_get([batch.keys[row] for row in rows], batch.partition_id, select_fields=names)

        def sums(name):
            jagged, whole = data[name], np.zeros(len(batch.keys))
            whole[rows] = row_sums(jagged.values().numpy(), jagged.offsets().numpy())
            return whole

        scores, lengths = sums("rm_scores"), np.zeros(len(batch.keys), dtype=int)
        lengths[rows] = data["loss_mask"].offsets().diff().numpy()
        returns = sums("token_level_rewards") if in_reward else scores
        truncated, metric = self._truncated(batch, groups, lengths), self._gate_metric(batch, groups, scores)
        return Scored(scores, returns, sums("loss_mask"), lengths, truncated, metric)

    def _truncated(self, batch, groups, lengths: np.ndarray) -> np.ndarray:
        """Rows that were cut: their response fills the length limit, and its last token is no stop id."""
        full = [row for g in groups for row in g.rows if lengths[row] >= self.hpt.length_limit(len(g.prompt))]
        truncated = np.zeros(len(batch.keys), dtype=bool)
        if full:
            keys = [batch.keys[row] for row in full]
            data = tq.kv_batch_get(keys, batch.partition_id, select_fields=["responses"])
            truncated[full] = [int(response[-1]) not in self.hpt.stops for response in data["responses"].unbind()]
        return truncated

    def _gate_metric(self, batch, groups, scores: np.ndarray) -> np.ndarray | None:
        """``hpt.gate.metric`` of each row, from its reward function's extra info; None where no gate reads one."""
        named = [(group, row, self.hpt.metric_of(group.source)) for group in groups for row in group.rows]
        named = [one for one in named if one[2] is not None]
        if not named:
            return None
        keys = [batch.keys[row] for _, row, _ in named]
        names = {"extra_fields", *(name for _, _, name in named)} & self._fields_of(keys, batch.partition_id)
        data = tq.kv_batch_get(keys, batch.partition_id, select_fields=sorted(names))
        columns = {name: list(data[name]) for name in names}
        numbers = scores.copy()
        for i, (group, row, name) in enumerate(named):
            info = {key: values[i] for key, values in columns.items() if key != "extra_fields"}
            if "extra_fields" in columns:
                info |= demos.plain(columns["extra_fields"][i]).get("reward_extra_info") or {}
            numbers[row] = gate_metric(group, name, info)
        return numbers

    def _fields_of(self, keys, partition) -> set[str]:
        """Columns that these rows have in TransferQueue."""
        meta = KVBatchMeta(partition_id=partition, keys=keys, tags=[{} for _ in keys])
        return set(kv_batch_meta2batch_meta(meta).field_names)

    def _read_questions(self, batch, groups) -> None:
        """Prompt, identity and dataset columns of each group, from its first rollout."""
        if not groups:
            return
        leaders = [batch.keys[group.rows[0]] for group in groups]
        there = self._fields_of(leaders, batch.partition_id)
        names = [name for name in self.hpt.question_fields() if name in there]
        data = tq.kv_batch_get(leaders, batch.partition_id, select_fields=names)
        prompts = [prompt.numpy() for prompt in data["prompts"].unbind()]
        columns = {name: list(data[name]) for name in names if name != "prompts"}
        for i, group in enumerate(groups):
            group.prompt = prompts[i]
            self.hpt.read_question(group, {name: values[i] for name, values in columns.items()})
            if demos.plain(group.columns.get("multi_modal_inputs")):
                raise UserError(f"{group.named()}: multi-modal prompts are not supported yet")

    def _write(self, batch, step: Step, written: list[str]):
        """Write the planned rows beside the rollouts; the batch that the update shall see.

        written: gains the keys of the rows that are ours, to be cleared whatever happens.
        """
        plan, partition = step.plan, batch.partition_id
        ours = (plan.layout == PADDING) | (np.append(plan.kind, DEMO)[plan.layout] == DEMO)
        mark = uuid.uuid4().hex
        keys = [
            f"hpt{mark}_{place}_0" if ours[place] else batch.keys[step.groups[q].rows[i]]
            for place, (q, i) in enumerate(
                zip(np.append(plan.question, 0)[plan.layout], np.append(plan.index, 0)[plan.layout], strict=True)
            )
        ]
        fields, own = self._fields(), {}
        self._put(keys, ~ours, partition, self._marks(step, plan.layout[~ours]))
        if ours.any():
            written.extend(key for key, own in zip(keys, ours, strict=True) if own)
            rows = [step.own_row(row, self.hpt.eos) for row in plan.layout[ours]]
            own = token_fields(rows, self._dtypes(batch, [name for name in fields if name not in self.hpt.marked]))
            self._put(keys, ours, partition, own | self._marks(step, plan.layout[ours]))
            demonstrations = [key for key, row in zip(written, plan.layout[ours], strict=True) if row != PADDING]
            for need in sorted(self.hpt.method.needs_of_demos & {"old_log_prob", "ref_log_prob"}):
                self._pass(need, demonstrations, partition)
        mixed = KVBatchMeta(
            partition_id=partition,
            keys=keys,
            tags=[{} for _ in keys],
            fields=fields,
            extra_info=self._extra_info(batch.extra_info),
        )
        there = kv_batch_meta2batch_meta(mixed).field_schema
        bent = [name for name in there.keys() & own.keys() if there[name]["dtype"] != own[name].dtype]
        if wrong := [name for name in fields if name not in there or name in bent]:
            raise RuntimeError(
                f"the update's rows lack the field(s) {', '.join(wrong)} in TransferQueue, or bring them in two "
                "dtypes; a field written in another dtype than the rollouts' can vanish, and others with it. "
                "Please report this with the run's config"
            )
        return mixed

    def _fields(self) -> list[str]:
        """The one explicit list of what goes to the update."""
        return list(dict.fromkeys([*ENGINE_FIELDS, *self.hpt.loss_spec().fields, *self.hpt.marked]))

    def _put(self, keys, where, partition, columns: dict) -> None:
        chosen = [key for key, here in zip(keys, where, strict=True) if here]
        if chosen:
            tags = [{"status": "success"} for _ in chosen] if "input_ids" in columns else None
            tq.kv_batch_put(chosen, partition, fields=TensorDict(columns, batch_size=len(chosen)), tags=tags)

    def _extra_info(self, given=None) -> dict:
        return RowTemperature(given or {}) if self.hpt.row_temperature else dict(given or {})

    def _marks(self, step: Step, layout: np.ndarray) -> dict[str, torch.Tensor]:
        """Our columns for the rows of a layout."""
        found = [step.demo(row) for row in layout] if self.hpt.token_columns else []
        lengths = [step.length(row) for row in layout] if self.hpt.token_columns else []
        of_tokens = self.hpt.token_marks(lengths, [demo and demo[1] for demo in found])
        return self.hpt.marks(step.plan, layout, step.other_log_probs()) | of_tokens

    def _dtypes(self, batch, names: Sequence[str]) -> dict[str, torch.dtype]:
        """The rollouts' dtypes of these fields and of those that a log-prob pass reads."""
        real = next(key for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding"))
        like = tq.kv_batch_get([real], batch.partition_id, select_fields=[*names, *self.hpt.pass_fields])
        if like["position_ids"].dim() != 2:
            raise UserError("multi-modal position ids are not supported yet: they have several axes a row")
        return {name: like[name].dtype for name in like.keys()}

    def _likelihoods(self, batch, candidates: Sequence[tuple[Group, Candidate]]) -> list[float]:
        """Mean log-likelihood a token of demonstrations, nats, by verl's own pass over rows made for it."""
        keys = [f"hpt{uuid.uuid4().hex}_0_0" for _ in candidates]
        rows = [(group.prompt, encoded.ids, encoded.mask) for group, (encoded, _) in candidates]
        columns = token_fields(rows, self._dtypes(batch, ENGINE_FIELDS))
        if self.hpt.row_temperature:
            columns["temperature"] = torch.ones(len(rows))
        need = self.hpt.choosing_pass
        name = {"old_log_prob": "old_log_probs"}.get(need, need)
        try:
            self._put(keys, [True] * len(keys), batch.partition_id, columns)
            self._pass(need, keys, batch.partition_id)
            said = tq.kv_batch_get(keys, batch.partition_id, select_fields=[name])[name].unbind()
        finally:
            tq.kv_clear(keys=keys, partition_id=batch.partition_id)
        masks = [torch.tensor(mask, dtype=torch.float64) for _, _, mask in rows]
        return [
            float((row.double()[: len(mask)] * mask).sum() / mask.sum()) for row, mask in zip(said, masks, strict=True)
        ]

    def _pass(self, need: str, chosen: list[str], partition) -> None:
        """verl's own pass for ``old_log_prob`` or ``ref_log_prob`` on rows of ours; its metrics are dropped."""
        if not chosen:
            return
        filling = self._filling_rows(
            -len(chosen) % self.hpt.log_prob_multiple(self._ranks(), need), chosen[0], partition
        )
        batch = KVBatchMeta(
            partition_id=partition,
            keys=chosen + filling,
            tags=[{} for _ in chosen + filling],
            fields=[*ENGINE_FIELDS, *(["temperature"] if self.hpt.row_temperature else [])],
            extra_info=self._extra_info(),
        )
        try:
            (self._compute_old_log_prob if need == "old_log_prob" else self._compute_ref_log_prob)(batch, {})
        finally:
            if filling:
                tq.kv_clear(keys=filling, partition_id=partition)

    def _filling_rows(self, count: int, like: str, partition) -> list[str]:
        """Copies of one row, so that a pass divides by ranks and micro-batches. Returns their keys."""
        if count == 0:
            return []
        row = tq.kv_batch_get([like], partition)
        keys = [f"hpt{uuid.uuid4().hex}_0_0" for _ in range(count)]
        copies = {
            name: torch.nested.as_nested_tensor([row[name][0]] * count, layout=torch.jagged)
            if row[name].is_nested
            else row[name].expand(count, *row[name].shape[1:]).clone()
            for name in row.keys()
            if isinstance(row[name], torch.Tensor)
        }
        tq.kv_batch_put(keys, partition, fields=TensorDict(copies, batch_size=count), tags=[{} for _ in keys])
        return keys

    def _ranks(self) -> int:
        """Data-parallel ranks of the actor."""
        group = self.actor_rollout_wg
        if "actor" not in group._dispatch_info:
            group._dispatch_info["actor"] = group._query_dispatch_info("actor")
        return max(group._dispatch_info["actor"]) + 1


def hybrid(base: type) -> type:
    """Our trainer over one of verl's."""
    return type(f"Hybrid{base.__name__}", (HybridMixin, base), {})
