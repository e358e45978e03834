"""A whole actor update of each method, next to hpt's, in verl's real FSDP2 engine on one rank.

    VERL_PLATFORM=cpu python tests/bench/update.py [--rows 8] [--tokens 256] [--runs 5] [--methods NAME ...]

Forward, loss, backward and optimizer step on the same rows for every method, with a small Qwen2. What a method's
mathematics needs beside that: entropies over the vocabulary (srft, srft_hpt, srft_code; marked), which are in the time
here; old or reference log-probs of demonstrations (psft, rl_plus, asft) and a critic (ppo), which are passes of their
own before the update and not in it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.batches import jagged
from engine.worker import worker_on
from loss import micro_batch
from measure import medians, table
from verl.utils import tensordict_utils as tu

from verl_hpt.host.loss_fn import hpt_loss
from verl_hpt.loss import ROW_FIELD, LossSpec
from verl_hpt.methods import METHODS

VOCABULARY = 4096


def write_model(path: Path, longest: int) -> None:
    """Four layers of width 256, random weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=longest, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(path)


def update(worker, method: str, batch):
    """One update of the method on these rows."""
    spec_of = METHODS[method]
    fields = ["response_mask", "old_log_probs", ROW_FIELD]
    fields += ["advantages"] if spec_of.uses_critic else []
    fields += ["ref_log_prob"] if "ref_log_prob" in spec_of.needs else []
    loss = partial(hpt_loss, spec=LossSpec(spec_of, fields=tuple(fields)))

    def step():
        data = batch.clone()
        tu.assign_non_tensor(data, calculate_entropy="entropy" in spec_of.needs)
        worker.set_loss_fn(loss)
        worker.train_mini_batch(data)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="NAME")
    args = parser.parse_args()
    torch.set_num_threads(1)  # CPU time counts every thread's
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DIST_INIT_METHOD"] = f"file://{folder}/store"
        write_model(Path(folder) / "model", args.tokens + 128)
        worker = worker_on(f"{folder}/model")
        batch, _, _ = micro_batch(args.rows, args.tokens, demos=0.25)
        batch["position_ids"] = jagged([torch.arange(len(ids)) for ids in batch["input_ids"].unbind()])
        tu.assign_non_tensor(
            batch, mini_batch_size=args.rows, epochs=1, dataloader_kwargs={"shuffle": False}, temperature=1.0,
            use_dynamic_bsz=False, micro_batch_size_per_gpu=args.rows // 2, max_token_len_per_gpu=0,
        )  # fmt: skip
        names = list(dict.fromkeys(["hpt", *args.methods]))
        seconds = medians({name: update(worker, name, batch) for name in names}, args.runs, warm_up=1)
        torch.distributed.destroy_process_group()
    rows = [
        [f"{name}{' (entropies)' if 'entropy' in METHODS[name].needs else ''}", f"{1e3 * seconds[name]:.0f}",
         f"{seconds[name] / seconds['hpt']:.2f}"]
        for name in names
    ]  # fmt: skip
    print(table([f"update of {args.rows} rows x {args.tokens}", "ms", "time / hpt"], rows))


if __name__ == "__main__":
    main()
