"""The process that runs math-verify, one request a line; started by `verl_hpt.reward`, never imported by it.

A request is a JSON line `{"solution": str, "truth": str, "limit": seconds}`, the answer a JSON line
`{"score": 0.0 | 1.0}` or `{"score": 0.0, "error": str}`. The process bounds itself: it dies even when its parent
is gone or busy: an alarm with the system's default action ends it in the middle of C code, where a Python handler would
never run, and an address-space limit turns a memory blow-up into a MemoryError of this process alone.
"""

import contextlib
import re
import sys

_REASONS = {MemoryError: "out of memory", RecursionError: "nested too deeply"}
_PERCENT = re.compile(r"(?<=[\d}])\s*\\?%")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_FONT = r"\\(?:text\w*|math(?:rm|bf|it|sf)|mbox|boldsymbol|bm)"
_GREEK = r"\\(?:pi|theta|alpha|beta|gamma|delta|phi|omega|lambda|mu|sigma)"
_PARTS = "third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|hundredth|thousandth|millionth"
_NO_UNIT = (  # words behind a number that change it
    r"(?:and|or|plus|minus|times|over|mod|modulo|squared|cubed|factorial|half|halves|quarters?|dozens?|percent|per|"
    rf"(?:{_PARTS})s?|gross|scores?|negative|inverse|wrong|incorrect|divided|choose|"
    r"pi|sqrt|infinity|sin|cos|tan|log|more|less|theta|alpha|beta|gamma|delta)\b"
)
# One spelling for another, of a truth as of an answer, in this order.
_SPELLINGS = (
    # Spaces, as LaTeX spells them too, are one space.
    (re.compile(r"(?<!\\)\\!"), ""),
    (re.compile(r"(?<!\\)\\[,;:> ]|\\q?quad\b|~|\s+"), " "),
    # A currency's sign, and a font around the whole, say nothing.
    (re.compile(r"\\?[$£€]"), ""),
    (re.compile(rf"^ ?{_FONT} ?\{{((?:[^{{}}]|\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}})*)\}} ?\.?$"), r"\1"),
    # Three digits by three are one number: 1 000, 1{,}000, and x = 1,000 where no other comma makes it a list.
    (re.compile(r"(?<![\d.,])\d{1,3}(?:(?: |\{,\})\d{3})+(?!\d)"), lambda number: re.sub(r"\D", "", number[0])),
    (
        re.compile(r"^[^,(\[]*(?<!\\\{)(?<![\d.,({\[])\d{1,3}(?:,\d{3})+(?![\d,])[^,]*$"),
        lambda text: text[0].replace(",", ""),
    ),
    # 1.5e3 is a power of ten, and so is a million; 1 1/2 is a mixed number.
    (re.compile(r"(?<![\w\\}])(\d+(?:\.\d*)?|\.\d+)[eE]([-+]?\d{1,3})(?!\w|\.\d)"), r"\1\\cdot 10^{\2}"),
    (
        re.compile(rf"(?<=\d) ?(\\text\{{ ?|\\mathrm\{{ ?)?({'|'.join(_SCALES)})\b ?"),
        lambda scale: rf"\cdot 10^{{{_SCALES[scale[2]]}}}{scale[1] or ' '}",
    ),
    (re.compile(r"^([-+]?\d+) (\d+) ?/ ?(\d+)$"), r"\1\\frac{\2}{\3}"),
    # A degree has one sign, whatever its scale.
    (re.compile(r" ?\^\{ ?(?:\\degree|°|º) ?\}| ?\^?(?:\\degree\b|°|º)"), "^\\\\circ"),
    (re.compile(r"(?<=\\circ)(?P<close>\}?) ?[CF]$"), r"\g<close>"),
    # An i stands apart: then math-verify counts with complex numbers.
    (re.compile(r"(?<=\d)i\b"), " i"),
    # What a fraction is of stands in braces.
    (re.compile(rf"\\([dtc]?)frac ?({_GREEK}) ?"), r"\\\1frac{\2}"),
    (re.compile(rf"(\\[dtc]?frac ?(?:\{{[^{{}}]*\}}|\d)) ?({_GREEK})"), r"\1{\2}"),
    # What stands before and behind an answer goes: =, about, a full stop.
    (re.compile(r"^(?: |=|\\approx\b|≈)+| ?[.,;:]? *$"), ""),
    # No solution is the empty set.
    (
        re.compile(r"^(?:\\text\{)? ?(?:no (?:real )?solutions?|none) ?\}?$|^(?:\\varnothing|∅|\\\{ ?\\\})$", re.I),
        r"\\emptyset",
    ),
    # Per cent has one sign.
    (
        re.compile(r"(?<=[\d}]) ?(?:\\%|%|per ?cent\b|\\text\{ ?(?:\\?%|per ?cent) ?\})(?: ?\\text ?\{[^{}]*\})?$"),
        r"\\%",
    ),
    # A unit behind a number goes: 12 cm^2, 6 chairs, 60 km/h; a letter alone may be a variable.
    (
        re.compile(
            r"(?<=[\d}])(?:(?: ?(?:[cmkd]m|ft|in|yd|mi|[mk]g|lbs?|oz|hr|min|sec|mph)| ?m(?=\^|²|³)"
            rf"|(?: (?!{_NO_UNIT})[a-z]{{4,}}\b)+)(?:\^\{{?[23]\}}?|²|³)?(?: ?/ ?[a-z]+)?)$"
        ),
        "",
    ),
)
_TEXT = re.compile(rf"{_FONT} ?\{{([^{{}}]*)\}}")
_WORDS = re.compile(r"[^\W\d_](?:[^\W\d_]|[ ,'-])*[^\W\d_]")  # two letters or more: x is not X
# math-verify drops a text behind a number, whatever it says.
_HEDGE = re.compile(rf"{_FONT} ?\{{[^{{}}]*\b(?:or(?! so)|and(?= \d)|not|nor|either|neither)\b ?[^{{}} ][^{{}}]*\}}")
_DECIMAL = re.compile(
    r"([-+]?(?:\d+(?:\.\d*)?|\.\d+))(?: ?\\(?:cdot|times) ?10\^\{?([-+]?\d{1,3})\}?)?"
    rf"(?: ?{_FONT} ?\{{[^{{}}]*\}}.*)?"
)
_EQUALS = re.compile(r"(?<![\\<>!:=])=(?!=|[^{}]*\})")
_NO_VARIABLE = re.compile(
    r"\\(?:[dtc]?frac|sqrt|pi|cdot|times|div|left|right|log|ln|sin|cos|tan|binom|circ|pm|displaystyle)\b"
)


