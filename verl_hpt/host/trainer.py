"""Demonstration rows are added in ``_update_actor``; every earlier stage of verl sees rollouts only.

There the gate decides, the plan is made, demonstration and padding rows are written beside the rollouts, verl's own
update runs on the planned rows, what was written is cleared, and verl goes on with its own batch. So its metrics,
critic, rollout correction, dumps and clean-up never meet a demonstration.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import contextmanager
from functools import cache, partial

import numpy as np
import torch
from omegaconf import OmegaConf, open_dict
from tensordict import NonTensorData, NonTensorStack
from verl.trainer.ppo.core_algos import kl_penalty
from verl.trainer.ppo.utils import create_rl_dataset, need_critic, need_reference_policy
from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

from verl_hpt.demos.demonstration import Demonstration, plain
from verl_hpt.demos.read import packed
from verl_hpt.demos.stored import Entry
from verl_hpt.errors import UserError
from verl_hpt.estimator import STARTS
from verl_hpt.host import contract, queue
from verl_hpt.host.batch import SKIPPED, Group, Scored, gate_metric, group_rows, questions_of, row_sums
from verl_hpt.host.beside import collected, question_of
from verl_hpt.host.loss_fn import hpt_loss
from verl_hpt.host.rows import ENGINE_FIELDS, AddedRow, Step, token_fields
from verl_hpt.host.run import Run
from verl_hpt.host.started import START, STARTED, Starts, check_prefixes, starts_of
from verl_hpt.metrics import of_plan, of_step, of_update
from verl_hpt.plan import PADDING, ROLLOUT, Plan, outcome_of, plan

ROLLOUTS = "__rollout_n__"  # verl's column: rollouts of a question, where they differ
AGENT = "agent_name"  # verl's column: the agent loop of a question


class RowTemperature(dict):
    """A dict that refuses the key ``temperature``; verl would override the column of each row's own.

    verl writes the rollouts' temperature here before each pass, and its critic leaves one in the batch that we get.
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
        self.hpt.bind_tokenizer(self.tokenizer)
        self._open_stream()

    def _open_stream(self):
        """The stream's files, read and filtered by verl as its training data are; prompts become a rollout's tokens."""
        files, data = self.hpt.stream_files, self.config.data
        if not files:
            return
        dataset = create_rl_dataset(files, data, self.tokenizer, self.processor, is_train=True)
        self.hpt.check_stream(dataset, self.val_dataset)
        builder = create_continuous_token_builder(
            self.tokenizer,
            hf_model_type=self.hpt.model_type(),
            chat_template_kwargs=data.get("apply_chat_template_kwargs") or {},
        )
        self.hpt.beside.open_stream(dataset, builder.build_initial_tokens, self.hpt.reader)

    def on_init_end(self):
        super().on_init_end()
        self.actor_rollout_wg.set_loss_fn(partial(hpt_loss, spec=self.hpt.loss_spec()))

    def _next_train_batch(self, *args, **kwargs):
        """verl's next questions; fewer rollouts for those whose rollouts teach nothing (``skipped_rollouts``)."""
        batch = super()._next_train_batch(*args, **kwargs)
        n = self.config.actor_rollout_ref.rollout.n
        full = plain(batch[ROLLOUTS]) if ROLLOUTS in batch else [n] * len(batch)
        names = [name for name in self.hpt.sampling_fields() if name in batch]
        questions = [Group("", []) for _ in full]
        for question, cells in zip(questions, zip(*(batch[name] for name in names), strict=True), strict=True):
            self.hpt.read_question(question, dict(zip(names, cells, strict=True)))
        skipped = self.hpt.skipped_rollouts(self.global_steps, questions, full)
        if skipped is not None:
            left = [now - less for now, less in zip(full, skipped, strict=True)]
            for name, values in ((ROLLOUTS, left), (SKIPPED, skipped)):
                batch[name] = NonTensorStack.from_list([NonTensorData(value) for value in values])
        if self.hpt.method.place in STARTS:
            left = full if skipped is None else left
            starts = [
                self.hpt.starts(question.key, n, self.global_steps) for question, n in zip(questions, left, strict=True)
            ]
            for name, values in ((START, starts), (AGENT, [START] * len(starts))):
                batch[name] = NonTensorStack.from_list([NonTensorData(value) for value in values])
        return batch

    def _save_checkpoint(self):
        # Before verl's marker file: a checkpoint that counts has its history.
        trainer = self.config.trainer
        folder = os.path.join(trainer.default_local_dir, f"global_step_{self.global_steps}")
        self.hpt.lifecycle.save(folder)
        self.hpt.alarms.save(folder)
        self.hpt.beside.save(folder)
        super()._save_checkpoint()

    def _load_checkpoint(self):
        super()._load_checkpoint()
        if self.global_steps > 0:
            trainer = self.config.trainer
            latest = os.path.join(trainer.default_local_dir, f"global_step_{self.global_steps}")
            folder = trainer.resume_from_path if trainer.resume_mode == "resume_path" else latest
            self.hpt.lifecycle.load(folder)
            self.hpt.alarms.load(folder)
            self.hpt.beside.load(folder)

    def _compute_advantage(self, batch, metrics):
        changes = {"algorithm.adv_estimator": "gae"} if self.hpt.method.uses_critic else {}
        with settings_for_now(self.config, changes):
            return super()._compute_advantage(batch, metrics)

    def step(self, metrics, timing_raw):
        """verl's step; where it has several updates, our metrics are made of theirs by us (``metrics.of_step``)."""
        self.hpt.updates = []
        batch = super().step(metrics, timing_raw)
        metrics.update(of_step(self.hpt.updates))
        return batch

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
            queue.clear(written, batch.partition_id)
        of_update(metrics)
        metrics.update(
            self.hpt.lifecycle.remember(
                self.global_steps, step.groups, step.questions, step.demos, step.plan, step.counts
            )
        )
        metrics.update(self.hpt.beside.after(self.global_steps, metrics))
        self.hpt.alarms.scored(step.questions, settings)
        metrics.update(self.hpt.alarms.watch(self.global_steps, metrics))
        self.hpt.updates.append({name: value for name, value in metrics.items() if name.startswith("hpt/")})
        return batch

    # --- what the gate reads -------------------------------------------------------------------------------------

    def _plan_step(self, batch, settings) -> Step:
        """Read what the gate needs, decide, plan."""
        groups = group_rows(batch.keys, [not real for real in queue.real_rows(batch)])
        self._read_questions(batch, groups)
        started = self._read_starts(batch, groups) if self.hpt.method.place in STARTS else None
        scored = self._read_rows(batch, groups, started)
        past = self.hpt.lifecycle.past(groups, self.global_steps)
        likelihoods = partial(self._likelihoods, batch) if self.hpt.choosing_pass else None
        questions, demos, counts, decisions = questions_of(
            groups, scored, self.hpt.reader, settings, self.global_steps, past, likelihoods
        )
        counts.update({} if started is None else started.counts)
        stream = self.hpt.beside.from_stream(self.global_steps, counts)
        buffer = self.hpt.beside.from_buffer(self._collected(batch, groups, questions, decisions, demos, settings))
        parts = [[question_of(entry) for entry in part] for part in (stream, *buffer)]
        planned = plan(questions, settings, decisions, parts[0], parts[1:])
        beside = [*stream, *(entry for part in buffer for entry in part)]
        rescored = self._rescored(batch, groups, planned, scored) if self.hpt.method.rescored else {}
        return Step(groups, questions, demos, counts, scored, planned, beside, rescored)

    def _read_starts(self, batch, groups: list[Group]) -> Starts:
        """How each row started, from what its agent loop says; its prompt without the hint becomes the question's.

        Raises:
            RuntimeError: a response does not begin with its demonstration; names the question.
        """
        rows = [row for group in groups for row in group.rows]
        fields = queue.read([batch.keys[row] for row in rows], batch.partition_id, ["extra_fields"])["extra_fields"]
        told = dict(zip(rows, (plain(cell).get(STARTED) for cell in fields), strict=True))
        started = starts_of(len(batch.keys), groups, told, self.hpt.reader)
        begun = np.flatnonzero(started.prefixes)
        if len(begun):
            responses = queue.read([batch.keys[row] for row in begun], batch.partition_id, ["responses"])["responses"]
            check_prefixes(groups, started, dict(zip(begun, responses.unbind(), strict=True)))
        return started

    def _collected(self, batch, groups, questions, decisions, demos, settings) -> list[Entry]:
        """What this step puts into the buffer."""
        if self.hpt.method.place != "buffer":
            return []
        if settings.collects == "demonstrations":
            return collected(groups, decisions, demos, settings, self.global_steps)
        kept = [(g, q) for g, q, d in zip(groups, questions, decisions, strict=True) if d.zone == "keep"]
        first = [int(np.argmax(outcome_of(question, settings).correct)) for _, question in kept]
        keys = [batch.keys[group.rows[place]] for (group, _), place in zip(kept, first, strict=True)]
        if not keys:
            return []
        names = ["responses", "loss_mask", "old_log_probs"]
        data = queue.read(keys, batch.partition_id, names)
        return [
            Entry(
                group.key, group.source, np.asarray(group.prompt).tolist(),
                *(data[name][i].tolist() for name in names[:2]), float(question.rewards[place]),
                old_log_probs=data["old_log_probs"][i].tolist(), step=self.global_steps,
            )
            for i, ((group, question), place) in enumerate(zip(kept, first, strict=True))
        ]  # fmt: skip

    def _rescored(self, batch, groups: list[Group], planned: Plan, scored: Scored) -> dict[int, AddedRow]:
        """Rollouts with a hint, as they are trained: on the prompt without it, with the log-probs that they had."""
        rows = {
            row: groups[planned.question[row]].rows[planned.index[row]]
            for row in np.flatnonzero(planned.kind == ROLLOUT)
        }
        rows = {row: of_batch for row, of_batch in rows.items() if scored.starts[of_batch]}
        if not rows:
            return {}
        names = ["responses", "loss_mask", "old_log_probs"]
        data = queue.read([batch.keys[of_batch] for of_batch in rows.values()], batch.partition_id, names)
        return {
            row: AddedRow(groups[planned.question[row]].prompt, *(data[name][i].tolist() for name in names))
            for i, row in enumerate(rows)
        }

    def _read_questions(self, batch, groups: list[Group]) -> None:
        """Prompt, identity and dataset columns of each group, from its first rollout."""
        if not groups:
            return
        leaders = [batch.keys[group.rows[0]] for group in groups]
        present = queue.fields_of(leaders, batch.partition_id)
        names = [name for name in self.hpt.question_fields() if name in present]
        data = queue.read(leaders, batch.partition_id, names)
        columns = {name: list(data[name]) for name in names if name != "prompts"}
        for i, (group, prompt) in enumerate(zip(groups, data["prompts"].unbind(), strict=True)):
            group.prompt = prompt.numpy()
            self.hpt.read_question(group, {name: values[i] for name, values in columns.items()})
            if plain(group.columns.get("multi_modal_inputs")):
                raise UserError(f"{group.named()}: multi-modal prompts are not supported yet")

    def _read_rows(self, batch, groups: list[Group], started: Starts | None = None) -> Scored:
        """What is known of each row; 0 where it is verl's padding."""
        rows = np.array([row for group in groups for row in group.rows], dtype=int)
        in_reward = self.config.algorithm.use_kl_in_reward
        names = ["rm_scores", "loss_mask", *(["token_level_rewards"] if in_reward else [])]
        data = queue.read([batch.keys[row] for row in rows], batch.partition_id, names)

        def sums(name: str) -> np.ndarray:
            jagged, whole = data[name], np.zeros(len(batch.keys))
            whole[rows] = row_sums(jagged.values().numpy(), jagged.offsets().numpy())
            return whole

        scores, lengths = sums("rm_scores"), np.zeros(len(batch.keys), dtype=int)
        lengths[rows] = data["loss_mask"].offsets().diff().numpy()
        returns = sums("token_level_rewards") if in_reward else scores
        longer = np.zeros(len(batch.keys), dtype=int) if started is None else started.longer
        truncated, metric = self._truncated(batch, groups, lengths, longer), self._gate_metric(batch, groups, scores)
        starts = () if started is None else (started.prefixes, started.starts)
        return Scored(scores, returns, sums("loss_mask"), lengths, truncated, metric, *starts)

    def _truncated(self, batch, groups: list[Group], lengths: np.ndarray, longer: np.ndarray) -> np.ndarray:
        """Rows that were cut: their response fills the length limit, and its last token is no stop id.

        longer: tokens that a row's prompt has beyond its question's, of a hint.
        """
        limit = cache(self.hpt.length_limit)
        full = [row for g in groups for row in g.rows if lengths[row] >= limit(len(g.prompt) + int(longer[row]))]
        truncated = np.zeros(len(batch.keys), dtype=bool)
        if full:
            responses = queue.read([batch.keys[row] for row in full], batch.partition_id, ["responses"])["responses"]
            truncated[full] = [int(response[-1]) not in self.hpt.stops for response in responses.unbind()]
        return truncated

    def _gate_metric(self, batch, groups: list[Group], scores: np.ndarray) -> np.ndarray | None:
        """``hpt.gate.metric`` of each row, from its reward function's extra info; None where no gate reads one."""
        wanted = [(group, row, self.hpt.metric_of(group.source)) for group in groups for row in group.rows]
        wanted = [one for one in wanted if one[2] is not None]
        if not wanted:
            return None
        keys = [batch.keys[row] for _, row, _ in wanted]
        names = {"extra_fields", *(name for _, _, name in wanted)} & queue.fields_of(keys, batch.partition_id)
        data = queue.read(keys, batch.partition_id, sorted(names))
        columns = {name: list(data[name]) for name in names}
        numbers = scores.copy()
        for i, (group, row, name) in enumerate(wanted):
            info = {key: values[i] for key, values in columns.items() if key != "extra_fields"}
            if "extra_fields" in columns:
                info |= plain(columns["extra_fields"][i]).get("reward_extra_info") or {}
            numbers[row] = gate_metric(group, name, info)
        return numbers

    # --- what the update gets ------------------------------------------------------------------------------------

    def _write(self, batch, step: Step, written: list[str]):
        """Write the planned rows beside the rollouts; the batch that the update shall see.

        written: gains the keys of the rows that are ours, to be cleared whatever happens.
        """
        layout, partition = step.plan.layout, batch.partition_id
        added, new = step.added(layout), queue.new_keys(len(layout))
        keys = [new[place] if own else batch.keys[step.rollout(layout[place])] for place, own in enumerate(added)]
        kept = [key for key, own in zip(keys, added, strict=True) if not own]
        columns = partial(step.columns, token_columns=self.hpt.token_columns, temperature=self.hpt.row_temperature)
        fields, of_added = list(dict.fromkeys([*ENGINE_FIELDS, *self.hpt.loss_spec().fields, *self.hpt.own_fields])), {}
        queue.put(kept, partition, columns(layout[~added]))
        if added.any():
            written.extend(key for key, own in zip(keys, added, strict=True) if own)
            rows = [step.added_row(row, self.hpt.eos) for row in layout[added]]
            names = [name for name in fields if name not in self.hpt.own_fields]
            of_added = token_fields(rows, queue.dtypes(batch, [*names, *self.hpt.pass_fields]))
            queue.put(written, partition, of_added | columns(layout[added]))
            real = [(key, row) for key, row, at in zip(written, rows, layout[added], strict=True) if at != PADDING]
            needs = self.hpt.method.needs_of_demos & {"old_log_prob", "ref_log_prob"}
            if step.rescored and "ref_log_prob" in fields:
                needs |= {"ref_log_prob"}
            for need in sorted(needs):
                kept = need == "old_log_prob"  # where it is kept, it is not taken anew
                self._pass(need, [k for k, row in real if not kept or row.old_log_probs is None], partition)
        mixed = queue.meta(keys, partition, fields, self._extra_info(batch.extra_info))
        queue.check_fields(mixed, of_added)
        return mixed

    def _extra_info(self, values: dict | None = None) -> dict:
        return dict(values or {}) if self.hpt.row_temperature is None else RowTemperature(values or {})

    def _likelihoods(self, batch, pairs: Sequence[tuple[Group, Demonstration]]) -> list[float]:
        """Mean log-likelihood a token of demonstrations, nats, by verl's own pass over rows made for it."""
        keys, partition = queue.new_keys(len(pairs)), batch.partition_id
        rows = [AddedRow(group.prompt, demo.ids, demo.mask) for group, demo in pairs]
        columns = token_fields(rows, queue.dtypes(batch, [*ENGINE_FIELDS, *self.hpt.pass_fields]))
        if self.hpt.row_temperature is not None:
            columns["temperature"] = torch.ones(len(rows))
        need = self.hpt.choosing_pass
        name = {"old_log_prob": "old_log_probs"}.get(need, need)
        try:
            queue.put(keys, partition, columns)
            self._pass(need, keys, partition)
            log_probs = queue.read(keys, partition, [name])[name].unbind()
        finally:
            queue.clear(keys, partition)
        masks = [torch.tensor(row.mask, dtype=torch.float64) for row in rows]
        return [
            float((row.double()[: len(mask)] * mask).sum() / mask.sum())
            for row, mask in zip(log_probs, masks, strict=True)
        ]

    def _pass(self, need: str, keys: list[str], partition: str) -> None:
        """verl's own pass for ``old_log_prob`` or ``ref_log_prob`` on rows of ours; its metrics are dropped."""
        if not keys:
            return
        missing = -len(keys) % self.hpt.log_prob_multiple(self._ranks(), need)
        filling = queue.copies(keys[0], missing, partition)
        fields = [*ENGINE_FIELDS, *(["temperature"] if self.hpt.row_temperature is not None else [])]
        batch = queue.meta(keys + filling, partition, fields, self._extra_info())
        try:
            (self._compute_old_log_prob if need == "old_log_prob" else self._compute_ref_log_prob)(batch, {})
        finally:
            queue.clear(filling, partition)

    def _ranks(self) -> int:
        """Data-parallel ranks of the actor."""
        group = self.actor_rollout_wg
        if "actor" not in group._dispatch_info:
            group._dispatch_info["actor"] = group._query_dispatch_info("actor")
        return max(group._dispatch_info["actor"]) + 1


def hybrid(base: type) -> type:
    """Our trainer over one of verl's."""
    return type(f"Hybrid{base.__name__}", (HybridMixin, base), {})
