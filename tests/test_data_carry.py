"""`data convert` carries every field unchanged; what cannot be carried is named by row and field, with the remedy."""

import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conversions import ask, asked, said, say

from verl_hpt.data import write
from verl_hpt.data.commands import main
from verl_hpt.demos.demonstration import plain

pytestmark = pytest.mark.usefixtures("group_rows")

LATE = [  # first value, late value
    (0, 0.5),
    ([0], [0.5]),
    ([[1]], [[0.5, 2]]),
    ({"a": 1}, {"a": 1, "b": 2}),
    ({"a": [{"b": 1}]}, {"a": [{"b": 0.5, "c": "x"}, {}]}),
    (None, 0.5),
    ([], [["x"]]),
    (1, None),
    (0.5, float("nan")),
    (0.1, 1e300),
]


@pytest.mark.parametrize("first, late", LATE, ids=str)
def test_a_late_value_widens_its_columns_type(tmp_path, capsys, first, late):
    rows = [asked(r=first) for _ in range(600)] + [asked(r=late)]
    status, made, *_ = said(tmp_path, capsys, rows)
    assert status == 0 and len(made) == 601
    back = plain(made[600]["r"])
    assert (back == late or (back != back and late != late)) and all(plain(row["r"]) == first for row in made[:600])


MIXED = [  # first value, late value, the late one as JSON text
    ("x", 5, "5"),
    (5, "x", "x"),
    ({"a": 1}, 5, "5"),
    ([1], {"a": 1}, '{"a": 1}'),
    (1, True, "true"),
    (0.5, True, "true"),
    ([0.5], [1.5, True], "[1.5, true]"),
    (1, 2**70, str(2**70)),
    (0.5, 2**60 + 1, str(2**60 + 1)),
]


@pytest.mark.parametrize("first, late, text", MIXED, ids=str)
def test_values_without_a_common_type_are_named_by_row_and_field(tmp_path, capsys, first, late, text):
    rows = [asked(r=first) for _ in range(600)] + [asked(r=late)]
    status, made, _, err = said(tmp_path, capsys, rows)
    assert status == 2 and made is None and "in.jsonl: row 601: field `r`: " in err
    assert "--as-text r writes it as JSON text, --drop r leaves it out\n" in err
    status, made, *_ = said(tmp_path, capsys, rows, "--as-text", "r")
    assert status == 0 and made[600]["r"] == text
    assert made[0]["r"] == first if isinstance(first, str) else json.loads(made[0]["r"]) == first
    status, made, *_ = said(tmp_path, capsys, rows, "--drop", "r")
    assert status == 0 and len(made) == 601 and "r" not in made[0]
    status, made, out, _ = said(tmp_path, capsys, rows, "--skip-bad")
    assert status == 0 and len(made) == 600 and "1 bad rows" in out and made[599]["extra_info"]["index"] == 599


def test_a_field_in_an_object_is_named_dropped_and_written_as_text_by_its_path(tmp_path, capsys):
    first, late = {"a": [{"b": 1, "c": 2}]}, {"a": [{"b": "x", "c": 2}, {"b": 1}]}
    rows = [asked(r=first, extra_info={"n": 1}), asked(r=late, extra_info={"n": "x"})]
    status, _, _, err = said(tmp_path, capsys, rows)
    assert (status == 2 and "row 2: field `extra_info.n`: " in err) or "row 2: field `r.a.b`: " in err
    _, made, *_ = said(tmp_path, capsys, rows, "--as-text", "r.a.b", "--drop", "extra_info.n")
    assert made[1]["r"] == {"a": [{"b": "x", "c": 2}, {"b": "1", "c": None}]} and "n" not in made[0]["extra_info"]
    messages = [{**ask("a?"), "weight": weight} for weight in (1, "x")]
    rows = [{"messages": [message, say("#### 1")], "s.t": 1} for message in messages]
    status, _, _, err = said(tmp_path, capsys, rows)
    assert status == 2 and "row 2: field `messages.weight`: " in err and "--drop messages.weight" in err
    _, made, *_ = said(tmp_path, capsys, rows, "--drop", "messages.weight", "--drop", "s.t")
    assert made[1]["prompt"] == [ask("a?")] and "s.t" not in made[0]
    _, made, *_ = said(tmp_path, capsys, rows, "--as-text", "messages.weight")
    assert [row["prompt"][0]["weight"] for row in made] == ["1", "x"] and made[0]["s.t"] == 1


