"""Agent sessions as verl's worker runs them: worker, registry and loops are verl's, the rollout engine is a fake."""

from __future__ import annotations

import asyncio
import random
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from omegaconf import OmegaConf
from tiny_run import changed
from tiny_tokenizers import tiny
from verl.trainer.ppo.v1 import agent_loop_tq
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn
from verl.workers.rollout.replica import TokenOutput

from verl_hpt.config import load
from verl_hpt.demos.demonstration import plain
from verl_hpt.demos.read import packed, unpacked
from verl_hpt.history import identity
from verl_hpt.host import start_loop
from verl_hpt.host.batch import Group, Reader
from verl_hpt.host.started import Starts, check_prefixes, starts_of

HERE = str(Path(__file__).parent)  # a folder without a generation config
SESSION: ContextVar[int] = ContextVar("session")
SHARED = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}
SAID = [101, 102, 103, 104]  # what the model says in every session


@dataclass
class Request:
    """What the rollout engine was asked for. given: verl's dict of parameters itself; params: what stood in it."""

    prompt: list[int]
    given: dict
    params: dict


class Engine:
    """Stands for verl's client of the rollout engine. asked: by session."""

    def __init__(self, said=SAID, log_probs: bool = True):
        self.said, self.log_probs, self.asked = list(said), log_probs, {}
        self.model = "verl's client has more than `generate`"

    async def generate(self, request_id, *, prompt_ids, sampling_params, **kwargs) -> TokenOutput:
        self.asked[SESSION.get()] = Request(list(prompt_ids), sampling_params, dict(sampling_params))
        said = self.said[: sampling_params.get("max_tokens")]
        numbers = [-0.5 - i / 8 for i in range(len(said))] if self.log_probs else None
        return TokenOutput(token_ids=said, log_probs=numbers, extra_fields={"min_global_steps": 3})


class Worker(agent_loop_tq.AgentLoopWorkerTQ.__ray_metadata__.modified_class):
    """verl's worker without Ray; what its sessions return is kept, by session, and so is what they raise."""

    def __init__(self, config, tokenizer, engine):
        self.config, self.llm_client, self.tokenizer, self.processor = config, engine, tokenizer, None
        self.dataset_cls, self.tools = RLHFDataset, []
        self.hf_model_type = "qwen2" if "<|im_end|>" in tokenizer.get_vocab() else "llama"
        self.reward_loop_worker_handles, self.distillation_enabled = None, False
        self.background_tasks, self.outputs, self.failed = set(), {}, []

    async def _run_agent_loop(self, *args, session_id, **kwargs):
        SESSION.set(session_id)
        try:
            await super()._run_agent_loop(*args, session_id=session_id, **kwargs)
        except Exception as error:
            self.failed.append(error)
            raise

    async def _agent_loop_postprocess(self, output, validate, **kwargs):
        self.outputs[kwargs["session_id"]] = output


@dataclass
class Sampled:
    """The sessions of one question, by number: what the engine was asked, and what the agent loops returned."""

    asked: dict[int, Request]
    outputs: dict[int, Any]
    prompt: dict = field(repr=False)

    def told(self, session: int) -> dict | None:
        return self.outputs[session].extra_fields.get("hpt_started")


def settings(*overrides: str, place: str = "prefix", limit: int = 64, prompt: int = 256):
    """verl's config of a run with rollouts that start from demonstrations."""
    lengths = (f"data.max_response_length={limit}", f"data.max_prompt_length={prompt}")
    method = {"prefix": "prefix_rft", "hint": "questa"}[place]
    return changed(*lengths, f"actor_rollout_ref.model.path={HERE}", f"++hpt.method={method}", *overrides)


def question(content="How many are 2 and 3?", **columns) -> dict:
    """A row of the training data, as verl's dataset gives it."""
    raw_prompt = [{"role": "user", "content": content}] if isinstance(content, str) else content
    return {"data_source": "src", "extra_info": {"index": 7}, "raw_prompt": raw_prompt, **columns}


