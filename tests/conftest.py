"""The folder on the path, so that tests can import what stands beside them; and which data the tests use."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import made_data


def pytest_configure():
    try:
        made_data.folder()
    except FileNotFoundError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_report_header():
    return made_data.said()
