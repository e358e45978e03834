"""The history's file: what is no history, or a damaged one, is refused with its name and what is wrong."""

import io
import json
import pickle
import re
import struct
import zipfile

import numpy as np
import pytest
from test_history import some_history

from verl_hpt import cli, history_file
from verl_hpt.errors import UserError
from verl_hpt.history import History
from verl_hpt.history_file import ARRAYS, COLUMNS, FILE, VERSION, OtherVersion

GOOD = some_history(questions=40, steps=3).state_dict()
KEYS, PROMPTS = len(GOOD["keys"]), len(GOOD["prompts"])


def archive(arrays) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def changed(**arrays) -> bytes:
    return archive(GOOD | arrays)


def lacking(name) -> bytes:
    return archive({other: array for other, array in GOOD.items() if other != name})


def member(name: str, content: bytes) -> bytes:
    """A good file of which one member's bytes are others."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive(GOOD))) as old, zipfile.ZipFile(out, "w") as new:
        for item in old.namelist():
            new.writestr(item, content if item == f"{name}.npy" else old.read(item))
    return out.getvalue()


def npy(array) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


def header(shape: str) -> bytes:
    """An array's bytes that promise a shape and hold nothing."""
    text = f"{{'descr': '<u8', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def at(name, place, value):
    array = GOOD[name].copy()
    array[place] = value
    return changed(**{name: array})


def depends(value) -> bytes:
    return changed(depends=np.array(value if isinstance(value, str) else json.dumps(value)))


