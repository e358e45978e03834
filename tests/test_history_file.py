"""The history's file: what is no history, or a damaged one, is refused with its name and what is wrong."""

import builtins
import io
import json
import pickle
import re

import numpy as np
import pytest
from test_history import empty, saved, some_history

from verl_hpt import cli, history
from verl_hpt.errors import UserError
from verl_hpt.history import EARLIER_FILE, FIELDS, FILE, FIRST_LINE, VERSION, History, OtherVersion, checksum

GOOD = [
    ["a", 0, 4, 3, 3, 3, 7, 7, False, [2, 1]],
    ["b", 2, 4, 1, 0, 0, 6, 0, False, []],
    ["ä", 1, 1, 2, 0, 1, 6, 2, True, []],
]
HEADER = {"settings": {"hpt.question_key": None, "hpt.gate.success": 1.0}, "tokens_saved": 12.5}


def signed(*lines, first: bytes = FIRST_LINE) -> bytes:
    """A file of these lines, in JSON or as they are, with the checksum that belongs to them."""
    made = [line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines]
    body = first + b"".join(made)
    return body + checksum(body)


WHOLE = signed(HEADER, *GOOD)


def header(**changes) -> bytes:
    return signed({name: value for name, value in {**HEADER, **changes}.items() if value is not ...}, *GOOD)


def row(field: str, value) -> bytes:
    """The second question, line 4, with another value."""
    return rows(GOOD[0], [value if name == field else old for name, old in zip(FIELDS, GOOD[1], strict=True)], GOOD[2])


def rows(*values) -> bytes:
    return signed(HEADER, *values)


def deep(line: str, what: str) -> bytes:
    """A line with a text in it as it is."""
    return line.replace("?", what).encode() + b"\n"


def npz() -> bytes:
    out = io.BytesIO()
    np.savez(out, version=np.array(2), keys=np.arange(3, dtype=np.uint64))
    return out.getvalue()


