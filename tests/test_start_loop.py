"""Rollouts that continue the first tokens of a demonstration: from the plugin's hook to what the agent loop returns."""

import json
import math
import os
import random
import subprocess
import sys
from fractions import Fraction
from importlib.metadata import entry_points
from pathlib import Path

import hydra
import pytest
from sessions import SAID, SHARED, Engine, at_the_door, hostile, ids_of, question, sample, settings
from tiny_tokenizers import STYLES, tiny
from verl.experimental.agent_loop.agent_loop import DictConfigWrap, _agent_loop_registry
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.utils.dataset.rl_dataset import RLHFDataset

from verl_hpt.demos.encode import encode

DEMO = "First 2 and 3 are added. That makes 5. The answer is five apples and no more.\n#### 5"
TOKENS = len(ids_of(DEMO))
TOOLS = [
    {"role": "assistant", "content": "I ask the tool what 2 and 3 are together."},
    {"role": "tool", "content": "They are 5."},
    {"role": "assistant", "content": "So the answer is 5."},
]
LIMIT = 64


def length_of(share: str, tokens: int = TOKENS) -> int:
    """⌊share · tokens⌋ in exact numbers; one token at least is left to the rollout."""
    return min(math.floor(Fraction(share) * tokens), tokens - 1)


# --- by verl's registry -----------------------------------------------------------------------------------------------


def test_the_plugin_offers_the_loop_by_name_and_hydra_makes_it_over_verls_own():
    assert [one.value for one in entry_points(group="verl.plugins") if one.name == "hpt"] == ["verl_hpt.plugin"]
    assert _agent_loop_registry["hpt_start"] == {"_target_": "verl_hpt.host.start_loop.StartedAgentLoop"}
    config = settings()
    loop = hydra.utils.instantiate(
        _agent_loop_registry["hpt_start"],
        trainer_config=DictConfigWrap(config), server_manager=Engine(), tokenizer=tiny("qwen2.5"), processor=None,
        dataset_cls=RLHFDataset, data_config=DictConfigWrap(config.data), hf_model_type="qwen2",
    )  # fmt: skip
    assert isinstance(loop, SingleTurnAgentLoop) and type(loop).__name__ == "StartedAgentLoop"


PROBE = """
import json, sys
import verl, verl_hpt
from verl.experimental.agent_loop.agent_loop import _agent_loop_registry as loops
import verl.experimental.agent_loop.single_turn_agent_loop
print(json.dumps([loops, [name for name in sys.modules if name.startswith("verl_hpt.")]]))
"""


def test_a_stock_runs_loops_are_verls_own_and_none_of_ours_is_imported():
    def found(**environment):
        env = {name: value for name, value in os.environ.items() if not name.startswith("VERL_")} | environment
        env["PYTHONPATH"] = str(Path(__file__).parents[1])
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROBE], env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    (ours, modules), (stock, none) = found(), found(VERL_USE_EXTERNAL_PLUGINS="none")
    assert ours.pop("hpt_start") and ours == stock and "single_turn_agent" in stock
    assert "verl_hpt.plugin" in modules and none == []
    of_host = {name for name in modules if name.startswith("verl_hpt.host.")}
    assert of_host <= {"verl_hpt.host.advantage"}, "the estimator, by a hook of its own"


def test_a_question_of_verls_own_loop_is_asked_for_as_ever():
    found = sample(settings(), question(target=DEMO), [0.6, 0.6], agent="single_turn_agent")
    for session in (0, 1):
        assert found.asked[session].params == SHARED and found.told(session) is None
        assert found.outputs[session].response_ids == SAID
        assert found.outputs[session].prompt_ids == found.asked[session].prompt