WHOLE = archive(GOOD)
CRAFTED = {
    # no archive of arrays
    "an empty file": (b"", "EOFError: No data left in file"),
    "text": (b"hello, this is no history", "ValueError: .*pickle"),
    "a pickle": (pickle.dumps({"keys": [1, 2]}), "ValueError: .*pickle"),
    "one array": (npy(GOOD["keys"]), "one array, not an archive"),
    "cut in the middle": (WHOLE[: len(WHOLE) // 2], "BadZipFile"),
    "cut at its end": (WHOLE[:-30], "BadZipFile"),
    "an empty archive": (archive({}), "without version, tokens_saved, depends, keys, prompts"),
    "an archive of text": (member("keys", b"no array at all"), "a history whose keys is no array"),
    "bytes turned round": (WHOLE.replace(GOOD["prompts"].tobytes(), GOOD["prompts"][::-1].tobytes()), "prompts: .*CRC"),
    "an array cut short": (member("drawn", npy(GOOD["drawn"])[:-7]), "array drawn: ValueError"),
    "an array of no end": (member("keys", header("(1152921504606846975,)")), "array keys: "),
    "an array of negative length": (member("keys", header("(-5,)")), "array keys: "),
    "an array of objects": (changed(keys=np.array([{}] * KEYS, dtype=object)), "array keys: .*Object arrays"),
    # a version that is none
    "a version of one axis": (changed(version=np.array([VERSION])), r"version has shape \(1,\), not a single value"),
    "a version in words": (changed(version=np.array("2")), "version has type <U1, not int64"),
    "a version of nothing": (changed(version=np.array(np.nan)), "version has type float64, not int64"),
    "a version of truth": (changed(version=np.array(True)), "version has type bool, not int64"),
    # names
    "an unknown array": (changed(solvd=GOOD["solved"]), "unknown array solvd"),
    "two unknown arrays": (changed(b=GOOD["keys"], a=GOOD["keys"]), "unknown array a, b"),
    **{f"no {name}": (lacking(name), f"without {name}$") for name in ARRAYS},
    # types and shapes
    "keys as floats": (changed(keys=GOOD["keys"].astype(float)), "keys has type float64, not uint64"),
    "keys as text": (changed(keys=GOOD["keys"].astype(str)), "keys has type <U20, not uint64"),
    "signed keys": (changed(keys=GOOD["keys"].astype(np.int64)), "keys has type int64, not uint64"),
    "keys of the other end": (changed(keys=GOOD["keys"].astype(">u8")), "keys has type >u8, not uint64"),
    "wide failures": (changed(failures=GOOD["failures"].astype(np.int64)), "failures has type int64, not uint16"),
    "flags of truth": (changed(flags=GOOD["flags"] > 0), "flags has type bool, not uint8"),
    "a table of keys": (changed(keys=GOOD["keys"].reshape(-1, 1)), r"keys has shape \(\d+, 1\), not one axis"),
    "one key for all": (changed(keys=np.array(7, dtype=np.uint64)), r"keys has shape \(\), not one axis"),
    "one row for all": (changed(prompt_rows=np.array(0, dtype=np.int32)), r"prompt_rows has shape \(\), not one axis"),
    "uses of one too many": (
        changed(uses=np.append(GOOD["uses"], [GOOD["uses"][0]])),
        rf"shape \({KEYS + 1},\), its keys",
    ),
    "rows of one too few": (changed(prompt_rows=GOOD["prompt_rows"][1:]), rf"shape \({PROMPTS - 1},\), its prompts"),
    "demo uses of none": (changed(demo_uses=GOOD["demo_uses"][:0]), r"demo_uses has shape \(0,\), its demos"),
    # contents
    "a row below": (at("prompt_rows", 3, -1), f"go from -1 to .* its {KEYS} questions from 0 to {KEYS - 1}$"),
    "a row above": (at("prompt_rows", 0, KEYS), f"prompt_rows go from .* to {KEYS}, its {KEYS} questions"),
    "a key twice": (at("keys", 1, GOOD["keys"][0]), f"keys has 1 of its {KEYS} numbers twice"),
    "the largest key twice": (at("keys", [0, 1], GOOD["keys"].max()), f"keys has [12] of its {KEYS} numbers twice"),
    "two keys twice": (changed(keys=np.append(np.repeat(GOOD["keys"][:2], 2), GOOD["keys"][4:])), "keys has 2 of its"),
    "a prompt twice": (at("prompts", 1, GOOD["prompts"][0]), "prompts has 1 of its"),
    "a demonstration twice": (at("demos", 1, GOOD["demos"][0]), "demos has 1 of its"),
    "tokens of nothing": (changed(tokens_saved=np.array(np.nan)), "tokens_saved is nan, not a number of at least 0"),
    "endless tokens": (changed(tokens_saved=np.array(np.inf)), "tokens_saved is inf"),
    "tokens below zero": (changed(tokens_saved=np.array(-1.0)), "tokens_saved is -1.0"),
    "tokens in words": (changed(tokens_saved=np.array("many")), "tokens_saved has type <U4, not float64"),
    "several tokens": (changed(tokens_saved=np.zeros(2)), r"tokens_saved has shape \(2,\), not a single value"),
    "depends as a number": (changed(depends=np.array(1)), "depends has type int64, not str_"),
    "several depends": (changed(depends=np.array(["{}", "{}"])), "depends has shape"),
    "depends no JSON": (depends("{nothing"), "depends is no JSON"),
    "depends too deep": (depends("[" * 200_000), "depends is no JSON"),
    "depends a list": (depends([1, 2]), "depends does not name identity and flags"),
    "depends without flags": (depends({"identity": {}}), "depends does not name identity and flags"),
    "depends of more": (depends({"identity": {}, "flags": {}, "more": {}}), "depends does not name"),
    "identity a list": (depends({"identity": [], "flags": {}}), "depends does not name"),
    "a gate that is a number": (depends({"identity": {}, "flags": {"hpt.gate": 1}}), "depends does not name"),
}


@pytest.mark.parametrize("what", CRAFTED)
def test_a_file_that_is_no_history_is_refused_by_name_and_reason(tmp_path, capsys, what):
    content, message = CRAFTED[what]
    path = tmp_path / FILE
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        History.read(str(path))
    assert str(raised.value).startswith(f"{path}: ") and not isinstance(raised.value, OtherVersion)
    assert cli.main(["history", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.search(message, err.strip()) and str(path) in err and "Traceback" not in err


def test_a_good_file_among_the_crafted_ones_is_read(tmp_path):
    """The crafted files are refused for what was changed in them."""
    path = tmp_path / FILE
    path.write_bytes(changed())
    for name, value in History.read(str(path)).state_dict().items():
        assert np.array_equal(value, GOOD[name]) and value.dtype == GOOD[name].dtype, name
    assert set(GOOD) == set(ARRAYS)


@pytest.mark.parametrize("what", ["nothing", "folder", "locked"])
def test_what_is_no_file_is_refused_by_name(tmp_path, capsys, what, monkeypatch):
    path = tmp_path / FILE
    if what == "folder":
        path.mkdir()
    elif what == "locked":
        path.write_bytes(WHOLE)

        def locked(*_, **__):
            raise PermissionError("not yours")

        monkeypatch.setattr(np, "load", locked)
    message = {"nothing": "FileNotFoundError", "folder": "IsADirectoryError", "locked": "PermissionError: not yours"}
    with pytest.raises(UserError, match=f"{path}: no history of verl-hpt can be read from it .{message[what]}"):
        History.read(str(path))
    assert cli.main(["history", str(path)]) == 2
    if what == "folder":
        assert "does not exist" not in capsys.readouterr().err


@pytest.mark.parametrize("version", [VERSION - 1, VERSION + 1, 0, -1])
def test_another_version_is_named_whatever_else_the_file_holds(tmp_path, capsys, version):
    """Version 1 had no description of what it depends on."""
    path = tmp_path / FILE
    arrays = {name: array for name, array in GOOD.items() if name != "depends"} | {"later": np.zeros(3)}
    path.write_bytes(archive(arrays | {"version": np.array(version)}))
    with pytest.raises(OtherVersion, match=f"{path}: a history of version {version}; this verl-hpt reads version 2"):
        History.read(str(path))
    assert cli.main(["history", str(tmp_path)]) == 2 and f"version {version};" in capsys.readouterr().err


def test_prompts_may_lead_to_the_first_and_the_last_question_and_there_may_be_none():
    for rows in ([0], [1], [0, 1], []):
        state = {name: np.zeros(2, kind) for name, kind in COLUMNS.items()} | {
            name: History().state_dict()[name] for name in ("version", "tokens_saved", "depends", "demos", "demo_uses")
        }
        state |= {"keys": np.array([5, 6], np.uint64), "prompts": np.arange(1, len(rows) + 1, dtype=np.uint64)}
        history = History()
        history.load_state_dict(state | {"prompt_rows": np.array(rows, np.int32)})
        known, keys = history.keys_of_prompts(np.array([1, 2, 3], np.uint64)[: len(rows)])
        assert known.all() and keys.tolist() == [5 + row for row in rows]


def test_the_file_of_version_2_has_these_arrays():
    """Another name or type is another version: what older runs wrote would be refused, or read as something else."""
    kinds = {name: (np.dtype(kind).name, of) for name, (kind, of) in ARRAYS.items()}
    assert (VERSION, FILE, kinds) == (2, "hpt_history.npz", {
        "version": ("int64", None), "tokens_saved": ("float64", None), "depends": ("str", None),
        "keys": ("uint64", "keys"), "prompts": ("uint64", "prompts"), "prompt_rows": ("int32", "prompts"),
        "demos": ("uint64", "demos"), "demo_uses": ("uint16", "demos"), "solved": ("uint16", "keys"),
        "rollouts": ("uint16", "keys"), "drawn": ("uint32", "keys"), "failures": ("uint16", "keys"),
        "uses": ("uint32", "keys"), "drawn_at": ("int32", "keys"), "taught_at": ("int32", "keys"),
        "flags": ("uint8", "keys"),
    })  # fmt: skip


def test_a_refused_state_leaves_the_history_as_it_was():
    history = some_history(questions=30, steps=2)
    before = {name: value.copy() for name, value in history.state_dict().items()}
    with pytest.raises(UserError, match="tokens_saved is nan"):
        history.load_state_dict(GOOD | {"tokens_saved": np.array(np.nan)})
    for name, value in history.state_dict().items():
        assert np.array_equal(value, before[name]), name


def test_what_it_depends_on_is_read_back(tmp_path):
    history = History()
    history.depends = {"identity": {"hpt.question_key": None, "tokens": "ab"}, "flags": {"hpt.gate": {"success": 0.1}}}
    history.save(str(tmp_path / "new" / "folder" / FILE))
    again = History.read(str(tmp_path / "new" / "folder" / FILE))
    assert again.depends == history.depends and len(again) == 0 and again.tokens_saved == 0.0


def test_a_file_takes_its_place_only_when_it_is_whole_and_on_disk(tmp_path, monkeypatch):
    """In this order: all written, flushed to disk, put in place."""
    done = []
    path = tmp_path / FILE
    real = {"savez": np.savez, "fsync": history_file.os.fsync, "replace": history_file.os.replace}

    def record(name):
        def call(*arguments, **named):
            assert not path.exists(), f"{name} comes before the file is in place"
            if name == "fsync":
                assert len(History.read(f"{path}.partial")) > 0, "all of it has left the buffers"
            done.append(name)
            return real[name](*arguments, **named)

        return call

    monkeypatch.setattr(np, "savez", record("savez"))
    monkeypatch.setattr(history_file.os, "fsync", record("fsync"))
    monkeypatch.setattr(history_file.os, "replace", record("replace"))
    some_history().save(str(path))
    assert done == ["savez", "fsync", "replace"] and len(History.read(str(path))) > 0
    assert [file.name for file in tmp_path.iterdir()] == [FILE]


def test_a_write_that_is_cut_off_leaves_the_former_file(tmp_path, monkeypatch):
    path = tmp_path / FILE
    some_history().save(str(path))
    good = path.read_bytes()

    def cut_off(file, **arrays):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", cut_off)
    with pytest.raises(OSError, match="no space"):
        History().save(str(path))
    assert path.read_bytes() == good


def test_a_file_is_written_into_the_folder_that_one_stands_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    some_history().save(FILE)
    assert len(History.read(FILE)) == len(some_history())
