"""Mean log-likelihood of demonstrations under a model: `verl-hpt data likelihood`, and `data check --model`."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from pathlib import Path

from verl_hpt.data.read import BadRow
from verl_hpt.data.render import Renderer, renderer
from verl_hpt.demos import encode as D
from verl_hpt.demos.columns import DemoColumns, read_demos
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
            problem = str(error).splitlines()[0][:200]
            raise UserError(f"--device {self.device}: cannot be used: {problem}") from None
        dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        try:
            self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().to(self.device)
        except Exception as error:  # whatever transformers raises for a folder that holds no model
            raise UserError(f"--model {path}: cannot be loaded: {str(error).splitlines()[0][:300]}") from None
        config = self.model.config.get_text_config()
        self.vocabulary, self.positions = config.vocab_size, getattr(config, "max_position_embeddings", None)

    def __call__(self, prompt: list[int], demo: D.EncodedDemo) -> float:
        """log π(demo | prompt) per trained token, EOS included, in nats; raises `Unusable` for more than it reads."""
        import torch

        if self.positions is not None and len(prompt) + len(demo.ids) > self.positions:
            raise D.Unusable("too_long", f"{len(prompt)} + {len(demo.ids)} tokens, the model reads {self.positions}")

        ids = torch.tensor([prompt + demo.ids], device=self.device)  # (1, prompt + tokens)
        if int(ids.max()) >= self.vocabulary:
            raise UserError(f"--model {self.path}: token {int(ids.max())} is beyond its vocabulary; wrong --tokenizer?")
        mask, total = torch.tensor(demo.mask, dtype=torch.float32, device=self.device), 0.0
        with torch.inference_mode():
            logits = self.model(ids).logits[0, len(prompt) - 1 : -1]  # (tokens, vocabulary)
            for at in range(0, len(demo.ids), _CHUNK):
                here = logits[at : at + _CHUNK].float()
                said = here.gather(-1, ids[0, len(prompt) :][at : at + _CHUNK, None])[:, 0] - here.logsumexp(-1)
                total += float((said * mask[at : at + _CHUNK]).sum())
        return total / float(mask.sum())


def run(args: argparse.Namespace) -> int:
    """Write the column: a number for each demonstration, null where training could not use it. Memory: a row group.

    Raises `UserError` for a file, model or column that does not fit; OUT appears whole or not at all.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from tqdm import tqdm

    if os.path.realpath(args.file) in {os.path.realpath(args.out), os.path.realpath(f"{args.out}.part")}:
        raise UserError("IN and OUT must be different files, and IN not OUT.part")
    if not args.out.endswith(".parquet"):
        raise UserError(f"{args.out}: verl reads parquet by its name; call the output something.parquet")
    try:
        source = pq.ParquetFile(args.file)
    except (OSError, pa.ArrowException) as error:
        problem = str(error).splitlines()[0][:200]
        raise UserError(
            f"{args.file}: is no readable parquet file: {problem}. `verl-hpt data convert` makes one"
        ) from None
    names = source.schema_arrow.names
    for option, column in (("--prompt-key", args.prompt_key), ("--demo-key", args.demo_key)):
        if column not in names:
            raise UserError(f"{args.file}: no column `{column}` ({option}); it has {', '.join(names)}")
    if not args.column:
        raise UserError("--column must have a name")
    if args.column in names:
        raise UserError(f"{args.file}: has a column `{args.column}` already; name another: --column")
    render = renderer(args)
    schema = source.schema_arrow.append(pa.field(args.column, pa.list_(pa.float64())))
    part, counts, first = f"{args.out}.part", Counter(), 1
    if os.path.isdir(args.out):
        raise UserError(f"{args.out}: is a folder; name a file")
    try:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        out = pq.ParquetWriter(part, schema, compression="zstd", write_page_checksum=True)
    except OSError as error:
        raise UserError(f"{args.out}: cannot be written: {error}") from None
    try:
        ask = Likelihood(args.model, args.device)
        with out, tqdm(total=source.metadata.num_rows, desc="log-likelihood", unit=" rows", disable=None) as bar:
            for group in range(source.num_row_groups):
                table, column = _read(source, group, args.file, first), []
                for row, (prompt, cell) in enumerate(
                    zip(table[args.prompt_key], table[args.demo_key], strict=True), first
                ):
                    column.append(_of_row(args, row, prompt, cell, render, ask, counts))
                    bar.update()
                new, first = schema.field(args.column), first + len(table)
                out.write_table(table.append_column(new, pa.array(column, new.type)))
        os.replace(part, args.out)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{args.out}: cannot be written: {str(error).splitlines()[0][:200]}") from None
    finally:
        Path(part).unlink(missing_ok=True)
    print(f"{args.out}: {counts['known']} demonstrations in column `{args.column}`")
    for reason, n in sorted(counts.items()):
        if reason != "known":
            print(f"  null: {n}: {D.REASONS[reason]}")
    return 0


def _read(source, group: int, file: str, first: int):
    import pyarrow as pa

    try:
        return source.read_row_group(group)
    except (OSError, pa.ArrowException) as error:
        raise BadRow(file, first, "(row)", f"cannot be read, damaged here or after: {str(error)[:200]}") from None


def _of_row(args, row: int, prompt, cell, render: Renderer, ask: Likelihood, counts: Counter) -> list[float | None]:
    """One number for each demonstration of a row."""
    try:
        prompt, raw = D.plain(prompt), D.demonstrations(cell)
    except UnicodeDecodeError as error:
        raise BadRow(args.file, row, args.demo_key, f"is not UTF-8: {error.reason}") from None
    if not isinstance(prompt, list) or not prompt or not all(isinstance(message, dict) for message in prompt):
        problem = f"must be chat messages, got {str(prompt)[:80]!r}: `verl-hpt data convert` first"
        raise BadRow(args.file, row, args.prompt_key, problem)
    try:
        (ids,) = render.tokens([render.prompt(prompt)])
        (found,) = read_demos([({args.demo_key: raw}, ids, prompt)], args.demo_key, DemoColumns(), *render.encoding)
    except D.Unusable as bad:
        found = [D.Demo(content, bad=bad) for content in raw]
    numbers = []
    for demo in found:
        try:
            if demo.bad is not None:
                raise demo.bad
            numbers.append(ask(ids, demo.encoded))
            counts["known"] += 1
        except D.Unusable as bad:
            numbers.append(None)
            counts[bad.reason] += 1
    return numbers
