"""Rollouts with a hint in their prompt, and started rollouts on their way through verl's queue to the trainer."""

import asyncio
import copy
import random

import numpy as np
import pytest
from batches import PARTITION, make_trainer
from sessions import (
    HERE,
    SAID,
    SHARED,
    Engine,
    Worker,
    at_the_door,
    hostile,
    ids_of,
    question,
    sample,
    settings,
    text_of,
)
from tensordict import NonTensorData, NonTensorStack, TensorDict
from tiny_tokenizers import STYLES, tiny
from transfer_queue import KVBatchMeta, kv_batch_put, kv_list
from verl.utils.dataset.rl_dataset import collate_fn
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from verl_hpt.demos.read import packed
from verl_hpt.demos.select import stable_hash
from verl_hpt.host import start_loop

DEMO = "First 2 and 3 are added. That makes 5. The answer is five apples and no more.\n#### 5"
PLAIN = {"tokens": 0, "place": 0, "missed": False, "longer": 0}
MISSED = PLAIN | {"missed": True}


def hint(share: float, text: str = DEMO) -> str:
    return text[: int(share * len(text))]


# --- the prompt -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_the_hint_stands_in_the_last_message_of_a_user_and_the_plain_prompt_is_told(style):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How many are 1 and 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And 2 and 3?"},
    ]
    before = copy.deepcopy(messages)
    found = sample(settings(place="hint"), question(messages, target=DEMO), [0.5, 0], tokenizer=tiny(style))
    plain, hinted = found.asked[1].prompt, found.asked[0].prompt
    content = f"And 2 and 3?\n\n## Hint.{hint(0.5)}"
    assert text_of(hinted, style) == text_of(plain, style).replace("And 2 and 3?", content)
    told = {"prompt": plain, "longer": len(hinted) - len(plain), "hint": stable_hash(*hinted) % 2**31}
    assert found.told(0) == PLAIN | told and found.told(1) is None
    assert found.outputs[0].prompt_ids == hinted and found.outputs[1].prompt_ids == plain
    assert found.prompt["raw_prompt"] == messages == before, "the row is verl's"
    for session in (0, 1):
        assert found.outputs[session].response_ids == SAID and found.outputs[session].response_mask == [1] * 4
        assert found.asked[session].params == SHARED, "its own tokens are all that its response has"


@pytest.mark.parametrize(("share", "characters"), [(0.5, 42), (0.25, 21), (0.12, 10), (1.0, 84)])
def test_a_hint_is_a_share_of_the_text_by_characters(share, characters):
    assert len(DEMO) == 84
    found = sample(settings(place="hint"), question("Why?", target=DEMO), [share])
    assert f"Why?\n\n## Hint.{DEMO[:characters]}<|im_end|>" in text_of(found.asked[0].prompt)


def test_what_the_demonstration_thinks_aloud_is_no_hint():
    found = sample(settings(place="hint"), question("Why?", target=f"<think>\nhm\n</think>\n\n{DEMO}"), [0.5])
    assert f"## Hint.{hint(0.5)}<|im_end|>" in text_of(found.asked[0].prompt)


def test_a_template_of_the_settings_has_both_in_its_own_order_and_braces_in_them_are_left_alone():
    config = settings(r"++hpt.start.template='Hint: {hint}\nTask: {question}'", place="hint")
    target = "{question} is what {hint} says, and so it is 5."
    found = sample(config, question("What does {hint} say?", target=target), [0.5])
    assert f"user\nHint: {hint(0.5, target)}\nTask: What does {{hint}} say?<|im_end|>" in text_of(found.asked[0].prompt)


def test_sessions_with_different_shares_have_different_prompts_and_the_same_plain_one():
    found = sample(settings(place="hint"), question(target=DEMO), [0.25, 0.5, 0.5, 0])
    longer = [found.told(session)["longer"] for session in (0, 1, 2)]
    assert 0 < longer[0] < longer[1] == longer[2]
    assert all(found.told(session)["prompt"] == found.asked[3].prompt for session in (0, 1, 2))
    assert found.asked[1].prompt == found.asked[2].prompt != found.asked[0].prompt


