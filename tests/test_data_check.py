"""`data check`: what it says is what training does."""

import copy
import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_data import folder, gsm8k
from quickstart_task import byte_tokenizer
from tiny_run import make_run
from tiny_tokenizers import STYLES, tiny
from transformers import AutoTokenizer

from verl_hpt.config import Demo
from verl_hpt.data.commands import main
from verl_hpt.data.questions import shared_frame, unframed
from verl_hpt.data.render import Renderer
from verl_hpt.data.report import histogram
from verl_hpt.demos.encode import Unusable, encode
from verl_hpt.errors import UserError
from verl_hpt.host.batch import Group, Reader

ROOT = Path(__file__).resolve().parents[1]


def verl_row(question, answer, truth, source="openai/gsm8k"):
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": question}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"index": 0, "split": "train"},
        "target": answer,
    }


def rows(count):
    found = []
    for row in gsm8k()[:count]:
        demo = [{"role": "assistant", "content": row["answer"]}]
        found.append(verl_row(row["question"], demo, row["answer"].rpartition("####")[2].strip()))
    return found


def say(text):
    return [{"role": "assistant", "content": text}]


def write(path, table):
    pq.write_table(pa.Table.from_pylist(table), path)
    return str(path)


def checked(tmp_path, file, *options):
    """(exit status, the JSON result)"""
    out = tmp_path / "result.json"
    status = main(["check", file, "--json", str(out), *options])
    result = json.loads(out.read_text(encoding="utf-8"))
    assert (status == 0) == result["ok"]
    return status, {f["check"]: f for f in result["findings"]}, result


def test_raw_gsm8k_needs_nothing_else_and_is_fine(tmp_path, capsys):
    status, found, result = checked(tmp_path, str(folder() / "gsm8k" / "train.jsonl"))
    assert status == 0 and found == {}
    assert result["rows"] == result["demonstrations"] == result["usable"] == len(gsm8k())
    assert result["rewards"] == {"openai/gsm8k": {"graded": len(gsm8k()), "mean": 1.0, "rejected": 0}}
    assert "nothing here would hurt training" in capsys.readouterr().out


@pytest.mark.parametrize("style", STYLES)
def test_many_at_a_time_are_the_tokens_of_one_by_one(tokenizers, style):
    render, tokenizer = Renderer(str(tokenizers / style)), tiny(style)
    texts = [r["answer"] for r in gsm8k()[:500]] + ["", " ", "é\n\n", tokenizer.eos_token, "\u3000漢字 🙂"]
    assert render.tokens(texts) == [tokenizer.encode(t, add_special_tokens=False) for t in texts]


@pytest.mark.parametrize("style", STYLES)
def test_demonstration_is_shown_beside_the_prompt_token_for_token(tmp_path, tokenizers, style, capsys):
    file, tokenizer = write(tmp_path / "a.parquet", rows(20)), tiny(style)
    status, _, result = checked(tmp_path, file, "--tokenizer", str(tokenizers / style), "--show", "3")
    assert status == 0 and len(result["rendered"]) == 3
    for shown, row in zip(result["rendered"], rows(3), strict=True):
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        assert "".join(shown["prompt_tokens"]) == prompt
        assert shown["ids"] == encode(row["target"], tokenizer, tokenizer.eos_token_id).ids
        assert shown["eos_count"] == 1 and shown["trained"] == [1] * len(shown["ids"])
    assert f"{tokenizer.eos_token!r}  ← EOS" in capsys.readouterr().out