def _limit_memory(megabytes: int) -> None:
    """Bound the address space; platforms without the limit keep the time limit only."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        size = megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def tidy(text: str) -> str:
    r"""An expected or a boxed answer in math-verify's spelling: `1\,000` and `1 000` are 1000, `90°` is `90^\circ`."""
    for pattern, spelling in _SPELLINGS:
        text = pattern.sub(spelling, text)
    return text


def grade(solution: str, truth: str) -> float:
    r"""1.0 where math-verify finds the solution's answer equal to the expected one, else 0.0.

    A solution that is a `\boxed{…}` and nothing else is read whole or not at all; any other is searched for its answer.
    Of an equation every side without a variable must be right, for math-verify takes the last: 5 = 6 is no 6.
    """
    if not (solution.startswith("\\boxed{") and solution.endswith("}")):
        if _verified(solution, truth, boxed=False):
            return 1.0
        bare = [_PERCENT.sub("", text) for text in (solution, truth)]
        # math-verify reads no percent sign inside a box: 62.5\\% equals 62.5 and 62.5% there.
        return grade(*bare) if bare != [solution, truth] else 0.0
    answer, truth = tidy(solution[len("\\boxed{") : -1]), tidy(truth)
    sides = [answer]
    if "=" not in truth and not re.search(r"[,;]|\b(?:and|or)\b", answer):
        *before, last = _EQUALS.split(answer)
        sides = [*(side for side in before if not re.search("[^\\W\\d_]", _NO_VARIABLE.sub("", side))), last]
    return float(all(_same(side, truth) for side in sides))


