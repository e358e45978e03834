"""The result of `verl-hpt data check` for people (text, picture) and for machines (JSON)."""

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from verl_hpt.demos.demonstration import REASONS
from verl_hpt.tools import show

FINDINGS = {  # message, and whether it would hurt training
    "eos": ("demonstrations would end with a token at which rollouts do not stop", True),
    "form": ("not in verl's form yet: `verl-hpt data convert` first", True),
    "no column": ("the demonstrations' column is not there (hpt.demo.key)", True),
    "schema": ("rows that verl cannot train on", True),
    "null among": ("nulls among a row's demonstrations (the others would be used)", True),
    **{f"unusable: {reason}": (f"demonstrations: {message}", True) for reason, message in REASONS.items()},
    "json text": ("chat messages written as JSON text: they would be trained on literally", True),
    "think": ("the prompt opens <think> and the demonstration never closes it", False),
    "round trip": ("the tokenizer does not give the text back: it will be trained on as something else", False),
    "prompt": ("prompts that the chat template refuses", True),
    "prompt length": ("prompts too long: verl drops them", False),
    "reward": ("the reward function fails, or gives no finite number", True),
    "grading": ("the grader hit its limit, or broke", False),
    "rejected": ("demonstrations that the reward function does not count as solved", True),
    "duplicate": ("questions that stand in the file more than once", False),
    "contradiction": ("the same question with another expected answer", True),
    "leak": ("rows of validation whose question is in this file", True),
    "left out": ("fields beside the question that no prompt has: rollouts do not see them", False),
    "without": ("questions without a demonstration keep their rollouts", False),
    "nothing usable": ("no demonstration can be trained on", True),
}
_BAR = 40  # characters of the longest bar
_SHOWN_PROMPT, _SHOWN_START, _SHOWN_END = 12, 24, 8  # tokens of a demonstration shown one by one


@dataclass
class Finding:
    """One kind of trouble: how often, where, and whether it would hurt training."""

    check: str
    message: str
    harmful: bool
    count: int = 0
    examples: list[dict] = field(default_factory=list)


@dataclass
class Result:
    """Everything the check learned; the report and the JSON are made from it."""

    file: str
    rows: int = 0
    questions: int = 0  # different ones among the rows
    demonstrations: int = 0
    usable: int = 0
    without: int = 0
    unit: str = "characters"
    grader: str = "the shipped grader, verl_hpt.reward"
    lengths: list[int] = field(default_factory=list)
    prompt_lengths: list[int] = field(default_factory=list)
    rewards: dict[str, list[float]] = field(default_factory=dict)  # data source → [graded, sum, rejected]
    reasons: Counter = field(default_factory=Counter)
    findings: dict[str, Finding] = field(default_factory=dict)
    log_likelihoods: list[float] = field(default_factory=list)
    rendered: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def found(self, check: str, row: int, field: str, detail: str = "") -> None:
        """Count one more of `FINDINGS`, with the row and the field that show it."""
        finding = self.findings.setdefault(check, Finding(check, *FINDINGS[check]))
        finding.count += 1
        if len(finding.examples) < 100:
            finding.examples.append({"file": self.file, "row": row, "field": field, "detail": detail[:300]})

    def ordered(self) -> list[Finding]:
        """The findings, harmful and frequent ones first."""
        return sorted(self.findings.values(), key=lambda finding: (not finding.harmful, -finding.count))

    def harmful(self) -> int:
        return sum(finding.harmful for finding in self.findings.values())


