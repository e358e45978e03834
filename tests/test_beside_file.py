"""What a killed run finds again of what stands beside its batches; files that are none of ours are refused."""

import json
import random
from collections import Counter
from functools import cache, partial

import numpy as np
import pytest
from test_beside import ADAPTED, BUFFER, ENTROPY, PLAIN, SOLVED, STEERED, STREAM, beside, demo, of_question, opened

from verl_hpt.errors import UserError
from verl_hpt.host.beside import FILE, KEPT, Beside, entry


def everything(**node) -> Beside:
    """All that a run can keep, at once; no method has all of it."""
    made = opened(STEERED, targets=["ab", None, "cd", "efg", "", "hi", "jk"], **node)
    buffer, adapts = beside(BUFFER, buffer={"size": 6}), beside(ADAPTED)
    made.buffer, made.length, made.start = buffer.buffer, adapts.length, adapts.start
    return made


def one_step(made: Beside, step: int) -> list:
    """What a step takes, collects and tells, from its number alone."""
    draw = random.Random(step)
    new = []
    for _ in range(draw.randint(0, 4)):
        text = "".join(draw.choice("abcdef") for _ in range(draw.randint(1, 6)))
        values = {"token_weights": np.array([draw.random() for _ in range(len(text) + 1)]), "source": "Ö"}
        new.append(entry(of_question(f"q{draw.randrange(15)}"), demo(text, **values), 1.0, step))
        new[-1].old_log_probs = [-draw.expovariate(1.0) for _ in new[-1].ids]
    counts = Counter()
    streamed = [one.state() for one in made.from_stream(step, counts)]
    parts = [[one.state() for one in part] for part in made.from_buffer(new)]
    lengths = made.amounts("q", 0, 4, step)
    told = made.after(step, {ENTROPY: draw.random(), SOLVED: draw.random()})
    return [streamed, dict(counts), parts, [one.state() for one in made.buffer.entries], lengths, told]


STEPS = 40


