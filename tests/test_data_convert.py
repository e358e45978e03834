"""`data convert` and `eval-set`: every form becomes verl's, in a stream, and validation never leaks."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conversions import ask, asked, converted, said, say
from made_data import EVAL, eval_file, eval_set, folder, gsm8k
from tiny_tokenizers import tiny

from verl_hpt import reward
from verl_hpt.data.commands import main
from verl_hpt.data.convert import in_validation
from verl_hpt.data.formats import FORMATS, Format, Layout, Question
from verl_hpt.data.questions import question_text
from verl_hpt.demos.demonstration import demonstrations
from verl_hpt.demos.encode import encode

ROOT = Path(__file__).resolve().parents[1]


def test_gsm8k_becomes_verls_parquet_with_every_word_kept(tmp_path):
    out, val = tmp_path / "train.parquet", tmp_path / "val.parquet"
    source = str(folder() / "gsm8k" / "train.jsonl")
    assert main(["convert", source, str(out), "--val", str(val), "--val-share", "0.05"]) == 0
    train, held = pq.read_table(out).to_pylist(), pq.read_table(val).to_pylist()
    count = len(gsm8k())
    assert len(train) + len(held) == count
    assert abs(len(held) / count - 0.05) < 4 * math.sqrt(0.05 * 0.95 / count)  # standard deviations
    by_question = {r["question"]: r["answer"] for r in gsm8k()}
    for split, rows in (("train", train), ("val", held)):
        assert [r["extra_info"]["index"] for r in rows] == list(range(len(rows)))
        for row in rows:
            assert set(row) == {"data_source", "prompt", "ability", "reward_model", "extra_info", "target"}
            answer = by_question[row["prompt"][0]["content"]]
            assert row["target"] == [say(answer)]
            assert row["reward_model"] == {
                "style": "rule",
                "ground_truth": answer.rpartition("####")[2].strip().replace(",", ""),
            }
            assert row["data_source"] == "openai/gsm8k" and row["extra_info"]["split"] == split
    assert not {question_text(r["prompt"]) for r in train} & {question_text(r["prompt"]) for r in held}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize(
    "row",
    [
        {"question": "2+2?", "answer": "It is 4.\n#### 4"},
        {"prompt": "2+2?", "target": "It is 4.\n#### 4"},
        {"prompt": [ask("2+2?")], "target": [say("It is 4.\n#### 4")], "reward_model": {"ground_truth": "4"}},
        {"prompt": [ask("2+2?")], "target": "It is 4.\n#### 4", "reward_model": {"ground_truth": 4}},
        {"messages": [ask("2+2?"), say("It is 4.\n#### 4")]},
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "It is 4.\n#### 4"}]},
        {"problem": "2+2?", "solution": "It is 4.\n#### 4", "answer": "4"},
        {"instruction": "2+2?", "output": "It is 4.\n#### 4", "answer": 4},
    ],
    ids=lambda row: "-".join(row),
)
def test_every_form_becomes_the_same_row(tmp_path, row, suffix):
    rows = converted(tmp_path, [row], "--data-source", "x", suffix=suffix)
    (made,) = rows
    assert made["prompt"] == [ask("2+2?")] and made["target"] == [say("It is 4.\n#### 4")]
    assert made["reward_model"] == {"style": "rule", "ground_truth": "4"} and made["data_source"] == "x"


def test_converting_twice_changes_nothing(tmp_path):
    rows = converted(tmp_path, gsm8k()[:50])
    again = converted(tmp_path, rows, suffix=".parquet")
    for a, b in zip(rows, again, strict=True):
        assert {k: a[k] for k in a if k != "extra_info"} == {k: b[k] for k in b if k != "extra_info"}


def test_system_and_suffix_and_marks(tmp_path):
    row = {"prompt": [{"role": "system", "content": "Think."}, ask("2+2?")], "target": "a <<2+2=4>>4\n#### 4"}
    (made,) = converted(tmp_path, [row], "--drop-system", "--strip-calculator", "--suffix", " Box it.")
    assert made["prompt"] == [ask("2+2? Box it.")] and made["target"] == [say("a 4\n#### 4")]
    (made,) = converted(tmp_path, [row], "--system", "Be brief.")
    assert made["prompt"] == [{"role": "system", "content": "Be brief."}, ask("2+2?")]
    assert made["target"] == [say("a <<2+2=4>>4\n#### 4")]


def test_several_demonstrations_and_further_columns(tmp_path):
    rows = [
        {"prompt": "2+2?", "target": ["It is 4.\n#### 4", "Four.\n#### 4"], "r": [1.0, 0.5], "answer": "4"},
        {"prompt": "1+1?", "target": "Two.\n#### 2", "r": [1.0], "answer": "2"},
        {"prompt": "1+2?", "target": None, "r": None, "answer": "3"},
    ]
    made = converted(tmp_path, rows)
    assert made[0]["target"] == [[say("It is 4.\n#### 4")], [say("Four.\n#### 4")]]
    assert [len(demonstrations(r["target"])) for r in made] == [2, 1, 0]
    assert [r["r"] for r in made] == [[1.0, 0.5], [1.0], None]


def test_late_second_demonstration_makes_lists_of_all(tmp_path, capsys):
    rows = [{"prompt": f"{i}?", "target": "x", "answer": "1"} for i in range(600)]
    for options in ([], ["--several"]):
        made = converted(tmp_path, [*rows, {"prompt": "last?", "target": ["x", "y"], "answer": "1"}], *options)
        assert made[0]["target"] == [[say("x")]] and made[600]["target"] == [[say("x")], [say("y")]]
    assert converted(tmp_path, rows)[0]["target"] == [say("x")]
    assert converted(tmp_path, rows, "--several")[0]["target"] == [[say("x")]]


def test_tool_conversations_keep_their_calls(tmp_path):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    messages = [
        ask("2+2?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
        say("It is \\boxed{4}."),
    ]
    (made,) = converted(tmp_path, [{"messages": messages}])
    assert made["prompt"] == [ask("2+2?")] and made["reward_model"]["ground_truth"] == "4"
    (demo,) = demonstrations(made["target"])
    tokenizer = tiny("qwen2.5")
    encoded = encode(demo, tokenizer, tokenizer.eos_token_id, prompt_messages=made["prompt"])
    said = [i for i, m in zip(encoded.ids, encoded.mask, strict=True) if m]
    call = '\n<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call><|im_end|>'
    assert tokenizer.decode(said) == call + "It is \\boxed{4}.<|im_end|>"


def test_late_tool_call_never_vanishes(tmp_path, capsys):
    plain = [{"messages": [ask(f"{i}?"), say("#### 1")]} for i in range(600)]
    call = {"function": {"name": "f", "arguments": "{}"}}
    late = {"messages": [ask("x?"), {"role": "assistant", "content": "", "tool_calls": [call]}, say("#### 1")]}
    made = converted(tmp_path, [*plain, late])
    assert made[600]["target"][0]["tool_calls"] == [{**call, "type": "function"}]
    assert made[0]["target"] == [{**say("#### 1"), "tool_calls": None}]


def test_several_files_and_a_local_dataset_folder(tmp_path):
    for name in ("a", "b"):
        rows = [{"question": f"{name}{i}?", "answer": f"#### {i}"} for i in range(5)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    inputs = [str(tmp_path / "a" / "train.jsonl"), f"hf:{tmp_path / 'b'}"]
    assert main(["convert", *inputs, str(tmp_path / "out.parquet")]) == 0
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [r["prompt"][0]["content"] for r in rows] == [f"{n}{i}?" for n in "ab" for i in range(5)]


def test_validation_split_depends_on_the_question_alone():
    assert in_validation([ask(" What  IS it?")], 0.5, 0) == in_validation("what is it?", 0.5, 0)
    drawn = [in_validation(f"question {i}", 0.1, 0) for i in range(5000)]
    assert 400 < sum(drawn) < 600
    assert drawn != [in_validation(f"question {i}", 0.1, 1) for i in range(5000)]


def test_eval_set_makes_verls_validation_files(tmp_path):
    files = [str(eval_file(name)) for name in EVAL]
    assert main(["eval-set", str(tmp_path), *files]) == 0
    for name in EVAL:
        rows = pq.read_table(tmp_path / f"{name}.parquet").to_pylist()
        assert len(rows) == len(eval_set(name))
        for row in rows:
            assert row["data_source"] == name and row["extra_info"]["split"] == "test"
            assert "\\boxed{}" in row["prompt"][-1]["content"]
            boxed = f"It is \\boxed{{{row['reward_model']['ground_truth']}}}."
            assert reward.compute_score(name, boxed, row["reward_model"]["ground_truth"])["score"] == 1.0
    assert main(["eval-set", str(tmp_path / "four"), files[0], "--repeat", "4", "--suffix", ""]) == 0
    assert pq.read_table(tmp_path / "four" / "aime24.parquet").num_rows == 4 * len(eval_set("aime24"))


def test_verls_own_scorer_gives_every_converted_solution_one(tmp_path):
    """It takes the commas out of an answer, and none out of the expected one: 1,080 could never be right."""
    scorer = pytest.importorskip("verl.utils.reward_score.gsm8k")
    made = [
        {"question": f"{i}?", "answer": f"So.\n#### {n}"} for i, n in enumerate(("1,080", "-12,345,678", "1,080.50"))
    ]
    rows = converted(tmp_path, gsm8k() + gsm8k("test") + made)
    assert [
        r for r in rows if scorer.compute_score(r["target"][0]["content"], r["reward_model"]["ground_truth"]) != 1
    ] == []
    assert [r["reward_model"]["ground_truth"] for r in rows[-3:]] == ["1080", "-12345678", "1080.50"]
    rows = converted(tmp_path, [{"problem": "a?", "solution": "#### 1,080"}, {"problem": "b?", "solution": "#### 1,2"}])
    assert [r["reward_model"]["ground_truth"] for r in rows] == ["1080", "1,2"]


def test_a_box_may_span_lines(tmp_path):
    matrix = "\\begin{pmatrix} 1 \\\\\n 2 \\end{pmatrix}"
    rows = [{"problem": f"{i}?", "solution": f"So \\boxed{{\n{box}\n}}."} for i, box in enumerate((matrix, "42"))]
    made = converted(tmp_path, rows)
    assert [r["reward_model"]["ground_truth"] for r in made] == [matrix, "42"]
    assert reward.compute_score("math", rows[0]["solution"], matrix.replace("\n", ""))["score"] == 1.0


def test_alpacas_input_belongs_to_its_question(tmp_path, capsys):
    rows = [
        {"instruction": "Add.", "output": "#### 4", "answer": "4"},
        {"instruction": "Add.", "input": "2 and 2", "output": "#### 4", "answer": "4"},
        {"instruction": "Add.", "input": " ", "output": "#### 4", "answer": "4"},
    ]
    _, made, *_ = said(tmp_path, capsys, rows)
    assert [r["prompt"][0]["content"] for r in made] == ["Add.", "Add.\n\n2 and 2", "Add."]
    assert "input" not in made[0]
    status, _, _, err = said(tmp_path, capsys, [{**rows[0], "input": {"a": 2}}])
    assert status == 2 and "field `input`: must be text" in err


def test_a_system_text_beside_the_messages_is_their_system_message(tmp_path, capsys):
    row = {"system": "Think.", "tools": "[]", "messages": [ask("a?"), say("#### 1")]}
    system = {"role": "system", "content": "Think."}
    _, (made,), *_ = said(tmp_path, capsys, [row])
    assert made["prompt"] == [system, ask("a?")] and made["target"] == [say("#### 1")]
    assert made["tools"] == "[]" and "system" not in made
    assert said(tmp_path, capsys, [row], "--drop-system")[1][0]["prompt"] == [ask("a?")]
    own = {**row, "messages": [{"role": "system", "content": "Own."}, *row["messages"]]}
    _, (made,), *_ = said(tmp_path, capsys, [own])
    assert made["prompt"][0]["content"] == "Own." and (made["system"], made["tools"]) == ("Think.", "[]")


@pytest.mark.parametrize("name", ["solutions", "responses", "completions", "outputs", "answers"])
def test_lists_of_demonstrations_have_further_names(tmp_path, capsys, name):
    row = {"question": "a?", name: ["x\n#### 1", "y\n#### 1"]}
    _, (made,), _, err = said(tmp_path, capsys, [row])
    assert made["target"] == [[say("x\n#### 1")], [say("y\n#### 1")]] and not err


def test_chats_and_reward_models_that_stand_as_text_are_parsed(tmp_path, capsys):
    plain = {"prompt": [ask("a?")], "target": [say("Yes.")], "reward_model": {"ground_truth": "1"}}
    rows = [{k: json.dumps(v) for k, v in plain.items()}] * 3
    _, made, out, err = said(tmp_path, capsys, rows)
    assert all(r["prompt"] == [ask("a?")] and r["target"] == [say("Yes.")] for r in made) and not err
    assert out.count("as JSON text: parsed") == 3 and made[0]["reward_model"]["ground_truth"] == "1"
    chat = [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "#### 1"}]
    _, (made,), *_ = said(tmp_path, capsys, [{"conversations": json.dumps(chat)}])
    assert made["prompt"] == [ask("a?")] and made["target"] == [say("#### 1")]
    _, (made,), out, _ = said(tmp_path, capsys, [{"question": '["role"]', "answer": "#### 1"}])
    assert made["prompt"] == [ask('["role"]')] and "parsed" not in out


@pytest.mark.parametrize("key", ["data", "train"])
def test_rows_wrapped_in_an_object_are_read(tmp_path, capsys, key):
    for indent in (None, 1):
        text = json.dumps({"version": "1", key: [asked(), asked(question="b?")]}, indent=indent)
        status, made, _, err = said(tmp_path, capsys, text)
        assert status == 0 and not err and [row["prompt"] for row in made] == [[ask("a?")], [ask("b?")]]


def test_fields_are_known_whatever_their_case(tmp_path, capsys):
    _, (made,), *_ = said(tmp_path, capsys, [{"Question": "a?", "Solution": "It is 1.", "Answer": "1"}])
    assert made["prompt"] == [ask("a?")] and made["target"] == [say("It is 1.")] and len(made) == 6
    assert made["reward_model"]["ground_truth"] == "1"
    _, (made,), *_ = said(tmp_path, capsys, [{"Question": "a?", "Answer": "It is 1.\n#### 1"}])
    assert made["target"] == [say("It is 1.\n#### 1")] and made["data_source"] == "openai/gsm8k"
    _, (made,), *_ = said(tmp_path, capsys, [{"Messages": [ask("a?"), say("#### 1")], "problem": "b?"}])
    assert made["prompt"] == [ask("a?")]


def test_a_format_of_ones_own_is_one_entry(tmp_path, capsys, monkeypatch):
    """Votes on answers: the entry is all that convert, check and --format need."""

    def detect(values, named):
        return Layout("ask", "answers", None) if "votes" in values else None

    def read(row, layout):
        best = max(range(len(row.values["votes"])), key=row.values["votes"].__getitem__)
        answers = row.values["answers"]
        if len(answers) != len(row.values["votes"]):
            raise row.bad("votes", "must be one number for each answer")
        return Question([ask(row.values["ask"])], [answers[best]], answers[best].rpartition(" ")[2])

    monkeypatch.setitem(FORMATS, "votes", Format(detect, read, truth="the last word of the best answer"))
    rows = [{"ask": f"{i}+1?", "answers": ["no", f"It is {i + 1}"], "votes": [i, i + 1]} for i in range(3)]
    status, made, out, _ = said(tmp_path, capsys, rows, "--format", "votes")
    assert (
        status == 0 and "format votes: question `ask`, demonstrations `answers`, expected answer the last word" in out
    )
    assert [row["target"] for row in made] == [[say(f"It is {i + 1}")] for i in range(3)]
    assert [row["reward_model"]["ground_truth"] for row in made] == ["1", "2", "3"] and made[2]["votes"] == [2, 3]
    assert main(["check", str(tmp_path / "in.jsonl")]) == 0
    assert "3 demonstrations, 3 usable" in capsys.readouterr().out
    rows[1]["votes"].append(0)
    status, _, _, err = said(tmp_path, capsys, rows)
    assert status == 2 and "in.jsonl: row 2: field `votes`: must be one number for each answer" in err
    assert main(["check", str(tmp_path / "in.jsonl")]) == 1
    assert "row 2: field `votes`: must be one number" in capsys.readouterr().out


MEASURED = """
import sys
from verl_hpt.data.commands import main
status = main(["convert", sys.argv[1], sys.argv[2]])
with open("/proc/self/status") as file:
    peak = next(line.split()[1] for line in file if line.startswith("VmHWM"))
print(status, int(peak) * 1024)
"""


def big(path, rows):
    """Rows of 4 kB; one row group where it is parquet, the hardest form to stream."""

    def row(i):
        return {"question": f"{i}?", "answer": f"{i} is {i * 2654435761 % 2**32:08x} " * 200 + "\n#### 1"}

    if path.suffix == ".jsonl":
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row(i)) + "\n" for i in range(rows))
    else:
        pq.write_table(pa.Table.from_pylist([row(i) for i in range(rows)]), path, row_group_size=10**9)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    """40 MB and 160 MB of text: the peak of the process (Linux's VmHWM) is that of a batch, far below 2 GiB."""
    peaks = []
    for scale in (1, 4):
        path = tmp_path / f"{scale}{suffix}"
        big(path, 10_000 * scale)
        command = [sys.executable, "-c", MEASURED, str(path), str(tmp_path / "out.parquet")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
        assert done.returncode == 0, done.stderr
        status, peak = done.stdout.split()[-2:]
        assert status == "0"
        peaks.append(int(peak))
    assert peaks[1] < 0.8 * 2**30 and peaks[1] < 1.2 * peaks[0], peaks