@pytest.mark.parametrize("name", ["responses", "output", "validate", "rm_scores"])
def test_a_field_whose_name_verl_needs_is_refused_and_can_be_dropped(tmp_path, capsys, name):
    """verl's agent loop would fail, or take the column for what it sampled; `--skip-bad` would leave every row out."""
    rows = [asked(target="2", **{name: value}) for value in (None, "x")]
    for options in ((), ("--skip-bad",)):
        status, made, _, err = said(tmp_path, capsys, rows, *options)
        assert status == 2 and made is None
        assert f"in.jsonl: field `{name}`: verl's rows or its agent loop have a field of that name" in err
        assert f"--drop {name} leaves it out" in err
    status, made, *_ = said(tmp_path, capsys, rows, "--drop", name)
    assert status == 0 and len(made) == 2 and name not in made[0]


def test_a_field_that_no_row_has_cannot_be_dropped_or_written_as_text(tmp_path, capsys):
    for option in ("--drop", "--as-text"):
        for name in ("nope", "question.nope", "r.nope"):
            status, made, _, err = said(tmp_path, capsys, [asked(r={"a": 1})], option, name)
            assert status == 2 and made is None
            assert f"{option} {name}: no row has such a field; they have `question`, `answer`, `r`" in err


def test_the_options_of_before_say_what_to_do(tmp_path, capsys):
    status, _, _, err = said(tmp_path, capsys, [asked(r=1)], "--keep", "r:string")
    assert status == 2 and "argument --keep: every field is carried over by itself; --drop NAME" in err
    status, _, _, err = said(tmp_path, capsys, [asked(r=1)], "--peek", "600")
    assert status == 2 and "argument --peek: the columns' types come from all rows now" in err


def random_value(draw, depth):
    """A value of a random type, and a function that draws further ones of that type, with parts missing."""
    kind = draw.choice(["int", "float", "str", "bool", *(["list", "object"] if depth else [])])
    if kind == "list":
        inner = random_value(draw, depth - 1)
        return lambda: [inner() for _ in range(draw.randrange(4))]
    if kind == "object":
        parts = {f"k{i}": random_value(draw, depth - 1) for i in range(3)}
        return lambda: {"k": 1, **{key: part() for key, part in parts.items() if draw.random() < 0.6}}
    drawn = {
        "int": lambda: draw.randrange(-(2**53), 2**53),
        "float": lambda: draw.choice([draw.random(), 1, 1e300, -0.0]),
        "str": lambda: draw.choice(["", "é漢🙂", "null", "[1]"]),
        "bool": lambda: draw.random() < 0.5,
    }
    return drawn[kind]


@pytest.mark.parametrize("seed", range(10))
def test_nothing_vanishes_and_every_value_is_equal(tmp_path, capsys, seed):
    draw = random.Random(seed)
    columns = {f"c{i}": random_value(draw, 3) for i in range(5)}
    inner = {f"c{i}": random_value(draw, 2) for i in range(3)}

    def some(parts):
        return {name: part() for name, part in parts.items() if draw.random() < 0.7}

    rows = [
        {
            "prompt": [{**ask("a?"), **some(inner)}],
            "target": [{**say("#### 1"), **some(inner)}],
            "reward_model": {"ground_truth": "1", **some(inner)},
            "extra_info": some(inner),
            **some(columns),
        }
        for _ in range(300)
    ]
    status, made, _, err = said(tmp_path, capsys, rows)
    assert status == 0, err
    for row, back in zip(rows, map(plain, made), strict=True):
        assert back["reward_model"].pop("style") == "rule" and back.pop("ability") == "math"
        assert back.pop("data_source") == "in" and back["extra_info"].pop("file") == "in.jsonl"
        assert {"index", "split", "row"} <= back["extra_info"].keys()
        back["extra_info"] = {k: v for k, v in back["extra_info"].items() if k not in ("index", "split", "row")}
        assert back == row