# --- where none is given ----------------------------------------------------------------------------------------------


def test_a_prompt_that_would_be_too_long_starts_from_nothing_and_is_never_cut_from_the_left():
    row = question(target=DEMO)
    fits = sample(settings(place="hint"), row, [0.5, 0])
    longer, plain = len(fits.asked[0].prompt), fits.asked[1].prompt
    assert sample(settings(place="hint", prompt=longer), row, [0.5]).asked[0].prompt == fits.asked[0].prompt
    found = sample(settings(place="hint", prompt=longer - 1), row, [0.5])
    assert found.asked[0].prompt == found.outputs[0].prompt_ids == plain
    assert found.told(0) == MISSED


@pytest.mark.parametrize(
    ("share", "overrides", "told"),
    [(9.99 / 84, (), PLAIN), (0.2, ("++hpt.start.min_length=17",), PLAIN), (0.2, ("++hpt.start.min_length=16",), None)],
)
def test_a_hint_shorter_than_min_length_is_left_out_and_is_not_missed(share, overrides, told):
    found = sample(settings(*overrides, place="hint"), question(target=DEMO), [share, 0])
    assert (found.asked[0].prompt == found.asked[1].prompt) == (told is not None)
    assert told is None or found.told(0) == told


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": [{"type": "text", "text": "How many?"}]}],
        [{"role": "system", "content": "How many?"}],
        [{"role": "user", "content": "How"}, {"role": "user", "content": [{"type": "text", "text": "many?"}]}],
    ],
    ids=["parts", "no user", "parts at last"],
)
def test_a_prompt_without_a_users_text_starts_from_nothing(messages):
    tokenizer = copy.copy(tiny("qwen2.5"))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    found = sample(settings(place="hint"), question(messages, target=DEMO), [0.5, 0], tokenizer=tokenizer)
    assert found.asked[0].prompt == found.asked[1].prompt and found.told(0) == PLAIN


@pytest.mark.parametrize(
    "target",
    [None, [], " ", 7, "word " * 200, "a<|im_end|>b",
     [{"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"}, {"role": "assistant", "content": "c"}]],
    ids=["null", "none", "spaces", "a number", "too long", "EOS", "several turns"],
)  # fmt: skip
def test_without_a_text_that_is_usable_a_session_starts_from_nothing_and_is_missed(target):
    found = sample(settings(place="hint"), question(target=target), [0.5, 0])
    assert found.asked[0].prompt == found.asked[1].prompt and found.told(0) == MISSED


def test_cells_of_every_kind_end_no_session_with_a_hint_either():
    config, hinted = settings("++hpt.demo.select=random", place="hint"), 0
    for seed in range(100):
        found = sample(config, question(target=hostile(random.Random(seed))), [0.9, 0], step=seed)
        group, starts = at_the_door(config, found)
        given = "prompt" in found.told(0)
        assert (found.asked[0].prompt == found.asked[1].prompt) is not given
        assert list(group.prompt) == found.asked[1].prompt and bool(starts.starts[0]) is given
        hinted += given
    assert 5 < hinted < 95


# --- from verl's worker through its queue to the door -----------------------------------------------------------------


class Writing(Worker):
    """A worker that writes its rows to TransferQueue as verl's does; every answer scores 1."""

    async def _agent_loop_postprocess(self, output, validate, **kwargs):
        output.reward_score, self.outputs[kwargs["uid"], kwargs["session_id"]] = 1.0, output
        await super(Worker, self)._agent_loop_postprocess(output, validate, **kwargs)


