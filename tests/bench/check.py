"""Time `verl-hpt data check` on 46,000 demonstrations of about 4,000 tokens, beside the bare tokenizer.

    python tests/bench/check.py FOLDER [--rows 46000] [--tokens 4000]

The texts are GSM8K's worked solutions (made ones of its form unless VERL_HPT_TEST_DATA names the folder with the real
files) in a random order, one after the other; the tokenizer is a byte-level BPE of up to 12,000 tokens trained on them.
The check tokenises, decodes, compares, grades and looks for duplicates; the peer only tokenises.
"""

import argparse
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent.parent))

from made_data import gsm8k
from tiny_tokenizers import byte_pairs
from transformers import AutoTokenizer

BATCH = 256


def write(file: Path, tokenizer, rows: int, tokens: int) -> None:
    """The demonstrations, a row group every thousand rows."""
    draw, solved = random.Random(0), gsm8k()
    lengths = [len(ids) for ids in tokenizer([row["answer"] for row in solved], add_special_tokens=False)["input_ids"]]
    out = None
    for start in range(0, rows, 1000):
        table = []
        for index in range(start, min(start + 1000, rows)):
            asked, text, size = solved[index % len(solved)], [], 0
            while size < tokens - 150:
                other = draw.randrange(len(solved))
                text.append(solved[other]["answer"].replace("####", "So:"))
                size += lengths[other] + 1
            table.append(
                {
                    "data_source": "openai/gsm8k",
                    "prompt": [{"role": "user", "content": f"{asked['question']} (No. {index})"}],
                    "ability": "math",
                    "reward_model": {"style": "rule", "ground_truth": asked["answer"].rpartition("####")[2].strip()},
                    "extra_info": {"index": index, "split": "train"},
                    "target": [{"role": "assistant", "content": "\n".join([*text, asked["answer"]])}],
                }
            )
        table = pa.Table.from_pylist(table)
        out = out or pq.ParquetWriter(file, table.schema)
        out.write_table(table)
    out.close()


def bare(file: Path, tokenizer) -> int:
    """Tokens of all demonstrations, many texts at a time, nothing else."""
    backend, count = tokenizer.backend_tokenizer, 0
    for batch in pq.ParquetFile(file).iter_batches(BATCH, columns=["target"]):
        texts = [messages[0]["content"] for messages in batch["target"].to_pylist()]
        count += sum(len(e.ids) for e in backend.encode_batch_fast(texts, add_special_tokens=False))
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=46_000)
    parser.add_argument("--tokens", type=int, default=4_000)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    file, model = options.folder / f"demos_{options.rows}x{options.tokens}.parquet", options.folder / "tokenizer"
    if not model.exists():
        byte_pairs("qwen2.5", 12_000).save_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    if not file.exists():
        write(file, tokenizer, options.rows, options.tokens)
    start = time.perf_counter()
    count = bare(file, tokenizer)
    peer = time.perf_counter() - start
    command = [str(Path(sys.executable).parent / "verl-hpt"), "data", "check", str(file), "--tokenizer", str(model)]
    command += ["--reward", "shipped", "--max-response-length", "8192", "--json", str(options.folder / "result.json")]
    start = time.perf_counter()
    status = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
    ours = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{options.rows} demonstrations, {count / options.rows:.0f} tokens each; exit status {status}")
    print(f"bare tokenizer   {peer:7.1f} s")
    cpu, peak = used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20
    print(f"data check       {ours:7.1f} s, {cpu:.0f} CPU s, peak {peak:.2f} GiB")
    print(f"ratio            {ours / peer:7.2f}")
    return status


if __name__ == "__main__":
    sys.exit(main())
