"""Mean log-likelihood of demonstrations under a model: `verl-hpt data likelihood`, and `data check --model`."""

import argparse
import os
from collections import Counter
from pathlib import Path

import pyarrow as pa
from tqdm import tqdm

from verl_hpt.data.read import file_kind, open_parquet
from verl_hpt.data.render import Renderer, renderer
from verl_hpt.data.rows import BadRow, first_line, listed
from verl_hpt.data.write import Writer
from verl_hpt.demos.demonstration import REASONS, Demonstration, Unusable, demonstrations, plain
from verl_hpt.demos.read import read
from verl_hpt.errors import UserError

_CHUNK = 512  # positions whose distributions over the vocabulary are held at once in float32


class Likelihood:
    """A frozen model asked for mean log-probs; one sequence at a time, so that there is no padding to get wrong.

    device: a torch device; None: the GPU where there is one. float32 on the CPU, bfloat16 elsewhere; sums in float32.
    """

    def __init__(self, path: str, device: str | None = None):
        import torch
        from transformers import AutoModelForCausalLM

        self.path, self.device = path, device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as error:  # torch's own words for a device that is not there
            raise UserError(f"--device {self.device}: cannot be used: {first_line(error)}") from None
        dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        try:
            self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().to(self.device)
        except Exception as error:  # whatever transformers raises for a folder that holds no model
            raise UserError(f"--model {path}: cannot be loaded: {first_line(error)}") from None
        config = self.model.config.get_text_config()
        self.vocabulary, self.positions = config.vocab_size, getattr(config, "max_position_embeddings", None)

    def __call__(self, prompt: list[int], demo: Demonstration) -> float:
        """log π(demo | prompt) per trained token, EOS included, in nats; raises `Unusable` for more than it reads."""
        import torch

        if self.positions is not None and len(prompt) + len(demo.ids) > self.positions:
            raise Unusable("too_long", f"{len(prompt)} + {len(demo.ids)} tokens, the model reads {self.positions}")

        ids = torch.tensor([prompt + demo.ids], device=self.device)  # (1, prompt + tokens)
        if int(ids.max()) >= self.vocabulary:
            raise UserError(f"--model {self.path}: token {int(ids.max())} is beyond its vocabulary; wrong --tokenizer?")
        mask, total = torch.tensor(demo.mask, dtype=torch.float32, device=self.device), 0.0
        with torch.inference_mode():
            logits = self.model(ids).logits[0, len(prompt) - 1 : -1]  # (tokens, vocabulary)
            for at in range(0, len(demo.ids), _CHUNK):
                part = logits[at : at + _CHUNK].float()
                log_prob = part.gather(-1, ids[0, len(prompt) :][at : at + _CHUNK, None])[:, 0] - part.logsumexp(-1)
                total += float((log_prob * mask[at : at + _CHUNK]).sum())
        return total / float(mask.sum())


def run(args: argparse.Namespace) -> int:
    """Write the column: a number for each demonstration, null where training could not use it. Memory: a row group.

    Raises `UserError` for a file, model or column that does not fit; OUT appears whole or not at all.
    """
    if os.path.realpath(args.file) in {os.path.realpath(args.out), os.path.realpath(f"{args.out}.part")}:
        raise UserError("IN and OUT must be different files, and IN not OUT.part")
    if Path(args.file).is_file() and file_kind(args.file) != "parquet":
        raise UserError(f"{args.file}: is no parquet file: `verl-hpt data convert` makes one")
    source = open_parquet(args.file)
    names = source.schema_arrow.names
    for option, column in (("--prompt-key", args.prompt_key), ("--demo-key", args.demo_key)):
        if column not in names:
            raise UserError(f"{args.file}: no column `{column}` ({option}); it has {listed(names)}")
    if not args.column:
        raise UserError("--column must have a name")
    if args.column in names:
        raise UserError(f"{args.file}: has a column `{args.column}` already; name another: --column")
    new, counts, first = pa.field(args.column, pa.list_(pa.float64())), Counter(), 1
    render, likelihood = renderer(args), Likelihood(args.model, args.device)
    bar = tqdm(total=source.metadata.num_rows, desc="log-likelihood", unit=" rows", disable=None)
    with bar, Writer(args.out, source.schema_arrow.append(new)) as out:
        for group in range(source.num_row_groups):
            try:
                table = source.read_row_group(group)
            except (OSError, pa.ArrowException) as error:
                problem = f"cannot be read, damaged here or after: {str(error)[:200]}"
                raise BadRow(args.file, first, "(row)", problem) from None
            column = []
            for number, cells in enumerate(zip(table[args.prompt_key], table[args.demo_key], strict=True), first):
                column.append(_of_row(args, number, *cells, render, likelihood, counts))
                bar.update()
            first += len(table)
            out.write_table(table.append_column(new, pa.array(column, new.type)))
    print(f"{args.out}: {counts.pop('known', 0)} demonstrations in column `{args.column}`")
    for reason, n in sorted(counts.items()):
        print(f"  null: {n}: {REASONS[reason]}")
    return 0


def _of_row(
    args, number: int, prompt, cell, render: Renderer, likelihood: Likelihood, counts: Counter
) -> list[float | None]:
    """One number for each demonstration of a row."""
    try:
        prompt, raw = plain(prompt), demonstrations(cell)
    except UnicodeDecodeError as error:
        raise BadRow(args.file, number, args.demo_key, f"is not UTF-8: {error.reason}") from None
    if not isinstance(prompt, list) or not prompt or not all(isinstance(message, dict) for message in prompt):
        problem = f"must be chat messages, got {str(prompt)[:80]!r}: `verl-hpt data convert` first"
        raise BadRow(args.file, number, args.prompt_key, problem)
    try:
        (ids,) = render.tokens([render.prompt(prompt)])
        (demos,) = read([({args.demo_key: raw}, ids, prompt)], args.demo_key, {}, *render.encoding)
    except Unusable as bad:
        demos = [Demonstration(content, bad=bad) for content in raw]
    numbers = []
    for demo in demos:
        try:
            if demo.bad is not None:
                raise demo.bad
            numbers.append(likelihood(ids, demo))
            counts["known"] += 1
        except Unusable as bad:
            numbers.append(None)
            counts[bad.reason] += 1
    return numbers
