"""What we lean on in verl is there, and what is gone is named with who needs it and why."""

import ast
import importlib
import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import verl_config
from datasets import Dataset
from omegaconf import DictConfig, OmegaConf

from verl_hpt.errors import UserError
from verl_hpt.host import contract, refusals
from verl_hpt.host.batch import Group

HOST = Path(contract.__file__).parent
SETTINGS = [path for path, _ in contract.CONFIG]


def resolve(place: str):
    """What a place of the table is, and what holds it."""
    module, _, path = place.partition(":")
    holder, target = None, importlib.import_module(module)
    for name in filter(None, path.split(".")):
        holder, target = target, getattr(target, name)
    return holder, target


def test_this_verl_has_everything_that_we_lean_on():
    assert contract.missing() == []
    assert contract.missing_settings() == []


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (("verl.utils.metric:Gone", (), (), "sums"), "verl.utils.metric.Gone (sums): "),
        (("verl.utils.metric:Metric", ("gone",), (), "sums"), "Metric (sums): has no parameter gone"),
        (("verl.gone:Metric", (), (), "sums"), "verl.gone.Metric (sums): No module named 'verl.gone'"),
        (("verl.utils.metric:Metric", (), ("gone()",), "sums"), "Metric (sums): its source has no gone()"),
        (("verl.utils.metric:Gone", (), ("x",), "sums"), "verl.utils.metric.Gone (sums): "),
    ],
)
def test_what_is_gone_is_named(monkeypatch, entry, says):
    monkeypatch.setattr(contract, "LEANED_ON", (entry,))
    (lacking,) = contract.missing()
    assert says in lacking
    with pytest.raises(UserError, match=r"verl 0\.9\.\d+ lacks what verl-hpt leans on"):
        contract.check()


@pytest.mark.parametrize("entry", contract.LEANED_ON, ids=lambda entry: entry[0])
def test_each_name_parameter_and_piece_is_missed_when_it_alone_is_gone(entry, monkeypatch):
    place, parameters, pieces, why = entry
    holder, target = resolve(place)
    monkeypatch.setattr(contract, "LEANED_ON", (entry,))
    assert contract.missing() == []
    for name in parameters:
        kept = inspect.signature(target)
        fewer = kept.replace(parameters=[p for p in kept.parameters.values() if p.name != name])
        with monkeypatch.context() as patch:
            patch.setattr(contract.inspect, "signature", lambda _, fewer=fewer: fewer)
            (lacking,) = contract.missing()
        assert f"({why}): has no parameter {name}" in lacking
    for piece in pieces:
        without = inspect.getsource(target).replace(piece, "")
        with monkeypatch.context() as patch:
            patch.setattr(contract.inspect, "getsource", lambda _, without=without: without)
            lacking = contract.missing()
        assert any(f"({why}): its source has no {piece}" in line for line in lacking)
    if holder is not None:
        name = place.replace(":", ".").rpartition(".")[2]
        bases = getattr(holder, "__mro__", type(holder).__mro__)  # Ray makes an object of a class
        for owner in (holder, *bases):
            if name in vars(owner):
                monkeypatch.delattr(owner, name)
        (lacking,) = contract.missing()
        assert why in lacking


@pytest.mark.parametrize("path", SETTINGS)
def test_each_setting_is_missed_when_it_alone_is_gone(path):
    config = OmegaConf.create(OmegaConf.to_container(verl_config.compose()))
    parent, _, name = path.rpartition(".")
    del OmegaConf.select(config, parent)[name]
    (lacking,) = contract.missing_settings(config)
    assert f"the setting {path} (" in lacking


# --- the tables name all that the room uses --------------------------------------------------------------------------


