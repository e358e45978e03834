"""Real trainings on a CPU for the tests: a tiny model, questions with recorded rewards, verl's own command.

Needs the extra ``cpu``. Each training takes about a minute to start.
"""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

import psutil
import pyarrow
import pyarrow.parquet
import quickstart_task as quickstart

from verl_hpt.history import FILE

HERE = Path(__file__).parent
MARKER = "latest_checkpointed_iteration.txt"
CPU = shlex.split("""
trainer.device=cpu trainer.nnodes=1 trainer.n_gpus_per_node=1
+ray_kwargs.ray_init.num_gpus=4 ray_kwargs.ray_init.num_cpus=32 +ray_kwargs.ray_init.include_dashboard=False
transfer_queue.backend.SimpleStorage.num_data_storage_units=1 data.dataloader_num_workers=0
actor_rollout_ref.model.use_remove_padding=False ++actor_rollout_ref.model.override_config.attn_implementation=sdpa
actor_rollout_ref.actor.strategy=fsdp2 actor_rollout_ref.actor.fsdp_config.strategy=fsdp2
actor_rollout_ref.actor.fsdp_config.use_torch_compile=False
++actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32
++actor_rollout_ref.actor.fsdp_config.mixed_precision.reduce_dtype=fp32
actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.dtype=float32
actor_rollout_ref.rollout.tensor_model_parallel_size=1 actor_rollout_ref.rollout.enforce_eager=True
actor_rollout_ref.rollout.free_cache_engine=False +actor_rollout_ref.rollout.enable_sleep_mode=False
actor_rollout_ref.rollout.agent.num_workers=1 reward.num_workers=1
data.max_prompt_length=48 data.max_response_length=24 data.seed=1
actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16 actor_rollout_ref.actor.optim.lr=1e-3
actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16
reward.reward_manager.source=importlib reward.reward_manager.name=RecordedRewards
trainer.logger=[console,file] trainer.project_name=verl-hpt trainer.total_epochs=1000
trainer.val_before_train=False trainer.test_freq=-1 algorithm.adv_estimator=hpt
""")


def question(index: int, rule: dict, source: str, demos: int) -> dict:
    """A row of verl's dataset: a word to write backwards, with some demonstrations, and the record of its rewards."""
    draw = random.Random(index)
    word = "".join(draw.choice("abcdefghij") for _ in range(5))
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": f"Reverse {index}: {word}"}],
        "ability": "string",
        "reward_model": {"style": "rule", "ground_truth": word[::-1]},
        "extra_info": {"split": "train", "index": index, "step": 0, "chance": 0.0, "lost": -1, **rule},
        "target": [f"{word[::-1]} {'!' * i}" for i in range(demos)],
    }


class Training:
    """One training of verl in a folder of its own. ``prefix`` stands before the command, e.g. a lock."""

    def __init__(self, folder: Path, rows: list[dict], overrides: list[str], prefix: tuple[str, ...] = ()):
        self.folder, self.prefix = Path(folder), list(prefix)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log, self.metrics_file = self.folder / "train.log", self.folder / "metrics.jsonl"
        data, model = self.folder / "train.parquet", self.folder / "model"
        if not model.exists():
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), data)
            quickstart.write_model(str(model), seed=0)
        self.checkpoints = self.folder / "checkpoints"
        self.arguments = [
            *CPU,
            f"data.train_files={data}",
            f"data.val_files={data}",
            f"actor_rollout_ref.model.path={model}",
            f"reward.reward_manager.module.path={HERE / 'recorded_rewards.py'}",
            f"trainer.default_local_dir={self.checkpoints}",
            f"trainer.experiment_name={self.folder.name}",
            *overrides,
        ]

    def start(self, *more: str) -> subprocess.Popen:
        environment = {
            **os.environ,
            "VERL_PLATFORM": "cpu",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "VERL_FILE_LOGGER_PATH": str(self.metrics_file),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        command = [*self.prefix, sys.executable, "-m", "verl.trainer.main_ppo", *self.arguments, *more]
        with open(self.log, "ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def run(self, *more: str, limit: float = 600) -> None:
        """To the end; the end of its log in the error where it fails."""
        process = self.start(*more)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = "still running"
        if status != 0:
            kill(process)
            raise AssertionError(f"status {status}\n{self.tail()}")

    def checkpoint(self) -> int:
        """The step that verl would resume from; 0: none."""
        marker = self.checkpoints / MARKER
        text = marker.read_text() if marker.exists() else ""
        return int(text) if text else 0

    def wait_for(self, process: subprocess.Popen, ready, limit: float = 400) -> None:
        """Until ``ready()``, while the process lives."""
        end = time.monotonic() + limit
        while not ready():
            assert process.poll() is None, f"ended with {process.returncode}\n{self.tail()}"
            assert time.monotonic() < end, f"not in {limit} s\n{self.tail()}"
            time.sleep(0.1)

    def history(self, step: int) -> Path:
        return self.checkpoints / f"global_step_{step}" / FILE

    def metrics(self) -> dict[int, dict]:
        """Step -> metrics, those of the last run that logged it; a line that a kill cut off is left out."""
        lines = self.metrics_file.read_text().split("\n")[:-1]
        return {line["step"]: line["data"] for line in map(json.loads, lines)}

    def logged(self) -> int:
        """Bytes of metrics so far."""
        return self.metrics_file.stat().st_size if self.metrics_file.exists() else 0

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the process and to all that it started, Ray and vLLM included, at once."""
    try:
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        tree = []
    for one in tree:
        try:
            one.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait(30)
    psutil.wait_procs(tree, timeout=30)
