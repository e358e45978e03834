"""Tests and recipes on the path, so that tests can import what lies there; and which data the tests use."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
sys.path.insert(0, str(Path(__file__).parent))

import made_data


def pytest_configure():
    try:
        made_data.folder()
    except FileNotFoundError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_report_header():
    return made_data.said()


@pytest.fixture(scope="module")
def transfer_queue():
    from batches import transfer_queue

    with transfer_queue():
        yield


@pytest.fixture
def queue(transfer_queue):
    """verl's TransferQueue in this process. Every test starts with an empty one, whose fields have no dtype yet."""
    import transfer_queue as tq
    from batches import PARTITION, keys_there

    yield
    if keys_there():
        tq.kv_clear(keys=list(keys_there()), partition_id=PARTITION)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """A folder with the tiny tokenizers, one a style."""
    from tiny_tokenizers import STYLES, tiny

    folder = tmp_path_factory.mktemp("tokenizers")
    for style in STYLES:
        tiny(style).save_pretrained(folder / style)
    return folder


@pytest.fixture
def check_run(capfd, monkeypatch, tmp_path):
    """Run `verl-hpt check-run` in an empty folder. -> (exit status, all that it printed)"""
    from verl_hpt import cli

    monkeypatch.chdir(tmp_path)

    def run(*words: str, data: bool = False, options: tuple = ()) -> tuple[int, str]:
        before = dict(os.environ)
        status = cli.main(["check-run", *options, *([] if data else ["--no-data"]), "--", *words])
        assert dict(os.environ) == before and Path.cwd() == tmp_path
        printed = "".join(capfd.readouterr())
        assert "Traceback" not in printed
        return status, printed

    return run


@pytest.fixture(params=[100, 20_000], ids=["small groups", "one group"])
def group_rows(request, monkeypatch):
    """Types are the same whether a late value stands in the first group of rows or in a later one."""
    from verl_hpt.data import write

    monkeypatch.setattr(write, "_GROUP_ROWS", request.param)
