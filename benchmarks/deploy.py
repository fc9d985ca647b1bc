"""An export at work on one core: latency per event, throughput and bytes of each size, and ways to retrieve.

The first table is of the events of one user after another: a session observes one and answers, against encoding the
whole history anew. The others are of exact search, funnel and ANN, for single outputs and for batches of 64, each side
once in every round: of the export's own catalogue, and of a larger one, its embeddings jittered by a share of their own
covariance. A search whose recall of the exact lists is below the wanted one ends the benchmark.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from benchmarks import describe_setting
from benchmarks.measuring.timing import Timing, interleave
from fmrl_dist import Recommender
from fmrl_dist.base.errors import run_command
from fmrl_dist.deploy.approximate.ann import calibrated_ann
from fmrl_dist.deploy.approximate.calibration import calibrated_funnel
from fmrl_dist.deploy.approximate.sample_histories import sample_histories
from fmrl_dist.deploy.item_vocabulary import ItemId
from fmrl_dist.deploy.report_page.size_costs import SEEN_ITEM_BYTES
from fmrl_dist.deploy.retrieval import Search, top_k

HISTORIES = 1024  # to calibrate with
QUERIES = 1024  # to measure with
BATCH = 64
K = 10
REPEATS = 5  # of a history anew
BOUND = 1e-4  # of scores of a session and of its history
MOVED_AT_ONCE = 65_536
SEED = 0


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.deploy", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("export", type=Path, help="folder of an export, of the whole model")
    parser.add_argument("--items", type=int, default=1_000_000, help="of the larger catalogue; 0 for none")
    parser.add_argument("--jitter", type=float, default=0.3, help="standard deviations, of embeddings jittered")
    parser.add_argument("--recall", type=float, default=0.99, help="of the exact lists, that is wanted")
    parser.add_argument("--methods", default="funnel,ann", help="besides exact: funnel, ann")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--events", type=int, default=1000, help="of each size, for the first table; 0 for none")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    for name, value in describe_setting().items():
        print(f"{name:<10} {value}")
    whole = Recommender.from_pretrained(arguments.export)
    if arguments.events:
        print_sizes(arguments.export, whole.sizes, arguments.events)
    model = whole.model
    histories = sample_histories(model.train_counts, HISTORIES + QUERIES, model.max_length)
    outputs = model.encode(histories)
    methods = [method for method in arguments.methods.split(",") if method]
    rotation = model.rotation_of_vectors
    print_searches(model.item_vectors, outputs, rotation, methods, arguments.recall, arguments.rounds)
    if arguments.items:
        vectors = jittered(model.item_vectors, arguments.items, arguments.jitter)
        print_searches(vectors, outputs, rotation, methods, arguments.recall, arguments.rounds)


def print_sizes(export: Path, sizes: Sequence[int], num_events: int) -> None:
    """The table of sizes."""
    length = Recommender.from_pretrained(export, sizes[0]).max_length
    print(f"\n{num_events:,} events, one at a time, of users of {length} events; lists of {K} of the whole catalogue\n")
    print("| size | step p50 / p99, ms | step and list | events a second | all events anew and list p50, ms ", end="")
    print("| bytes of a user's state | of an item's vector |")
    print("|---|---|---|---|---|---|---|")
    for size in sizes:
        recommender = Recommender.from_pretrained(export, size)
        generator = np.random.default_rng(SEED)
        session, steps, totals, anew = recommender.session(), [], [], []
        state_bytes = 0  # without the items seen
        history: list[ItemId] = []
        for row in generator.integers(recommender.num_items, size=num_events).tolist():
            if len(history) == length:
                session, history = recommender.session(), []
            history.append(recommender.item_ids[row])
            began = time.perf_counter()
            session.observe(history[-1])
            if not recommender.model.has_state:
                session.output()
            stepped = time.perf_counter()
            found = session.recommend(K)
            steps.append(stepped - began)
            totals.append(time.perf_counter() - began)
            if len(history) == length:
                state_bytes = session.state().nbytes - SEEN_ITEM_BYTES * session.num_seen
                for _ in range(REPEATS):
                    began = time.perf_counter()
                    (expected,) = recommender.recommend([history], K)
                    anew.append(time.perf_counter() - began)
                scores = np.array([[item.score for item in items] for items in (found, expected)])
                if np.abs(np.diff(scores, axis=0)).max() > BOUND * np.abs(scores).max():
                    fail(f"size {size}: lists of a session and of its history differ")
        print(
            f"| {size} | {percentiles(steps)} | {percentiles(totals)} | {len(totals) / sum(totals):,.0f} "
            f"| {1e3 * float(np.median(anew)):.2f} | {state_bytes:,} | {4 * recommender.width_of_vectors:,} |",
            flush=True,
        )


def print_searches(
    vectors: np.ndarray,
    outputs: np.ndarray,
    rotation: np.ndarray | None,
    methods: Sequence[str],
    recall: float,
    rounds: int,
) -> None:
    """The table of searches of one catalogue."""
    calibration, queries = outputs[:HISTORIES], outputs[HISTORIES:]
    exact = partial(top_k, vectors)
    _, expected = exact(queries, K)
    searches: dict[str, Search] = {"exact": exact}
    notes: dict[str, str] = {"exact": ""}
    for method in methods:
        began = time.perf_counter()
        if method == "funnel":
            funnel, record = calibrated_funnel(vectors, calibration, recall, rotation)
            searches[method] = funnel.top_k
            notes[method] = (
                f"{record.width} of {record.channels} channels as int8, {funnel.prefix.num_bytes / 1e6:,.0f} MB; "
                f"{record.shortlist_mean:,.0f} items ranked again, p99 {record.shortlist_p99:,.0f}"
            )
        else:
            ann, found = calibrated_ann(vectors, calibration, recall)
            searches[method] = ann.top_k
            notes[method] = f"{found.probes['1']['10']} of {found.cells} cells"
        notes[method] += f"; chosen in {time.perf_counter() - began:,.0f} s"
    recalls = {}
    for name, search in searches.items():
        _, scores = search(queries, K)
        recalls[name] = float((scores >= expected[:, -1:] - 3e-6 * np.abs(expected).max(1, keepdims=True)).mean())
        if recalls[name] < recall:
            fail(f"{name}: recall {recalls[name]:.4f}; expected {recall}")
    print(f"\n{len(vectors):,} items of {vectors.shape[1]} channels, lists of {K}; medians of {rounds} rounds\n")
    print("| search | recall | one, ms | of exact | one of a batch of 64, ms | of exact | |")
    print("|---|---|---|---|---|---|---|")
    single = interleave({name: timed(search, queries, 1) for name, search in searches.items()}, rounds)
    batch = interleave({name: timed(search, queries, BATCH) for name, search in searches.items()}, rounds)
    for name in searches:
        alone = f"{1e3 * single[name].median:.3f} | {speedup(single['exact'], single[name])}"
        print(
            f"| {name} | {recalls[name]:.4f} | {alone} "
            f"| {1e3 / BATCH * batch[name].median:.3f} | {speedup(batch['exact'], batch[name])} | {notes[name]} |",
            flush=True,
        )


def jittered(vectors: np.ndarray, num_items: int, jitter: float) -> np.ndarray:
    """More items like those of [V, W]: each one repeated, moved by a share of the vectors' standard deviations."""
    generator = np.random.default_rng(SEED)
    spread = np.linalg.cholesky(np.cov(vectors.T) + 1e-6 * np.eye(vectors.shape[1])).astype(np.float32)
    more = vectors[np.arange(num_items) % len(vectors)]
    for first in range(0, num_items, MOVED_AT_ONCE):
        tile = more[first : first + MOVED_AT_ONCE]
        tile += jitter * generator.standard_normal(tile.shape, np.float32) @ spread.T
    return more


def timed(search: Search, queries: np.ndarray, number: int) -> Callable[[int], object]:
    """One search of so many queries, others in every round."""

    def side(round_number: int) -> object:
        first = round_number * number % (len(queries) - number + 1)
        return search(queries[first : first + number], K)

    return side


def speedup(exact: Timing, other: Timing) -> str:
    """How many times faster than exact, the median of the rounds."""
    return f"{exact.ratio(other):.2g} ×"


def percentiles(seconds: Sequence[float]) -> str:
    median, high = np.quantile(seconds, (0.5, 0.99))
    return f"{1e3 * median:.3f} / {1e3 * high:.3f}"


def fail(message: str) -> NoReturn:
    print(f"NOT AS EXPECTED: {message}; nothing more is reported", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    run_command(main)