def as_drawn(row: dict) -> dict:
    """A row as it reaches an agent loop: collated by verl, with our packing, one question taken out."""
    return {name: cells[0] for name, cells in packed([row], collate_fn).items()}


def sample(
    config, row: dict, amounts, *, step=1, agent="hpt_start", engine=None, tokenizer=None, sessions=None
) -> Sampled:
    """All sessions of one question, by verl's ``_run_prompt``; an exception in one of them is raised. amounts: the
    column ``hpt_start``; None: without it."""
    sessions = len(amounts) if sessions is None else sessions
    engine = Engine() if engine is None else engine
    worker = Worker(config, tiny("qwen2.5") if tokenizer is None else tokenizer, engine)
    prompt = {**as_drawn(row), "uid": "u", "agent_name": agent, "global_steps": step, "__rollout_n__": sessions}
    if amounts is not None and agent == "hpt_start":
        prompt["hpt_start"] = [float(amount) for amount in amounts]
    start_loop._shared.clear()  # a process has one config
    trajectory = {"step": step, "sample_index": 0, "rollout_n": 0, "validate": False}

    async def nothing(**kwargs):
        pass

    with patch.object(agent_loop_tq.tq, "async_kv_put", nothing):
        asyncio.run(worker._run_prompt(prompt, dict(SHARED), trajectory))
    if worker.failed:
        raise worker.failed[0]
    assert sorted(worker.outputs) == list(range(sessions))
    return Sampled(engine.asked, worker.outputs, prompt)


def ids_of(text: str, style: str = "qwen2.5") -> list[int]:
    return tiny(style).encode(text, add_special_tokens=False)


def text_of(ids: list[int], style: str = "qwen2.5") -> str:
    return tiny(style).decode(ids)


def at_the_door(config, sampled: Sampled, tokenizer=None) -> tuple[Group, Starts]:
    """What the trainer makes of a question's sessions, which are its rows; it checks their prefixes, too."""
    tokenizer = tiny("qwen2.5") if tokenizer is None else tokenizer
    settings = load(OmegaConf.to_container(config.hpt))
    reader = Reader(tokenizer, tokenizer.eos_token_id, settings.demo, config.data.max_response_length, settings.seed)
    columns = {name: unpacked(plain(cell)) for name, cell in sampled.prompt.items()}
    outputs = sampled.outputs
    group = Group("u", [*sorted(outputs)], identity(columns), "src", outputs[0].prompt_ids, columns)
    starts = starts_of(len(outputs), [group], {session: plain(sampled.told(session)) for session in outputs}, reader)
    check_prefixes([group], starts, {session: output.response_ids for session, output in outputs.items()})
    return group, starts


WORDS = [
    None, "", "  ", "a", "First add 2 and 3.", "<|im_end|>", "x<|im_end|>y", "<think>", "</think>", "\ud800", "\x00",
    "word " * 500, "verl-hpt packed: ", "verl-hpt packed: [1", 0, -1, 7.5, float("nan"), True, 10**400, b"x", {}, [],
]  # fmt: skip


def hostile(draw: random.Random, depth: int = 0):
    """A cell of demonstrations such as no converter would write."""
    kind = draw.random()
    if depth > 3 or kind < 0.35:
        return draw.choice(WORDS)
    if kind < 0.6:
        return [hostile(draw, depth + 1) for _ in range(draw.randint(0, 4))]
    message = {"role": draw.choice(["assistant", "assistant", "tool", "user", None, 5, ["assistant"]])}
    message["content"] = draw.choice(["some text", "some text", hostile(draw, depth + 1)])
    if draw.random() < 0.3:
        message["tool_calls"] = [hostile(draw, depth + 1) for _ in range(draw.randint(0, 2))]
    if draw.random() < 0.2:
        message["reasoning_content"] = hostile(draw, depth + 1)
    if draw.random() < 0.1:
        del message["role"]
    return message if draw.random() < 0.5 else [message, *(hostile(draw, depth + 1) for _ in range(draw.randint(0, 3)))]
