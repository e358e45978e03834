"""The history of questions: which question it is, and what is remembered of it."""

import dataclasses
import hashlib
import io
import json
import os
import time
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from verl.utils.tensordict_utils import get_tensordict

from verl_hpt import gate
from verl_hpt.errors import UserError
from verl_hpt.history import FILE, LISTINGS, Draw, History, Past, Record, identity

# --- which question it is ---------------------------------------------------------------------------------------------


def row(content="2+2?", source="gsm8k", **columns) -> dict:
    return {"data_source": source, "raw_prompt": [{"role": "user", "content": content}], **columns}


def test_an_identity_is_a_hash_of_source_and_prompt_reckoned_without_the_package():
    """What checkpoints have: another way to reckon it would lose every run's history."""
    text = '["gsm8k", [{"content": "Wie groß ist √2?", "role": "user"}]]'
    assert identity(row("Wie groß ist √2?")) == hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    assert identity(row("Wie groß ist √2?")) == f"{10246916772431935664:016x}"
    without_source = text.replace('"gsm8k"', '""').encode()
    assert identity(row("Wie groß ist √2?", None)) == hashlib.blake2b(without_source, digest_size=8).hexdigest()


def test_an_identity_depends_on_source_and_prompt_and_on_nothing_else():
    same = [
        row(prompts=[1, 2], target="ab", index=7),
        row() | {"raw_prompt": [{"content": "2+2?", "role": "user", "name": None}]},
        row() | {"raw_prompt": np.array([{"role": "user", "content": "2+2?"}], dtype=object)},
        row(source=np.str_("gsm8k")),
        {"prompt": row()["raw_prompt"], "data_source": "gsm8k"},
    ]
    keys = [identity(one) for one in same[:-1]] + [identity(same[-1], prompt_key="prompt")]
    assert set(keys) == {identity(row())} and len(keys[0]) == 16
    other = [row("2+3?"), row(source="math"), row() | {"raw_prompt": row()["raw_prompt"] * 2}]
    assert len({identity(one) for one in [row(), *other]}) == 4
    assert identity(row(source=None)) == identity(row(source="")) == identity({"raw_prompt": row()["raw_prompt"]})


