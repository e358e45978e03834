"""The house's rules that import-linter (`lint-imports`, in tests/run.sh) cannot hold."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "verl_hpt"


def test_the_plugin_imports_only_the_standard_library_and_wrapt_at_its_top():
    tree = ast.parse((PACKAGE / "plugin.py").read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {alias.name for node in top for alias in node.names} <= {"os", "wrapt"}


def test_files_have_one_to_450_lines_and_no_name_of_their_folders_or_of_nothing():
    for path in PACKAGE.rglob("*.py"):
        assert 1 <= len(path.read_text(encoding="utf-8").splitlines()) <= 450, path.name
        assert path.stem not in ("utils", "util", "helpers", "misc", path.parent.name), path
        assert not path.stem.startswith(f"{path.parent.name}_"), path


def test_public_names_are_imported_when_they_are_asked_for():
    import verl_hpt

    assert {"Estimator", "Method", "METHODS", "part", "register_gate", "DEMO"} <= set(dir(verl_hpt))
    assert verl_hpt.METHODS["hpt"].name == "hpt" and verl_hpt.DEMO.zone == "demo"
    assert all(getattr(verl_hpt, name) is not None for name in verl_hpt.__all__)
    try:
        verl_hpt.no_such_name  # noqa: B018
    except AttributeError as error:
        assert "no_such_name" in str(error)
    else:
        raise AssertionError("an unknown name")
