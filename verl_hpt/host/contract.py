"""What we lean on in verl: each unpromised name once, with who uses it and why; the trainer and ``doctor`` check it.

A name here may change with any release of verl; that is why the supported range is narrow. Public extension points
(register_adv_est, set_loss_fn, on_init_end) stand here too, so that one look tells what to test against a new version.
"""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import PackageNotFoundError, version

from verl_hpt.errors import UserError

SUPPORTED = ((0, 9), (0, 10))

_TRAINER, _LOOP = "verl.trainer.ppo.v1.trainer_base:PPOTrainer", "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopWorkerTQ"
_OUTPUT, _LOSS = "verl.experimental.agent_loop.agent_loop:AgentLoopOutput", "verl.workers.utils.losses:ppo_loss"
_ENGINE = "verl.workers.engine.fsdp.transformer_impl:FSDPEngineWithLMHead"

# module:name, parameters that it must take, pieces that its source must have, who of us uses it and why. The pieces
# stand for what no signature shows: fields of TransferQueue, keys, tags, attributes and conventions.
LEANED_ON = (
    ("verl.trainer.ppo.v1:get_trainer_cls", ("name",), (), "plugin: replaced by a look-up that can return our trainer"),
    ("verl.trainer.ppo.core_algos:register_adv_est", (), (), "plugin: registers the estimator hpt"),
    ("verl.trainer.ppo.core_algos:ADV_ESTIMATOR_REGISTRY", (), (), "doctor: whether hpt is registered"),
    ("verl.trainer.ppo.ray_trainer:compute_advantage", (),
     ('"token_level_rewards": ', '"response_mask": ', 'adv_kwargs["index"]', '"config": '), "advantage: its arguments"),
    ("verl.trainer.ppo.core_algos:kl_penalty", ("logprob", "ref_logprob", "kl_penalty"), (),
     "trainer: KL loss of RL rollouts"),
    ("verl.trainer.ppo.utils:need_reference_policy", ("config",), (), "trainer: methods that need reference log-probs"),
    ("verl.trainer.ppo.utils:need_critic", ("config",), (), "trainer: methods that need a critic"),
    ("verl.trainer.ppo.ray_trainer:RayPPOTrainer", (), ("self.config = config",), "plugin: it refuses hpt"),
    ("verl.utils.config:validate_config", ("config", "use_reference_policy", "use_critic"), (), "launch: its checks"),
    ("verl.utils.config:omega_conf_to_dataclass", ("config",), (), "launch: its checks"),
    # the trainer's own methods, and what they set
    (_TRAINER, ("config",), ("self.config =", "_query_dispatch_info(", "_dispatch_info["),
     "trainer: the run is built before it; data-parallel ranks of the actor"),
    (f"{_TRAINER}.on_init_end", (), (), "trainer: sets the loss once the workers are there"),
    (f"{_TRAINER}._init_tokenizer", (), ("self.tokenizer =",), "trainer: demonstrations become tokens"),
    (f"{_TRAINER}._init_dataloader", (),
     ("self.train_dataset =", "self.train_dataloader =", "self.val_dataloader =", "collate_fn=collate_fn"),
     "trainer: checks columns before a model loads, packs them as rows are collated"),
    (f"{_TRAINER}._setup", (), ("self.actor_rollout_wg =",), "trainer: the workers that take our loss"),
    (f"{_TRAINER}.step", ("metrics", "timing_raw"), ("metrics_aggregator.get_aggregated_metrics()",),
     "trainer: metrics of several updates"),
    (f"{_TRAINER}._next_train_batch", (), (), "trainer: fewer rollouts where they teach nothing"),
    (f"{_TRAINER}._balance_batch", (), ("dp",), "trainer: rows are balanced before they come to us"),
    (f"{_TRAINER}._get_required_batch_multiple", (), ("ppo_mini_batch_size",), "batch: why verl pads"),
    (f"{_TRAINER}._compute_advantage", ("batch", "metrics"),
     ("self.config.algorithm.adv_estimator", '"rm_scores"', '"token_level_rewards"', '"advantages"',
      '"rollout_is_weights"'), "trainer: GAE for ppo; fields that gate, plan and loss read"),
    (f"{_TRAINER}._compute_old_log_prob", ("batch", "metrics"),
     ('"old_log_probs"', '"rollout_log_probs"', '"actor/entropy"'),
     "trainer: log-probs of demonstrations; beside: the entropy that steers λ"),
    (f"{_TRAINER}._compute_ref_log_prob", ("batch", "metrics"), ('"ref_log_prob"', "batch.extra_info.update("),
     "trainer: reference log-probs of demonstrations"),
    (f"{_TRAINER}._update_actor", ("batch", "metrics"),
     ("ppo_mini_batch_size * self.config.actor_rollout_ref.rollout.n", "batch.extra_info.update(", '"temperature"',
      "actor.calculate_entropy", '"actor/"'),
     "trainer, run, metrics: the door of the update, rows of an optimizer step, where the loss's sums arrive"),
    (f"{_TRAINER}._save_checkpoint", (), ("global_step_",), "trainer: our state, before verl's marker file"),
    (f"{_TRAINER}._load_checkpoint", (), ("self.global_steps =", '"resume_path"'), "trainer: our state"),
    ("verl.single_controller.base.worker:Worker._query_dispatch_info", ("mesh_name",), (), "trainer: the ranks"),
    ("verl.single_controller.base.worker_group:WorkerGroup", (), ("self._dispatch_info",), "trainer: the ranks"),
    # rows of a batch: keys, tags, fields, columns
    (f"{_LOOP}._agent_loop_postprocess", (),
     ('f"{uid}_{session_id}_{i}"', '"loss_mask"', '"input_ids"', '"position_ids"', '"multi_modal_inputs"',
      '"reward_extra_info"', '"status": "success"'), "batch, rows, trainer: a rollout's key, tag and fields"),
    ("verl.trainer.ppo.v1.agent_loop_tq:", (), ('"__rollout_n__"',), "trainer: a question's own number of rollouts"),
    (_OUTPUT, (), ('"prompts"', '"responses"', '"response_mask"', '"rm_scores"', '"extra_fields"'),
     "rows, trainer: a rollout's fields; a score is a number a token"),
    (f"{_LOOP}.generate_sequences", (), ('"agent_name" not in batch',), "trainer: a question's own agent loop"),
    (f"{_LOOP}._run_prompt", (), ("session_id=i",), "start_loop: each session knows its number"),
    ("verl.experimental.agent_loop.agent_loop:_agent_loop_registry", (), (), "plugin: the loop of started rollouts"),
    ("verl.experimental.agent_loop.agent_loop:AgentLoopBase", ("trainer_config", "server_manager", "tokenizer"),
     ("self.continuous_token_builder =", "self.config =", "self.loop ="), "start_loop: what it reads"),
    ("verl.experimental.agent_loop.single_turn_agent_loop:SingleTurnAgentLoop.run", ("sampling_params",),
     ('kwargs["raw_prompt"]', "self.server_manager.generate(", "sampling_params=sampling_params", "response_mask["),
     "start_loop: a prefix before what is generated, a hint in the prompt"),
    ("verl.trainer.ppo.utils:create_rl_dataset", ("data_paths", "data_config", "tokenizer", "processor"), (),
     "trainer: the stream's files"),
    ("verl.utils.tokenizer.continuous_token_wiring:create_continuous_token_builder",
     ("tokenizer", "hf_model_type", "chat_template_kwargs"), (), "trainer: prompts of the stream, as rollouts have"),
    ("verl.utils.tokenizer.continuous_token:ContinuousTokenBuilder.build_initial_tokens", ("messages",), (),
     "trainer, start_loop: a prompt's tokens"),
    ("verl.experimental.agent_loop.agent_loop:AgentLoopWorker", (), ("np.array([v] * n)",),
     "trainer: why columns are packed"),
    ("verl.trainer.ppo.padding_utils:", (), ("is_padding=True",), "batch: verl's own padding rows are left out"),
    ("verl.utils.dataset.rl_dataset:RLHFDataset", (), ("self.dataframe", '"raw_prompt"'),
     "run: columns of the training data"),
    # the workers
    ("verl.workers.engine_workers:ActorRolloutRefWorker.set_loss_fn", ("loss_fn",), (), "trainer: our loss"),
    (_LOSS, ("model_output", "data", "dp_group"), ('data["dp_size"]', '["log_probs"]', '.get("entropy"'),
     "loss_fn: protocol and scale of the loss"),
    (f"{_ENGINE}.prepare_model_inputs", (), ("isinstance(temperature, torch.Tensor)",), "run: a temperature a row"),
    ("verl.workers.utils.padding:no_padding_2_padding", ("tensor", "data"), (), "loss_fn: (rows, response_len)"),
    ("verl.utils.metric:Metric", ("aggregation", "value"), (), "loss_fn: metrics that are sums"),
    ("verl.utils.metric:AggregationType", (), ("SUM =",), "loss_fn: metrics that are sums"),
    ("verl.workers.config.engine:EngineRouterReplayConfig", ("mode",), (), "refusals: demonstrations have no routes"),
    # TransferQueue
    ("verl.utils.transferqueue_utils:kv_batch_meta2batch_meta", ("meta",), (), "trainer: which fields rows have"),
    ("transfer_queue:BatchMeta", ("field_schema",), ("def field_names",), "trainer: which fields rows have"),
    ("transfer_queue:kv_batch_get", ("keys", "partition_id", "select_fields"), (), "trainer: reads rollouts"),
    ("transfer_queue:kv_batch_put", ("keys", "partition_id", "fields", "tags"), (), "trainer: writes rows"),
    ("transfer_queue:kv_clear", ("keys", "partition_id"), (), "trainer: clears what we wrote"),
    ("transfer_queue:KVBatchMeta", ("keys", "tags", "partition_id", "fields", "extra_info"), (), "trainer: a batch"),
)  # fmt: skip

