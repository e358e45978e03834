"""What we lean on in verl: each private or unpromised name once, with why; the trainer and ``doctor`` check it.

A name here may change with any release of verl; that is why the supported range is narrow. Public extension points
(register_adv_est, set_loss_fn, PlatformRegistry, on_init_end) are listed too, so that one look tells what to test
against a new version.
"""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import PackageNotFoundError, version

from verl_hpt.errors import UserError

SUPPORTED = ((0, 9), (0, 10))

# module, attribute path, parameters that must be there, why
LEANED_ON = (
    ("verl.trainer.ppo.v1", "get_trainer_cls", ("name",), "replaced by a look-up that can return our trainer"),
    ("verl.trainer.ppo.core_algos", "register_adv_est", (), "registers the estimator hpt"),
    ("verl.trainer.ppo.core_algos", "kl_penalty", ("logprob", "ref_logprob", "kl_penalty"), "KL loss of RL rollouts"),
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer.on_init_end", (), "sets the loss once the workers are there"),
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._init_dataloader", (), "checks columns before a model loads"),
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._compute_advantage", ("batch", "metrics"), "GAE for ppo"),
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._compute_old_log_prob", ("batch", "metrics"), "of demonstrations"),
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._compute_ref_log_prob", ("batch", "metrics"), "of demonstrations"),
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._update_actor", ("batch", "metrics"), "the door of the update"),
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._next_train_batch", (), "fewer rollouts where all failed"),
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._save_checkpoint", (), "our state, before verl's marker file"),
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._load_checkpoint", (), "our state"),
    ("verl.trainer.ppo.utils", "need_reference_policy", ("config",), "methods that need reference log-probs"),
    ("verl.trainer.ppo.utils", "need_critic", ("config",), "methods that need a critic"),
    ("verl.workers.engine_workers", "ActorRolloutRefWorker.set_loss_fn", ("loss_fn",), "our loss on a live actor"),
    ("verl.workers.utils.padding", "no_padding_2_padding", ("tensor", "data"), "(rows, response_len) log-probs"),
    ("verl.utils.metric", "Metric", ("aggregation", "value"), "metrics that are sums"),
    ("verl.utils.transferqueue_utils", "kv_batch_meta2batch_meta", ("meta",), "which fields a batch really has"),
    ("transfer_queue", "kv_batch_get", ("keys", "partition_id", "select_fields"), "reads rollouts"),
    ("transfer_queue", "kv_batch_put", ("keys", "partition_id", "fields", "tags"), "writes rows"),
    ("transfer_queue", "kv_clear", ("keys", "partition_id"), "clears what we wrote"),
    ("transfer_queue", "KVBatchMeta", ("keys", "tags", "partition_id", "fields", "extra_info"), "the update's batch"),
)

# module, attribute path, a piece of its source, why: keys, tags, columns and conventions that no signature shows.
_TRAINER, _LOOP = "verl.trainer.ppo.v1.trainer_base", "verl.trainer.ppo.v1.agent_loop_tq"
CONVENTIONS = (
    (_LOOP, "AgentLoopWorkerTQ._agent_loop_postprocess", 'f"{uid}_{session_id}_{i}"', "rows are grouped by their keys"),
    (_LOOP, "", '"__rollout_n__"', "a question's own number of rollouts"),
    (_LOOP, "AgentLoopWorkerTQ._agent_loop_postprocess", '"loss_mask"', "tokens that learn, before any rejection"),
    ("verl.experimental.agent_loop.agent_loop", "AgentLoopOutput", '"rm_scores"', "scores, a number a token"),
    ("verl.experimental.agent_loop.agent_loop", "AgentLoopWorker", "np.array([v] * n)", "why columns are packed"),
    ("verl.trainer.ppo.padding_utils", "", "is_padding=True", "verl's own padding rows are left out"),
    (_TRAINER, "PPOTrainer._balance_batch", "dp", "rows are balanced before they come to us"),
    (_TRAINER, "PPOTrainer._get_required_batch_multiple", "ppo_mini_batch_size", "why verl pads"),
    (_TRAINER, "PPOTrainer", "_query_dispatch_info", "data-parallel ranks of the actor"),
    (_TRAINER, "PPOTrainer._init_dataloader", "collate_fn=collate_fn", "columns are packed as rows are collated"),
    (_TRAINER, "PPOTrainer._update_actor", "ppo_mini_batch_size * self.config.actor_rollout_ref.rollout.n",
     "rows of an optimizer step"),
    (_TRAINER, "PPOTrainer._update_actor", "batch.extra_info.update(", "a temperature a row"),
    (_TRAINER, "PPOTrainer._update_actor", '"actor/"', "where the loss's sums arrive"),
    (_TRAINER, "PPOTrainer._save_checkpoint", "global_step_", "the folder of a checkpoint"),
    ("verl.utils.dataset.rl_dataset", "RLHFDataset", "self.dataframe", "columns of the training data"),
    ("verl.workers.utils.losses", "ppo_loss", 'data["dp_size"]', "scale of the loss"),
)  # fmt: skip


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
    """What of ``LEANED_ON`` and ``CONVENTIONS`` this installation lacks, each with why it matters."""
    lacking = []
    for module, path, parameters, why in LEANED_ON:
        try:
            target = importlib.import_module(module)
            for name in path.split("."):
                target = getattr(target, name)
            known = inspect.signature(target).parameters
            gone = [p for p in parameters if p not in known]
        except (ImportError, AttributeError) as error:
            lacking.append(f"{module}.{path} ({why}): {error}")
            continue
        if gone:
            lacking.append(f"{module}.{path} ({why}): has no parameter {', '.join(gone)}")
    for module, path, text, why in CONVENTIONS:
        try:
            target = importlib.import_module(module)
            for name in filter(None, path.split(".")):
                target = getattr(target, name)
            there = text in inspect.getsource(target)
        except (ImportError, AttributeError, TypeError, OSError) as error:
            lacking.append(f"{module}.{path} ({why}): {error}")
            continue
        if not there:
            lacking.append(f"{module}.{path} ({why}): its source has no {text}")
    return lacking


def check() -> str:
    """The verl version, once all is there; else a UserError that names what is gone."""
    found = verl_version()
    lacking = missing()
    if lacking:
        raise UserError(f"verl {found} lacks what verl-hpt leans on:\n  " + "\n  ".join(lacking))
    return found
