"""A run's config as verl's ``main_ppo`` composes and validates it, and our Run over it: no worker, no Ray, no model.

Refusals and banner come from the same code that trains (``run``, ``refusals``).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import io
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import hydra
import verl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from verl.trainer.ppo.core_algos import kl_penalty
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config

from verl_hpt.errors import UserError, raise_all
from verl_hpt.host import contract
from verl_hpt.host.advantage import OTHER_TRAINER
from verl_hpt.host.run import Run

MAIN = Path(verl.__file__).parent / "trainer" / "main_ppo.py"
ESTIMATOR = "algorithm.adv_estimator"
SWITCH = f"{ESTIMATOR}=hpt"
# Nodes that verl makes a dataclass of, which refuses a key that it does not have.
INSTANTIATED = ("actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model", "algorithm")
# Entry points of verl and of its recipes that people start, and what to do in place of each.
OTHER_ENTRIES = (
    (r"verl\.trainer\.main_ppo_v0", "it is verl's legacy trainer"),
    (r"verl\.trainer\.(fsdp_)?sft_trainer\w*",
     "it is verl's own SFT, which knows no rollouts: ++hpt.method=sft trains on demonstrations alone"),
    (r"verl\.trainer\.main_(generation|eval)\w*", "it trains nothing"),
    (r"(recipe\.dapo|.*)\.main_dapo",
     "its trainer is one of its own; the clip range, the overlong penalty and the token mean are settings of main_ppo "
     "(actor.clip_ratio_high, reward.reward_manager.name=dapo, ++hpt.normalization=token), and the gate stands where "
     "it filters groups"),
    (r"verl\.experimental\.fully_async_policy\..*|verl\.experimental\.one_step_off_policy\..*",
     "its trainer is one of its own; main_ppo has trainer.v1.trainer_mode=colocate_async and separate_async"),
    (r".*", "its trainer is one of its own"),
)  # fmt: skip


def entry_problem(entry: str) -> str | None:
    """Why verl-hpt takes no part in what this entry point starts; None for verl's own main_ppo."""
    name = entry.removesuffix(".py").replace("/", ".").strip(".")
    if name == "verl.trainer.main_ppo" or Path(entry).resolve() == MAIN:
        return None
    why = next(why for pattern, why in OTHER_ENTRIES if re.fullmatch(pattern, name))
    return f"{entry}: hpt trains in `python -m verl.trainer.main_ppo` alone; {why}"


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    """Hydra's own options and the overrides."""
    usage = io.StringIO()
    try:
        with contextlib.redirect_stderr(usage):
            return get_args_parser().parse_args(list(arguments))
    except SystemExit:
        problem = usage.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        problem = f"Hydra does not take these arguments: {problem} (its own options come before all overrides)"
        raise UserError(problem) from None


@contextlib.contextmanager
def _hydra(options: argparse.Namespace) -> Iterator[tuple[Hydra, str]]:
    """Hydra as verl's entry point sets it up, and the config's name."""
    search = create_automatic_config_search_path(str(MAIN), None, options.config_path or "config")
    if options.config_dir is not None:
        folder = os.path.abspath(options.config_dir)
        search.prepend(provider="command-line", path=f"file://{folder}", anchor=SearchPathQuery(provider="schema"))
    GlobalHydra.instance().clear()
    try:
        yield Hydra.create_main_hydra2("main_ppo", search), options.config_name or "ppo_trainer"
    finally:
        GlobalHydra.instance().clear()


def compose(arguments: Sequence[str]) -> DictConfig:
    """verl's config under the arguments of its entry point.

    Raises:
        UserError: Hydra refuses them, or a dataclass of verl's lacks a key; a misspelt one comes with the nearest.
    """
    options = _options(arguments)
    with _hydra(options) as (composer, name):
        try:
            config = _composed(composer, name, options.overrides)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(_composing(error, composer, name, options.overrides)) from None
    try:
        OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"verl's config does not resolve: {_first_line(error)}") from None
    return config


def base_config(arguments: Sequence[str]) -> DictConfig:
    """The same without the overrides, but for the model engine: what the overrides are compared with."""
    options = _options(arguments)
    own = options.config_path or options.config_dir
    where = (options.config_name, options.config_path, options.config_dir, os.getcwd() if own else "")
    return _base(*where, tuple(_engine(options.overrides)))


@functools.cache
def _base(name: str | None, path: str | None, folder: str | None, cwd: str, engine: tuple[str, ...]) -> DictConfig:
    with _hydra(argparse.Namespace(config_name=name, config_path=path, config_dir=folder)) as (composer, found):
        return _composed(composer, found, engine)


def _engine(overrides: Sequence[str]) -> list[str]:
    return [word for word in overrides if word.startswith("model_engine=")]


def _composed(composer: Hydra, name: str, overrides: Sequence[str]) -> DictConfig:
    config = composer.compose_config(name, [*overrides], RunMode.RUN, from_shell=True, with_log_configuration=False)
    with open_dict(config):
        del config["hydra"]
    return config


