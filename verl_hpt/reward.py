"""Rule-based rewards for verl: math-verify, `####` answers, multiple choice and exact match.

    reward.custom_reward_function.path=/…/verl_hpt/reward.py          # compute_score: the grader by data source
    reward.custom_reward_function.name=math_verify                    # or one grader for all rows
    +reward.custom_reward_function.reward_kwargs.timeout=5            # any keyword below

verl calls a synchronous reward function in a thread, where `signal.alarm` cannot be set, so the symbolic grader runs in
processes of its own with a hard limit of time and memory: `9**9**9**9` costs at most the limit, and only its process,
which is replaced. The file stands on its own: verl imports it by path.

The last box alone is graded, as `\\boxed{…}`, `\\fbox{…}` or `\\boxed 5`; boxes side by side are one answer (so
`\\boxed{1} or \\boxed{2}` is no 2), an empty one is none, and without a box the solution's end is read. An expected
letter takes one letter and no hedge; all else goes to math-verify, spelled alike by `reward_worker.tidy`.

Every grader returns the same keys, all finite: `score` and `acc` (1.0 or 0.0), `grading_failed` (1.0 where grading hit
a limit or broke, so that the score 0.0 says nothing about the answer).
"""

import atexit
import collections
import contextlib
import json
import logging
import os
import re
import selectors
import subprocess
import sys
import threading
import time
from fractions import Fraction

logger = logging.getLogger(__name__)
_warned: set[str] = set()  # data sources of rows without an expected answer