# --- what the engine gets, and what comes back ------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("share", ["0.05", "0.3", "0.6", "0.95", "1.0"])
def test_the_engine_gets_the_prompt_and_exactly_the_first_tokens_of_the_demonstration(share, style):
    demo = ids_of(DEMO, style)
    found = sample(settings(), question(target=DEMO), [float(share), 0], tokenizer=tiny(style))
    length = length_of(share, len(demo))
    assert found.asked[0].prompt == found.asked[1].prompt + demo[:length] and length > 0
    assert found.asked[0].params == {**SHARED, "max_tokens": LIMIT - length}
    assert found.outputs[0].prompt_ids == found.asked[1].prompt == found.outputs[1].prompt_ids


def test_what_comes_back_is_prefix_and_continuation_with_mask_and_log_probs_aligned():
    output = sample(settings(), question(target=DEMO), [0.6]).outputs[0]
    length = length_of("0.6")
    assert output.response_ids == ids_of(DEMO)[:length] + SAID
    assert output.response_mask == [0] * length + [1] * len(SAID)
    assert output.response_logprobs == [0.0] * length + [-0.5, -0.625, -0.75, -0.875]
    assert output.extra_fields == {
        "hpt_started": {"tokens": length, "place": 0, "missed": False, "longer": 0},
        "min_global_steps": 3, "turn_scores": [], "tool_rewards": [],
    }  # fmt: skip
    fields = output.as_dict()  # as verl writes them to its queue
    assert [len(fields[name]) for name in ("responses", "response_mask", "rollout_log_probs")] == [length + 4] * 3


def test_verls_one_dict_of_parameters_for_all_sessions_is_not_written_into():
    found = sample(settings(), question(target=DEMO), [0.6, 0, 0.3, 0])
    assert [session for session in range(4) if "max_tokens" in found.asked[session].params] == [0, 2]
    assert found.asked[1].given is found.asked[3].given and found.asked[1].given == SHARED
    assert found.asked[0].given is not found.asked[2].given
    for session in (1, 3):
        assert found.told(session) is None and found.outputs[session].response_mask == [1] * len(SAID)


def test_a_session_beyond_the_shares_starts_from_nothing_and_so_do_all_without_the_column():
    found = sample(settings(), question(target=DEMO), [0.6], sessions=3)
    assert found.told(0)["tokens"] == length_of("0.6") and found.told(1) is None and found.told(2) is None
    none = sample(settings(), question(target=DEMO), None, sessions=2)
    for session in (0, 1):
        assert none.told(session) is None and none.asked[session].params == SHARED


def test_a_response_has_no_more_tokens_than_it_may_have():
    engine = Engine(said=range(100, 300))
    for limit in (32, 33, 64):  # the demonstration has 31 tokens and EOS
        output = sample(settings(limit=limit), question(target=DEMO), [1.0], engine=engine).outputs[0]
        assert len(output.response_ids) == len(output.response_mask) == len(output.response_logprobs) == limit
        assert sum(output.response_mask) == limit - (TOKENS - 1)


def test_a_response_length_of_verls_that_is_shorter_than_the_datas_bounds_the_prefix():
    """verl cuts the response at rollout.response_length; the mask was longer than it."""
    config = settings("actor_rollout_ref.rollout.response_length=8")
    found = sample(config, question(target=DEMO), [0.95], engine=Engine(said=range(100, 300)))
    assert found.told(0)["tokens"] == 7 and found.asked[0].params["max_tokens"] == 1
    assert found.outputs[0].response_mask == [0] * 7 + [1] and len(found.outputs[0].response_ids) == 8


@pytest.mark.parametrize("end", ["", "<|im_end|>", "<|im_end|>\n"])
@pytest.mark.parametrize("amount", [0.9999, 1.0])
def test_the_end_token_and_the_token_before_it_are_left_to_the_rollout(end, amount):
    found = sample(settings(), question(target=DEMO + end), [amount])
    assert found.told(0)["tokens"] == TOKENS - 1
    assert tiny("qwen2.5").eos_token_id not in found.outputs[0].response_ids


