"""A copy of the recipes in an empty folder; its `python` and `verl-hpt` note what they would have started."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
RECIPES = REPO / "recipes"
MODELS = ("qwen2.5_math_7b", "qwen2.5_math_1.5b", "llama3.1_8b")
METHODS = ("hpt", "luffy", "srft", "prefix_rft", "chord_mu", "relift", "grpo", "sft", "sft_then_grpo")
PLACED = {"prefix_rft": "prefix_rft", "chord": "chord_mu", "relift": "relift"}  # recipes of one method
OFFICIAL = ("hpt", "luffy", "srft")

# Stands for python: notes the start of a training or a merge and leaves behind what each would; runs plain scripts.
PYTHON = """#!{python} -S
import json, os, sys
args = sys.argv[1:]
def note(kind, rest):
    with open({calls!r}, "a") as file:
        file.write(json.dumps([kind, rest]) + "\\n")
if "verl.trainer.main_ppo" in args:
    rest = args[args.index("verl.trainer.main_ppo") + 1 :]
    note("train", rest)
    for arg in rest:
        if arg.startswith("trainer.default_local_dir="):
            folder = arg.partition("=")[2]
            os.makedirs(folder + "/global_step_500/actor", exist_ok=True)
            open(folder + "/latest_checkpointed_iteration.txt", "w").write("500")
elif "verl.model_merger" in args:
    note("merge", args[args.index("verl.model_merger") + 1 :])
    os.makedirs(args[args.index("--target_dir") + 1])
elif args and args[0].endswith("/quickstart_task.py"):
    note("python", args)
elif args and args[0].endswith(".py") or args[:1] == ["-c"]:
    os.execv({python!r}, [{python!r}, *args])
else:
    note("python", args)
"""
VERL_HPT = """#!{python} -S
import json, sys
args = sys.argv[1:]
with open({calls!r}, "a") as file:
    file.write(json.dumps(["verl-hpt", args]) + "\\n")
if args[:2] == ["data", "convert"]:
    open(args[3], "w").close()
"""


class Bench:
    """A copy of the recipes in an empty folder, with the stand-ins on PATH."""

    def __init__(self, root: Path):
        self.root, self.calls_file = root, root / "calls.jsonl"
        shutil.copytree(RECIPES, root / "recipes")
        shutil.copy(REPO / "pyproject.toml", root)
        (root / "verl_hpt").mkdir()
        shutil.copy(REPO / "verl_hpt" / "reward.py", root / "verl_hpt")
        programs = root / ".venv" / "bin"  # where the CPU recipes look
        programs.mkdir(parents=True)
        for name, text in (("python", PYTHON), ("verl-hpt", VERL_HPT)):
            program = programs / name
            program.write_text(text.format(python=sys.executable, calls=str(self.calls_file)))
            program.chmod(0o755)
        stamp = subprocess.run(["cksum"], stdin=(root / "pyproject.toml").open(), capture_output=True, text=True)
        (root / ".venv" / ".installed-cpu").write_text(stamp.stdout)
        self.model = root / "model"
        self.model.mkdir()
        (self.model / "config.json").write_text(json.dumps(QWEN))
        (self.model / "model.safetensors").write_text("weights")
        for name in ("aime24", "amc23", "math-500"):
            (root / "outputs" / "eval").mkdir(parents=True, exist_ok=True)
            (root / "outputs" / "eval" / f"{name}.parquet").touch()

    def run(self, recipe: str, *args: str, code: int = 0, **env: str) -> str:
        """Run a recipe; what it said. Its calls are in ``calls``."""
        self.calls_file.write_text("")
        path = f"{self.root / '.venv' / 'bin'}:{os.environ['PATH']}"
        clean = {k: v for k, v in os.environ.items() if k not in ("METHOD", "OFFICIAL", "STEPS", "OUT", "K")}
        done = subprocess.run(
            ["bash", str(self.root / "recipes" / f"{recipe}.sh"), *args],
            env={**clean, "PATH": path, "PYTHON": sys.executable, "MODEL_PATH": str(self.model), **env},
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, f"{recipe} {env}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def calls(self, kind: str) -> list[list[str]]:
        lines = [json.loads(line) for line in self.calls_file.read_text().splitlines()]
        return [rest for this, rest in lines if this == kind]


QWEN = {  # what matters here of Qwen2.5-Math's config.json
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_theta": 10000, "max_position_embeddings": 4096,
    "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1,
    "intermediate_size": 32, "vocab_size": 32,
}  # fmt: skip
