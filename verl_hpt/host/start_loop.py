"""The agent loop of rollouts that start from a demonstration: verl's single-turn loop, and what stands before it.

A prefix is put behind the prompt's tokens that the rollout engine gets, and in front of what it returns; verl's mask is
0 there, its own word for tokens that the model did not write. A hint is put into the prompt's last user message. The
loop never fails for data: whoever has no usable demonstration starts from nothing, and is counted by the trainer.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from verl_hpt import config
from verl_hpt.demos.demonstration import REASONS, Demonstration, plain
from verl_hpt.demos.encode import end_of_answers
from verl_hpt.demos.read import unpacked
from verl_hpt.demos.select import stable_hash
from verl_hpt.estimator import Method
from verl_hpt.history import identity
from verl_hpt.host.batch import Group, Reader
from verl_hpt.host.started import START, STARTED
from verl_hpt.places.starts import Start, hint_of, hinted, prefix_length


@dataclass
class Started:
    """How one session started.

    tokens: of the prefix. place: of the demonstration among those of the row. missed: it should have started from a
    demonstration, and could not. prompt: the plain prompt's tokens, where the rollout's own has a hint; longer: by how
    many that has more, hint: a number that tells hints apart.
    """

    tokens: int = 0
    place: int = 0
    missed: bool = False
    prompt: list[int] | None = None
    longer: int = 0
    hint: int | None = None


class _Settings:
    """What the loops of a process share, read once."""

    def __init__(self, verl_config, tokenizer):
        node = verl_config.get("hpt")
        settings = config.load(OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node)
        self.method: Method = config.resolve_method(settings)
        self.start: Start = config.start_of(settings, self.method)
        data, rollout = verl_config.data, verl_config.actor_rollout_ref.rollout
        longest = int(data.max_response_length)
        self.limit = min(longest, int(rollout.response_length))  # verl cuts a response at the second
        eos, _, _ = end_of_answers(tokenizer, verl_config.actor_rollout_ref.model.path, settings.demo.eos)
        kwargs = data.get("apply_chat_template_kwargs") or {}
        demo = dataclasses.replace(settings.demo, on_unusable="keep")
        self.reader = Reader(tokenizer, eos, demo, longest, settings.seed, kwargs)
        self.reader.warned |= REASONS.keys()  # the trainer warns, once
        self.question_key = settings.question_key
        self.names = {demo.key, *demo.columns().values(), "raw_prompt", "data_source", self.question_key} - {None}

    def group(self, cells: Mapping) -> Group:
        """The question that an agent loop's arguments describe."""
        columns = {name: unpacked(plain(cells[name])) for name in self.names if name in cells}
        return Group("", [], identity(columns, self.question_key), columns=columns)

    def demo(self, group: Group, draw: int) -> Demonstration | None:
        """The demonstration from which the question's rollouts start at a draw, or None."""
        usable = self.reader.usable(group, Counter())
        return self.reader.choose(group, usable, draw)[0] if usable else None


_shared: dict[int, _Settings] = {}


def settings_for(verl_config, tokenizer, step: int) -> _Settings:
    """What holds at a step: what holds always, read once in a process."""
    if id(tokenizer) not in _shared:
        _shared[id(tokenizer)] = _Settings(verl_config, tokenizer)
    return _shared[id(tokenizer)]


class StartedAgentLoop(SingleTurnAgentLoop):
    """verl's loop; a session may begin with tokens of a demonstration, or with a hint."""

    async def run(self, sampling_params: dict[str, Any], **kwargs):
        amounts = plain(kwargs.get(START)) or []
        session = int(kwargs["session_id"])
        amount = float(amounts[session]) if session < len(amounts) else 0.0
        if amount <= 0:
            return await super().run(sampling_params, **kwargs)
        step = int(kwargs["global_steps"])
        shared = settings_for(self.config, self.tokenizer, step)
        begin = self._hinted if shared.method.place == "hint" else self._prefixed
        output, started = await begin(shared, amount, shared.group(kwargs), step, sampling_params, kwargs)
        told = dataclasses.asdict(started)
        output.extra_fields[STARTED] = {name: value for name, value in told.items() if value is not None}
        return output

    async def _prefixed(self, shared: _Settings, amount: float, group: Group, step: int, sampling_params, kwargs):
        started = Started()

        def prefix_of(prompt_ids: list[int]) -> list[int]:
            group.prompt = prompt_ids
            demo = shared.demo(group, step)
            if demo is None:
                started.missed = True
                return []
            first_run = demo.mask.index(0) if 0 in demo.mask else len(demo.ids)  # what the assistant says first
            started.tokens = prefix_length(amount, shared.start, first_run - 1, shared.limit)
            started.place = demo.index
            return list(demo.ids[: started.tokens])

        self.server_manager = _Begun(self.server_manager, prefix_of, shared.limit, self.loop)
        output = await super().run(sampling_params, **kwargs)
        output.response_mask = [0] * started.tokens + output.response_mask[started.tokens :]
        return output, started

    async def _hinted(self, shared: _Settings, amount: float, group: Group, step: int, sampling_params, kwargs):
        messages, started = list(plain(kwargs["raw_prompt"])), Started()
        build = self.continuous_token_builder.build_initial_tokens
        own = await self.loop.run_in_executor(None, build, messages)
        group.prompt = own
        demo = await self.loop.run_in_executor(None, shared.demo, group, step)
        with_hint = None if demo is None else _with_hint(messages, demo, amount, shared.start)
        if with_hint is not None:
            longer = await self.loop.run_in_executor(None, build, with_hint)
            if len(longer) <= self.prompt_length:  # verl would cut it from the left
                started.prompt, started.longer, started.place = own, len(longer) - len(own), demo.index
                started.hint = stable_hash(*longer) % 2**31
                kwargs = {**kwargs, "raw_prompt": with_hint}
            else:
                started.missed = True
        started.missed |= demo is None or demo.text is None
        return await super().run(sampling_params, **kwargs), started


def _with_hint(messages: list[Mapping], demo: Demonstration, amount: float, start: Start) -> list[Mapping] | None:
    """The prompt's messages with a hint in the last of a user; None where there is nothing to hint at."""
    last = max((i for i, message in enumerate(messages) if message.get("role") == "user"), default=None)
    hint = None if demo.text is None else hint_of(amount, start, demo.text)
    if last is None or hint is None or not isinstance(messages[last].get("content"), str):
        return None
    content = hinted(start.template, messages[last]["content"], hint)
    return [*messages[:last], {**messages[last], "content": content}, *messages[last + 1 :]]


class _Begun:
    """verl's client of the rollout engine, whose answers begin with given tokens."""

    def __init__(self, client, prefix_of: Callable[[list[int]], list[int]], limit: int, loop):
        self.client, self.prefix_of, self.limit, self.loop = client, prefix_of, limit, loop

    def __getattr__(self, name):
        return getattr(self.client, name)

    async def generate(self, request_id, *, prompt_ids, sampling_params, **kwargs):
        prefix = await self.loop.run_in_executor(None, self.prefix_of, list(prompt_ids))
        if prefix:  # a dict of its own: verl's is one for all sessions of a question
            sampling_params = {**sampling_params, "max_tokens": self.limit - len(prefix)}
        output = await self.client.generate(
            request_id, prompt_ids=list(prompt_ids) + prefix, sampling_params=sampling_params, **kwargs
        )
        output.token_ids = prefix + list(output.token_ids)
        if output.log_probs is not None:
            output.log_probs = [0.0] * len(prefix) + list(output.log_probs)
        return output
