"""``verl-hpt settings``: every key of node ``hpt`` with its default, what it may be and what it means."""

import argparse
import json

from verl_hpt.config import Settings
from verl_hpt.errors import rows
from verl_hpt.places.schedule import Schedule, Steered
from verl_hpt.places.starts import Adapted, Chunks, Uniform

FORMS = (Schedule, Steered, Uniform, Chunks, Adapted)  # mappings that a key can be in place of a number


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="verl-hpt settings", description=__doc__)
    parser.add_argument(
        "--json", action="store_true", help="a list of {key, type, default, meaning}; no default: set it"
    )
    found = [*rows(Settings, "hpt"), *(row for form in FORMS for row in rows(form, form.__name__.lower()))]
    if parser.parse_args(argv).json:
        print(json.dumps(found, ensure_ascii=False, indent=2))
        return 0
    for row in found:
        default = json.dumps(row["default"], ensure_ascii=False) if "default" in row else "(must be set)"
        print(f"{row['key']} = {default}\n    {row['meaning']}\n    {row['type']}")
    return 0
