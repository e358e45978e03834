"""Refusals of prefixes, hints, streams and buffers: each is said with the key, and what it says to set works."""

import dataclasses

import pytest
from verl_config import ACTOR, refused, start

from verl_hpt import parts
from verl_hpt.config import parse
from verl_hpt.estimator import Estimator, Method, Term
from verl_hpt.methods import METHODS
from verl_hpt.places.starts import Start

ROLL = "actor_rollout_ref.rollout"
FILES = "++hpt.stream.files=experts.parquet"
PLACED = {"prefix_rft": [f"{ROLL}.n=8"], "questa": [], "chord_mu": [FILES], "relift": []}  # one of each place


def of(method: str, *overrides: str) -> list[str]:
    return [f"++hpt.method={method}", *PLACED.get(method, []), *overrides]


def composed(text: str, *overrides: str) -> list[str]:
    return [f"++hpt.compose={{{text}}}", *overrides]


# --- methods and settings that do not fit -----------------------------------------------------------------------------

SUCCESSES = "++hpt.buffer.content=successes"
PREFERENCE = "demos: [{kind: S, estimator: {advantage: preference}}], place: buffer"
TEACHER = "demos: [{kind: S, estimator: {reference: teacher, advantage: unit}}], place: buffer"
AS_DEMONSTRATIONS = ["++hpt.buffer.content=demonstrations"]
LEVELS = "[0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]"


