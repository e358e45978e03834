"""The data of a run, as its config names it, through `verl-hpt data check`: the run's tokenizer, limits and reward."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import pyarrow.parquet as pq
from omegaconf import DictConfig, OmegaConf

from verl_hpt.data import check, report
from verl_hpt.data.commands import add_check
from verl_hpt.data.read import BadRow, count_rows, file_kind, read_rows
from verl_hpt.errors import UserError
from verl_hpt.host.run import Run


class Table:
    """Columns of training files, read when they are asked for: what verl's dataset has in ``dataframe``."""

    def __init__(self, files: list[str]):
        self.files = files

    @cached_property
    def column_names(self) -> list[str]:
        names = [self._names(file) for file in self.files]
        return [name for name in names[0] if all(name in others for others in names)]

    def _names(self, file: str) -> list[str]:
        if file_kind(file) == "parquet":
            return pq.ParquetFile(file).schema_arrow.names
        return list(next((row.values for row in read_rows(file)), {}))

    def __getitem__(self, name: str) -> Iterator:
        for file in self.files:
            if file_kind(file) == "parquet":
                for batch in pq.ParquetFile(file).iter_batches(columns=[name]):
                    yield from batch.column(0).to_pylist()
            else:
                yield from (row.values.get(name) for row in read_rows(file))

    def __len__(self) -> int:
        return sum(count_rows(file) or sum(1 for _ in read_rows(file)) for file in self.files)


def named_files(config: DictConfig, key: str) -> list[str]:
    """Files of ``data.train_files`` or ``data.val_files``."""
    files = OmegaConf.select(config, f"data.{key}")
    return [str(file) for file in (files if OmegaConf.is_list(files) else [files] if files else [])]


def missing_files(config: DictConfig, run: Run) -> list[tuple[str, str]]:
    """Files that are trained on and not on this machine, each with the key that names it."""
    named = {"data.train_files": named_files(config, "train_files"), "hpt.stream.files": run.stream_files}
    return [(key, file) for key, files in named.items() for file in files if not Path(file).is_file()]


def check_data(config: DictConfig, run: Run, options: argparse.Namespace) -> Iterator[tuple[str, bool]]:
    """Reports on the training files that are there, each with whether training would be hurt.

    options: limit, tokenizer and reward in place of the run's own.
    """
    files = [file for file in named_files(config, "train_files") if Path(file).is_file()]
    if not files:
        return
    try:
        run.check_columns(argparse.Namespace(dataframe=Table(files)))
    except BadRow as bad:
        yield f"HARM: {bad}", True
        return
    except UserError as error:
        yield f"HARM: {error}", True
    if not run.reads_demos:
        beside = " there" if run.stream_files else ""
        yield f"method {run.method.name} reads no demonstrations{beside}; the files are not looked into further", False
        files = [file for file in run.stream_files if Path(file).is_file()]
        if not files:
            return
    arguments, notes = _arguments(config, run, options)
    for file in files:
        try:
            result = check.check(_parsed([file, *arguments], run))
        except (BadRow, UserError) as error:
            yield f"HARM: {error}", True
            continue
        result.notes += notes
        yield report.text(result, int(config.data.max_response_length)), bool(result.harmful())


def _parsed(arguments: list[str], run: Run) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="verl-hpt data check", allow_abbrev=False)
    add_check(parser)
    args = parser.parse_args(arguments)
    for name, column in run.settings.demo.columns().items():
        setattr(args, f"column_{name}", column)
    # The check grades by score; where the gate reads another number, the scores are shown and nothing is rejected.
    args.success = run.settings.gate.success if run.settings.gate.metric is None else -math.inf
    return args


def _arguments(config: DictConfig, run: Run, options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Options of `data check` that say what the run's config says, and notes on what cannot be checked here."""
    data, demo, notes = config.data, run.settings.demo, []
    arguments = ["--prompt-key", data.prompt_key, "--demo-key", demo.key]
    for name in ("max_prompt_length", "max_response_length"):
        arguments += [f"--{name.replace('_', '-')}", str(data[name])]
    kwargs = data.get("apply_chat_template_kwargs")
    if kwargs:
        arguments += ["--template-kwargs", json.dumps(OmegaConf.to_container(kwargs, resolve=True))]
    if demo.eos is not None:
        arguments += ["--eos", str(demo.eos)]
    if options.limit is not None:
        arguments += ["--limit", str(options.limit)]
    for file in named_files(config, "val_files"):
        if Path(file).is_file():
            arguments += ["--val", file]
        else:
            notes.append(f"data.val_files: {file} is not on this machine; leaks into it were not looked for")
    tokenizer, why = _tokenizer(config, options)
    arguments += [] if tokenizer is None else ["--tokenizer", tokenizer]
    reward, kwargs, how = _reward(config, options)
    arguments += ["--reward", reward, "--reward-kwargs", json.dumps(kwargs)]
    if run.settings.gate.metric is not None and reward != "none":
        notes.append(f"the gate reads {run.settings.gate.metric}: scores are shown here, and none is judged")
    return arguments, [*notes, *why, *how]


def _tokenizer(config: DictConfig, options: argparse.Namespace) -> tuple[str | None, list[str]]:
    """The run's tokenizer, and why not, where it is not on this machine; nothing is downloaded."""
    if options.tokenizer is not None:
        return options.tokenizer, []
    model = config.actor_rollout_ref.model
    path = str(model.get("tokenizer_path") or model.path)
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(path, trust_remote_code=bool(model.get("trust_remote_code")))
    except Exception as error:  # whatever transformers raises where there is none, or no network
        if Path(path).exists():
            raise UserError(f"actor_rollout_ref.model.path={path}: its tokenizer cannot be loaded: {error}") from None
        why = "nothing is downloaded here; --tokenizer PATH names another"
        return None, [f"actor_rollout_ref.model.path={path}: its tokenizer is not on this machine ({why})"]
    return path, []


def _reward(config: DictConfig, options: argparse.Namespace) -> tuple[str, dict, list[str]]:
    """The run's reward function as `--reward` of `data check`, its arguments, and notes."""
    if options.reward is not None:
        return options.reward, {}, []
    own, manager = config.reward.custom_reward_function, config.reward.reward_manager.name
    notes = [] if manager == "naive" else [f"reward.reward_manager.name={manager}: what it adds is not in these scores"]
    if own.path:
        kwargs = OmegaConf.to_container(own.get("reward_kwargs") or OmegaConf.create({}), resolve=True)
        return f"{own.path}:{own.name}", kwargs, notes
    if config.reward.reward_model.enable:
        return "none", {}, ["reward.reward_model.enable=True: a model scores, so nothing was graded here"]
    return "verl", {}, notes  # verl's own scorer by data source
