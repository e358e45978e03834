"""A local copy of a model with another rotary base, longer positions or a chat template; its weights are links.

    python recipes/local_model.py Qwen/Qwen2.5-Math-7B DIR --rope-theta 40000 --max-position-embeddings 16384
    python recipes/local_model.py meta-llama/Llama-3.1-8B DIR --chat-template recipes/llama_question_answer.jinja

Why a copy, and not `actor_rollout_ref.model.override_config`: verl gives that to the trainer only, vLLM reads the
model's own config.json. And with transformers 5 (which verl 0.9 needs) an overridden `rope_theta` has no effect even in
the trainer: the base is read from `rope_parameters`, which verl's override cannot reach into.
"""

import argparse
import json
import os
import sys
from pathlib import Path


def with_changes(config: dict, rope_theta: float | None, max_position_embeddings: int | None) -> dict:
    """config.json's content with the changes; the rotary base in the old place and, where there is one, in the new."""
    config = dict(config)
    if max_position_embeddings is not None:
        config["max_position_embeddings"] = max_position_embeddings
    if rope_theta is not None:
        config["rope_theta"] = rope_theta
        if isinstance(config.get("rope_parameters"), dict):
            config["rope_parameters"] = {**config["rope_parameters"], "rope_theta": rope_theta}
    return config


def make(source: Path, out: Path, rope_theta, max_position_embeddings, chat_template: Path | None) -> None:
    """Fill `out` with links to every file of `source`, except those that change."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    changed = {"config.json": json.dumps(with_changes(config, rope_theta, max_position_embeddings), indent=2)}
    if chat_template is not None:
        changed["chat_template.jinja"] = chat_template.read_text(encoding="utf-8")
    out.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        link = out / file.name
        link.unlink(missing_ok=True)
        if file.is_file() and file.name not in changed:
            link.symlink_to(os.path.realpath(file))
    for name, text in changed.items():
        (out / name).write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("source", help="folder, or a model's name on the Hugging Face hub (downloaded)")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--rope-theta", type=float)
    parser.add_argument("--max-position-embeddings", type=int)
    parser.add_argument("--chat-template", type=Path, metavar="FILE")
    args = parser.parse_args()
    source = Path(args.source)
    if not source.is_dir():
        from huggingface_hub import snapshot_download

        source = Path(snapshot_download(args.source, ignore_patterns=["original/*", "*.pth", "*.gguf"]))
    if source.resolve() == args.out.resolve():
        print(f"error: source and copy are the same folder, {source}", file=sys.stderr)
        return 2
    make(source, args.out, args.rope_theta, args.max_position_embeddings, args.chat_template)
    print(f"{args.out}: config.json changed, weights are links to {source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