def test_share_too_long_and_lengths_are_those_of_encode(tmp_path, tokenizers):
    file, tokenizer = write(tmp_path / "a.parquet", rows(300)), tiny("qwen3")
    lengths, long = [], 0
    for row in rows(300):
        lengths.append(len(encode(row["target"], tokenizer, tokenizer.eos_token_id).ids))
        try:
            encode(row["target"], tokenizer, tokenizer.eos_token_id, max_length=150)
        except Unusable as bad:
            long += bad.reason == "too_long"
    options = ("--tokenizer", str(tokenizers / "qwen3"), "--max-response-length", "150")
    status, found, result = checked(tmp_path, file, *options)
    assert status == 1 and found["unusable: too_long"]["count"] == long > 3
    assert result["unusable"] == {"too_long": long} and result["usable"] == 300 - long
    assert sum(n for *_, n in result["lengths"]["histogram"]) == 300
    assert (result["lengths"]["min"], result["lengths"]["max"]) == (min(lengths), max(lengths))
    status, found, _ = checked(tmp_path, file, *options, "--tolerance", "0.9")
    assert status == 0 and not found["unusable: too_long"]["harmful"]


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_reward_is_the_runs_own_function(tmp_path, kind):
    function = tmp_path / "mine.py"
    function.write_text(
        f"{kind} mine(data_source, solution_str, ground_truth, extra_info=None, low=0.0):\n"
        "    return {'score': 1.0 if extra_info['index'] == 0 and len(solution_str) % 2 else low, 'other': 1}\n",
        encoding="utf-8",
    )
    file = write(tmp_path / "a.parquet", rows(50))
    odd = sum(len(r["answer"]) % 2 for r in gsm8k()[:50])
    options = ("--reward", f"{function}:mine", "--reward-kwargs", '{"low": 0.25}')
    status, found, result = checked(tmp_path, file, *options)
    assert status == 1 and found["rejected"]["count"] == 50 - odd
    assert result["rewards"]["openai/gsm8k"]["mean"] == pytest.approx((odd + 0.25 * (50 - odd)) / 50)
    assert checked(tmp_path, file, *options, "--success", "0.25")[0] == 0


def test_wrong_demonstrations_are_named(tmp_path):
    table = rows(100)
    table[7]["reward_model"]["ground_truth"] = "123456"
    status, found, _ = checked(tmp_path, write(tmp_path / "a.parquet", table))
    assert status == 0 and found["rejected"]["examples"][0]["row"] == 8
    status, found, _ = checked(tmp_path, write(tmp_path / "a.parquet", table), "--tolerance", "0")
    assert status == 1 and found["rejected"]["harmful"]


def test_duplicates_contradictions_and_leaks(tmp_path):
    table = rows(100)
    table += [
        dict(table[3]),
        {**table[4], "reward_model": {"style": "rule", "ground_truth": "77"}, "target": say("#### 77")},
    ]
    table[100]["prompt"] = [{"role": "user", "content": "  " + table[3]["prompt"][0]["content"].upper()}]
    val = [{"prompt": r["question"] + "\n\nPut your answer in a box.", "answer": "1"} for r in gsm8k()[90:130]]
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(r) + "\n" for r in val), encoding="utf-8")
    file = write(tmp_path / "a.parquet", table)
    status, found, _ = checked(tmp_path, file, "--val", str(tmp_path / "val.jsonl"))
    assert status == 1 and found["leak"]["count"] == 10 and found["leak"]["harmful"]
    assert [e["row"] for e in found["leak"]["examples"]] == list(range(91, 101))
    assert [e["row"] for e in found["duplicate"]["examples"]] == [101, 102]
    assert [e["row"] for e in found["contradiction"]["examples"]] == [102]
    assert "same question as row 4" in found["duplicate"]["examples"][0]["detail"]


def test_gsm8k_test_set_is_not_in_its_training_set(tmp_path):
    train, test = (str(folder() / "gsm8k" / f"{n}.jsonl") for n in ("train", "test"))
    status, found, _ = checked(tmp_path, train, "--reward", "none", "--val", test)
    assert status == 0 and "leak" not in found


def test_frame_of_prompts_is_what_all_begin_and_end_with():
    texts = [f"please solve: what is {i} + {i}? put it in a box." for i in range(10)]
    frame = shared_frame(texts)
    assert [unframed(t, frame) for t in texts] == [f"{i} + {i}?" for i in range(10)]
    assert shared_frame(texts[:3]) == ("", "") and shared_frame(["same"] * 10) == ("", "")


def test_questions_without_a_demonstration_are_counted_and_bearable(tmp_path):
    table = rows(10)
    table[2]["target"] = table[5]["target"] = None
    status, found, result = checked(tmp_path, write(tmp_path / "a.parquet", table))
    assert status == 0 and found["without"]["count"] == result["questions_without"] == 2
    assert result["demonstrations"] == 8


def test_open_reasoning_tag_is_seen(tmp_path, tokenizers):
    table = [verl_row(f"{i}?", "<think>\nHm.\n</think>\n\n#### 1" if i else "#### 1", "1") for i in range(5)]
    file = write(tmp_path / "a.parquet", table)
    options = ("--tokenizer", str(tokenizers / "qwen3"), "--show", "5")
    status, found, result = checked(tmp_path, file, *options, "--template-kwargs", '{"open_thinking": true}')
    assert status == 0 and found["think"]["count"] == 1 and found["think"]["examples"][0]["row"] == 1
    for shown in result["rendered"]:
        assert "".join(shown["prompt_tokens"] + shown["tokens"]).count("<think>") == 1
    assert "think" not in checked(tmp_path, file, *options)[1]


