"""verl's TransferQueue in this process, rollouts in it as verl's agent loop leaves them, and a trainer over both.

Controller, storage and client are TransferQueue's own, as threads of the test instead of Ray actors. The trainer is
ours over verl's ``PPOTrainerSync``, with what its steps touch and workers that only record what verl's own bridge hands
to them.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
import transfer_queue as tq
from engine.batches import jagged
from quickstart_task import byte_tokenizer
from tiny_run import changed, make_run
from transfer_queue import KVBatchMeta, interface
from transfer_queue.client import TransferQueueClient
from transfer_queue.controller import TransferQueueController
from transfer_queue.storage.simple_storage import SimpleStorageUnit
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import transferqueue_utils
from verl.utils.tensordict_utils import get_tensordict, list_of_dict_to_tensordict

from verl_hpt.host.trainer import hybrid
from verl_hpt.loss import ROW_COLUMNS, ROW_FIELD

PARTITION = "train"
TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token_id
HERE = str(Path(__file__).parent)  # a folder without a generation config


@contextmanager
def transfer_queue():
    """TransferQueue as ``tq.init`` makes it, without Ray."""
    controller = TransferQueueController.__ray_metadata__.modified_class()
    storage = SimpleStorageUnit.__ray_metadata__.modified_class({"num_data_storage_units": 1})
    client = TransferQueueClient("test", controller.get_zmq_server_info())
    info = storage.zmq_server_info
    client.initialize_storage_manager("SimpleStorage", {"zmq_info": {info.id: info}})
    interface._TQ_CLIENT, transferqueue_utils.TQ_INITIALIZED = client, True
    try:
        yield
    finally:
        interface._TQ_CLIENT, transferqueue_utils.TQ_INITIALIZED = None, False
        client.close()
        storage.shutdown()


def likelihood(ids: torch.Tensor) -> torch.Tensor:
    """What every model of these tests says of a token: a multiple of 1/8, exact in bfloat16."""
    return -(ids % 8).float() / 8 - 0.125


class Workers:
    """Stands for verl's worker groups. Each rank gets its chunk of a batch as verl's bridge fetches it.

    updates, passes: (meta, rows of each rank) of every call.
    """

    def __init__(self, ranks: int = 1, dtype: torch.dtype = torch.bfloat16):
        self._dispatch_info = {"actor": list(range(ranks))}
        self.ranks, self.dtype, self.updates, self.passes = ranks, dtype, [], []
        self.during = lambda: None  # called in every update

    def update_actor(self, batch: KVBatchMeta) -> dict:
        self.during()
        self.updates.append((batch, [self._fetch(chunk) for chunk in self._cut(batch)]))
        return {"metrics": {"grad_norm": [0.5], "mfu": [0.0]}}

    def compute_log_prob(self, batch: KVBatchMeta) -> KVBatchMeta:
        self.passes.append((batch, [self._said(chunk) for chunk in self._cut(batch)]))
        return batch

    compute_ref_log_prob = compute_log_prob

    def _cut(self, batch):
        assert len(batch) and len(batch) % self.ranks == 0, "verl cuts a batch into equal chunks"
        return batch.chunk(self.ranks)

    def _fetch(self, chunk):
        rows = []
        transferqueue_utils.tqbridge()(lambda data: rows.append(data))(chunk)
        return rows[0]

    def _said(self, chunk):
        """Log-probs and entropies of whole sequences, written back as verl's workers do."""
        rows = []

        def infer(data):
            rows.append(data)
            ids = data["input_ids"].unbind()
            of_next = [likelihood(torch.roll(row, -1)).to(self.dtype) for row in ids]
            columns = {"log_probs": jagged(of_next), "entropy": jagged([-row for row in of_next])}
            return get_tensordict(columns)

        transferqueue_utils.tqbridge()(infer)(chunk)
        return rows[0]