def drawn(rows: list[dict], amounts: list[list[float]]) -> TensorDict:
    """A batch as the trainer hands it to the agent loops."""
    cells = packed([row | {"index": i, "uid": f"q{i}"} for i, row in enumerate(rows)], collate_fn)
    columns = cells | {"hpt_start": amounts, "agent_name": ["hpt_start"] * len(rows)}
    batch = TensorDict({}, batch_size=len(rows))
    for name, values in columns.items():
        batch[name] = NonTensorStack.from_list([NonTensorData(value) for value in values])
    batch["global_steps"] = NonTensorData(1)
    return batch


def at_the_trainers_door(method: str, rows: list[dict], amounts: list[list[float]], *overrides: str):
    """The rows' sessions by verl's ``generate_sequences``, then what our trainer reads of them from the queue."""
    overrides = (f"++hpt.method={method}", f"actor_rollout_ref.rollout.n={len(amounts[0])}", *overrides)
    start_loop._shared.clear()
    worker = Writing(settings(*overrides), tiny("qwen2.5"), Engine())

    async def run():
        await worker.generate_sequences(drawn(rows, amounts))
        await asyncio.gather(*worker.background_tasks)

    asyncio.run(run())
    assert not worker.failed
    there = {key: tag for key, tag in kv_list(PARTITION)[PARTITION].items() if "_" in key}
    keys, tags = list(there), list(there.values())
    old = [{"old_log_probs": np.full(tag["response_len"], -1.0)} for tag in tags]
    kv_batch_put(keys, PARTITION, fields=list_of_dict_to_tensordict(old), tags=tags)
    trainer = make_trainer(*overrides, folder=HERE, tokenizer=tiny("qwen2.5"))
    batch = KVBatchMeta(partition_id=PARTITION, keys=keys, tags=tags)
    return worker, trainer._plan_step(batch, trainer.hpt.plan_settings(1, 1))


@pytest.mark.usefixtures("queue")
def test_prefixes_reach_the_trainer_with_their_tokens_and_their_continuations_alone_count_as_own():
    rows = [question(target=DEMO), question("And 4?", target=[None, DEMO]), question("And 5?", target=None)]
    worker, step = at_the_trainers_door("prefix_rft", rows, [[0.5, 0, 0.5], [0.9, 0, 0], [0.5, 0, 0]])
    tokens = len(ids_of(DEMO))
    found = {group.uid: question for group, question in zip(step.groups, step.questions, strict=True)}
    half, most = tokens // 2, int(0.9 * tokens)
    assert {uid: one.prefixes.tolist() for uid, one in found.items()} == {
        "q0": [half, 0, half], "q1": [most, 0, 0], "q2": [0, 0, 0],
    }  # fmt: skip
    assert all(one.lengths.tolist() == [len(SAID)] * 3 for one in found.values())
    assert found["q0"].starts[0] == found["q0"].starts[2] != 0 and found["q1"].starts[0] != found["q0"].starts[0]
    assert step.counts["start/missed"] == step.counts["unusable/null"] == 1
    for group in step.groups:
        first = worker.outputs[group.uid, 0]
        assert list(group.prompt) == first.prompt_ids
        assert step.scored.lengths[group.rows[0]] == len(first.response_ids)


@pytest.mark.usefixtures("queue")
def test_hinted_rollouts_are_trained_on_the_plain_prompt_where_the_method_rescores_them():
    rows = [question(target=DEMO), question("And 4?", target=None)]
    worker, step = at_the_trainers_door("guide", rows, [[1.0, 0], [1.0, 0]], "++hpt.start.rollouts=1")
    found = {group.uid: (group, question) for group, question in zip(step.groups, step.questions, strict=True)}
    group, hinted = found["q0"]
    plain = worker.outputs["q0", 1].prompt_ids
    assert list(group.prompt) == plain and len(worker.outputs["q0", 0].prompt_ids) > len(plain)
    assert hinted.prefixes.tolist() == [0, 0] and (hinted.starts > 0).tolist() == [True, False]
    assert found["q1"][1].starts.tolist() == [0, 0] and step.counts["start/missed"] == 1
    (row,) = step.rescored.values()
    assert list(row.prompt) == plain and row.answer == SAID and row.old_log_probs == [-1.0] * 4