TIMEOUT = 10.0  # seconds a call of the symbolic grader may take
WORKERS = 2  # grader processes; verl runs eight reward workers, each with its own
MEMORY_MB = 2048  # address space of a grader process
_START_TIMEOUT = 300.0  # seconds to import SymPy on a busy machine
_TAIL = 4000  # characters at the end of a solution without a box that the symbolic grader looks at
_BOX_SEARCH = 50_000  # characters at a solution's end where a box is looked for
_BOX_TRIES = 20  # boxes that are looked at: a text of nothing but their beginnings must not cost its length squared

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?:(?P<brace>\{)\s*)?")
# What a box without braces holds; a word would be of a sentence about boxes.
_BARE = re.compile(r"(?=[-+.]?\d|\\[A-Za-z]|[A-Za-z](?![A-Za-z]))(?:\{[^{}]*\}|[^\s${}])+")
_BETWEEN = re.compile(r"[ $,;~\\()]{0,9}(?:(?:and|or|\\text *\{ *(?:and|or) *\})[ $~\\()]{0,9})?")  # boxes side by side
_COMMA = r"(?:,|\{,\}|\\,|\\!| (?=\d{3}(?!\d)))"  # between digits, also as LaTeX writes it
_NUMBER = re.compile(
    r"(?:[A-Za-z]*\s*[=:])?\s*(?P<sign>[-+]?)\s*(?:"
    r"(?:(?P<whole>\d+)\s+)?(?P<over>\d+)\s*/\s*(?P<under>\d+)|"
    rf"(?P<digits>(?:\d{{1,3}}(?:{_COMMA}\d{{2,3}})*{_COMMA}\d{{3}}|\d+)(?:\.\d*)?|\.\d+)"
    r"(?P<exponent>[eE][-+]?\d{1,3})?"  # bounded: the number is written out
    r")\s*(?P<unit>\D*)"
)
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# What may follow a number without being a unit: another operand, a variable, a constant.
_NO_UNIT = re.compile(
    r"(?i)(?:or|and|to|out|plus|minus|(?:thi|four|fif|six|seven|eigh|nin|ten|hundred|thousand|million)(?:r?d|th)s?"
    r"|squared|cubed|divided|dozens?|gross|scores?|wrong|negative|inverse|[xyz]+|pi|π)(?![^\W_])|[abeiknqr]$|.*[+*=<>^\\?×÷·≤≥≠~|]"
)
_PLAIN = (  # what stands around a number, and the same in plain text
    (re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\?[$€£]|\\[();:\s]|\*\*|__|`|(?<=\d)~(?=[A-Za-z\d\\])"), " "),
    (re.compile(r"\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}"), r" \1/\2"),
    (re.compile(r"\^?\{?(?:\\circ|\\degree)\}?"), "°"),
    (re.compile(r"(?<=[A-Za-z])(?:\^\{?[23]\}?|[²³])"), ""),  # cm²; x² has a variable all the same
    (re.compile(r"(?<=[A-Za-z])\s*\([^()]*\)"), ""),  # 72 clips (48 + 24)
    (re.compile(r"\\%"), "%"),
    (re.compile("[−–]"), "-"),
    (re.compile(r"(?<=[A-Za-z])\s+(?:in|of|from|by|per|on)\b(?!.*\bor\b).*"), ""),  # 72 boxes of 12; but 1 in 5 is no 1
    (re.compile(r"\s(?:for|after|at|before|since|every)\b(?!.*\bor\b).*"), ""),  # 134 pounds after 2 weeks
)
_LETTER = re.compile(r"\(?([A-Z])\)?\.?")
_CHOICE = re.compile(r"\(?([A-Z])(?:\)?[.:)]|(?=\s+[^\W_])|$)(.*)", re.DOTALL)
# Behind a letter: a joint, another letter in brackets, or letters alone.
_HEDGE = re.compile(
    r"(?s)\W*(?:or|and|nor)\b|.*\b(?:or|maybe|perhaps|possibly|be)\s+\(?[A-J]\b(?!')"
    r"|\s*[,;/&]|.*(?:^|[\s,;/&])\(?[A-J]\)|(?:\W*\b[A-J]\b)+\W*$"
)
_CHOICES = re.compile(r"gpqa|mmlu|mcq|multiple.?choice|(?<![a-z])arc(?:[_-](?:c|e|easy|challenge))?(?![a-z_-])")


def _text(value) -> str:
    """A column's value as text; verl may hand back NumPy scalars and wrappers of a single object."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    return value if isinstance(value, str) else str(value)


def _truths(ground_truth) -> list[str]:
    """The accepted answers: one, or a list of which any will do."""
    if hasattr(ground_truth, "tolist"):
        ground_truth = ground_truth.tolist()
    values = ground_truth if isinstance(ground_truth, list | tuple) else [ground_truth]
    return [t for t in (unboxed(_text(v).strip()) for v in values) if t]


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{…}` (or `\fbox{…}`) whose braces close, else None; looked for near the end."""
    return next((content for _, _, content, _ in _boxes(text, bare=False) if content is not None), None)


def _boxes(text: str, bare: bool = True):
    """The boxes, the last first: its start, its inside's, its content (None where its braces do not close), its end."""
    for box in list(_BOX.finditer(text, max(0, len(text) - _BOX_SEARCH)))[: -_BOX_TRIES - 1 : -1]:
        if box["brace"]:
            depth, end = 1, box.end("brace")
            while depth and end < len(text):
                depth += (text[end] == "{") - (text[end] == "}")
                end += 1
            yield box.start(), box.end(), None if depth else text[box.end("brace") : end - 1], end
        elif bare and (content := _BARE.match(text, box.end())):
            yield box.start(), box.end(), content[0], content.end()


def boxed_answer(text: str) -> str | None:
    """The content of the last box that closes, and of those side by side with it; None without a box."""
    contents, start = [], None
    for box, inside, content, end in _boxes(text):
        if start == inside:  # right around the one before
            if content is None:
                return ""
        elif content is not None and (start is None or _BETWEEN.fullmatch(text, end, start)):
            contents.append(unboxed(content))
        elif start is not None:
            break
        start = box if contents else None
    return (contents[0] and ", ".join(dict.fromkeys(reversed(contents)))) if contents else None


def unboxed(text: str) -> str:
    r"""An expected answer without dollar signs or a `\boxed{…}` around the whole of it."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] == "$" and text.count("$") == 2:
        text = text[1:-1].strip()
    inner = last_boxed(text) if text.startswith("\\boxed{") and text.endswith("}") else None
    return inner.strip() if inner is not None and len(inner) == len(text) - len("\\boxed{}") else text


def _verdict(correct: bool, failed: bool = False) -> dict[str, float]:
    score = 1.0 if correct else 0.0
    return {"score": score, "acc": score, "grading_failed": 1.0 if failed else 0.0}


def _number(text: str) -> Fraction | None:
    """The number that the whole text is, its unit and markup apart; None where it is no number, or more than one."""
    if len(text) > 200:
        return None
    for pattern, plain in _PLAIN:
        text = pattern.sub(plain, text)
    text = unboxed(text.strip(" *_").rstrip(" .,;*_"))
    if (match := _NUMBER.fullmatch(text)) is None:
        return None
    unit = match["unit"].strip()
    named = unit.lstrip("%°/ -")
    if _NO_UNIT.match(named) or (unit and not (unit[0].isalpha() or unit[0] in "%°/")):
        return None
    if match["digits"]:
        value = Fraction(re.sub(_COMMA, "", match["digits"]) + (match["exponent"] or ""))
    elif int(match["under"]):
        value = int(match["whole"] or 0) + Fraction(int(match["over"]), int(match["under"]))
    else:
        return None
    scale = _SCALES.get((named.split() or [""])[0].lower(), 1)
    return (-value if match["sign"] == "-" else value) * scale


def _letters(truths: list[str]) -> list[str]:
    """The expected answers that are a capital letter: `C`, `(C)`."""
    return [letter[1] for letter in map(_LETTER.fullmatch, map(_unmarked, truths)) if letter]


def _chosen(answer: str, letters: list[str]) -> bool | None:
    """Whether an answer is an expected letter and no other; None where it does not begin with a letter."""
    if (choice := _CHOICE.fullmatch(_unmarked(answer))) is None:
        return None
    return choice[1] in letters and not _HEDGE.match(re.sub(rf"\b{choice[1]}\b", "", choice[2]))


def _unmarked(text: str) -> str:
    return _PLAIN[1][0].sub(" ", _PLAIN[0][0].sub(r" \1 ", text)).strip()


def _same_number_or_text(given: str, truth: str) -> bool:
    a, b = _number(given), _number(truth)
    return a == b if a is not None and b is not None else given.strip().casefold() == truth.strip().casefold()


def exact_match(data_source, solution_str, ground_truth, extra_info=None, **kwargs) -> dict[str, float]:
    r"""1.0 where the whole solution, or the content of its last `\boxed{…}`, is an accepted answer, spaces apart."""
    solution = _text(solution_str).strip()
    return _verdict(not {solution, (boxed_answer(solution) or "").strip()}.isdisjoint(_truths(ground_truth)))


def hash_answer(data_source, solution_str, ground_truth, extra_info=None, **kwargs) -> dict[str, float]:
    """GSM8K's own form: 1.0 where what follows the last `####`, to the end of its line, is the expected number."""
    _, mark, tail = _text(solution_str).rpartition("####")
    given = (tail.strip().splitlines() or [""])[0]
    truths = [t.rpartition("####")[2].strip() for t in _truths(ground_truth)]
    return _verdict(bool(mark) and any(_same_number_or_text(given, t) for t in truths))


def multiple_choice(data_source, solution_str, ground_truth, extra_info=None, **kwargs) -> dict[str, float]:
    r"""1.0 where the last `\boxed{…}` holds the expected letter and no other: `D`, `(D)`, `\text{D}`, `(D) 12`.

    A row that expects no letter (an option's number, its text) is `math_verify`'s.
    """
    letters, boxed = _letters(_truths(ground_truth)), boxed_answer(_text(solution_str))
    if not letters:
        return math_verify(data_source, solution_str, ground_truth, extra_info, **kwargs)
    return _verdict(boxed is not None and _chosen(boxed, letters) is True)


def math_verify(
    data_source, solution_str, ground_truth, extra_info=None, timeout=TIMEOUT, workers=WORKERS, memory_mb=MEMORY_MB, **_
) -> dict[str, float]:
    r"""1.0 where math-verify finds the answer equal to an expected one, or it is that very text or letter.

    `timeout`: seconds a call, the wait for a free process apart; `memory_mb` bounds a process's address space.
    """
    solution, truths = _text(solution_str).strip(), _truths(ground_truth)
    boxed = boxed_answer(solution)
    answer = solution if boxed is None else " ".join(boxed.split())
    if not answer or answer in truths:
        return _verdict(bool(answer))  # the same text needs no algebra; math-verify cannot parse every answer there is
    if boxed and (letters := _letters(truths)) and (chosen := _chosen(boxed, letters)) is not None:
        return _verdict(chosen)
    # Without a box the answer stands at the end: a whole chain of thought takes long to search, and has other numbers.
    solution, failed = solution[-_TAIL:] if boxed is None else "\\boxed{" + answer + "}", False
    for truth in truths:
        reply = pool(workers, memory_mb).grade(solution, truth, timeout)
        if reply["score"] > 0:
            return _verdict(True)
        failed = failed or "error" in reply
    return _verdict(False, failed)


GRADERS = {grader.__name__: grader for grader in (math_verify, hash_answer, multiple_choice, exact_match)}


def grader_of(data_source, solution_str: str, grader: str | None = None, graders: dict | None = None):
    r"""The grader of a row: `grader` for all rows, else `graders[data_source]`, else by what the source's name says.

    A name with `gsm8k` takes the `####` form, and the symbolic grader where the solution writes `\boxed{…}` instead;
    one of multiple choice (`gpqa`, `mmlu`, `arc_c`, `multiple_choice`, …) takes that; all others take math-verify.
    """
    source = _text(data_source)
    name = grader or (graders or {}).get(source)
    if name is None:
        lower, boxed = source.lower(), "####" not in solution_str and _BOX.search(solution_str)
        in_hashes = "gsm8k" in lower and not boxed
        name = "multiple_choice" if _CHOICES.search(lower) else "hash_answer" if in_hashes else "math_verify"
    if name not in GRADERS:
        raise ValueError(f"unknown grader {name!r} for data source {source!r}; choose from {sorted(GRADERS)}")
    return GRADERS[name]


def compute_score(
    data_source, solution_str, ground_truth, extra_info=None, grader: str | None = None, graders=None, **kwargs
) -> dict[str, float]:
    """verl's custom reward function: the grader of the row's source; `{"score", "acc", "grading_failed"}`, all finite.

    `grader` (a name in `GRADERS`) fixes one for all rows; `graders` maps data sources to names. A row without an
    expected answer scores 0.0 and is warned of once.
    """
    solution = _text(solution_str)
    if not _truths(ground_truth):
        if (source := _text(data_source)) not in _warned:
            _warned.add(source)
            logger.warning(f"no expected answer (reward_model.ground_truth) on a row of {source!r}: it scores 0")
        return _verdict(False, True)
    return grader_of(data_source, solution, grader, graders)(data_source, solution, ground_truth, extra_info, **kwargs)


def score_and_source(data_source, solution_str, ground_truth, extra_info=None, **kwargs) -> dict:
    """`compute_score`, and the row's source beside it: verl's record of validation answers names no set by itself."""
    score = compute_score(data_source, solution_str, ground_truth, extra_info, **kwargs)
    return {**score, "data_source": _text(data_source)}


class _Died(Exception):
    """A grader process ended, or ran past its limit, before it answered."""


class _Worker:
    """One grader process and the pipes to it; used by one thread at a time."""

    def __init__(self, memory_mb: int):
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "reward_worker.py")
        self.process = subprocess.Popen(
            [sys.executable, script, str(memory_mb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            bufsize=0,
        )
        self._received = b""
        try:
            for stream in (self.process.stdin, self.process.stdout):
                os.set_blocking(stream.fileno(), False)
            self._exchange(b"", _START_TIMEOUT)
        except BaseException:
            self.close()
            raise

    def _exchange(self, request: bytes, limit: float) -> dict:
        deadline, unsent = time.monotonic() + limit, memoryview(request)
        stdin, stdout = self.process.stdin.fileno(), self.process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            if unsent:
                selector.register(stdin, selectors.EVENT_WRITE)
            while b"\n" not in self._received:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise _Died(f"no answer within {limit:g} s")
                for key, _ in selector.select(left):
                    try:
                        if key.fd == stdin:
                            unsent = unsent[os.write(stdin, unsent) :]
                            if not unsent:
                                selector.unregister(stdin)
                            continue
                        data = os.read(stdout, 65536)
                    except OSError as error:
                        raise _Died("the process ended") from error
                    if not data:
                        raise _Died("the process ended")
                    self._received += data
        line, _, self._received = self._received.partition(b"\n")
        try:
            return json.loads(line)
        except ValueError as error:
            raise _Died(f"it wrote {line[:80]!r} instead of an answer") from error

    def grade(self, solution: str, truth: str, limit: float) -> dict:
        # The process ends itself at the limit; the second on top is for one that cannot.
        request = json.dumps({"solution": solution, "truth": truth, "limit": limit}).encode() + b"\n"
        return self._exchange(request, limit + 1.0)

    def close(self) -> None:
        self.process.kill()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


class Pool:
    """At most `workers` grader processes, started when they are first needed and replaced when they die."""

    def __init__(self, workers: int, memory_mb: int):
        self._free = threading.Semaphore(workers)
        self._idle: collections.deque[_Worker] = collections.deque()
        self._memory_mb = memory_mb
        self._pid = os.getpid()

    def grade(self, solution: str, truth: str, limit: float) -> dict:
        """`{"score": float}` and, where grading failed, `"error"`, within `limit` seconds of getting a process."""
        with self._free:
            worker = self._worker()
            try:
                reply = worker.grade(solution, truth, limit)
            except BaseException as error:
                worker.close()
                if isinstance(error, _Died):
                    return {"score": 0.0, "error": str(error)}
                raise
            self._idle.append(worker)
            return reply

    def _worker(self) -> _Worker:
        """An idle process that is alive, or a new one."""
        with contextlib.suppress(IndexError):  # none is idle
            while (worker := self._idle.pop()).process.poll() is not None:
                worker.close()
            return worker
        try:
            return _Worker(self._memory_mb)
        except _Died as died:
            raise RuntimeError(
                "the grader process does not start: check that `python -c 'import math_verify'` works "
                f"with {sys.executable}, and that {self._memory_mb} MB are enough ({died})"
            ) from died

    def close(self) -> None:
        """End the idle processes; those of a process that this one was forked from are left alone."""
        while self._idle and self._pid == os.getpid():
            self._idle.pop().close()


_pools: dict[tuple[int, int, int], Pool] = {}
_pools_lock = threading.Lock()


def pool(workers: int = WORKERS, memory_mb: int = MEMORY_MB) -> Pool:
    """This process's pool of that size; a forked child gets one of its own, for pipes cannot be shared."""
    key = (os.getpid(), workers, memory_mb)
    with _pools_lock:
        if key not in _pools:
            _pools[key] = Pool(workers, memory_mb)
            atexit.register(_pools[key].close)
        return _pools[key]