def test_a_table_that_would_change_a_row_is_not_written(tmp_path):
    row = {
        "extra_info": {"index": 0, "split": "train"},
        "target": [],
        "r": 1,
        "s": {"a": [{"b": 1}]},
        "t": 0.5,
        "u": "x",
    }
    schema = write.schema_of([[row]], several=False)
    for change, path, says in (
        ({"r": 0.5}, "r", "0.5 would become 0: its column is int64"),
        ({"s": {"a": [{"b": 1}, {"b": 1, "c": 2}]}}, "s.a.c", "would be dropped, its column is struct<b: int64>"),
        ({"s": {"a": [{"b": 0.5}]}}, "s.a.b", "0.5 would become 0"),
        ({"t": True}, "t", "True would become 1.0"),
        ({"u": b"x"}, "u", "b'x' would become 'x'"),
    ):
        with pytest.raises(KeyboardInterrupt), write.Writer(str(tmp_path / "out.parquet"), schema) as writer:
            ((position, *found),) = writer.write([row, {**row, **change}, row], "train")
            assert (position, found[0]) == (1, path) and says in found[1]
            assert writer.write([row], "train") == [] and writer.count == 1
            raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_file_that_does_not_read_back_gets_no_name(tmp_path, capsys, monkeypatch):
    whole = pq.ParquetWriter.write_table
    other = [asked(r=i) for i in range(50)]

    def changed(self, table):
        column = pa.array([row + 1 for row in table["r"].to_pylist()])
        whole(self, table.set_column(table.schema.get_field_index("r"), "r", column))

    monkeypatch.setattr(pq.ParquetWriter, "write_table", changed)
    status, made, _, err = said(tmp_path, capsys, other)
    assert status == 2 and made is None and "out.parquet: row group 1 does not read back as it was written" in err


@pytest.mark.parametrize("value", [2**70, {}, [{}], {"a": {}}], ids=str)
def test_what_parquet_cannot_hold_is_one_message_and_text_can_hold_it(tmp_path, capsys, value):
    status, made, _, err = said(tmp_path, capsys, [asked(r=value)])
    assert status == 2 and made is None and "row 1: field `r" in err and "--as-text r" in err
    assert said(tmp_path, capsys, [asked(r=value)], "--as-text", "r")[1][0]["r"] == json.dumps(value)
    assert "r" not in said(tmp_path, capsys, [asked(r=value)], "--drop", "r")[1][0]


def test_types_that_do_not_mix_name_the_row(tmp_path, capsys):
    rows = [asked(r=1), asked(r="x"), asked(r=2)]
    status, _, _, err = said(tmp_path, capsys, rows)
    assert status == 2 and "row 2: field `r`: fits no one type" in err
    status, made, *_ = said(tmp_path, capsys, rows, "--skip-bad")
    assert status == 0 and [row["r"] for row in made] == [1, 2]


TAKEN = [  # a row whose fields convert writes itself, and the option that reads the field instead
    ({"question": "a?", "prompt": "b?", "answer": "#### 1"}, ["--prompt-key", "question"], "prompt", "--prompt-key"),
    ({"question": "a?", "target": "#### 2", "proof": "#### 1"}, ["--demo-key", "proof"], "target", "--demo-key"),
    (
        {"question": "a?", "reward_model": {"ground_truth": "2"}, "key": "1"},
        ["--answer-key", "key"],
        "reward_model.ground_truth",
        "--answer-key",
    ),
    ({**asked(), "ability": 5}, [], "ability", None),
    ({**asked(), "reward_model": {"style": 5, "x": 1}}, [], "reward_model.style", None),
]


@pytest.mark.parametrize("row, options, name, other", TAKEN, ids=[name for *_, name, _ in TAKEN])
def test_a_field_whose_place_convert_fills_is_refused_and_can_be_dropped(tmp_path, capsys, row, options, name, other):
    status, made, _, err = said(tmp_path, capsys, [row], *options)
    assert status == 2 and made is None and f"row 1: field `{name}`: convert writes that field itself" in err
    assert f"--drop {name} leaves it out" in err and (other is None or f"{other} {name} reads this one" in err)
    assert said(tmp_path, capsys, [row], *options, "--drop", name)[0] == 0
    if other:
        read = [option if option != options[1] else name for option in options]
        status, (made,), *_ = said(tmp_path, capsys, [row], *read)
        assert status == 0 and (made.get("question") == "a?" if name == "prompt" else made["prompt"] == [ask("a?")])


@pytest.mark.parametrize("name", ["extra_info", "reward_model"])
def test_what_must_be_an_object_says_so(tmp_path, capsys, name):
    status, _, _, err = said(tmp_path, capsys, [{**asked(), name: "x"}])
    assert status == 2 and f"row 1: field `{name}`: must be an object with named fields, got str; --drop {name}" in err
    assert said(tmp_path, capsys, [{**asked(), name: "x"}], "--drop", name)[0] == 0