# Settings of verl's composed `ppo_trainer`: who reads them -> node -> names.
_ACTOR, _ROLLOUT, _MODEL = (f"actor_rollout_ref.{part}" for part in ("actor", "rollout", "model"))
_CUTS = "log_prob_use_dynamic_bsz log_prob_micro_batch_size_per_gpu"
_READ = {
    "plugin": {"algorithm": "adv_estimator"},
    "launch": {"trainer": "use_v1 val_only"},
    "trainer": {"algorithm": "use_kl_in_reward", "trainer": "default_local_dir resume_mode resume_from_path"},
    "run": {
        "data": "max_response_length apply_chat_template_kwargs prompt_key image_key video_key audio_key",
        "trainer.v1": "trainer_mode",
        "algorithm": "norm_adv_by_std_in_grpo rollout_correction.rollout_is",
        _MODEL: "path trust_remote_code use_fused_kernels",
        _ROLLOUT: f"n temperature max_model_len calculate_log_probs {_CUTS}",
        "actor_rollout_ref.ref": f"{_CUTS} strategy",
        _ACTOR: "strategy ppo_mini_batch_size ppo_epochs use_dynamic_bsz ppo_micro_batch_size_per_gpu clip_ratio "
                "clip_ratio_low clip_ratio_high clip_ratio_c entropy_coeff calculate_entropy use_kl_loss kl_loss_coef "
                "kl_loss_type loss_agg_mode",
    },
    "refusals": {
        "algorithm": "filter_groups.enable rollout_correction.bypass_mode", "distillation": "enabled",
        "reward": "reward_manager.name reward_model.enable",
        _ACTOR: "shuffle policy_loss.loss_mode", "critic": "enable",
        _ROLLOUT: "enable_rollout_routing_replay name agent.default_agent_loop",
    },
}  # fmt: skip
CONFIG = tuple(  # path, who reads it
    (f"{node}.{name}", user) for user, nodes in _READ.items() for node, names in nodes.items() for name in names.split()
)


