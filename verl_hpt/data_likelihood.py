"""Mean log-likelihood of demonstrations under a model: `verl-hpt data likelihood`, and `data check --model`."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from pathlib import Path

from verl_hpt import demos as D
from verl_hpt.data_options import json_option
from verl_hpt.data_render import Renderer
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


def add_likelihood(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="IN", help="parquet as verl reads it (`data convert` makes it)")
    parser.add_argument("out", metavar="OUT", help="parquet file to write: IN and one more column")
    parser.add_argument("--model", metavar="PATH", required=True, help="frozen model; GRAPE: the one to be trained")
    parser.add_argument("--tokenizer", metavar="PATH", help="default: the model's")
    parser.add_argument("--column", default="log_likelihood", help="name of the column, as hpt.demo.log_likelihood")
    parser.add_argument("--prompt-key", default="prompt")
    parser.add_argument("--demo-key", default="target")
    parser.add_argument("--max-response-length", type=int, help="tokens, as data.max_response_length")
    parser.add_argument("--template-kwargs", default="{}", metavar="JSON", help="data.apply_chat_template_kwargs")
    parser.add_argument("--eos", help="id or text of the EOS token, as hpt.demo.eos; default: the tokenizer's")
    parser.add_argument("--device", help="torch device; default: the GPU where there is one")


def run_likelihood(args: argparse.Namespace) -> int:
    """Write the column: a number for each demonstration, null where training could not use it. Memory: a row group.

    Raises `UserError` for a file, model or column that does not fit; OUT appears whole or not at all.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from tqdm import tqdm

    if os.path.realpath(args.file) == os.path.realpath(args.out):
        raise UserError("IN and OUT must be different files")
    if not args.out.endswith(".parquet"):
        raise UserError(f"{args.out}: verl reads parquet by its name; call the output something.parquet")
    kwargs = json_option("--template-kwargs", args.template_kwargs)
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
    if args.column in names:
        raise UserError(f"{args.file}: has a column `{args.column}` already; name another: --column")
    option = "--tokenizer" if args.tokenizer else "--model"
    render = Renderer(
        args.tokenizer or args.model, option=option, eos=args.eos, max_length=args.max_response_length, kwargs=kwargs
    )
    schema = source.schema_arrow.append(pa.field(args.column, pa.list_(pa.float64())))
    part = f"{args.out}.part"
    try:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(part).touch()
    except OSError as error:
        raise UserError(f"{args.out}: cannot be written: {error}") from None
    ask, counts = Likelihood(args.model, args.device), Counter()
    try:
        with (
            pq.ParquetWriter(part, schema, compression="zstd", write_page_checksum=True) as out,
            tqdm(total=source.metadata.num_rows, desc="log-likelihood", unit=" rows", disable=None) as bar,
        ):
            for group in range(source.num_row_groups):
                table, column = source.read_row_group(group), []
                for prompt, cell in zip(table[args.prompt_key], table[args.demo_key], strict=True):
                    column.append(_of_row(D.plain(prompt), cell, render, ask, counts))
                    bar.update()
                new = schema.field(args.column)
                out.write_table(table.append_column(new, pa.array(column, new.type)))
        os.replace(part, args.out)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{args.out}: {str(error).splitlines()[0][:200]}") from None
    finally:
        Path(part).unlink(missing_ok=True)
    print(f"{args.out}: {counts['known']} demonstrations in column `{args.column}`")
    for reason, n in sorted(counts.items()):
        if reason != "known":
            print(f"  null: {n}: {D.REASONS[reason]}")
    return 0


def _of_row(prompt, cell, render: Renderer, ask: Likelihood, counts: Counter) -> list[float | None]:
    """One number for each demonstration of a row."""
    numbers = []
    for demo in D.demonstrations(cell):
        try:
            ids = render.tokenizer.encode(render.prompt(prompt), add_special_tokens=False)
            encoded = D.encode(
                demo,
                render.tokenizer,
                render.eos_id,
                prompt_ids=ids,
                max_length=render.max_length,
                prompt_messages=prompt,
                template_kwargs=render.kwargs,
            )
            numbers.append(ask(ids, encoded))
            counts["known"] += 1
        except D.Unusable as bad:
            numbers.append(None)
            counts[bad.reason] += 1
    return numbers