def accepted(path, tokenizer, eos) -> bool:
    """Whether training begins with this end token."""
    run = make_run(f"actor_rollout_ref.model.path={path}", *([] if eos is None else [f"++hpt.demo.eos={eos}"]))
    try:
        run.bind_tokenizer(tokenizer)
    except UserError:
        return False
    return True


@pytest.mark.parametrize(
    ("stops", "end", "problem"),
    [
        (["own", 0], None, None),
        (["pad"], None, None),  # rollouts stop at the tokenizer's EOS too
        ("own", None, None),
        (["pad", 0], "pad", None),
        ("own", "pad", "end with token {pad} (hpt.demo.eos), but generation stops at [{own}]; set it to one of these"),
        ("absent", "pad", "end with token {pad} (hpt.demo.eos), but generation stops at [{own}]"),
        ("absent", None, None),
    ],
)
def test_an_end_at_which_rollouts_do_not_stop_is_harm_where_training_refuses_it(tmp_path, stops, end, problem):
    folder, tokenizer = tmp_path / "tokenizer", tiny("qwen2.5")
    tokenizer.save_pretrained(folder)
    ids = {"own": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    if stops != "absent":
        stops = [ids.get(x, x) for x in stops] if isinstance(stops, list) else ids[stops]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}), encoding="utf-8")
    file, option = write(tmp_path / "a.parquet", rows(5)), [] if end is None else ["--eos", tokenizer.pad_token]
    status, found, _ = checked(tmp_path, file, "--tokenizer", str(folder), *option)
    assert (status == 0) == (problem is None) == accepted(folder, tokenizer, end and ids[end])
    assert set(found) == ({"eos"} if problem else set())
    assert problem is None or problem.format(**ids) in found["eos"]["examples"][0]["detail"]


@pytest.mark.parametrize("content", ["[1]", "{", '"x"'])
def test_a_damaged_generation_config_is_refused_by_check_and_training(tmp_path, content, capsys):
    tiny("qwen2.5").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=r"generation_config\.json: cannot be read .*; mend it"):
        make_run(f"actor_rollout_ref.model.path={tmp_path}").bind_tokenizer(tiny("qwen2.5"))
    assert main(["check", write(tmp_path / "a.parquet", rows(1)), "--tokenizer", str(tmp_path)]) == 2
    assert "generation_config.json: cannot be read" in capsys.readouterr().err


def test_a_tokenizer_without_eos_needs_the_option(tmp_path, capsys):
    tokenizer = copy.deepcopy(tiny("qwen2.5"))
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    assert main(["check", write(tmp_path / "a.parquet", rows(1)), "--tokenizer", str(tmp_path)]) == 2
    assert "has no EOS token; set hpt.demo.eos (`data`: --eos) to the id" in capsys.readouterr().err


@pytest.mark.parametrize("style", ["qwen3", "bytes"])
@pytest.mark.parametrize(
    "tail", ["\n", "\n\n", "\n" * 100, "a", "</think>\n"], ids=["line", "two", "hundred", "said", "closed"]
)
@pytest.mark.parametrize("question", ["1?", "Wie groß ist 漢字 🙂? " * 50], ids=["short", "long"])
def test_an_open_reasoning_tag_is_the_same_in_check_and_training(tmp_path, tokenizers, style, tail, question):
    folder, tokenizer = tmp_path / "tokenizer", copy.deepcopy(tiny("qwen3") if style == "qwen3" else byte_tokenizer())
    start = "{{ messages[0].content }}{% if add_generation_prompt %}<think>" + tail + "{% endif %}"
    tokenizer.chat_template = start.replace("\n", "{{ '\\n' }}")
    tokenizer.save_pretrained(folder)
    demo, message = f"<think>{tail}Hm.\n</think>\n\n#### 1", [{"role": "user", "content": question}]
    file = write(tmp_path / "a.parquet", [verl_row(question, demo, "1")])
    shown = checked(tmp_path, file, "--tokenizer", str(folder), "--show", "1")[2]["rendered"][0]
    ids = tokenizer.encode(
        tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True), add_special_tokens=False
    )
    trained = encode(demo, tokenizer, tokenizer.eos_token_id, prompt_ids=ids).ids
    assert shown["prompt_ids"] == ids and shown["ids"] == trained
    said = demo if tail.strip() else demo.removeprefix("<think>" + tail)
    assert tokenizer.decode(trained[:-1]) == said