@cache
def uninterrupted() -> list[list]:
    whole = everything()
    return [one_step(whole, step) for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("kill", range(10))
def test_a_killed_run_goes_on_with_the_same_demonstrations_and_numbers(tmp_path, kill):
    """Ten runs, killed at random moments, some of them in the middle of a step; a checkpoint every few steps."""
    draw = random.Random(kill)
    last, every = draw.randrange(3, STEPS - 5), draw.randint(1, 4)
    expected = uninterrupted()
    assert {len(one[3]) for one in expected} > {1, 2, 3} and max(len(one[2]) for one in expected) == 1
    run, saved = everything(), 0
    run.save(str(tmp_path / "0"))
    for step in range(1, last + 1):
        assert one_step(run, step) == expected[step - 1]
        if step % every == 0:
            saved = step
            run.save(str(tmp_path / str(step)))
    if draw.random() < 0.5:
        run.from_stream(last + 1, Counter())
    resumed = everything()
    resumed.load(str(tmp_path / str(saved)))
    assert [one_step(resumed, step) for step in range(saved + 1, STEPS + 1)] == expected[saved:]


@pytest.mark.parametrize(
    ("make", "words"),
    [(opened, ["the stream"]), (partial(beside, BUFFER), ["the buffer"]), (partial(beside, ADAPTED), [KEPT["length"]]),
     (partial(opened, STEERED), ["the stream", "the steered λ"]), (everything, list(KEPT.values()))],
    ids=["stream", "buffer", "length", "stream and λ", "everything"],
)  # fmt: skip
def test_a_checkpoint_without_the_state_stops_the_run_unless_it_may_start_anew(tmp_path, caplog, make, words):
    made, free = make(), make(history={"on_missing": "empty"})
    assert made.matters == words
    with pytest.raises(UserError) as raised:
        made.load(str(tmp_path))
    lost = f"the checkpoint has no state of {', '.join(words)} ({tmp_path / FILE} does not exist)"
    assert str(raised.value) == (
        f"{lost}, and would start anew. Resume from a checkpoint that has it, or set hpt.history.on_missing=empty"
    )
    assert not caplog.messages
    free.load(str(tmp_path))
    assert caplog.messages == [f"{lost}; it starts anew"]
    for folder, run in (("anew", make()), ("loaded", free)):
        run.save(str(tmp_path / folder))
    assert (tmp_path / "anew" / FILE).read_bytes() == (tmp_path / "loaded" / FILE).read_bytes()


def test_the_state_of_another_method_is_a_missing_one(tmp_path, caplog):
    beside(BUFFER).save(str(tmp_path))
    lost = rf"no state of the stream, the steered λ \({tmp_path / FILE} has none\)"
    with pytest.raises(UserError, match=lost):
        opened(STEERED).load(str(tmp_path))
    opened(STEERED, history={"on_missing": "empty"}).load(str(tmp_path))
    assert "it starts anew" in caplog.text
    opened(STEERED).save(str(tmp_path))
    opened(STREAM).load(str(tmp_path))  # the stream is there; its λ follows a schedule
    opened(STEERED, targets="abcdefghijk").load(str(tmp_path))


def test_methods_that_keep_nothing_write_nothing_and_read_nothing(tmp_path):
    for method in PLAIN:
        made = beside(method)
        assert made.matters == []
        made.save(str(tmp_path / method))
        assert not (tmp_path / method).exists()
        (tmp_path / FILE).write_text("no JSON")
        made.load(str(tmp_path))


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    made = everything()
    made.save(str(tmp_path))
    before = (tmp_path / FILE).read_bytes()
    one_step(made, 1)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr("os.fsync", lambda number: (_ for _ in ()).throw(OSError("full")))
        made.save(str(tmp_path))
    assert (tmp_path / FILE).read_bytes() == before
    made.save(str(tmp_path))
    assert (tmp_path / FILE).read_bytes() != before and [path.name for path in tmp_path.iterdir()] == [FILE]


def saved_state(folder) -> dict:
    made, step = everything(), 0
    while not (made.buffer.entries and made.solve_rates):
        one_step(made, step := step + 1)
    made.save(str(folder))
    return json.loads((folder / FILE).read_text())


WRONG = {
    "another version": {"verl_hpt_beside": 2}, "no version": {"verl_hpt_beside": ...}, "no stream": {"stream": ...},
    "a stream in words": {"stream": "here"}, "a stream as a list": {"stream": [7, 0, 3]},
    "a stream elsewhere": {"stream": {"rows": 7, "epoch": 0, "position": 8}}, "a buffer as text": {"buffer": ""},
    "a buffer by name": {"buffer": {}}, "a buffer of numbers": {"buffer": [1]}, "a buffer of nothing": {"buffer": [{}]},
    "λ in words": {"steered": "0.5"}, "λ as a list": {"steered": [0.5]}, "λ of nothing": {"steered": float("nan")},
    "λ of truth": {"steered": True}, "an endless length": {"length": float("inf")}, "a length by name": {"length": {}},
    "rates as a number": {"solve_rates": 1}, "rates in words": {"solve_rates": ["a"]}, "no rates": {"solve_rates": ...},
}  # fmt: skip


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG.keys())
def test_a_state_with_wrong_values_is_refused_and_the_file_named(tmp_path, changes):
    state = {name: value for name, value in (saved_state(tmp_path) | changes).items() if value is not ...}
    (tmp_path / FILE).write_text(json.dumps(state))
    with pytest.raises(
        UserError, match=rf"^{tmp_path / FILE}: cannot be read .*Resume from another checkpoint, or delete"
    ):
        everything().load(str(tmp_path))


def test_files_of_another_size_are_refused_and_the_file_named(tmp_path):
    opened(targets="abcd").save(str(tmp_path))
    with pytest.raises(UserError, match=rf"^{tmp_path / FILE}: hpt\.stream\.files have 5 .*, and had 4 "):
        opened(targets="abcde").load(str(tmp_path))


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"\x80\x00\xff", b"null", b"5", b"[]", b"{}", b'"verl_hpt_beside"', b"[" * 200_000, b"PK\x03"],
)
def test_a_file_that_is_none_of_ours_is_refused_and_named(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    for make in (opened, everything, lambda: beside(BUFFER)):
        with pytest.raises(UserError, match=rf"^{tmp_path / FILE}: cannot be read"):
            make().load(str(tmp_path))


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    saved_state(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        (tmp_path / FILE).write_bytes(whole[:length])
        with pytest.raises(UserError, match=FILE):
            everything().load(str(tmp_path))


def test_a_folder_where_the_file_should_be_is_refused(tmp_path):
    (tmp_path / FILE).mkdir()
    with pytest.raises(UserError, match="IsADirectoryError"):
        opened().load(str(tmp_path))