def test_a_demonstration_of_one_token_or_a_share_below_a_token_starts_nothing_and_is_not_missed():
    for target, amount in (("5", 1.0), (DEMO, 1 / TOKENS - 1e-6)):
        found = sample(settings(), question(target=target), [amount, 0])
        assert found.told(0) == {"tokens": 0, "place": 0, "missed": False, "longer": 0}
        assert found.asked[0].prompt == found.asked[1].prompt and found.asked[0].params == SHARED
        assert found.outputs[0].response_ids == SAID and found.outputs[0].response_mask == [1] * len(SAID)


def test_min_length_is_of_tokens():
    config = settings("++hpt.start.min_length=10")
    found = sample(config, question(target=DEMO), [9.99 / TOKENS, 10 / TOKENS])
    assert [found.told(session)["tokens"] for session in (0, 1)] == [0, 10]


@pytest.mark.parametrize(
    ("engine", "mask", "log_probs"),
    [(Engine(log_probs=False), [1] * 4, None), (Engine(said=[]), [], []), (Engine(said=[], log_probs=False), [], None)],
    ids=["no log-probs", "nothing said", "neither"],
)
def test_an_engine_without_log_probs_or_without_an_answer(engine, mask, log_probs):
    output = sample(settings(), question(target=DEMO), [0.5], engine=engine).outputs[0]
    length = length_of("0.5")
    assert output.response_mask == [0] * length + mask and len(output.response_ids) == length + len(mask)
    assert output.response_logprobs == (None if log_probs is None else [0.0] * length + log_probs)


# --- which demonstration, and how much of it --------------------------------------------------------------------------