@pytest.mark.parametrize(
    ("target", "rewards", "reason"),
    [
        (["#### 1 <|im_end|> b"], [None], "eos_inside"),  # its reward is missing too
        (["#### 1"], [None], "bad_column"),
        (["#### 1", "1"], [1.0], "bad_column"),
        ([" "], [1.0], "empty"),
    ],
)
def test_reasons_are_those_of_training_for_every_demonstration(tmp_path, tokenizers, target, rewards, reason):
    columns = {"target": target, "r": rewards}
    file = write(tmp_path / "a.parquet", [{**verl_row("a?", None, "1"), **columns}])
    options = ("--tokenizer", str(tokenizers / "qwen2.5"), "--demo-reward-key", "r")
    _, _, result = checked(tmp_path, file, *options)
    assert result["unusable"] == {reason: len(target)} and result["demonstrations"] == len(target)
    tokenizer, counts = tiny("qwen2.5"), Counter()
    reader = Reader(tokenizer, tokenizer.eos_token_id, Demo(reward="r"), 64)
    assert reader.usable(Group("u", [0], columns=columns), counts) == []
    assert counts == {"unusable": 1, f"unusable/{reason}": 1}


def test_several_demonstrations_and_tools_are_checked_one_by_one(tmp_path, tokenizers):
    say = {"role": "assistant", "content": "#### 1"}
    turns = [{**say, "content": "look"}, {"role": "tool", "content": "it is one"}, say]
    table = [verl_row("a?", [[say], turns], "1"), verl_row("b?", [[say], [say, say]], "1")]
    options = ("--tokenizer", str(tokenizers / "qwen2.5"), "--show", "4")
    status, found, result = checked(tmp_path, write(tmp_path / "a.parquet", table), *options)
    assert status == 1 and result["demonstrations"] == 4 and result["usable"] == 3
    assert found["unusable: bad_roles"]["examples"][0]["field"] == "target[1]"
    assert result["rendered"][1]["eos_count"] == 2 and 0 in result["rendered"][1]["trained"]