VERL = {
    "prompt": [ask("a?")],
    "target": [{**say("#### 1"), "weight": 1}],
    "reward_model": {"style": "model", "ground_truth": "1", "tests": [1]},
    "extra_info": {"index": 7, "split": "test", "file": "x", "level": 3, "tests": ["t"], "none": None},
    "agent_name": "tool_agent",
}


def test_every_column_and_nested_field_is_carried(tmp_path, capsys):
    status, (made,), _, err = said(tmp_path, capsys, [VERL])
    assert status == 0 and not err
    own = {k: v for k, v in VERL["extra_info"].items() if v is not None}
    assert made == {**VERL, "data_source": "in", "ability": "math", "extra_info": {**own, "row": 1}}


def test_a_rows_own_extra_info_wins_over_ours(tmp_path, capsys):
    rows = [VERL] * 600 + [{**VERL, "extra_info": {"new": 1}}]
    status, made, *_ = said(tmp_path, capsys, rows)
    assert status == 0 and plain(made[600]["extra_info"]) == {
        "index": 600,
        "split": "train",
        "file": "in.jsonl",
        "row": 601,
        "new": 1,
    }
    odd = {**VERL, "extra_info": {"index": "a-7", "split": 5}}
    _, (made,), *_ = said(tmp_path, capsys, [odd])
    assert made["extra_info"] == {"index": "a-7", "split": 5, "file": "in.jsonl", "row": 1}
    _, (made,), *_ = said(tmp_path, capsys, [odd], "--drop", "extra_info.index", "--drop", "extra_info.split")
    assert made["extra_info"] == {"index": 0, "split": "train", "file": "in.jsonl", "row": 1}


def test_our_own_output_converted_again_is_the_same(tmp_path, capsys):
    made = said(tmp_path, capsys, [asked(r=1), asked(r=None), {**asked(), "extra_info": {"index": 7}}])[1]
    assert said(tmp_path, capsys, made)[1] == made


def test_ability_is_the_options_then_the_rows(tmp_path, capsys):
    for options, ability in (([], "code"), (["--ability", "x"], "x")):
        assert said(tmp_path, capsys, [asked(ability="code")], *options)[1][0]["ability"] == ability
    assert said(tmp_path, capsys, [asked()])[1][0]["ability"] == "math"


def test_types_of_parquet_are_carried(tmp_path, capsys):
    import datetime
    import decimal

    values = {
        "bytes": b"\xff",
        "half": 0.1,
        "when": datetime.datetime(2026, 1, 2, 3),
        "day": datetime.date(2026, 1, 2),
        "sum": decimal.Decimal("1.50"),
    }
    kinds = [pa.binary(), pa.float32(), pa.timestamp("us"), pa.date32(), pa.decimal128(5, 2)]
    table = pa.Table.from_pylist(
        [asked(**values)],
        pa.schema([("question", pa.string()), ("answer", pa.string()), *zip(values, kinds, strict=True)]),
    )
    path, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    pq.write_table(table, path)
    assert main(["convert", str(path), str(out)]) == 0
    (made,) = pq.read_table(out).to_pylist()
    assert {name: made[name] for name in values} == {name: table[name][0].as_py() for name in values}
    capsys.readouterr()
    assert main(["convert", str(path), str(out), "--as-text", "bytes"]) == 2
    assert "row 1: field `bytes`: cannot be written as JSON text" in capsys.readouterr().err


@pytest.mark.parametrize("source", [[], ["x"], {"a": 1}, 0.5, True], ids=str)
def test_a_data_source_must_be_text(tmp_path, capsys, source):
    status, _, _, err = said(tmp_path, capsys, [asked(data_source=source)])
    assert status == 2 and "field `data_source`: must be text" in err
    assert said(tmp_path, capsys, [asked(data_source=source)], "--data-source", "x")[0] == 0


@pytest.mark.parametrize("answer", [float("inf"), float("-inf"), float("nan")])
def test_an_expected_answer_is_a_finite_number(tmp_path, capsys, answer):
    status, _, _, err = said(tmp_path, capsys, [{"question": "a?", "answer": answer}])
    assert status == 2 and "field `answer`: must be the expected answer" in err