def uses_of(path: Path) -> set[str]:
    """Names of verl and TransferQueue that a file imports, calls through `tq.`, or asks of the trainer it extends."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("verl", "transfer_queue"):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.Attribute):
            of_queue = isinstance(node.value, ast.Name) and node.value.id == "tq"
            of_super = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super"
            if of_queue or of_super:
                found.add(node.attr)
    return found - {"__init__", "update"}  # object's and dict's own


@pytest.mark.parametrize("file", sorted(path.name for path in HOST.glob("*.py")))
def test_every_name_of_verl_that_a_file_uses_is_in_the_table(file):
    named = {part for place, *_ in contract.LEANED_ON for part in place.replace(":", ".").split(".")}
    assert uses_of(HOST / file) <= named


def test_every_setting_of_verl_that_a_run_reads_is_in_the_table(monkeypatch, tokenizers, tmp_path):
    """What is read is recorded while runs are built and asked for what a step needs."""
    from tiny_run import changed
    from transformers import AutoTokenizer
    from verl.trainer.ppo.core_algos import kl_penalty

    from verl_hpt.host.run import Run

    nodes, get = [], DictConfig._get_node

    def recorded(self, key, *args, **kwargs):
        node = get(self, key, *args, **kwargs)
        if node is not None and not OmegaConf.is_config(node):
            nodes.append(node)
        return node

    tokenizer = AutoTokenizer.from_pretrained(next(tokenizers.iterdir()))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    for overrides in (
        [],
        ["++hpt.method=ppo", "critic.enable=True", "algorithm.adv_estimator=gae"],
        [
            "++hpt.method=grpo",
            "actor_rollout_ref.actor.use_kl_loss=True",
            "actor_rollout_ref.actor.use_dynamic_bsz=False",
        ],
        ["++hpt.method=asft", "actor_rollout_ref.actor.use_kl_loss=True", "actor_rollout_ref.rollout.temperature=0.7"],
        ["++hpt.method=prefix_rft", "actor_rollout_ref.rollout.n=4"],
        ["++hpt.method=chord_mu", "++hpt.stream.files=experts.parquet"],
        ["++hpt.method=relift"],
    ):
        config = changed(*overrides, f"actor_rollout_ref.model.path={tmp_path}")
        with monkeypatch.context() as patch:
            patch.setattr(refusals, "_host", lambda config: ())  # these look through all of `actor`
            patch.setattr(refusals, "_method", lambda *_: ())
            patch.setattr(DictConfig, "_get_node", recorded)
            run = Run(config, verl="0.9", kl_penalty=kl_penalty, has_reference=True, has_critic=True)
            run.bind_tokenizer(tokenizer)
            run.plan_settings(1, 1), run.loss_spec(), run.question_fields(), run.length_limit(3)
            [run.log_prob_multiple(1, need) for need in ("old_log_prob", "ref_log_prob")]
            run.skipped_rollouts(1, [Group("", [0])], [4]), run.model_type()
            columns = SimpleNamespace(dataframe=Dataset.from_dict({"prompt": ["p"], "target": ["t"]}))
            run.check_columns(columns), run.check_stream(columns, columns)
    read = {node._get_full_key(None) for node in nodes}
    read = {path for path in read if not path.startswith("hpt.")}
    assert len(read) > 25 and read <= set(SETTINGS), read - set(SETTINGS)


@pytest.mark.parametrize(("version", "fine"), [("0.8.9", False), ("0.9.0", True), ("0.9.7", True), ("0.10.0", False)])
def test_versions_of_verl_outside_the_range_are_refused(monkeypatch, version, fine):
    monkeypatch.setattr(contract, "version", lambda name: version)
    if fine:
        assert contract.verl_version() == version
        return
    with pytest.raises(UserError, match=rf"verl {version} is installed; this verl-hpt supports verl>=0.9,<0.10"):
        contract.verl_version()


def test_no_verl_at_all_is_said(monkeypatch):
    def gone(name):
        raise contract.PackageNotFoundError(name)

    monkeypatch.setattr(contract, "version", gone)
    with pytest.raises(UserError, match=r"verl is not installed in this environment; pip install 'verl>=0.9,<0\.10'"):
        contract.verl_version()