def histogram(values: list[int], bins: int = 12) -> list[tuple[int, int, int]]:
    """(from, to, how many) with round edges of equal width; the last `to` is the largest value."""
    if not values:
        return []
    low, high = min(values), max(values)
    width = max(1, math.ceil((high - low + 1) / bins))
    step = 10 ** max(0, len(str(width)) - 2)
    width = math.ceil(width / step) * step
    low = low // width * width
    counts = Counter((value - low) // width for value in values)
    bins = range((high - low) // width + 1)
    return [(low + i * width, min(low + (i + 1) * width - 1, high), counts[i]) for i in bins]


def quantiles(values: list) -> dict[str, float]:
    """min, p50, p90, p99, max and mean."""
    ordered = sorted(values)
    if not ordered:
        return {}
    shares = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    by_name = {name: ordered[min(len(ordered) - 1, int(q * len(ordered)))] for name, q in shares.items()}
    return {**by_name, "mean": round(sum(ordered) / len(ordered), 4)}


def as_json(result: Result) -> dict[str, Any]:
    """The whole result: `ok`, counts, `findings` with examples by file, row and field, lengths, rewards, tokens."""
    copied = ("file", "rows", "questions", "demonstrations", "usable", "rendered", "notes")
    return {
        "ok": not result.harmful(),
        **{name: getattr(result, name) for name in copied},
        "questions_without": result.without,
        "unusable": dict(result.reasons),
        "findings": [vars(finding) for finding in result.ordered()],
        "lengths": {"unit": result.unit, **quantiles(result.lengths), "histogram": histogram(result.lengths)},
        "prompt_lengths": quantiles(result.prompt_lengths),
        "rewards": {
            source: {"graded": n, "mean": total / n if n else None, "rejected": rejected}
            for source, (n, total, rejected) in sorted(result.rewards.items())
        },
        "log_likelihood": {**quantiles(result.log_likelihoods), "values": result.log_likelihoods},
    }


def text(result: Result, limit: int | None, examples: int = 5) -> str:
    """The readable report; limit: tokens that a response may have."""

    def shown(values: list, form: str = "") -> str:
        return ", ".join(f"{name} {value:{form}}" for name, value in quantiles(values).items())

    lines = [
        f"{result.file}: {result.rows} rows with {result.questions} different questions, "
        f"{result.demonstrations} demonstrations, {result.usable} usable, {result.without} rows without one"
    ]
    for demonstration in result.rendered:
        lines += ["", *_tokens(demonstration)]
    if result.lengths:
        eos, bins = ", EOS included" if result.unit == "tokens" else "", histogram(result.lengths)
        numbers = quantiles(result.lengths)
        lines += ["", f"Length of demonstrations in {result.unit}{eos}"]
        lines += [f"  mean {numbers.pop('mean'):.1f}, " + ", ".join(f"{k} {v}" for k, v in numbers.items())]
        most = max(n for *_, n in bins)
        lines += [f"  {low:>8} to {high:<8} {'█' * math.ceil(_BAR * n / most):<{_BAR}} {n}" for low, high, n in bins]
    if result.unit == "tokens" and limit is not None:
        long = result.reasons["too_long"]
        share = long / max(result.demonstrations, 1)
        lines.append(f"  longer than a response may be ({limit} tokens): {long} ({share:.2%})")
    if result.prompt_lengths:
        lines += ["", f"Length of prompts in tokens: {shown(result.prompt_lengths)}"]
    if result.rewards:
        lines += ["", f"Reward of the demonstrations under {result.grader}"]
    for source, (n, total, rejected) in sorted(result.rewards.items()):
        mean = f"{total / n:.4f}" if n else "-"
        lines.append(f"  {source}: mean {mean} over {n}, not solved {rejected}")
    if count := len(result.log_likelihoods):
        numbers = shown(result.log_likelihoods, ".3f")
        lines += ["", f"Mean log-likelihood a token, over {count} demonstrations, in nats: {numbers}"]
    lines.append("")
    for finding in result.ordered():
        lines.append(f"{'HARM' if finding.harmful else 'warning'}: {finding.message}: {finding.count}")
        distinct = _told_apart(finding.examples)[:examples]
        for example in distinct:
            where = f"row {example['row']}" if example["row"] else "the file"
            detail = f": {example['detail']}" if example["detail"] else ""
            lines.append(f"    {example['file']}: {where}: field `{example['field']}`{detail}")
        if finding.examples and finding.count > len(distinct):
            lines.append(f"    … and {finding.count - len(distinct)} more{_rows(finding.examples, distinct)}")
    harmful = result.harmful()
    lines.append(f"{harmful} kind(s) of trouble would hurt training" if harmful else "nothing here would hurt training")
    return "\n".join([*lines, *(f"note: {note}" for note in result.notes)])


def _told_apart(examples: list[dict]) -> list[dict]:
    """The first of each kind of example: those that differ in numbers and quoted values alone are of one."""
    kinds: dict[tuple[str, str], dict] = {}
    for example in examples:
        words = re.sub(r"""'[^']*'|"[^"]*"|`[^`]*`|\d+""", "…", example["detail"])
        kinds.setdefault((re.sub(r"\d+", "…", example["field"]), words), example)
    return list(kinds.values())


def _rows(examples: list[dict], shown: list[dict]) -> str:
    """The rows of the first few examples that are not shown."""
    rows = [str(example["row"]) for example in examples if example not in shown and example["row"]]
    return f": rows {', '.join(rows[:10])}{', …' if len(rows) > 10 else ''}" if rows else ""


def _tokens(shown: dict) -> list[str]:
    """A demonstration beside its prompt: the prompt's end, then what is trained on, one token a line."""
    prompt, ids = shown["prompt_ids"], shown["ids"]
    trained, lines = ["prompt"] * len(prompt) + ["yes" if one else "no" for one in shown["trained"]], []
    tokens = zip(prompt + ids, trained, shown["prompt_tokens"] + shown["tokens"], strict=True)
    for position, (number, part, token) in enumerate(tokens):
        note = "  ← EOS" if part != "prompt" and number == shown["eos"] else ""
        lines.append(f"  {position:>8} {number:>8}  {part:<7}  {token!r}{note}")
    begin, start = max(0, len(prompt) - _SHOWN_PROMPT), len(prompt) + _SHOWN_START
    end = max(start, len(lines) - _SHOWN_END)
    return [
        f"Row {shown['row']}, as it is trained: {len(prompt)} prompt tokens, then {len(ids)} of the demonstration",
        "  position       id  trained  token",
        *([f"       … {begin} tokens of the prompt before"] if begin else []),
        *lines[begin:start],
        *([f"       … {end - start} more"] if end > start else []),
        *lines[end:],
        f"  EOS among the trained tokens: {shown['eos_count']}",
    ]


def draw(result: Result, path: str, limit: int | None) -> None:
    """The picture: lengths against the limit, what becomes of the demonstrations, rewards, log-likelihoods."""
    blue, red = show.COLOURS[:2]
    with show.picture(path, "--report", 2, 2, (11, 7.5), dpi=110) as (figure, axes):
        lengths, outcome, rewards, likelihood = axes.flat
        lengths.set(title="length of demonstrations", xlabel=result.unit, ylabel="demonstrations")
        if result.lengths:
            lengths.hist(result.lengths, bins=40, color=blue)
        if limit is not None and result.unit == "tokens":
            lengths.axvline(limit, color=red, linestyle="--", label=f"max_response_length {limit}")
            lengths.legend()
        bars = {"usable": result.usable, "question without": result.without, **result.reasons}
        colors = [show.COLOURS[2], "#bbbbbb"] + [red] * len(result.reasons)
        outcome.set_title("what becomes of them")
        outcome.bar_label(outcome.barh(list(bars), list(bars.values()), color=colors))
        outcome.invert_yaxis()
        rewards.set_title("mean reward by data source")
        means = {source: total / n for source, (n, total, _) in sorted(result.rewards.items()) if n}
        if means:
            rewards.bar_label(rewards.barh(list(means), list(means.values()), color=blue), fmt="%.3f")
            rewards.set_xlim(min(0.0, *means.values()), max(1.1, *means.values()))
        else:
            rewards.text(0.5, 0.5, "not graded", ha="center", transform=rewards.transAxes)
        likelihood.set(title="mean log-likelihood a token", xlabel="nats")
        if result.log_likelihoods:
            likelihood.hist(result.log_likelihoods, bins=30, color=blue)
        else:
            likelihood.text(0.5, 0.5, "no --model given", ha="center", transform=likelihood.transAxes)
        figure.suptitle(f"{result.file.replace(chr(92), '/').split('/')[-1]}: {result.rows} rows")
