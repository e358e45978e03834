"""What `verl-hpt data check` learned of a file."""

from collections import Counter
from dataclasses import dataclass, field


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

    def found(self, check: str, message: str, row: int, name: str, detail: str = "", harmful: bool = True) -> None:
        """Count one more `check`, with the row and the field that show it."""
        finding = self.findings.setdefault(check, Finding(check, message, harmful))
        finding.count += 1
        if len(finding.examples) < 100:
            finding.examples.append({"file": self.file, "row": row, "field": name, "detail": detail[:300]})