COUNTS = [name for name in FIELDS if name not in ("key", "graduated", "demo_uses")]
LINE4 = "a history whose line 4"
MUST = "is not what it must be"
ROW = '["b", ?, 4, 1, 0, 0, 6, 0, false, []]'
CRAFTED = {
    # no file of lines
    "an empty file": (b"", "first line is not a history's"),
    "text": (b"hello, this is no history", "first line is not a history's"),
    "a pickle": (pickle.dumps({"keys": [1, 2]}), "first line is not a history's"),
    "other JSON": (b'{"held": {}, "said": []}\n', "first line is not a history's"),
    "a list": (b"[1, 2]\n", "first line is not a history's"),
    "a line of no end": (b"[" * 200_000, "first line is not a history's"),
    "no UTF-8": (b"\xff\xfe" + WHOLE, "first line is not a history's"),
    "lines of another system": (WHOLE.replace(b"\n", b"\r\n"), "first line is not a history's"),
    "other columns": (signed(HEADER, *GOOD, first=FIRST_LINE.replace(b"solved", b"won")), "first line is not"),
    # cut off or changed
    "the first line alone": (FIRST_LINE, "cut off or changed"),
    "no header": (signed(), "cut off or changed"),
    "cut in the middle": (WHOLE[: len(WHOLE) // 2], "cut off or changed"),
    "cut at its end": (WHOLE[:-30], "cut off or changed"),
    "cut before the last newline": (WHOLE[:-1], "cut off or changed"),
    "without its checksum": (WHOLE[: -len(checksum(b""))], "cut off or changed"),
    "a question less": (WHOLE.replace(json.dumps(GOOD[1]).encode() + b"\n", b""), "cut off or changed"),
    "another number": (WHOLE.replace(b'["a", 0, 4, 3', b'["a", 0, 4, 5'), "cut off or changed"),
    "a bit flipped": (WHOLE[:200] + bytes([WHOLE[200] ^ 1]) + WHOLE[201:], "cut off or changed"),
    "zeros at its end": (WHOLE[:-100] + bytes(100), "cut off or changed"),
    "twice": (WHOLE * 2, "cut off or changed"),
    "a checksum in words": (WHOLE[: -len(checksum(b""))] + b'{"blake2b": "right"}\n', "cut off or changed"),
    # the header
    "a header that is a list": (signed([1, 2], *GOOD), f"line 2 {MUST}.*got \\[1, 2\\]"),
    "a header of nothing": (signed({}, *GOOD), f"line 2 settings {MUST}: Field required"),
    "no settings": (header(settings=...), f"line 2 settings {MUST}: Field required"),
    "no tokens saved": (header(tokens_saved=...), f"line 2 tokens_saved {MUST}: Field required"),
    "an unknown value": (header(more=1), f"line 2 more {MUST}"),
    "records in the header": (header(records={}), f"line 2 records {MUST}"),
    "tokens of nothing": (header(tokens_saved=float("nan")), f"line 2 tokens_saved {MUST}.*got nan"),
    "endless tokens": (header(tokens_saved=float("inf")), f"line 2 tokens_saved {MUST}.*got inf"),
    "tokens below zero": (header(tokens_saved=-1.0), f"line 2 tokens_saved {MUST}.*got -1.0"),
    "tokens in words": (header(tokens_saved="many"), f"line 2 tokens_saved {MUST}.*got many"),
    "tokens of truth": (header(tokens_saved=True), f"line 2 tokens_saved {MUST}.*got True"),
    "several tokens": (header(tokens_saved=[0.0, 0.0]), f"line 2 tokens_saved {MUST}"),
    "settings as a number": (header(settings=1), f"line 2 settings {MUST}.*got 1"),
    "settings as a list": (header(settings=[]), f"line 2 settings {MUST}"),
    "a setting that is a list": (header(settings={"hpt.gate": []}), f"line 2 settings hpt.gate .*{MUST}"),
    "a setting of nothing": (header(settings={"hpt.gate": float("nan")}), f"line 2 settings hpt.gate .*{MUST}"),
    "a header that is no JSON": (signed(b"{nothing\n", *GOOD), f"line 2 {MUST}: Invalid JSON"),
    "a header without end": (signed(b'{"settings": ' + b"[" * 200_000 + b"\n", *GOOD), f"line 2.* {MUST}.*recursion"),
    "a header of digits": (signed(b'{"settings": {}, "tokens_saved": ' + b"9" * 5000 + b"}\n"), f"line 2.* {MUST}"),
    # a question
    **{f"{name} below zero": (row(name, -1), f"{LINE4} {name} {MUST}.*got -1") for name in COUNTS},
    **{f"{name} in words": (row(name, "1"), f"{LINE4} {name} {MUST}.*got 1") for name in COUNTS},
    **{f"{name} of nothing": (row(name, None), f"{LINE4} {name} {MUST}.*got None") for name in COUNTS},
    "half a count": (row("drawn", 1.5), f"{LINE4} drawn {MUST}.*got 1.5"),
    "a whole number as a float": (row("drawn", 1.0), f"{LINE4} drawn {MUST}.*got 1.0"),
    "a count of truth": (row("drawn", True), f"{LINE4} drawn {MUST}.*got True"),
    "a count that is none": (row("drawn", float("nan")), f"{LINE4} drawn {MUST}.*got nan"),
    "an endless count": (row("drawn", float("inf")), f"{LINE4} drawn {MUST}.*got inf"),
    "a count beyond all draws": (row("drawn", 2**53 + 1), f"{LINE4} drawn {MUST}.*got {2**53 + 1}"),
    "a count of a thousand digits": (row("drawn", 10**1000), f"{LINE4} drawn {MUST}"),
    "a count of ten thousand digits": (rows(GOOD[0], deep(ROW, "9" * 10_000)), f"{LINE4} {MUST}"),
    "a count that overflows": (rows(GOOD[0], deep(ROW, "1e999")), f"{LINE4} solved {MUST}"),
    "a list without end": (rows(GOOD[0], deep(ROW, "[" * 200_000)), f"{LINE4} {MUST}.*recursion"),
    "a key as a number": (row("key", 7), f"{LINE4} key {MUST}.*got 7"),
    "a key that is a list": (row("key", ["a"]), f"{LINE4} key {MUST}"),
    "graduated as a number": (row("graduated", 1), f"{LINE4} graduated {MUST}.*got 1"),
    "uses that are no list": (row("demo_uses", 3), f"{LINE4} demo_uses {MUST}.*got 3"),
    "uses below zero": (row("demo_uses", [0, -1]), f"{LINE4} demo_uses 1 {MUST}.*got -1"),
    "uses in lists": (row("demo_uses", [[1]]), f"{LINE4} demo_uses 0 {MUST}"),
    "a value less": (rows(GOOD[0], GOOD[1][:-1]), f"{LINE4} demo_uses {MUST}: Field required"),
    "a value more": (rows(GOOD[0], [*GOOD[1], 1]), f"{LINE4} {MUST}"),
    "a question of nothing": (rows(GOOD[0], []), f"{LINE4} key {MUST}: Field required"),
    "a question by names": (rows(GOOD[0], {"key": "b"}), f"{LINE4} {MUST}"),
    "a line that is no JSON": (rows(GOOD[0], b"nothing\n"), f"{LINE4} {MUST}: Invalid JSON"),
    "an empty line": (rows(GOOD[0], b"\n"), f"{LINE4} {MUST}: Invalid JSON"),
    "two questions in a line": (rows(GOOD[0], b'["b"]["c"]\n'), f"{LINE4} {MUST}: Invalid JSON"),
    "a key that is no UTF-8": (rows(GOOD[0], b'["\xff", 0, 0, 0, 0, 0, 0, 0, false, []]\n'), f"{LINE4} {MUST}"),
    "a key twice": (rows(*GOOD, GOOD[0]), "line 6 has the key 'a' again"),
    "more solved than rollouts": (row("solved", 5), f"{LINE4} has more solved than rollouts"),
    "more failures than draws": (row("failures", 2), f"{LINE4} has more .* failures than draws"),
    "more uses than draws": (row("uses", 2), f"{LINE4} has more .* uses .* than draws"),
}  # fmt: skip


@pytest.mark.parametrize("what", CRAFTED)
def test_a_file_that_is_no_history_is_refused_by_name_and_reason(tmp_path, capsys, what):
    content, message = CRAFTED[what]
    path = tmp_path / FILE
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        History.read(str(path))
    assert str(raised.value).startswith(f"{path}: ") and not isinstance(raised.value, OtherVersion)
    assert len(str(raised.value)) < len(str(path)) + 300, "a message, not the file"
    assert cli.main(["history", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.search(message, err.strip()) and str(path) in err and "Traceback" not in err


def test_a_good_file_among_the_crafted_ones_is_read(tmp_path):
    """The crafted files are refused for what was changed in them."""
    path = tmp_path / FILE
    for content in (WHOLE, header(), row("solved", 2), rows(*GOOD)):
        path.write_bytes(content)
        found = History.read(str(path))
        assert found.tokens_saved == 12.5 and found.settings == HEADER["settings"]
        assert [[key, *(getattr(one, name) for name in FIELDS[1:])] for key, one in found.records.items()] == GOOD
        assert saved(found, tmp_path) == WHOLE
    path.write_bytes(row("drawn", 2**53))
    assert History.read(str(path)).of("b").drawn == 2**53


@pytest.mark.parametrize("what", ["nothing", "folder", "locked"])
def test_what_is_no_file_is_refused_by_name(tmp_path, capsys, what, monkeypatch):
    path = tmp_path / FILE
    if what == "folder":
        path.mkdir()
    elif what == "locked":
        path.write_bytes(WHOLE)
        real = open

        def locked(name, *arguments, **named):
            if str(name) == str(path):
                raise PermissionError("not yours")
            return real(name, *arguments, **named)

        monkeypatch.setattr(builtins, "open", locked)
    message = {"nothing": "FileNotFoundError", "folder": "IsADirectoryError", "locked": "PermissionError: not yours"}
    with pytest.raises(UserError, match=f"{path}: no history of verl-hpt can be read from it .{message[what]}"):
        History.read(str(tmp_path))
    assert cli.main(["history", str(tmp_path)]) == 2
    if what == "folder":
        assert "does not exist" not in capsys.readouterr().err


@pytest.mark.parametrize("version", [VERSION - 1, VERSION + 1, 0, -1])
def test_another_version_is_named_whatever_else_the_file_holds(tmp_path, capsys, version):
    path = tmp_path / FILE
    path.write_bytes(b'{"verl_hpt_history": %d, "later": 1}\n\x00\xff' % version)
    with pytest.raises(OtherVersion, match=f"{path}: a history of version {version}; this verl-hpt reads version 3"):
        History.read(str(path))
    assert cli.main(["history", str(tmp_path)]) == 2 and f"version {version};" in capsys.readouterr().err


@pytest.mark.parametrize("content", [npz(), npz()[:100]])
def test_a_file_of_the_earlier_form_is_another_version(tmp_path, capsys, content):
    """Versions 1 and 2 were archives of arrays under another name; whatever such a file holds is not read."""
    path = tmp_path / EARLIER_FILE
    path.write_bytes(content)
    for where in (tmp_path, path):
        with pytest.raises(OtherVersion, match=f"{path}: a history of version 1 or 2; this verl-hpt reads version 3$"):
            History.read(str(where))
    assert cli.main(["history", str(tmp_path)]) == 2 and "version 1 or 2;" in capsys.readouterr().err
    (tmp_path / FILE).write_bytes(WHOLE)
    assert len(History.read(str(tmp_path)).records) == 3, "a checkpoint that has both"


def test_the_file_of_version_3_has_this_first_line():
    """Another name or order is another version: what older runs wrote would be refused, or read as something else."""
    assert (VERSION, FILE, EARLIER_FILE) == (3, "hpt_history.jsonl", "hpt_history.npz")
    assert FIRST_LINE == (
        b'{"verl_hpt_history": 3, "columns": ["key", "solved", "rollouts", "drawn", "failures", "uses", "drawn_at", '
        b'"taught_at", "graduated", "demo_uses"]}\n'
    )


def test_an_empty_history_is_read_back(tmp_path):
    made = History({"hpt.question_key": None, "hpt.gate.metric": "acc", "hpt.gate.finished": True}, 0.0)
    made.save(str(tmp_path / "new" / "folder" / FILE))
    again = History.read(str(tmp_path / "new" / "folder" / FILE))
    assert again == made and not again.records and again.settings["hpt.gate.finished"] is True


def test_a_file_takes_its_place_only_when_it_is_whole_and_on_disk(tmp_path, monkeypatch):
    """In this order: all written, flushed to disk, put in place."""
    done = []
    path = tmp_path / FILE
    real = {"fsync": history.os.fsync, "replace": history.os.replace}

    def record(name):
        def call(*arguments, **named):
            assert not path.exists(), f"{name} comes before the file is in place"
            assert History.read(f"{path}.partial").records, "all of it has left the buffers"
            done.append(name)
            return real[name](*arguments, **named)

        return call

    monkeypatch.setattr(history.os, "fsync", record("fsync"))
    monkeypatch.setattr(history.os, "replace", record("replace"))
    some_history(questions=3, steps=2).save(str(path))  # small enough to stay in a buffer
    assert done == ["fsync", "replace"] and History.read(str(path)).records
    assert [file.name for file in tmp_path.iterdir()] == [FILE]


def test_a_write_that_is_cut_off_leaves_the_former_file(tmp_path, monkeypatch):
    path = tmp_path / FILE
    some_history().save(str(path))
    good = path.read_bytes()

    def cut_off(file):
        raise OSError("no space left")

    monkeypatch.setattr(history.os, "fsync", cut_off)
    with pytest.raises(OSError, match="no space"):
        empty().save(str(path))
    assert path.read_bytes() == good


def test_a_file_is_written_into_the_folder_that_one_stands_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    some_history().save(FILE)
    assert len(History.read(FILE).records) == len(some_history().records)