def _same(answer: str, truth: str) -> bool:
    """Whether they are equal: words in any letter case, an inequality as its interval, all else as math-verify finds.

    A percentage is its number, or that number's hundredth where the other has no sign.
    """
    (answer, hundredths), (truth, of_truth) = ((t.removesuffix("\\%"), t.endswith("\\%")) for t in (answer, truth))
    words, expected = (_TEXT.sub(r" \1 ", text).strip(" .") for text in (answer, truth))
    if words.casefold() == expected.casefold() and _WORDS.fullmatch(words):
        return True
    if _HEDGE.search(answer) and not _HEDGE.search(truth):
        return False
    numbers = [float(f"{m[1]}e{m[2] or 0}") for m in map(_DECIMAL.fullmatch, (answer, truth)) if m]
    if hundredths == of_truth and len(numbers) == 2 and abs(numbers[0] - numbers[1]) > 1e-3 * abs(numbers[1]):
        return False  # math-verify rounds decimals to six places, where 4e-10 is 0.0
    boxed = "\\boxed{" + answer + "}"
    if _verified(boxed, truth, boxed=True):
        return True
    if hundredths and not of_truth:
        return _verified("\\boxed{\\frac{" + answer + "}{100}}", truth, boxed=True)
    return of_truth and not hundredths and _verified(boxed, "\\frac{" + truth + "}{100}", boxed=True)


def _verified(solution: str, truth: str, boxed: bool) -> bool:
    """math-verify's verdict; its own timeouts are off, for this process has its own, harder one."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    searched = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    # Of a box that cannot be read, no number that stands in it is the answer: \\neq 6 is no 6.
    whole = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=not boxed)]
    gold = parse("\\boxed{" + truth + "}", whole, parsing_timeout=None)
    if not gold or all(isinstance(g, str) for g in gold):
        gold = gold + [found for found in parse(truth, searched, parsing_timeout=None) if found not in gold]
    answer = parse(solution, whole if boxed else searched, parsing_timeout=None)
    if any(getattr(g, "is_Symbol", False) for g in gold):  # compared by its name: 0 + i must become i first
        answer += [a.doit() for a in answer if hasattr(a, "doit")]
    return bool(gold and answer and verify(gold, answer, allow_set_relation_comp=True, timeout_seconds=None))


def serve(memory_mb: int) -> None:
    """Answer requests from standard input until it closes."""
    import json
    import logging
    import os
    import signal

    requests = os.fdopen(os.dup(0), "r", encoding="utf-8", newline="\n")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    # What the libraries print must not mix with the answers.
    quiet = os.open(os.devnull, os.O_RDWR)
    os.dup2(quiet, 0)
    os.dup2(quiet, 1)
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    grade("\\boxed{1}", "1")
    _limit_memory(memory_mb)
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in requests:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, request["limit"])
        last = False
        try:
            reply = {"score": grade(request["solution"], request["truth"])}
        except Exception as error:
            # math-verify and SymPy raise whatever a hostile expression provokes; the name goes back to the caller.
            why = next((text for kind, text in _REASONS.items() if isinstance(error, kind)), type(error).__name__)
            reply, last = {"score": 0.0, "error": why}, isinstance(error, MemoryError)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(reply), file=replies, flush=True)
        if last:  # what is left of this process is too tight to trust: make room for a new one
            return


if __name__ == "__main__":
    # Started by path, so this folder stands first on the search path, where its `config.py` would shadow others'.
    sys.path.pop(0)
    serve(int(sys.argv[1]))