def random_model(folder):
    """A tiny model of random weights, written to the folder."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tiny("qwen3")), **sizes)).eval()
    model.save_pretrained(folder)
    return model


def test_prompts_have_the_templates_begin_token_and_demonstrations_none(tmp_path, tokenizers, monkeypatch):
    """Under a tokenizer whose post-processor adds one: what is shown, what a model is asked, what lengths count."""
    from verl_hpt.data import likelihood as data_likelihood

    asked, tokenizer = [], AutoTokenizer.from_pretrained(tokenizers / "llama3")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokenizer.encode("a") == [bos, *tokenizer.encode("a", add_special_tokens=False)]

    class Asked(data_likelihood.Likelihood):
        def __init__(self, path, device=None):
            pass

        def __call__(self, prompt, demo):
            asked.append((prompt, demo.ids))
            return -1.0

    monkeypatch.setattr(data_likelihood, "Likelihood", Asked)
    table = rows(10)
    expected = [
        (
            tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False),
            [*tokenizer.encode(row["target"][0]["content"], add_special_tokens=False), eos],
        )
        for row in table
    ]
    assert all(prompt[0] == bos and prompt.count(bos) == 1 and bos not in ids for prompt, ids in expected)
    file, given = write(tmp_path / "a.parquet", table), ("--tokenizer", str(tokenizers / "llama3"), "--model", "any")
    shortest = str(min(len(prompt) for prompt, _ in expected))
    _, found, result = checked(tmp_path, file, *given, "--show", "10", "--max-prompt-length", shortest)
    assert [(shown["prompt_ids"], shown["ids"]) for shown in result["rendered"]] == expected == asked
    assert found["prompt length"]["count"] == sum(len(prompt) > int(shortest) for prompt, _ in expected) < 10
    assert result["lengths"]["max"] == max(len(ids) for _, ids in expected)
    asked.clear()
    assert main(["likelihood", file, str(tmp_path / "b.parquet"), *given]) == 0
    assert asked == expected


def test_json_is_all_that_standard_output_has_when_asked(tmp_path):
    file = write(tmp_path / "a.parquet", rows(5))
    code = "import sys; from verl_hpt.data.commands import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "check", file, "--json", "-"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0 and json.loads(done.stdout)["usable"] == 5


def test_histogram_counts_every_value_once():
    for values in ([1], [5, 5, 5], list(range(1000)), [1, 10**6], []):
        bins = histogram(values)
        assert sum(n for *_, n in bins) == len(values)
        assert all(a[1] < b[0] for a, b in itertools.pairwise(bins))


def test_options_that_make_no_sense_are_refused_before_any_work(tmp_path, capsys):
    file = write(tmp_path / "a.parquet", rows(5))
    content = Path(file).read_bytes()
    for options, says in (
        (["--json", file], "would overwrite the data"),
        (["--val", str(tmp_path / "v.json"), "--json", str(tmp_path / "v.json")], "would overwrite the data"),
        (["--report", str(tmp_path / "r.txt")], "something.png"),
        (["--json", f"{file}/x.json"], "cannot be written"),
        (["--max-response-length", "-5"], "1 or more"),
        (["--tolerance", "5"], "from 0 to 1"),
        (["--success", "nan"], "finite"),
        (["--show", "-1"], "0 or more"),
        (["--model", "nope"], "--model nope: no such folder"),
    ):
        assert main(["check", file, *options]) == 2
        assert says in capsys.readouterr().err
    assert Path(file).read_bytes() == content
    assert main(["check", file, "--json", str(tmp_path / "new" / "x.json")]) == 0


def test_what_a_grader_prints_is_not_in_the_json(tmp_path, capsys):
    file = write(tmp_path / "a.parquet", rows(3))
    (tmp_path / "loud.py").write_text("def compute_score(**kwargs):\n    print('HELLO')\n    return 1.0\n")
    assert main(["check", file, "--reward", str(tmp_path / "loud.py"), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["usable"] == 3


def test_a_template_that_leaves_out_tool_calls_is_found(tmp_path, tokenizers):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": "{}"}}]}
    turns = [call, {"role": "tool", "content": "18"}, {"role": "assistant", "content": "#### 18"}]
    file = write(tmp_path / "a.parquet", [verl_row("How warm?", turns, "18")])
    style = str(tokenizers / "llama3")  # a template without tool calls
    status, found, _ = checked(tmp_path, file, "--tokenizer", style)
    assert status == 1 and "call of tool 'weather' in turn 1" in found["unusable: template"]["examples"][0]["detail"]
    assert checked(tmp_path, file, "--tokenizer", str(tokenizers / "qwen3"))[0] == 0


def test_prompts_that_verl_would_drop_are_harm_where_they_are_many(tmp_path, tokenizers):
    file = write(tmp_path / "a.parquet", rows(10))
    options = ("--tokenizer", str(tokenizers / "qwen3"), "--max-prompt-length", "3")
    status, found, _ = checked(tmp_path, file, *options)
    assert status == 1 and found["prompt length"]["harmful"] and found["prompt length"]["count"] == 10
    assert checked(tmp_path, file, *options, "--tolerance", "1")[0] == 0


def test_messages_written_as_json_text_are_harm(tmp_path):
    file = write(tmp_path / "a.parquet", [verl_row("a?", json.dumps(say("#### 1")), "1")])
    status, found, _ = checked(tmp_path, file)
    assert status == 1 and found["json text"]["count"] == 1


@pytest.mark.parametrize("suffix", ["", " Put it in a box."])
@pytest.mark.parametrize("asked", [3, 10])
def test_a_leak_is_found_whatever_the_prompts_of_either_file_share(tmp_path, suffix, asked):
    questions = [f"What is {i} plus {i}?{suffix}" for i in range(20)] + [
        f"Compute {i} times {i}.{suffix}" for i in range(20)
    ]
    train = write(tmp_path / "train.parquet", [verl_row(q, say("#### 1"), "1") for q in questions])
    val = write(tmp_path / "val.parquet", [verl_row(q, None, "1") for q in questions[:asked]])
    status, found, _ = checked(tmp_path, train, "--val", val)
    assert status == 1 and found["leak"]["count"] == asked


def test_a_models_limit_is_a_note_and_no_end(tmp_path):
    random_model(tmp_path / "model")
    tiny("qwen3").save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text()) | {"max_position_embeddings": 40}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    file = write(tmp_path / "a.parquet", rows(3))
    status, _, result = checked(tmp_path, file, "--model", str(tmp_path / "model"))
    assert status == 0 and any("longer than the 40 tokens" in note for note in result["notes"])