def _composing(error: Exception, composer: Hydra, name: str, overrides: Sequence[str]) -> str:
    """The message of Hydra's refusal, in few words and with the override that it is about."""
    text = (str(error).strip() or repr(error)).partition("Config search path")[0]
    key = re.search(r"Could not override '([^']+)'", text)
    if key is not None:
        problem = _unknown(_composed(composer, name, _engine(overrides)), key.group(1))
        if problem is not None:
            return f"{problem}; a key that verl's config does not list is set with ++{key.group(1)}=..."
    else:
        for word in overrides:
            try:
                OverridesParser.create().parse_overrides([word])
            except HydraException:
                return f"Hydra cannot read `{word}` ({text.splitlines()[0]}); quote values with special characters"
    lines = [line.strip() for line in text.splitlines() if line.strip() and "https://" not in line]
    return f"verl's config cannot be composed: {' '.join(lines)}"


def _unknown(base: DictConfig, path: str, alike: float = 0.6) -> str | None:
    """That verl's config lacks this key, with the nearest that there is; None where it has it."""
    node, done = base, []
    for name in path.split("."):
        if not OmegaConf.is_dict(node):
            return None
        if name not in node:
            fields = _fields(node.get("_target_"))
            if name in fields:
                return None
            known = {str(key) for key in node} | fields
            near = difflib.get_close_matches(name, known, n=1, cutoff=alike)
            hint = f"; did you mean {'.'.join([*done, near[0]])}?" if near else ""
            return f"{path}: {'.'.join(done) or 'the config'} has no key {name!r}{hint}"
        done.append(name)
        node = OmegaConf.select(base, ".".join(done), throw_on_missing=False)
    return None


def _fields(target: object) -> set[str]:
    """Names of the fields of a dataclass of verl's; none where it is no such thing, or cannot be imported here."""
    if isinstance(target, str):
        with contextlib.suppress(Exception):
            return {field.name for field in dataclasses.fields(hydra.utils.get_class(target))}
    return set()


def added(arguments: Sequence[str], base: DictConfig) -> tuple[list[str], list[str]]:
    """Keys added with + or ++. -> (those at which verl will stop, those that look misspelt and that nothing reads)"""
    parsed = OverridesParser.create().parse_overrides(_options(arguments).overrides)
    fatal, misspelt = [], []
    for override in parsed:
        path = override.key_or_group
        passed_on = re.search(r"kwargs|override", path)  # to Ray, to an engine, to a model's config: verl lists no keys
        if not (override.is_add() or override.is_force_add()) or path.split(".")[0] == "hpt" or passed_on:
            continue
        node, _, name = path.rpartition(".")
        found = OmegaConf.select(base, node, throw_on_missing=False) if node else None
        if node in INSTANTIATED and name not in found:
            fields = _fields(found.get("_target_"))
            if fields and name not in fields:
                fatal.append(f"verl refuses it: {_unknown(base, path)}")
        elif (problem := _unknown(base, path, alike=0.85)) is not None and "did you mean" in problem:
            misspelt.append(problem)
    return fatal, misspelt


def wants(config: DictConfig) -> dict[str, bool]:
    """Which workers verl builds: {"has_reference", "has_critic"}."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {"has_reference": bool(need_reference_policy(config)), "has_critic": bool(need_critic(config))}


def build(config: DictConfig, problems: Sequence[str] = ()) -> tuple[Run, str, list[str]]:
    """The run that would train. -> (it, its banner, notes on checks that cannot be made here)

    Raises:
        UserError: the problems given, and what verl and verl-hpt refuse, together.
    """
    problems, run, banner, has = [*problems], None, io.StringIO(), wants(config)
    problem, note = (None, None) if problems else _validated(config, has)
    problems += [] if problem is None else [f"verl refuses it: {problem}"]
    if "verl_hpt.plugin" not in sys.modules:  # verl was imported above, and loads it
        problems.append("verl does not load the plugin, and would not know hpt: see `verl-hpt doctor`")
    if config.trainer.get("use_v1") is False:
        problems.append(f"trainer.use_v1=False: {OTHER_TRAINER}")
    try:
        with contextlib.redirect_stdout(banner):
            run = Run(config, verl=contract.verl_version(), kl_penalty=kl_penalty, **has)
    except UserError as error:
        head, *rest = str(error).split("\n  - ")
        problems += rest or [head]
    raise_all(problems, "this run would be refused before any model loads:")
    return run, banner.getvalue().rstrip(), [] if note is None else [note]


def _validated(config: DictConfig, has: Mapping[str, bool]) -> tuple[str | None, str | None]:
    """verl's own checks. -> (what they refuse, what could not be checked here)"""
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            validate_config(config, has["has_reference"], has["has_critic"])
            for node in (config.actor_rollout_ref.rollout, config.algorithm):
                omega_conf_to_dataclass(node)
    except Exception as error:  # verl's checks raise what they like
        frames = traceback.extract_tb(error.__traceback__)
        while error.__cause__ is not None:
            error = error.__cause__
            frames += traceback.extract_tb(error.__traceback__)
        # A package of another version, or a model that is not here: another machine trains.
        absent = any(frame.name == "<module>" or "/huggingface_hub/" in frame.filename for frame in frames[1:])
        if isinstance(error, ImportError) or absent:
            return None, f"verl's own checks cannot all be made on this machine: {_first_line(error)}"
        if (
            lacks := re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        ) is not None:
            return f"its {lacks[1]} has no field {lacks[2]!r}", None
        if isinstance(error, (AssertionError, ValueError)) and str(error):
            return _first_line(error), None
        return f"{type(error).__name__}: {_first_line(error)}, in `{frames[-1].line}`", None
    return None, None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
