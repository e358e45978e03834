"""Who may import whom: the mathematics knows no host, the data no host either, and one file knows the trainer."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "verl_hpt"
HOSTS = {"verl", "ray", "transfer_queue", "vllm", "hydra"}
MATH = ("parts", "estimator", "gate", "mixing", "normalize", "advantage")
DATA = (
    "demos",
    "demo_choice",
    "demo_columns",
    "lifecycle",
    "questions",
    "history",
    "history_file",
    "reward",
    "reward_worker",
    "config",
    *(p.stem for p in PACKAGE.glob("data*.py")),
)
FACE = ("cli", "explain", "report", "table", "errors")


def imports(module: str) -> set[str]:
    """Dotted names of all that a module imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("module", MATH)
def test_mathematics_imports_torch_numpy_and_itself(module):
    roots = {name.split(".")[0] for name in imports(module)}
    assert not roots & (HOSTS | {"transformers", "datasets", "pyarrow", "omegaconf"})
    own = {name.split(".")[1] for name in imports(module) if name.startswith("verl_hpt.")}
    assert own <= set(MATH)


@pytest.mark.parametrize("module", [m for m in DATA + FACE if (PACKAGE / f"{m}.py").exists()])
def test_data_and_face_import_no_host(module):
    assert not {name.split(".")[0] for name in imports(module)} & HOSTS


def test_only_the_trainer_imports_verls_trainer_and_its_queue():
    for path in PACKAGE.glob("*.py"):
        touched = {n for n in imports(path.stem) if n.startswith(("verl.trainer", "transfer_queue"))}
        assert not touched or path.stem == "trainer", f"{path.name} imports {touched}"


def test_the_plugin_imports_only_the_standard_library_and_wrapt_at_its_top():
    tree = ast.parse((PACKAGE / "plugin.py").read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {alias.name for node in top for alias in node.names} <= {"os", "wrapt"}


def test_files_have_one_to_450_lines_and_there_is_no_utils():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 450, path.name
        assert path.stem not in ("utils", "util", "helpers", "misc")