def test_a_demonstration_of_several_turns_gives_only_what_the_assistant_says_first():
    tokenizer = tiny("qwen2.5")
    whole = encode(TOOLS, tokenizer, tokenizer.eos_token_id, prompt_messages=question()["raw_prompt"])
    first = whole.mask.index(0) - 1  # without its EOS
    assert whole.ids[:first] == ids_of(TOOLS[0]["content"]) and first < len(whole.ids) / 2
    found = sample(settings(limit=128), question(target=TOOLS), [0.5, 1.0])
    assert [found.told(session)["tokens"] for session in (0, 1)] == [first // 2, first - 1]
    for session in (0, 1):
        length = found.told(session)["tokens"]
        assert found.outputs[session].response_ids == whole.ids[:length] + SAID


BAD = {
    "null": None, "none": [], "empty": "", "spaces": " \n", "a number": 7, "NaN": float("nan"), "EOS": "a<|im_end|>b",
    "too long": "word " * 200, "roles": [{"role": "user", "content": "a"}], "a surrogate": "a\ud800b",
}  # fmt: skip


@pytest.mark.parametrize("target", BAD.values(), ids=BAD.keys())
def test_without_a_usable_demonstration_a_session_starts_from_nothing_and_is_missed(target):
    found = sample(settings(), question(target=target), [0.6, 0])
    assert found.told(0) == {"tokens": 0, "place": 0, "missed": True, "longer": 0} and found.told(1) is None
    assert found.asked[0].prompt == found.asked[1].prompt and found.asked[0].params == SHARED
    assert found.outputs[0].response_mask == [1] * len(SAID) and found.outputs[0].response_ids == SAID


def test_a_row_without_the_column_is_missed_and_an_error_is_the_trainers_to_raise(caplog):
    for overrides in ((), ("++hpt.demo.on_unusable=error",)):
        found = sample(settings(*overrides), question(), [0.6])
        assert found.told(0)["missed"] and found.outputs[0].response_ids == SAID
    assert not [record for record in caplog.records if record.name.startswith("verl_hpt")]


def test_cells_of_every_kind_end_no_session_and_the_trainer_agrees_on_what_they_hold():
    config, begun = settings("++hpt.demo.select=random"), 0
    for seed in range(150):
        found = sample(config, question(target=hostile(random.Random(seed))), [0.6, 0], step=seed)
        _, starts = at_the_door(config, found)
        length = found.told(0)["tokens"]
        assert found.asked[0].prompt == found.asked[1].prompt + found.outputs[0].response_ids[:length]
        assert starts.counts["start/missed"] == found.told(0)["missed"] == (starts.counts["unusable"] == 1)
        begun += length > 0
    assert 10 < begun < 140


def test_a_list_of_shares_starts_each_session_from_its_own():
    shares = [0.0, 0.25, 0.5, 0.75]
    config = settings("++hpt.method=stephint", f"++hpt.start.share={shares}")
    found = sample(config, question(target=DEMO), shares)
    assert [found.outputs[session].response_mask.count(0) for session in range(4)] == [
        length_of(share) for share in ("0", "0.25", "0.5", "0.75")
    ]


def test_an_adapted_start_is_a_number_of_tokens():
    found = sample(settings("++hpt.method=g2rpo_a"), question(target=DEMO), [7.9, 3072, 1, 0])
    assert [found.outputs[session].response_mask.count(0) for session in range(4)] == [7, TOKENS - 1, 1, 0]


def test_all_sessions_of_a_question_and_step_start_from_the_same_demonstration():
    texts = [f"{word}, then 2 and 3 are added, and so it is 5." for word in ("One", "Two", "Three", "Four")]
    config, places = settings("++hpt.demo.select=random", "++hpt.seed=3"), []
    for step in range(1, 30):
        found = sample(config, question(target=texts), [0.3, 0.6, 0.9], step=step)
        shown = {found.told(session)["place"] for session in range(3)}
        assert len(shown) == 1
        places.append(*shown)
        for session in range(3):
            tokens = found.told(session)["tokens"]
            assert found.outputs[session].response_ids[:tokens] == ids_of(texts[places[-1]])[:tokens]
    assert set(places) == {0, 1, 2, 3}
    again = sample(config, question(target=texts), [0.3], step=7)
    assert again.told(0)["place"] == places[6]
    other = [sample(settings("++hpt.demo.select=random", "++hpt.seed=4"), question(target=texts), [0.3], step=step)
             for step in range(1, 30)]  # fmt: skip
    assert [one.told(0)["place"] for one in other] != places


def test_the_rule_of_the_settings_chooses_and_unusable_ones_leave_the_choice():
    texts = [None, DEMO, "2 and 3 are 5.", "word " * 200]
    for rule, place in (("first", 1), ("shortest", 2)):
        found = sample(settings(f"++hpt.demo.select={rule}"), question(target=texts), [0.5])
        assert found.told(0)["place"] == place
        assert found.outputs[0].response_ids[:2] == ids_of(texts[place])[:2]


def test_uneven_lists_that_pass_verls_loop_as_one_text_are_opened():
    """Two demonstrations, one of them of several turns, and columns with a number a token of each."""
    second = [{"role": "assistant", "content": DEMO}]
    config = settings("++hpt.demo.reward=score", "++hpt.demo.token_weights=weights", limit=128)
    tokenizer = tiny("qwen2.5")
    first = encode(TOOLS, tokenizer, tokenizer.eos_token_id, prompt_messages=question()["raw_prompt"])
    weights = [[1.0] * len(first.ids), [1.0] * (TOKENS + 1)]
    row = question(target=[TOOLS, second], score=[0.5, 1.0], weights=weights)
    found = sample(config, row, [0.5])
    assert isinstance(found.prompt["weights"], str) and found.told(0)["tokens"] == (first.mask.index(0) - 1) // 2
    del row["score"][1]
    assert sample(config, row, [0.5]).told(0)["missed"], "a score less than demonstrations"


def test_a_prompt_that_opens_a_reasoning_block_has_none_in_the_prefix():
    tokenizer, text = tiny("qwen3"), "<think>\nFirst 2 and 3 are added.\n</think>\nIt is 5."
    config = settings("++data.apply_chat_template_kwargs={open_thinking: true}")
    found = sample(config, question(target=text), [0.8], tokenizer=tokenizer)
    tokens = found.told(0)["tokens"]
    assert tokenizer.decode(found.outputs[0].prompt_ids).endswith("<think>\n") and tokens > 5
    assert tokenizer.decode(found.outputs[0].response_ids[:tokens]).startswith("First 2 and 3")
