"""Combines ``hpt.*`` with verl's config, checks both, and derives plan settings, loss spec and columns."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from omegaconf import OmegaConf

from verl_hpt import config
from verl_hpt.demos.demonstration import demonstrations, plain
from verl_hpt.demos.encode import end_of_answers
from verl_hpt.demos.read import unpacked
from verl_hpt.errors import UserError, raise_all
from verl_hpt.estimator import STARTS
from verl_hpt.gate import always_demo
from verl_hpt.history import Lifecycle, identity, names_question
from verl_hpt.host import advantage, contract, refusals
from verl_hpt.host.alarms import Alarms
from verl_hpt.host.banner import banner
from verl_hpt.host.batch import SKIPPED, Group, Reader
from verl_hpt.host.beside import Beside
from verl_hpt.host.started import START
from verl_hpt.loss import ROW_FIELD, TOKEN_FIELDS, LossSpec
from verl_hpt.plan import Plan, PlanSettings

logger = logging.getLogger(__name__)
SOURCE = "data_source"  # verl's column


class Run:
    """Built before any model loads; raises UserError for whatever cannot work.

    kl_penalty: verl's function. has_reference, has_critic: whether verl builds those workers.
    """

    def __init__(self, verl_config, *, verl: str, kl_penalty: Callable, has_reference: bool, has_critic: bool):
        node = verl_config.get("hpt")
        node = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        self.verl_config, self.kl_penalty = verl_config, kl_penalty
        self.settings, self.method = refusals.settle(
            verl_config, node, has_reference=has_reference, has_critic=has_critic
        )
        own = self.method.place == "buffer" and self.settings.buffer.content == "successes"
        self.reads_demos = self.method.reads_demos and not own
        advantage.switch_on(self.method)
        self.normalization = self.settings.normalization or self.method.normalization
        self.length_scale = self.settings.rl_length_scale or float(verl_config.data.max_response_length)
        model, rollout = verl_config.actor_rollout_ref.model, verl_config.actor_rollout_ref.rollout
        fused = bool(model.get("use_fused_kernels", False))
        # At T ≠ 1 verl divides logits by the rollouts' temperature; a demonstration's likelihood is at T = 1.
        differs = rollout.temperature != 1.0 and not fused and self.method.demos
        self.row_temperature = float(rollout.temperature) if differs else None
        demo = self.settings.demo
        # The pass that tells whose likelihood chooses among demonstrations; None where a column does, or nothing.
        whose = demo.likelihood_of if demo.select == "likelihood" and self.method.demos else "column"
        self.choosing_pass = {"column": None, "policy": "old_log_prob", "reference": "ref_log_prob"}[whose]
        # verl's old-log-prob pass compares with the rollout engine's log-probs, which demonstrations do not have.
        passes = "old_log_prob" in {*self.method.needs_of_demos, self.choosing_pass}
        self.pass_fields = ("rollout_log_probs",) if passes and rollout.calculate_log_probs else ()
        weighted = demo.token_weights is not None and self.method.demos
        read = {"token_weights": weighted, "teacher_log_prob": "teacher_log_prob" in self.method.needs_of_demos}
        self.token_columns = tuple(name for name, on in read.items() if on)
        temperature = ["temperature"] if self.row_temperature is not None else []
        self.own_fields = (ROW_FIELD, *temperature, *(TOKEN_FIELDS[name] for name in self.token_columns))
        self.lifecycle = Lifecycle(self.settings, rollout.n, config.start_of(self.settings, self.method))
        self.beside = Beside(self.settings, self.method, rollout.n, int(verl_config.data.max_response_length) - 1)
        self.updates: list[dict[str, float]] = []  # our metrics of each update of the step
        self.alarms = Alarms(scheduled=lambda step: self._all_on_demos(step, rollout.n))
        print(banner(self, verl, fused), flush=True)

    # --- before training -----------------------------------------------------------------------------------------

    def starts(self, key: str, n: int, step: int) -> list[float]:
        """How much of its demonstration each of a question's n rollouts starts from. -> (n,)"""
        return self.beside.amounts(key, self.lifecycle.history.of(key).failures, n, step)

    @property
    def stream_files(self) -> list[str]:
        """The stream's files, none where the method has no stream."""
        files = self.settings.stream.files
        return [] if files is None or self.method.place != "stream" else [files] if isinstance(files, str) else files

    def model_type(self) -> str | None:
        """The model's type in its config.json, by which verl chooses how prompts become tokens."""
        from transformers import AutoConfig

        model = self.verl_config.actor_rollout_ref.model
        trust = bool(model.get("trust_remote_code"))
        return AutoConfig.from_pretrained(model.path, trust_remote_code=trust).model_type

    def check_stream(self, dataset, validation) -> None:
        """Columns of the stream's files, and prompts that stand in the validation data too."""
        table = getattr(dataset, "dataframe", None)
        columns, named = getattr(table, "column_names", None), self._demo_columns()
        if columns is None:
            return
        if self.settings.question_key is not None:
            named["hpt.question_key"] = self.settings.question_key
        problems = [
            f"{key}={column!r}: hpt.stream.files have no such column; they have {', '.join(columns)}"
            for key, column in named.items()
            if column not in columns
        ]
        problems += _multi_modal(table, columns, self.verl_config.data, "hpt.stream.files")
        raise_all(problems, "the stream's files do not fit the settings:")
        key = self.verl_config.data.prompt_key
        held_out = getattr(validation, "dataframe", None)
        if held_out is not None and key in held_out.column_names:
            known = {str(plain(prompt)) for prompt in held_out[key]}
            shared = sum(str(plain(prompt)) in known for prompt in table[key])
            if shared:
                logger.warning("hpt.stream.files: %d of %d prompts are validation prompts too", shared, len(table))

    def check_columns(self, dataset) -> None:
        """Every column and data source that the settings name is in the training data, and every question is named."""
        table = getattr(dataset, "dataframe", None)
        columns = getattr(table, "column_names", None)
        if columns is None:
            return  # a dataset class of the user's own: its rows are checked when they come
        problems = [
            f"{key}={column!r}: the training data has no such column; it has {', '.join(columns)}"
            for key, column in self._named_columns().items()
            if column not in columns
        ]
        agent = {"agent_name"} if self.method.place in STARTS else set()
        problems += [
            f"the training data's column {name!r} has the name of a field of verl's rows, or of an argument of its "
            "agent loop, and would take its place: rename it, or leave it out (`verl-hpt data convert --drop NAME`)"
            for name in columns
            if contract.reserved(name) or name in agent
        ]
        if self.settings.per_source:
            sources = sorted({str(plain(source)) for source in table[SOURCE]} if SOURCE in columns else ())
            shown = ", ".join(sources[:10]) + (f" and {len(sources) - 10} more" if len(sources) > 10 else "")
            problems += [
                f"hpt.per_source.{source}: no row of the training data has this data_source; it has {shown or 'none'}"
                for source in self.settings.per_source
                if source not in sources
            ]
        key = self.settings.question_key
        if key in columns:
            nameless = [row for row, value in enumerate(table[key], start=1) if not names_question(plain(value))]
            if nameless:
                problems.append(
                    f"hpt.question_key={key!r}: {len(nameless)} of {len(table)} rows of the training data have no "
                    f"value there, the first is row {nameless[0]}; name every question, or drop hpt.question_key (a "
                    "hash of source and prompt names them then)"
                )
        problems += _multi_modal(table, columns, self.verl_config.data)
        raise_all(problems, "the training data does not fit the settings:")

    def bind_tokenizer(self, tokenizer) -> None:
        """Once the tokenizer is there: the end token and the reader of demonstrations."""
        demo = self.settings.demo
        model = self.verl_config.actor_rollout_ref.model.path
        self.eos, stops, problem = end_of_answers(tokenizer, model, demo.eos)
        if (self.method.demos or self.reads_demos) and problem:
            raise UserError(problem)
        self.stops = stops | {self.eos}
        self.context = context_length(self.verl_config.actor_rollout_ref)
        data = self.verl_config.data
        self.reader = Reader(
            tokenizer,
            self.eos,
            demo,
            int(data.max_response_length),
            self.settings.seed,
            data.get("apply_chat_template_kwargs") or {},
        )

    # --- every step ----------------------------------------------------------------------------------------------

    def plan_settings(self, step: int, ranks: int) -> PlanSettings:
        actor = self.verl_config.actor_rollout_ref.actor
        return PlanSettings(
            method=self.method,
            normalization=self.normalization,
            length_scale=self.length_scale,
            demo_coef=self.beside.demo_coef(step),
            gate=self.settings.gate.at(step),
            gates={source: own.gate.at(step) for source, own in self.settings.per_source.items()},
            truncated=self.settings.rollouts.truncated,
            collects=self.settings.buffer.content,
            questions_per_step=actor.ppo_mini_batch_size,
            ranks=ranks,
            rows_multiple=_pipeline_group(actor)
            * (1 if actor.use_dynamic_bsz else actor.ppo_micro_batch_size_per_gpu or 1),
            seed=self.settings.seed + step,
        )

    def question_fields(self) -> list[str]:
        """Columns read once a question."""
        names = ["prompts", "data_source", "extra_info", "raw_prompt", "multi_modal_inputs", SKIPPED, START]
        return list(dict.fromkeys([*names, *self._named_columns().values()]))

    def sampling_fields(self) -> list[str]:
        """Columns read of a question before it is sampled."""
        names = [SOURCE, "extra_info", "raw_prompt", self.settings.demo.key, self.settings.question_key]
        return [name for name in dict.fromkeys(names) if name is not None]

    def read_question(self, group: Group, cells: Mapping) -> None:
        """Sets a question's columns, data source and identity from its row, before sampling and after it alike.

        Raises:
            UserError: the row does not say which question it is.
        """
        group.columns = {name: unpacked(plain(cell)) for name, cell in cells.items()}
        group.source = str(plain(group.columns.get(SOURCE)) or "")
        try:
            group.key = identity(group.columns, self.settings.question_key)
        except UserError as error:
            raise UserError(f"{group.named()}: {error}") from None

    def loss_spec(self) -> LossSpec:
        actor = self.verl_config.actor_rollout_ref.actor
        fields = ["response_mask", "old_log_probs", ROW_FIELD, *(TOKEN_FIELDS[name] for name in self.token_columns)]
        kl_coef = float(actor.kl_loss_coef) if actor.use_kl_loss and self.method.rollouts is not None else 0.0
        if self.method.uses_critic:
            fields.append("advantages")
        if kl_coef or "ref_log_prob" in self.method.needs:
            fields.append("ref_log_prob")
        if OmegaConf.select(self.verl_config, "algorithm.rollout_correction.rollout_is") and self.method.rollouts:
            fields.append("rollout_is_weights")
        return LossSpec(
            method=self.method,
            constants=config.constants(
                self.settings, **{name: float(value) for name, value in config.clips(actor).items()}
            ),
            fields=tuple(fields),
            entropy_coeff=float(actor.entropy_coeff) if self.method.rollouts is not None else 0.0,
            kl_coef=kl_coef,
            kl_type=actor.kl_loss_type,
            kl_penalty=self.kl_penalty,
        )

    def update_settings(self, plan: Plan) -> dict:
        """verl cuts an update into ppo_mini_batch_size · rollout.n rows; make that the plan's rows a step."""
        actor = "actor_rollout_ref.actor"
        changes = {f"{actor}.ppo_mini_batch_size": plan.rows_per_step, "actor_rollout_ref.rollout.n": 1}
        if "entropy" in self.method.needs:
            changes[f"{actor}.calculate_entropy"] = True
        return changes

    def log_prob_multiple(self, ranks: int, need: str) -> int:
        """Rows of a log-prob pass are a multiple of this; a reference model of its own has its own micro-batches."""
        parts = self.verl_config.actor_rollout_ref
        cuts = [parts.rollout, *([parts.ref] if need == "ref_log_prob" else [])]
        sizes = [1 if cut.log_prob_use_dynamic_bsz else cut.log_prob_micro_batch_size_per_gpu or 1 for cut in cuts]
        actor = self.verl_config.actor_rollout_ref.actor
        nodes = [actor, *([self.verl_config.actor_rollout_ref.ref] if need == "ref_log_prob" else [])]
        return ranks * math.lcm(*(size * _pipeline_group(node) for size in sizes for node in nodes))

    def skipped_rollouts(self, step: int, questions: Sequence[Group], full: Sequence[int]) -> list[int] | None:
        """How many of its rollouts are left out of each question that is about to be sampled; None where none is.

        The early gate leaves out rollouts of those that failed again and again. And one rollout is enough where every
        question trains on its demonstration at this step, whatever its rollouts score (SFT until a step, RL after it);
        only in trainer_mode=sync, where what is sampled at a step is trained at that step.

        Args:
            full: rollouts of each question, where none is left out.
        """
        skipped = self.lifecycle.skipped_rollouts([question.key for question in questions], full)
        if (
            self.method.when != "gate"
            or self.method.place == "buffer"
            or self.verl_config.trainer.v1.trainer_mode != "sync"
        ):
            return skipped
        bounds, key = self.plan_settings(step, 1), self.settings.demo.key
        on_demo = [
            always_demo(bounds.gate_of(question.source), n) and bool(demonstrations(question.columns.get(key)))
            for question, n in zip(questions, full, strict=True)
        ]
        all_but_one = [n - 1 if certain else 0 for certain, n in zip(on_demo, full, strict=True)]
        if not any(all_but_one):
            return skipped
        return all_but_one if skipped is None else [max(pair) for pair in zip(all_but_one, skipped, strict=True)]

    def _all_on_demos(self, step: int, n: int) -> bool:
        """Whether the settings alone put every question on its demonstration at this step."""
        if self.method.rollouts is None:
            return True
        bounds = self.plan_settings(step, 1)
        return all(always_demo(settings, n) for settings in (bounds.gate, *bounds.gates.values()))

    def metric_of(self, source: str) -> str | None:
        """Key of the reward function's extra info that the gate of a data source reads; None: the score."""
        own = self.settings.per_source.get(source)
        return (self.settings if own is None else own).gate.metric

    def length_limit(self, prompt: int) -> int:
        """Tokens that a response to a prompt of so many tokens can have."""
        limit = int(self.verl_config.data.max_response_length)
        return limit if self.context is None else min(limit, self.context - prompt)

    def _named_columns(self) -> dict[str, str]:
        named = {}
        if self.reads_demos:
            named |= self._demo_columns()
        if self.settings.question_key is not None:
            named["hpt.question_key"] = self.settings.question_key
        return named

    def _demo_columns(self) -> dict[str, str]:
        demo = self.settings.demo
        return {"hpt.demo.key": demo.key, **{f"hpt.demo.{name}": column for name, column in demo.columns().items()}}