def test_kept_numbers_count_towards_a_row_group(tmp_path, capsys):
    assert said(tmp_path, capsys, [asked(r=[0] * 50_000)] * 40)[0] == 0
    assert pq.ParquetFile(tmp_path / "out.parquet").num_row_groups == 4


def test_a_damaged_gzip_is_one_message(tmp_path, capsys):
    whole = gzip.compress("".join(json.dumps(asked(n=i * 7919)) + "\n" for i in range(5000)).encode())
    for at in (12, len(whole) // 2):
        path = tmp_path / "in.jsonl.gz"
        path.write_bytes(whole[:at] + b"\xff" * 40 + whole[at + 40 :])
        assert main(["convert", str(path), str(tmp_path / "out.parquet")]) == 2
        assert f"{path}: " in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_one_message(tmp_path, capsys, monkeypatch):
    (tmp_path / "in.jsonl").write_text(json.dumps(asked()), encoding="utf-8")
    (tmp_path / "folder.parquet").mkdir()
    for out in ("in.jsonl/out.parquet", "in.jsonl/a/out.parquet", "folder.parquet"):
        assert main(["convert", str(tmp_path / "in.jsonl"), str(tmp_path / out)]) == 2
        assert "cannot be written" in capsys.readouterr().err

    def full(*_):
        raise OSError(28, "No space left on device")

    for method in ("write_table", "close"):
        with monkeypatch.context() as patch:
            patch.setattr(pq.ParquetWriter, method, full)
            status, made, _, err = said(tmp_path, capsys, [asked()])
            assert status == 2 and made is None and "out.parquet: cannot be written: [Errno 28]" in err


def test_names_and_texts_that_parquet_cannot_hold_are_named_escaped(tmp_path, capsys):
    name = "half \ud800"
    status, made, _, err = said(tmp_path, capsys, [asked(**{name: 1})])
    assert status == 2 and made is None and "row 1: field `half \\ud800`: character 5 is half of a surrogate" in err
    assert said(tmp_path, capsys, [asked(**{name: 1})], "--drop", name)[0] == 0
    for value in (name, [name], {"a": name}):
        status, made, _, err = said(tmp_path, capsys, [asked(r="x"), asked(s=value)])
        assert status == 2 and "row 2: field `s" in err and "half of a surrogate pair: --drop s" in err
        assert said(tmp_path, capsys, [asked(r="x"), asked(s=value)], "--drop", "s")[0] == 0


def test_a_field_that_is_read_in_part_is_carried_whole(tmp_path, capsys):
    row = {"q": {"text": "a?", "level": 3}, "answer": "#### 1", "a.b": 1}
    options = ["--prompt-key", "q.text", "--demo-key", "answer"]
    _, (made,), *_ = said(tmp_path, capsys, [row], *options)
    assert made["q"] == row["q"] and made["a.b"] == 1 and made["prompt"] == [ask("a?")]
    status, _, _, err = said(tmp_path, capsys, [{**row, "target": "x", "prompt": {"q": "a?"}}], *options)
    assert status == 2 and "field `target`: " in err
    row = {"prompt": {"text": "a?", "level": 3}, "answer": "#### 1"}
    options = ["--prompt-key", "prompt.text", "--demo-key", "answer"]
    status, _, _, err = said(tmp_path, capsys, [row], *options)
    assert status == 2 and "field `prompt.level`: convert writes that field itself" in err
    assert said(tmp_path, capsys, [row], *options, "--drop", "prompt.level")[1][0]["prompt"] == [ask("a?")]


def test_a_list_after_a_byte_order_mark(tmp_path, capsys):
    assert said(tmp_path, capsys, "\ufeff" + json.dumps([asked(), asked()]))[0] == 0


def test_text_and_bytes_do_not_mix(tmp_path, capsys):
    paths = [str(tmp_path / name) for name in ("a.parquet", "b.parquet")]
    for path, value in zip(paths, ("x", b"\xff"), strict=True):
        pq.write_table(pa.Table.from_pylist([asked(r=value)]), path)
    assert main(["convert", *paths, str(tmp_path / "out.parquet")]) == 2
    problem = "field `r`: 'x' would become b'x': its column is binary: --drop r"
    assert f"a.parquet: row 1: {problem}" in capsys.readouterr().err
    assert main(["convert", *paths, str(tmp_path / "out.parquet"), "--drop", "r"]) == 0