class Rollouts:
    """A step's rollouts, written to TransferQueue one agent session at a time."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16):
        self.dtype, self.keys, self.tags, self.answers = dtype, [], [], {}

    def add(
        self, uid: str, scores, *, target=None, answers=None, prompt=None, source="src", cut=(), info=None, **columns
    ) -> Rollouts:
        """One question's rollouts; answers: their texts, EOS is appended but for those that are cut, by number; info:
        what the reward function said of each beside the score."""
        answers = [f"{uid}{i}" * (i + 1) for i in range(len(scores))] if answers is None else answers
        prompt = f"{uid}:" if prompt is None else prompt
        for session, (score, answer) in enumerate(zip(scores, answers, strict=True)):
            end = [] if session in cut else [EOS]
            extra = {} if info is None else {"extra_fields": {"reward_extra_info": info[session]}}
            self.row(f"{uid}_{session}_0", uid, score, answer, target, prompt, source, columns | extra, end)
        return self

    def row(self, key, uid, score, answer, target, prompt, source, columns, end=(EOS,), **tags) -> None:
        question = torch.tensor(TOKENIZER.encode(prompt))
        said = torch.tensor([*TOKENIZER.encode(answer), *end])
        whole, ones, scores = torch.cat([question, said]), torch.ones_like(said), torch.zeros(len(said))
        scores[-1] = score
        row = {
            "uid": uid,
            "data_source": source,
            "extra_info": {"index": len(self.keys), "split": "train"},
            "raw_prompt": [{"role": "user", "content": prompt}],
            "target": target,
            "multi_modal_inputs": {},
            "prompts": question,
            "responses": said,
            "input_ids": whole,
            "position_ids": torch.arange(len(whole)),
            "response_mask": ones,
            "loss_mask": ones,
            "rm_scores": scores,
            "rollout_log_probs": likelihood(said),
            "old_log_probs": likelihood(said).to(self.dtype),
        } | columns
        tags = {"status": "success", "seq_len": len(whole), "response_len": len(said), "global_steps": 1} | tags
        tq.kv_batch_put([key], PARTITION, fields=list_of_dict_to_tensordict([row]), tags=[tags])
        self.keys.append(key)
        self.tags.append(tags)
        self.answers[key] = said.tolist()

    def padding(self, count: int = 1) -> Rollouts:
        """Rows as verl's ``_balance_batch`` adds them."""
        for number in range(count):
            self.row(f"pad{number}_0_0", f"pad{number}", 0.0, "", None, "p", "src", {}, is_padding=True)
        return self

    def batch(self, order=None) -> KVBatchMeta:
        """The batch that verl hands to the update; order: of its rows."""
        order = range(len(self.keys)) if order is None else order
        keys, tags = [self.keys[i] for i in order], [self.tags[i] for i in order]
        return KVBatchMeta(partition_id=PARTITION, keys=keys, tags=tags, extra_info={"kept": 1})


def keys_there() -> set[str]:
    """Keys that TransferQueue holds."""
    return set(tq.kv_list(PARTITION).get(PARTITION, {}))


def make_trainer(*overrides: str, ranks: int = 1, base=PPOTrainerSync, folder=HERE, tokenizer=TOKENIZER):
    """Our trainer over verl's, workers that record, and ``plans``: every step's plan, as it was made."""
    overrides = (
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.actor.ppo_mini_batch_size=99",
        "actor_rollout_ref.rollout.n=2",
        "data.max_response_length=64",
        f"actor_rollout_ref.model.path={folder}",
        f"trainer.default_local_dir={folder}",
        *overrides,
    )
    trainer = object.__new__(hybrid(base))
    trainer.config, trainer.global_steps, trainer.hpt = changed(*overrides), 1, make_run(*overrides)
    trainer.hpt.verl_config = trainer.config
    trainer.hpt.bind_tokenizer(tokenizer)
    trainer.actor_rollout_wg = trainer.ref_policy_wg = Workers(ranks)
    trainer.use_critic, trainer.ref_in_actor, trainer.trainer_mode = False, False, "sync"
    trainer.checkpoint_callback = SimpleNamespace(on_save=lambda **_: None)
    trainer.plans, plan_step = [], trainer._plan_step

    def kept(*given):
        trainer.plans.append(plan_step(*given))
        return trainer.plans[-1]

    trainer._plan_step = kept
    return trainer


def three_questions(**settings) -> Rollouts:
    """One that no rollout solves, one half solved, one that failed but has no demonstration; and verl's padding."""
    rollouts = Rollouts(**settings)
    rollouts.add("hard", [0, 0], target="abc", prompt="Why? ", answers=["no", "none"])
    rollouts.add("half", [1, 0], target="unread", answers=["yes", "no no no"]).add("lost", [0], answers=["never"])
    return rollouts.padding()


ORDER = [5, 3, 0, 4, 1, 2]  # rows as verl's balancing leaves them


def updated(rows) -> list[dict]:
    """The rows of all ranks, in order: each field's own values, and the columns of our row by name."""
    found = []
    for rank in rows:
        fields = {name: column for name, column in rank.items() if isinstance(column, torch.Tensor)}
        for i in range(len(rank)):
            row = {name: column[i] for name, column in fields.items()}
            found.append(row | dict(zip(ROW_COLUMNS, row[ROW_FIELD].tolist(), strict=False)))
    return found


def step(trainer, batch):
    """One update; verl's meta, the rows of each rank, the metrics."""
    metrics = {}
    assert trainer._update_actor(batch, metrics) is batch, "verl goes on with its own batch"
    meta, ranks = trainer.actor_rollout_wg.updates[-1]
    return meta, ranks, metrics