def _pipeline_group(actor) -> int:
    """Micro-batches of a rank must be a multiple of it: Megatron with virtual pipeline stages takes them in groups."""
    megatron = actor.get("megatron") if actor.get("strategy") == "megatron" else None
    if megatron is None or megatron.get("virtual_pipeline_model_parallel_size") in (None, 1):
        return 1
    own = (megatron.get("override_transformer_config") or {}).get("microbatch_group_size_per_vp_stage")
    return int(own or megatron.pipeline_model_parallel_size)


def _multi_modal(table, columns: Sequence[str], data, whose: str = "the training data") -> Iterator[str]:
    """Prompts with images, videos or sounds: in columns of their own, or as parts of the first prompt's messages."""
    remedy = "multi-modal prompts are not supported yet. Leave such rows out, or train them with another adv_estimator"
    for key, default in (("image_key", "images"), ("video_key", "videos"), ("audio_key", "audios")):
        column = data.get(key) or default
        if column in columns:
            # The arrow column where there is one: a cell of `datasets` would be decoded into a picture.
            cells = (cell.as_py() for cell in table.data.column(column)) if hasattr(table, "data") else table[column]
            first = next((row for row, cell in enumerate(cells, start=1) if cell is not None and len(cell)), None)
            if first is not None:
                yield f"data.{key}={column!r}: row {first} of {whose} has something there; {remedy}"
    prompts = table[data.prompt_key] if data.prompt_key in columns and hasattr(table, "__len__") else ()
    messages = plain(next(iter(prompts), None))
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, Mapping) and part.get("type") in ("image", "video", "audio"):
                yield f"data.prompt_key={data.prompt_key!r}: row 1 of {whose} has an {part['type']}; {remedy}"
                return


def context_length(actor_rollout_ref) -> int | None:
    """Tokens that prompt and response can have together: ``rollout.max_model_len``, else the model's own limit; None
    where neither says one."""
    from transformers import AutoConfig

    if actor_rollout_ref.rollout.get("max_model_len") is not None:
        return int(actor_rollout_ref.rollout.max_model_len)
    try:
        model = AutoConfig.from_pretrained(
            actor_rollout_ref.model.path, trust_remote_code=bool(actor_rollout_ref.model.get("trust_remote_code"))
        )
    except (OSError, ValueError):  # no config.json here, or of an architecture that transformers does not know
        return None
    return getattr(model.get_text_config(), "max_position_embeddings", None)
