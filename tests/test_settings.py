"""``verl-hpt settings``: every key with its default and its meaning, from the settings themselves."""

import json
import re
from pathlib import Path

import pytest

from verl_hpt import config
from verl_hpt.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def leaves(node: dict, path: str = "hpt"):
    """Every key of nested dictionaries with its value; an empty one is a value."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{path}.{key}")
        else:
            yield f"{path}.{key}", value


@pytest.fixture
def listed(capsys) -> dict[str, dict]:
    assert main(["settings", "--json"]) == 0
    return {row["key"]: row for row in json.loads(capsys.readouterr().out)}


def test_every_key_is_listed_with_its_default_and_its_meaning(listed):
    for key, default in leaves(config.defaults()):
        assert listed[key]["default"] == default, key
    for key, row in listed.items():
        assert row["meaning"] and row["type"] and "any value" not in row["type"], key


def test_what_stands_under_a_key_that_is_null_or_a_list_is_listed_too(listed):
    assert listed["hpt.history.early_gate.after_failures"]["type"] == "a whole number at least 1"
    assert "default" not in listed["hpt.history.early_gate.after_failures"]
    assert listed["hpt.compose.demos[].estimator"]["default"] == {"advantage": "unit"}
    assert listed["schedule.shape"]["type"] == "one of linear, cosine, step"


def test_bounds_and_choices_are_in_words(listed):
    assert listed["hpt.options.trust"]["type"] == "a number above 0 and at most 1"
    assert listed["hpt.normalization"]["type"].startswith("null or one of question, sequence")


def test_the_table_for_people_says_the_same(listed, capsys):
    assert main(["settings"]) == 0
    text = capsys.readouterr().out
    assert all(f"{key} = " in text and row["meaning"] in text for key, row in listed.items())
    assert "hpt.gate.threshold = 0.0\n" in text and "hpt.compose.demos[].kind = (must be set)" in text


def test_every_setting_that_the_readme_names_exists(listed):
    nodes = {key.rsplit(".", depth)[0] for key in listed for depth in range(1, key.count(".") + 1)}
    for key in re.findall(r"\bhpt\.([a-z_]{2,}(?:\.[a-z_]+)*)", README):  # hpt.x=y stands for any
        assert f"hpt.{key}" in listed or f"hpt.{key}" in nodes, key
    table = README.split("## Settings")[1].split("\n## ")[0]
    for keys, defaults in re.findall(r"(?m)^\| (`hpt\.[^|]+) \| ([^|]+) \|", table):
        for key, default in zip(keys.split(", "), defaults.split(", "), strict=True):
            value = listed[key.strip("`")]["default"]
            assert (json.dumps(value).strip('"') == default.strip("`")) if "`" in default else not value, key