# Fields of verl's rows, and arguments of its agent loop. The loop gets a question's dataset columns as keyword
# arguments, which fails where it has one of that name, and writes them over what it sampled, so that a column would
# take a field's place; later stages would meet one that has another form than theirs.
FIELDS = (
    "prompts", "responses", "response_mask", "rollout_log_probs", "routed_experts", "rm_scores", "num_turns", "metrics",
    "extra_fields", "token_level_scores", "token_level_rewards", "old_log_probs", "ref_log_prob", "values",
    "advantages", "returns", "rollout_is_weights", "temperature", "output", "validate", "sampling_params", "trajectory",
    "trace", "session_id",
)  # fmt: skip


def reserved(column: str) -> bool:
    """Whether a dataset's column has a name that verl's rows or ours need."""
    return column in FIELDS or column.startswith("hpt_")


def verl_version() -> str:
    """Raises UserError: verl is not installed, or not a version that this release knows."""
    try:
        found = version("verl")
    except PackageNotFoundError as error:
        raise UserError("verl is not installed in this environment; pip install 'verl>=0.9,<0.10'") from error
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if not SUPPORTED[0] <= numbers < SUPPORTED[1]:
        low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
        raise UserError(f"verl {found} is installed; this verl-hpt supports verl>={low},<{high}")
    return found


def missing() -> list[str]:
    """What of ``LEANED_ON`` this installation lacks, each with who needs it and why."""
    lacking = []
    for place, parameters, pieces, why in LEANED_ON:
        module, _, path = place.partition(":")
        place = f"{module}.{path}".rstrip(".")
        try:
            target = importlib.import_module(module)
            for name in filter(None, path.split(".")):
                target = getattr(target, name)
            known = inspect.signature(target).parameters if parameters else ()
            source = inspect.getsource(target) if pieces else ""
        except (ImportError, AttributeError, TypeError, OSError) as error:
            lacking.append(f"{place} ({why}): {error}")
            continue
        lacking += [f"{place} ({why}): has no parameter {name}" for name in parameters if name not in known]
        lacking += [f"{place} ({why}): its source has no {piece}" for piece in pieces if piece not in source]
    return lacking


def missing_settings(config=None) -> list[str]:
    """Paths of ``CONFIG`` that verl's config has not. config: a composed one; by default it is composed here."""
    import hydra
    from omegaconf import OmegaConf

    if config is None:
        with hydra.initialize_config_module("verl.trainer.config", version_base=None):
            config = hydra.compose("ppo_trainer")

    def lacks(path: str) -> bool:  # one that must be set ("???") is there
        node, _, name = path.rpartition(".")
        return name not in (OmegaConf.select(config, node) or {}).keys()

    return [f"the setting {path} ({user})" for path, user in CONFIG if lacks(path)]


def check() -> str:
    """The verl version, once all is there; else a UserError that names what is gone."""
    found = verl_version()
    lacking = missing()
    if lacking:
        raise UserError(f"verl {found} lacks what verl-hpt leans on:\n  " + "\n  ".join(lacking))
    return found