def test_a_prompt_of_the_dataset_of_verls_queue_and_of_parquet_is_one_question(tmp_path):
    rows = [row(f"{i} ∑") for i in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    read = pyarrow.parquet.read_table(tmp_path / "data.parquet").to_pylist()
    queue = get_tensordict({name: np.array([*(one[name] for one in rows), None], dtype=object)[:-1] for name in row()})
    cells = [dict(zip(row(), values, strict=True)) for values in zip(*(queue[name] for name in row()), strict=True)]
    assert [identity(one) for one in cells] == [identity(one) for one in rows] == [identity(one) for one in read]


def test_a_text_that_is_no_unicode_has_an_identity():
    assert identity(row("\udc80")) == identity(row("\udc80")) != identity(row("\udc81"))
    assert identity({"id": "\udc80"}, "id") == "\\udc80"


def test_the_column_that_names_questions_is_their_identity_whatever_the_prompt():
    assert identity(row(id="q 7"), "id") == identity(row("other", id="q 7"), "id") == "q 7"
    assert [identity({"id": name}, "id") for name in (0, np.int64(3), "ä", 2.5)] == ["0", "3", "ä", "2.5"]


@pytest.mark.parametrize("nothing", [None, "", " ", float("nan"), np.float64("nan")])
def test_a_row_that_names_no_question_is_refused_with_the_column(nothing):
    with pytest.raises(
        UserError, match=r"its column 'id' \(hpt\.question_key\) names no question; fill it in, or drop"
    ):
        identity({"id": nothing}, "id")
    with pytest.raises(
        UserError, match=r"its column 'raw_prompt' names no question; set hpt\.question_key to a column"
    ):
        identity({"raw_prompt": nothing})
    with pytest.raises(UserError, match="'asked' names no question"):
        identity(row(), prompt_key="asked")


def image(color, size=(4, 3)):
    return Image.new("RGB", size, color)


def test_an_image_belongs_to_the_question_by_its_pixels():
    """verl puts images into the messages; each draw opens them anew."""

    def shown(picture, **more):
        return row([{"type": "image", "image": picture, **more}, {"type": "text", "text": "What is it?"}])

    png = io.BytesIO()
    image("red").save(png, "PNG")
    same = [shown(image("red")), shown(image("red")), shown(Image.open(io.BytesIO(png.getvalue())))]
    other = [shown(image("blue")), shown(image("red", (3, 4))), shown(image("red"), bytes=png.getvalue())]
    assert len({identity(one) for one in same}) == 1
    assert len({identity(one) for one in [same[0], *other]}) == 4
    gray, palette = (Image.frombytes(mode, (4, 3), bytes(12)) for mode in ("L", "P"))
    assert identity(shown(gray)) != identity(shown(palette)), "the same bytes, other colours"
    assert identity(other[2]) == identity(shown(image("red"), bytes=png.getvalue())) != identity(shown("red.png"))


def test_what_a_step_did_cannot_be_changed():
    draw = Draw("a", 0, 4, (), True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        draw.solved = 1


# --- what is remembered -----------------------------------------------------------------------------------------------


def empty() -> History:
    return History({"hpt.question_key": None}, 0.0)


def observe(history, step, solved, taught=None, *, keys=None, n=4, on_rl=None, places=None):
    """One step in which question i had solved[i] of n rollouts solved; on demonstrations where none is, unless said."""
    taught = [count == 0 for count in solved] if taught is None else taught
    keys = range(1, len(solved) + 1) if keys is None else keys
    on_rl = [not one for one in taught] if on_rl is None else on_rl
    places = [(0,) * bool(one) for one in taught] if places is None else places
    history.observe(
        step,
        [
            Draw(f"{int(key):04d}", int(count), n, tuple(shown), bool(rl))
            for key, count, shown, rl in zip(keys, solved, places, on_rl, strict=True)
        ],
    )


def columns(history, *names, questions=1):
    return [[getattr(history.of(f"{key:04d}"), name) for key in range(1, questions + 1)] for name in names]


def listed(history, which) -> list[int]:
    return [int(key) for key in history.listing(which)]


def test_counts_of_draws_failures_and_uses_follow_the_steps():
    history = empty()
    for step, solved in enumerate(([0, 4, 0], [0, 0, 1], [0, 0, 0]), 1):
        observe(history, step, solved)
    names = ("drawn", "failures", "uses", "solved", "rollouts", "drawn_at", "taught_at")
    assert columns(history, *names, questions=3) == [
        [3, 3, 3], [3, 2, 1], [3, 2, 2], [0, 0, 0], [4, 4, 4], [3, 3, 3], [3, 3, 3],
    ]  # fmt: skip
    assert columns(history, "drawn", "taught_at", questions=4)[0] == [3, 3, 3, 0], "an unknown question has zeros"
    assert history.of("new") == Record() and len(history.records) == 3, "a look-up leaves nothing"


def test_graduated_once_a_taught_question_trains_on_solved_rollouts():
    """Question 1 is taught, then solved; 2 is solved from the start; 3 keeps unsolved rollouts (retired)."""
    history = empty()
    observe(history, 1, [0, 2, 0])
    observe(history, 2, [1, 3, 0], taught=[False, False, False])
    assert listed(history, "graduated") == [1]
    observe(history, 3, [0, 3, 1], taught=[True, False, True], on_rl=[False, True, True])
    assert listed(history, "graduated") == [1], "taught while solved is no graduation"
    observe(history, 4, [0, 3, 1], taught=[True, False, False])
    assert sorted(listed(history, "graduated")) == [1, 3]


def test_forgotten_while_a_solved_question_is_not_solved_now():
    history = empty()
    observe(history, 1, [2, 0])
    assert history.totals() == {"questions": 2, "graduated": 0, "forgotten": 0, "never_solved": 1}
    observe(history, 2, [0, 0])
    observe(history, 3, [0, 0])
    assert listed(history, "forgotten") == [1]
    assert listed(history, "never_solved") == [2]
    assert len(history.listing("all")) == 2
    observe(history, 4, [1, 0])
    assert history.totals()["forgotten"] == 0
    assert list(LISTINGS) == ["graduated", "forgotten", "never_solved", "all"]


# A draw: solved of 4, taught on a demonstration, trained on rollouts. Then: what the question is, failures in a row.
TAUGHT, RL, BOTH, NOTHING = (True, False), (False, True), (True, True), (False, False)
CAREERS = [
    ([], "", 0),
    ([(0, TAUGHT)], "never_solved", 1),
    ([(0, RL)], "never_solved", 1),
    ([(0, NOTHING)] * 3, "never_solved", 3),
    ([(1, RL)], "", 0),
    ([(4, TAUGHT)], "", 0),
    ([(0, TAUGHT), (1, RL)], "graduated", 0),
    ([(2, TAUGHT), (1, RL)], "graduated", 0),
    ([(0, TAUGHT), (1, NOTHING)], "", 0),
    ([(0, TAUGHT), (1, BOTH)], "", 0),
    ([(0, BOTH), (1, RL)], "graduated", 0),
    ([(0, TAUGHT), (0, RL)], "never_solved", 2),
    ([(0, RL), (1, RL)], "", 0),
    ([(0, TAUGHT), (1, TAUGHT), (1, RL)], "graduated", 0),
    ([(0, TAUGHT), (0, RL), (0, RL), (4, RL)], "graduated", 0),
    ([(0, TAUGHT), (1, RL), (0, TAUGHT)], "graduated forgotten", 1),
    ([(0, TAUGHT), (1, RL), (0, TAUGHT), (1, TAUGHT)], "graduated", 0),
    ([(1, RL), (0, TAUGHT)], "forgotten", 1),
    ([(1, RL), (0, RL), (0, RL)], "forgotten", 2),
    ([(1, RL), (0, RL), (1, RL)], "", 0),
    ([(1, RL), (0, RL), (1, RL), (0, RL)], "forgotten", 1),
    ([(1, RL), (0, TAUGHT), (1, RL)], "graduated", 0),
]


@pytest.mark.parametrize(("draws", "is_", "failures"), CAREERS)
def test_what_a_question_is_after_its_draws(draws, is_, failures):
    history = empty()
    for step, (solved, (taught, on_rl)) in enumerate(draws, 1):
        observe(history, step, [solved], [taught], on_rl=[on_rl])
    named = [name for name in LISTINGS if name != "all" and history.listing(name)]
    assert named == is_.split()
    assert history.totals() == {"questions": len(history.records)} | {
        name: int(name in named) for name in ("graduated", "forgotten", "never_solved")
    }
    assert columns(history, "failures", "drawn", "uses") == [
        [failures], [len(draws)], [sum(taught for _, (taught, _) in draws)],
    ]  # fmt: skip
    last = [step for step, (_, (taught, _)) in enumerate(draws, 1) if taught][-1:] or [0]
    assert columns(history, "taught_at", "drawn_at", "solved") == [last, [len(draws)], [(draws or [(0,)])[-1][0]]]


def test_a_listing_has_the_records_of_its_questions_in_the_order_in_which_they_came():
    history = empty()
    observe(history, 3, [0, 2], keys=[7, 5])
    observe(history, 4, [0, 0], keys=[7, 5], n=3)
    assert list(history.listing("all").items()) == [
        ("0005", Record(solved=0, rollouts=3, drawn=2, failures=1, uses=1, drawn_at=4, taught_at=4, demo_uses=[1])),
        ("0007", Record(solved=0, rollouts=3, drawn=2, failures=2, uses=2, drawn_at=4, taught_at=4, demo_uses=[2])),
    ]
    assert listed(history, "forgotten") == [5] and listed(history, "never_solved") == [7]
    assert listed(history, "graduated") == []


def test_the_order_of_a_batch_leaves_no_trace():
    draw = np.random.default_rng(1)
    one, other = empty(), empty()
    for step in range(1, 9):
        keys = draw.integers(0, 300, 64)  # some twice in a batch
        solved, taught = draw.integers(0, 3, 64), draw.random(64) < 0.5
        places = [(int(place),) * bool(one) for place, one in zip(draw.integers(0, 4, 64), taught, strict=True)]
        turned = draw.permutation(64)
        observe(one, step, solved, taught, keys=keys, places=places)
        turned_places = [places[i] for i in turned]
        observe(other, step, solved[turned], taught[turned], keys=keys[turned], places=turned_places)
    assert one == other and list(one.records) == list(other.records)


def test_a_question_several_times_in_a_batch_is_so_many_draws_the_unsolved_first():
    history = empty()
    observe(history, 1, [0, 2, 0, 1, 0], keys=[1, 2, 1, 3, 1])
    assert columns(history, "drawn", "failures", "uses", questions=3) == [[3, 1, 1], [3, 0, 0], [3, 0, 0]]
    for solved in ([3, 0, 1], [0, 1, 3]):
        history = empty()
        observe(history, 5, solved, taught=[False] * 3, keys=[1, 1, 1])
        assert columns(history, "drawn", "failures", "solved", "drawn_at") == [[3], [0], [3], [5]]
        assert history.totals() == {"questions": 1, "graduated": 0, "forgotten": 0, "never_solved": 0}
    for order in (1, -1):  # equal scores: the one of fewer rollouts, then the untaught, then the one off RL
        history = empty()
        history.observe(1, [Draw("0001", 1, n, (), True) for n in (4, 2)[::order]])
        assert columns(history, "rollouts") == [[4]]
        history.observe(2, [Draw("0001", 1, 4, places, False) for places in ((0,), ())[::order]])
        history.observe(3, [Draw("0001", 1, 4, (), True)])
        assert columns(history, "uses", "taught_at") == [[1], [2]] and history.totals()["graduated"] == 1


def test_an_empty_step_leaves_the_history_as_it_was(tmp_path):
    history = some_history()
    before = saved(history, tmp_path)
    observe(history, 9, [])
    assert saved(history, tmp_path) == before


def test_uses_of_each_demonstration_are_counted_apart():
    history = empty()
    for step, (key, places) in enumerate([("a", (0, 2)), ("b", (0,)), ("a", (2,)), ("a", (2,)), ("c", ())], 1):
        history.observe(step, [Draw(key, 0, 4, places, False)])
    assert [history.of(key).demo_uses for key in "abcd"] == [[1, 0, 3], [1], [], []]
    assert [history.of(key).uses for key in "abcd"] == [3, 1, 0, 0]


def test_counts_go_on_beyond_what_a_machine_number_holds():
    history = empty()
    observe(history, 2**40, [2**40], n=2**40, taught=[False])
    assert columns(history, "solved", "rollouts", "drawn_at", "taught_at") == [[2**40], [2**40], [2**40], [0]]


# --- checkpoints ------------------------------------------------------------------------------------------------------


def some_history(questions=500, steps=6) -> History:
    draw, history = np.random.default_rng(2), empty()
    for step in range(1, steps):
        keys = draw.integers(0, questions, 128)
        taught, places = draw.random(128) < 0.5, draw.integers(0, 4, 128).tolist()
        shown = [(place,) * bool(one) for place, one in zip(places, taught, strict=True)]
        observe(history, step, draw.integers(0, 5, 128), taught, keys=keys, places=shown)
    history.tokens_saved = 12.5
    return history


def saved(history, folder) -> bytes:
    history.save(str(folder / "saved"))
    return (folder / "saved").read_bytes()


def test_a_restored_history_is_the_same_and_goes_on_the_same(tmp_path):
    one = some_history()
    one.save(str(tmp_path / "global_step_5" / FILE))
    other = History.read(str(tmp_path / "global_step_5"))
    for _ in range(2):
        assert one == other and list(one.records) == list(other.records)
        assert saved(one, tmp_path) == saved(other, tmp_path)
        for history in (one, other):
            observe(history, 9, [0, 1, 2], keys=[5, 9999, 3], places=[(1,), (), ()])
    assert os.listdir(tmp_path / "global_step_5") == [FILE], "nothing is left beside it"


def test_a_file_is_lines_of_json_that_people_and_other_programs_can_read(tmp_path):
    history = History({"hpt.question_key": "id"}, 2.0)
    history.observe(3, [Draw("ä\n", 0, 4, (1,), False)])
    version, header, question, checksum = map(json.loads, saved(history, tmp_path).decode("ascii").splitlines())
    assert version == {"verl_hpt_history": 3, "columns": [
        "key", "solved", "rollouts", "drawn", "failures", "uses", "drawn_at", "taught_at", "graduated", "demo_uses",
    ]}  # fmt: skip
    assert header == {"settings": {"hpt.question_key": "id"}, "tokens_saved": 2.0}
    assert question == ["ä\n", 0, 4, 1, 1, 1, 3, 3, False, [0, 1]] and list(checksum) == ["blake2b"]
    assert History.read(str(tmp_path / "saved")) == history


# --- size and speed ---------------------------------------------------------------------------------------------------


def test_history_is_small_and_a_steps_look_ups_are_quick():
    """64,000 questions, what 500 steps of 128 draw, take less than 20 MiB, and a step's look-ups less than 10 ms of a
    step that takes seconds."""
    tracemalloc.start()
    keys = [hashlib.blake2b(bytes([i % 256, i // 256]), digest_size=8).hexdigest() for i in range(64_000)]
    history = empty()
    for step in range(500):
        part = keys[128 * step : 128 * step + 128]
        history.observe(1000 + step, [Draw(key, 0, 8, (0,), False) for key in part])
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(history.records) == 64_000 and used < 20 * 2**20, used
    seconds = []
    for attempt in range(20):
        asked = keys[128 * attempt : 128 * attempt + 128]
        start = time.thread_time()
        for key in asked:
            history.of(key)
        history.observe(2000, [Draw(key, 0, 8, (0,), False) for key in asked])
        seconds.append(time.thread_time() - start)
    assert min(seconds) < 0.01, seconds


def test_a_gate_reads_the_same_numbers_of_a_question_that_was_never_drawn():
    assert Record().numbers() == gate.NEVER_DRAWN == Past().numbers
