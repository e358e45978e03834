"""The model, the data and the progress display of the recipes for a CPU. Offline.

    python recipes/quickstart_task.py model DIR            # a tiny byte-level Qwen2 with random weights
    python recipes/quickstart_task.py data DIR             # DIR/train.parquet and DIR/val.parquet
    python recipes/quickstart_task.py run RUN_DIR --steps N -- COMMAND...   # run it, show a line every few steps

The task: write a word of five random letters backwards. A demonstration builds the answer letter by letter, in the
form GSM8K's solutions have, with the answer after `####`:

    question       Reverse: badge
    demonstration  e
                   eg
                   egd
                   egda
                   egdab
                   #### egdab

The letters are a to l. Of those 12^5 (248,832) questions 2,048 are trained on and 128 others validate. Random weights
never solve one, so reinforcement learning alone has nothing to reinforce.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time

from verl_hpt.errors import UserError

SOURCE = "verl-hpt/reverse"
ALPHABET = "abcdefghijkl"
LETTERS = 5
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def demonstration(word: str) -> str:
    """The worked solution: the reversed word grows by one letter a line, then stands after `####`."""
    reverse = word[::-1]
    return "\n".join([*(reverse[: i + 1] for i in range(len(reverse))), f"#### {reverse}"])


def row(word: str, split: str, index: int) -> dict:
    """One question as verl's datasets have it, with the demonstration in the column `target`."""
    return {
        "data_source": SOURCE,
        "prompt": [{"role": "user", "content": f"Reverse: {word}"}],
        "ability": "string",
        "reward_model": {"style": "rule", "ground_truth": word[::-1]},
        "extra_info": {"split": split, "index": index},
        "target": demonstration(word),
    }


def questions(train: int = 2048, val: int = 128, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """Rows to train on and rows to validate on; no word is in both."""
    draw = random.Random(seed)
    words: dict[str, None] = {}  # a dict keeps the order of the draw, a set would not
    while len(words) < train + val:
        words["".join(draw.choice(ALPHABET) for _ in range(LETTERS))] = None
    drawn = list(words)
    return (
        [row(word, "train", i) for i, word in enumerate(drawn[val:])],
        [row(word, "val", i) for i, word in enumerate(drawn[:val])],
    )


def write_data(directory: str, train: int, val: int, seed: int) -> None:
    """Write train.parquet and val.parquet into `directory`."""
    import pyarrow
    import pyarrow.parquet

    os.makedirs(directory, exist_ok=True)
    for name, rows in zip(("train", "val"), questions(train, val, seed), strict=True):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), os.path.join(directory, f"{name}.parquet"))


def byte_tokenizer():
    """One token a byte, no merges, and three special tokens; ids below 256 stand for bytes.

    Qwen2's class, because that is what `AutoTokenizer` makes of a Qwen2 model whatever was saved.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocab = {char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        vocab[token] = len(vocab)
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=[],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_model(directory: str, seed: int, max_length: int = 1024) -> int:
    """Write tokenizer and untrained model into `directory`; number of parameters."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=max_length,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)
    return sum(p.numel() for p in model.parameters())


def run(directory: str, command: list[str], steps: int, every: int) -> int:
    """Run a training whose log goes to train.log; print a line every few steps from its metrics.jsonl. Exit status."""
    os.makedirs(directory, exist_ok=True)
    log_path, metrics_path = (os.path.join(directory, name) for name in ("train.log", "metrics.jsonl"))
    if os.path.exists(metrics_path):
        os.remove(metrics_path)  # an older run's lines are not progress
    environment = {**os.environ, "VERL_FILE_LOGGER_PATH": os.path.abspath(metrics_path)}
    start, shown = time.time(), -1
    print(f"Training; verl's own output goes to {log_path}. Ray, trainer and vLLM take about a minute to start.")
    with open(log_path, "wb") as log:
        # A group of its own, so that Ctrl-C reaches the training once, from here, and it can end its workers.
        child = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            while True:
                status = child.poll()
                seen = latest(metrics_path)
                if seen and seen["step"] > shown and (seen["step"] % every == 0 or status is not None):
                    shown = seen["step"]
                    print(progress_line(seen, steps, time.time() - start), flush=True)
                if status is not None:
                    break
                time.sleep(0.5)
        except BaseException:
            os.killpg(child.pid, signal.SIGINT)
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
            raise
    if status != 0:
        with open(log_path, errors="replace") as log:
            sys.stderr.write("".join(log.readlines()[-40:]))
        print(f"The training ended with status {status}; the lines above are the last of {log_path}.", file=sys.stderr)
    return status


def latest(path: str) -> dict | None:
    """The newest value of each curve and the newest step, for a run under way; None before its first line."""
    if not os.path.exists(path):
        return None
    from verl_hpt.tools.report import curves, read

    if not (rows := read(path)):
        return None
    return {"step": rows[-1][0], **{name: points[-1][1] for name, points in curves(rows).items() if points}}


def progress_line(seen: dict, steps: int, seconds: float) -> str:
    """One line of progress from the newest value of each curve."""
    parts = [f"step {seen['step']:4d}/{steps}"]
    for key, name in (
        ("validation_accuracy", "validation"),
        ("solve_rate", "solve rate"),
        ("demo_share", "on demonstrations"),
    ):
        parts.append(f"{name} {'  – ' if seen.get(key) is None else format(seen[key], '.2f')}")
    return " · ".join([*parts, f"{seconds:4.0f} s"])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="quickstart_task.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("model", "data"):
        sub = commands.add_parser(name)
        sub.add_argument("directory")
        sub.add_argument("--seed", type=int, default=0)
        if name == "model":
            sub.add_argument("--max-length", type=int, default=1024, help="longest prompt and response, in tokens")
        else:
            sub.add_argument("--train", type=int, default=2048, help="questions to train on")
            sub.add_argument("--val", type=int, default=128, help="questions to validate on")
    sub = commands.add_parser("run")
    sub.add_argument("directory")
    sub.add_argument("--steps", type=int, required=True)
    sub.add_argument("--every", type=int, default=5)
    ours, training = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args = parser.parse_args(ours)
    if args.command == "model":
        count = write_model(args.directory, args.seed, args.max_length)
        print(f"{args.directory}: Qwen2, {count:,} parameters, random weights, one token a byte")
    elif args.command == "data":
        write_data(args.directory, args.train, args.val, args.seed)
        print(json.dumps(questions(args.train, args.val, args.seed)[0][0], indent=2))
        print(f"{args.directory}: {args.train} questions to train on, {args.val} others to validate on; one is above")
    else:
        if not training:
            raise UserError("nothing to run: give the training's command after `--`")
        return run(args.directory, training, args.steps, args.every)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