@pytest.mark.parametrize(
    ("overrides", "message", "remedies"),
    [
        ([FILES], "hpt.stream is set, but method hpt has no stream; drop it, or choose chord_mu, chord_phi",
         [of("chord_mu"), of("chord_phi"), ["++hpt.stream.files=null"]]),
        (["++hpt.stream.batch=7"], "hpt.stream is set, but method hpt has no stream", [of("chord_mu")]),
        (["++hpt.buffer.size=7"], "hpt.buffer is set, but method hpt has no buffer; drop it, or choose relift",
         [of("relift"), ["++hpt.buffer.size=128"]]),
        (["++hpt.method=chord_phi"],
         "method chord_phi needs demonstrations beside the questions; set hpt.stream.files to parquet files in the "
         "form of the training data's", [[FILES], ["++hpt.stream.files=[a.parquet, b.parquet]"]]),
        (of("chord_mu", "++hpt.stream.files=[]"), "set hpt.stream.files to parquet files", [[FILES]]),
        (of("chord_mu", "++hpt.demo_coef=1.25"),
         "hpt.demo_coef=1.25: method chord_mu weighs rollouts with 1 − λ, so λ must lie between 0 and 1",
         [["++hpt.demo_coef=1.0"], ["++hpt.demo_coef=0"]]),
        (of("chord_mu", "++hpt.demo_coef={start: 0.5, end: 1.5, steps: 9}"), "so λ must lie between 0 and 1",
         [["++hpt.demo_coef.end=1.0"]]),
        (of("chord_mu", "++hpt.demo_coef={start: 0.5, target: 0.3, high: 1.5}"), "so λ must lie between 0 and 1",
         [["++hpt.demo_coef.high=1.0"]]),
        (of("relift", f"{ACTOR}.ppo_epochs=2"),
         f"{ACTOR}.ppo_epochs=2: method relift would train its buffer so often too; set it to 1",
         [[f"{ACTOR}.ppo_epochs=1"]]),
        (composed(PREFERENCE, "++hpt.demo.other_log_prob=o", SUCCESSES),
         "hpt.buffer.content=successes: method composed needs log-probs of other models, which own rollouts do not "
         "have", [AS_DEMONSTRATIONS]),
        (composed(TEACHER, "++hpt.demo.teacher_log_prob=t", SUCCESSES),
         "hpt.buffer.content=successes: method composed needs log-probs of a teacher, which own rollouts do not have",
         [AS_DEMONSTRATIONS]),
        (of("relift", SUCCESSES, "++hpt.gate.threshold=0.5"),
         "hpt.gate is set, but with hpt.buffer.content=successes method relift collects of every question that is "
         "partly solved; drop it", [["++hpt.gate.threshold=0.0"], AS_DEMONSTRATIONS]),
        (of("relift", SUCCESSES, "++hpt.gate.count=2"), "hpt.gate is set, but with hpt.buffer.content=successes",
         [["++hpt.gate.count=null"]]),
        (["++hpt.start.share=0.5"],
         "hpt.start is set, but method hpt starts no rollout from a demonstration; drop it, or choose prefix_rft",
         [of("prefix_rft"), ["++hpt.start=null"]]),
        (["++hpt.start={}"], "hpt.start is set, but method hpt starts no rollout", [["++hpt.start=null"]]),
        (composed("rollouts: grpo, place: prefix, when: never"),
         "hpt.start.share=null: method composed has none of its own; set how much of a demonstration rollouts start "
         "from", [["++hpt.start.share=0.5"]]),
        (["++hpt.method=stephint", f"{ROLL}.n=9"],
         f"hpt.start.share={LEVELS}: must have a number for each rollout, {ROLL}.n=9; it has 8", [[f"{ROLL}.n=8"]]),
        (["++hpt.method=stephint", f"{ROLL}.n=8", "++hpt.start.rollouts=2"],
         "hpt.start.rollouts=2 has no effect: hpt.start.share has a number for each rollout; drop it",
         [["++hpt.start.rollouts=null"], ["++hpt.start.share=0.5"]]),
        (of("questa", f"{ROLL}.agent.default_agent_loop=tool_agent"),
         f"{ROLL}.agent.default_agent_loop=tool_agent: method questa brings an agent loop of its own, of one turn; set "
         "it to single_turn_agent", [[f"{ROLL}.agent.default_agent_loop=single_turn_agent"]]),
        (of("prefix_rft", f"{ROLL}.name=trtllm"),
         f"{ROLL}.name=trtllm does not read how many tokens a rollout has left, and method prefix_rft needs it; set "
         "vllm or sglang", [[f"{ROLL}.name=vllm"], [f"{ROLL}.name=sglang"]]),
        (of("prefix_rft", "++hpt.start.rollouts=8"),
         f"hpt.start.rollouts=8: method prefix_rft compares started rollouts with others, and of {ROLL}.n=8 none is "
         "left; set fewer", [["++hpt.start.rollouts=7"]]),
        (of("prefix_rft", "++hpt.start.rollouts=all"), "hpt.start.rollouts=all: method prefix_rft compares started",
         [["++hpt.start.rollouts=1"]]),
        (of("prefix_rft", f"++hpt.start.share=[{', '.join(['0.5'] * 8)}]"), "and of actor_rollout_ref.rollout.n=8 none",
         [[f"++hpt.start.share=[0, {', '.join(['0.5'] * 7)}]"]]),
        (["++hpt.method=pope", f"{ROLL}.n=3"], f"hpt.start.rollouts=4: {ROLL}.n is 3; set fewer",
         [["++hpt.start.rollouts=3"], ["++hpt.start={rollouts: all, after_failures: 0}"]]),
        (["++hpt.method=g2rpo_a", f"{ROLL}.n=4", "++hpt.start.rollouts=all"],
         "hpt.start.rollouts=all: the length of method g2rpo_a follows the solve rate of rollouts that start from "
         "nothing; set fewer", [["++hpt.start.rollouts=3"]]),
        (of("questa", "++hpt.start.after_failures=2"),
         "hpt.start.after_failures=2 with hpt.start.rollouts=all: no rollout would say when the question is solved "
         "without help; leave one out", [["++hpt.start.rollouts=3", f"{ROLL}.n=4"]]),
        (of("prefix_rft", "++hpt.start.template='{question}{hint}'"),
         "hpt.start.template is set, but method prefix_rft gives no hint in the prompt; drop it",
         [["++hpt.start.template=null"]]),
        (of("questa", "++hpt.start.share={tokens: 5}"),
         "a hint is a share of a text, not a number of tokens; set a number", [["++hpt.start.share=0.5"]]),
        (of("prefix_rft", "algorithm.use_kl_in_reward=True"),
         "method prefix_rft rewards tokens of prefixes, and algorithm.use_kl_in_reward=True has their KL left out; set "
         "it to False", [["algorithm.use_kl_in_reward=False"]]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_what_is_said_to_set_works(overrides, message, remedies):
    assert message in refused(*overrides)
    for remedy in remedies:
        start(*overrides, *remedy)


@pytest.mark.parametrize("method", PLACED)
@pytest.mark.parametrize(
    ("setting", "message", "remedy"),
    [
        ("history.retire_after=3", "hpt.history.retire_after=3 has no effect: {}; drop it",
         "history.retire_after=null"),
        ("history.cooldown=2", "hpt.history.cooldown=2 has no effect: {}", "history.cooldown=0"),
        ("demo.select=round_robin",
         "hpt.demo.select=round_robin counts uses, and {}, which has none; set first, random or shortest",
         "demo.select=first"),
        ("demo.select=unseen_first", "hpt.demo.select=unseen_first counts uses, and {}, which has none",
         "demo.select=random"),
        ("demo.select=unseen_first", "set first, random or shortest", "demo.select=shortest"),
        ("demo={select: likelihood, likelihood_of: policy}",
         "hpt.demo.likelihood_of=policy takes a pass in the update, and {}; use a column",
         "demo={select: likelihood, log_likelihood: l}"),
        ("demo.per_question=2", "hpt.demo.per_question=2: {}, one a question; set it to 1", "demo.per_question=1"),
    ],
)  # fmt: skip
def test_what_asks_for_demonstrations_beside_their_rollouts_is_refused_elsewhere(method, setting, message, remedy):
    where = f"method {method} has its demonstrations elsewhere (place: {METHODS[method].place})"
    assert message.format(where) in refused(*of(method, f"++hpt.{setting}"))
    start(*of(method, f"++hpt.{remedy}"))
    if "per_question" in setting or "retire" in setting:
        start(f"++hpt.{setting}")


@pytest.mark.parametrize(("method", "fine"), [("uft", True), ("stephint", True), ("g2rpo_a", False)])
def test_a_penalty_of_the_kl_is_refused_where_a_prefix_is_reinforced(method, fine):
    overrides = [f"++hpt.method={method}", f"{ROLL}.n=8", "algorithm.use_kl_in_reward=True"]
    if fine:
        start(*overrides)
    else:
        assert "algorithm.use_kl_in_reward=True has their KL left out" in refused(*overrides)


def test_a_critic_that_valued_a_rollout_with_its_hint_is_refused_for_the_prompt_without_it(monkeypatch):
    guided = dataclasses.replace(METHODS["guide"], name="valued", rollouts=METHODS["ppo"].rollouts)
    monkeypatch.setitem(METHODS, "valued", guided)
    text = refused("++hpt.method=valued", f"{ROLL}.n=8", critic=True)
    assert text == "method valued trains rollouts on another prompt than they had, and a critic valued them with it"
    monkeypatch.setitem(METHODS, "valued", dataclasses.replace(guided, rescored=False))
    start("++hpt.method=valued", f"{ROLL}.n=8", critic=True)


def test_all_problems_of_a_place_come_at_once():
    wrong = ["++hpt.start.rollouts=8", f"{ROLL}.name=trtllm", "algorithm.use_kl_in_reward=True", FILES,
             f"{ROLL}.agent.default_agent_loop=tool_agent", "++hpt.demo.per_question=2", f"{ACTOR}.shuffle=True",
             "++hpt.start.template='{hint}{question}'", "++hpt.buffer.size=2"]  # fmt: skip
    text = refused(*of("prefix_rft", *wrong))
    assert text.startswith("verl-hpt refuses this config:\n  - ") and text.count("\n  - ") == len(wrong)
    text = refused(*of("relift", "++hpt.start.share=2", "++hpt.stream.batch=0", f"{ACTOR}.shuffle=True"))
    for problem in ("hpt.start.share=2.0: must lie", "hpt.stream.batch=0: must be", "actor.shuffle=True"):
        assert problem in text
    assert text.count("\n  - ") == 3


# --- settings by themselves -------------------------------------------------------------------------------------------

SHARE = "must be a number or a schedule {start, end, steps, shape, warmup}, at least 0 and at most 1"


@pytest.mark.parametrize(
    ("node", "problem", "mended"),
    [
        ({"start": {"share": 1.5}}, "hpt.start.share=1.5: must lie between 0 and 1", {"share": 1.0}),
        ({"start": {"share": -0.1}}, "hpt.start.share=-0.1: must lie between 0 and 1", {"share": 0.0}),
        ({"start": {"share": [0.5, 2.0]}}, "hpt.start.share=[0.5, 2.0]: must lie between 0 and 1", {"share": [0.5, 1]}),
        ({"start": {"share": [0, 0]}}, "hpt.start.share=[0.0, 0.0]: one must be above 0", {"share": [0, 0.1]}),
        ({"start": {"share": {"low": 0.9, "high": 0.5}}},
         "hpt.start.share.low=0.9: must not lie above high, which is 0.5 at step 0",
         {"share": {"low": 0.5, "high": 0.5}}),
        ({"start": {"share": {"low": {"start": 0.2, "end": 0.8, "steps": 10}, "high": 0.5}}},
         "hpt.start.share.low=0.56: must not lie above high, which is 0.5 at step 6",
         {"share": {"low": {"start": 0.2, "end": 0.5, "steps": 10}, "high": 0.5}}),
        ({"start": {"share": {"low": -0.1, "high": 0.5}}}, f"hpt.start.share.low=-0.1: {SHARE}: smallest share",
         {"share": {"low": 0, "high": 0.5}}),
        ({"start": {"share": {"low": 0.1}}}, "hpt.start.share: needs high; got low",
         {"share": {"low": 0.1, "high": 1}}),
        ({"start": {"share": {"chunks": 0, "p": 0.5}}}, "hpt.start.share.chunks=0: must be a whole number at least 1: ",
         {"share": {"chunks": 1, "p": 0.5}}),
        ({"start": {"share": {"chunks": 5, "p": 2}}}, f"hpt.start.share.p=2: {SHARE}: the probability",
         {"share": {"chunks": 5, "p": 1}}),
        ({"start": {"share": {"tokens": 0}}}, "hpt.start.share.tokens=0: must be a whole number at least 1: ",
         {"share": {"tokens": 1}}),
        ({"start": {"share": {"tokens": 5, "every": 1}}},
         "hpt.start.share.every=1: must be a whole number at least 2: ", {"share": {"tokens": 5, "every": 2}}),
        ({"start": {"share": "half"}}, "hpt.start.share='half': must be null or a number or a schedule {start, end, "
         "steps, shape, warmup} or a uniform {low, high} or a chunks {chunks, p} or an adapted {tokens, every} or a "
         "list, got str", {"share": 0.5}),
        ({"start": {"rollouts": 0}}, "hpt.start.rollouts=0: must be null or a whole number at least 1 or 'all'",
         {"rollouts": 1}),
        ({"start": {"rollouts": "some"}}, "hpt.start.rollouts='some': must be null or a whole number at least 1 or "
         "'all'", {"rollouts": "all"}),
        ({"start": {"until": -1}}, "hpt.start.until=-1: must be null or a whole number at least 0: ", {"until": 0}),
        ({"start": {"after_failures": -1}}, "hpt.start.after_failures=-1: must be null or a whole number at least 0: ",
         {"after_failures": 0}),
        ({"start": {"min_length": 0}}, "hpt.start.min_length=0: must be null or a whole number at least 1: ",
         {"min_length": 1}),
        ({"start": {"template": "{question}"}}, "hpt.start.template='{question}': must have {hint} in it, once",
         {"template": "{question}{hint}"}),
        ({"start": {"template": "{question} {question} {hint}"}},
         "hpt.start.template='{question} {question} {hint}': must have {question} in it, once",
         {"template": "{question} {hint}"}),
        ({"start": {"sare": 0.5}}, "hpt.start.sare: unknown key (value 0.5); one of share, rollouts, until, "
         "after_failures, min_length, template; did you mean share?", {"share": 0.5}),
        ({"start": 5}, "hpt.start=5: must be null or a mapping with keys share, rollouts, until, after_failures, "
         "min_length, template, got int", {}),
        ({"stream": {"batch": 0}}, "hpt.stream.batch=0: must be a whole number at least 1: demonstrations a step",
         {"batch": 1}),
        ({"stream": {"files": 5}}, "hpt.stream.files=5: must be null or text or a list, got int", {"files": ["5"]}),
        ({"stream": {"files": ""}}, "hpt.stream.files='': must be null or text or a list, and not empty",
         {"files": "x"}),
        ({"stream": {"file": "x"}},
         "hpt.stream.file: unknown key (value 'x'); one of files, batch; did you mean files?", {"files": "x"}),
        ({"buffer": {"size": 0}}, "hpt.buffer.size=0: must be a whole number at least 1: ", {"size": 1}),
        ({"buffer": {"content": "failures"}}, "hpt.buffer.content='failures': must be one of demonstrations, successes",
         {"content": "successes"}),
        ({"buffer": {"sise": 4}}, "hpt.buffer.sise: unknown key (value 4); one of size, content; did you mean size?",
         {"size": 4}),
        ({"demo_coef": -1},
         "hpt.demo_coef=-1: must be null or a number or a schedule {start, end, steps, shape, warmup} or a steered "
         "{start, target, rate, low, high}, at least 0: ", 0),
        ({"demo_coef": {"start": 0.5}}, "hpt.demo_coef: needs target; got start", {"start": 0.5, "target": 0.3}),
        ({"demo_coef": {"start": 0.5, "target": -1}}, "hpt.demo_coef.target=-1: must be a number at least 0: ",
         {"start": 0.5, "target": 0}),
        ({"demo_coef": {"start": 0.99, "target": 0.3}},
         "hpt.demo_coef.start=0.99: must lie between low (0.05) and high (0.95)",
         {"start": 0.99, "target": 0.3, "high": 0.99}),
        ({"demo_coef": {"start": 0.5, "target": 0.3, "rate": 0}}, "hpt.demo_coef.rate=0: must be a number above 0: ",
         {"start": 0.5, "target": 0.3, "rate": 0.1}),
        ({"demo_coef": {"start": 0.5, "target": 0.3, "low": -0.5}},
         "hpt.demo_coef.low=-0.5: must be a number at least 0: ", {"start": 0.5, "target": 0.3, "low": 0}),
        ({"demo_coef": {"start": 0.5, "target": 0.3, "hihg": 0.6}},
         "hpt.demo_coef.hihg: unknown key (value 0.6); one of "
         "start, target, rate, low, high; did you mean high?", {"start": 0.5, "target": 0.3, "high": 0.6}),
        ({"demo_coef": {"start": 0.5, "end": -0.1, "steps": 3}},
         "hpt.demo_coef={'start': 0.5, 'end': -0.1, 'steps': 3}: must be null or a number or",
         {"start": 0.5, "end": 0, "steps": 3}),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_named_with_what_it_must_be(node, problem, mended):
    settings, problems = parse(node)
    assert settings is None and len(problems) == 1 and problems[0].startswith(problem)
    (name,) = node
    assert parse({name: mended})[1] == []


# --- methods that cannot be -------------------------------------------------------------------------------------------

S, R = "demos: [{kind: S}]", "demos: [{kind: R}]"
AGAINST = "estimator: {advantage: against_plain}"
START = "++hpt.start={share: 0.5, rollouts: 1}"


@pytest.mark.parametrize(
    ("text", "place", "message", "mended"),
    [
        (f"rollouts: null, {S}, place: stream, when: always", "stream",
         "its demonstrations stand with rollouts, and it has nothing for those", [f"{S}, place: stream, when: always"]),
        ("rollouts: {advantage: against_plain}, when: never", "separate",
         "against_plain is the advantage of a prefix's R term alone", ["rollouts: {advantage: centered}, when: never"]),
        (f"demos: [{{kind: R, {AGAINST}}}], when: always", "separate",
         "against_plain is the advantage of a prefix's R term alone",
         [f"demos: [{{kind: R, {AGAINST}}}], when: always, place: prefix"]),
        (f"{S}, place: prefix", "prefix",
         "a prefix learns wherever it stands (when='always'), and its R term has scale 1",
         [f"{S}, place: prefix, when: always"]),
        ("demos: [{kind: R, scale: 0.5}], place: prefix, when: always", "prefix", "and its R term has scale 1",
         [f"{R}, place: prefix, when: always"]),
        (f"{S}, place: hint, when: always", "hint", "no token of a hint learns; leave its terms on demonstrations out",
         ["place: hint, when: never"]),
        (f"{R}, place: stream, when: always", "stream",
         "it takes one S term, when='always' for a stream and when='gate' for a buffer",
         [f"{S}, place: stream, when: always"]),
        (f"{S}, place: stream, when: gate", "stream", "when='always' for a stream",
         [f"{S}, place: stream, when: always"]),
        (f"{S}, place: buffer, when: always", "buffer", "when='gate' for a buffer", [f"{S}, place: buffer"]),
        (f"{R}, place: buffer", "buffer", "it takes one S term", [f"{S}, place: buffer"]),
    ],
)  # fmt: skip
def test_a_composed_method_that_contradicts_its_place_is_refused(text, place, message, mended):
    more = [f"{ROLL}.n=2"]
    assert refused(*composed(text, *more)).startswith(f"hpt.compose: method 'composed' (place='{place}'): ")
    assert message in refused(*composed(text, *more))
    for remedy in mended:
        more += [FILES] if "stream" in remedy else [START] if "prefix" in remedy or "hint" in remedy else []
        start(*composed(remedy, *more))


def test_a_place_that_is_none_is_refused_with_those_that_there_are():
    text = refused(*composed(f"{S}, place: prefixed"))
    assert text.startswith("hpt.compose.place='prefixed': must be one of separate, group, prefix, hint, stream, buffer")
    assert text.endswith("did you mean prefix?")


GRPO, IMITATES = METHODS["grpo"].rollouts, Term("S", Estimator(advantage=parts.unit))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rescored": True}, "only hints are rescored, and only a stream's weights are convex"),
        ({"convex": True}, "only hints are rescored, and only a stream's weights are convex"),
        ({"rescored": True, "place": "prefix"}, "only hints are rescored"),
        (
            {"convex": True, "place": "buffer", "demos": (IMITATES,), "when": "gate"},
            "only a stream's weights are convex",
        ),
        ({"start": Start(0.5)}, "start says how rollouts start from demonstrations, with place 'prefix' or 'hint'"),
    ],
)
def test_what_only_one_place_has_is_refused_in_another(given, message):
    with pytest.raises(ValueError, match=rf"method 'mine' \(place='{given.get('place', 'separate')}'\): .*{message}"):
        Method("mine", GRPO, **given)
    Method("mine", GRPO, place="hint", rescored=True, start=Start(0.5))
    Method("mine", GRPO, (IMITATES,), "stream", "always", convex=True)


# --- what each method does without further settings -------------------------------------------------------------------

DEFAULTS = {
    "prefix_rft": (8, "prefix"), "uft": (4, "prefix"), "stephint": (8, "prefix"), "g2rpo_a": (12, "prefix"),
    "questa": (1, "hint"), "pope": (4, "hint"), "guide": (8, "hint"), "chord_mu": (1, "stream"),
    "chord_phi": (1, "stream"), "amft_style": (1, "stream"), "relift": (1, "buffer"),
}  # fmt: skip


def test_every_method_of_another_place_is_among_those_that_are_built():
    assert {name: method.place for name, method in METHODS.items() if method.place not in ("separate", "group")} == {
        name: place for name, (_, place) in DEFAULTS.items()
    }


@pytest.mark.parametrize("name", DEFAULTS)
def test_every_method_builds_with_no_further_settings(name):
    n, place = DEFAULTS[name]
    run = start(f"++hpt.method={name}", f"{ROLL}.n={n}", *([FILES] if place == "stream" else []))
    assert run.method.name == name and run.plan_settings(1, 1).demo_coef == run.beside.demo_coef(1)
    assert run.reads_demos == (place != "stream") and (run.stream_files == ["experts.parquet"]) == (place == "stream")
    assert len(run.starts("question", n, 1)) == n if place in ("prefix", "hint") else run.beside.start.share is None


def test_rescored_rollouts_have_no_correction_of_the_prompt_that_they_were_sampled_with():
    correct = "algorithm.rollout_correction.rollout_is=token"
    asks = [correct, f"{ROLL}.calculate_log_probs=True", "++hpt.start.rollouts=4", f"{ROLL}.n=8"]
    text = refused("++hpt.method=guide", *asks)
    assert "algorithm.rollout_correction.rollout_is: method guide trains hinted rollouts on another prompt" in text
    start("++hpt.method=guide", *asks, "algorithm.rollout_correction.rollout_is=null")
    start("++hpt.method=pope", *asks)


def test_what_reaches_no_token_of_a_prefix_or_no_question_of_a_buffer_is_refused():
    weights = "hpt.demo.token_weights has no effect: method uft has its demonstrations elsewhere (place: prefix)"
    assert weights in refused("++hpt.method=uft", "++hpt.demo.token_weights=w")
    start("++hpt.method=relift", "++hpt.demo.token_weights=w")
    off = "hpt.gate.off is set, but method 'relift' has no term off-policy; drop it"
    assert off in refused("++hpt.method=relift", "++hpt.gate.off=0.5")
    start("++hpt.method=relift", "++hpt.gate.off=null")
