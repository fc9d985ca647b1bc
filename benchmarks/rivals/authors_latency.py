"""From one more event to a list of ten: a session of ours against the authors' model, on the same weights, one core.

    python -m benchmarks.rivals.authors_latency --reference CHECKOUT

Random features and weights; 12,101 items, two blocks, sizes 8 … 128 and 8 … 1024. The sides, each for ten users, one
after the other, in every round: "session" observes the event and answers; "history" is ours over all 50 events anew;
"theirs" is the authors' forward pass over these 50 events as they publish it, which projects the catalogue and scores
every size and position, then the ten best; "theirs, lean" has the projected catalogue at hand, and scores the last
position of the largest size alone.
Nothing is reported if scores of the lists differ by more than 1e-4.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from benchmarks import describe_setting
from benchmarks.measuring.timing import interleave
from benchmarks.parity import MAX_LENGTH, Case, build_ours, build_reference, describe_reference, load_reference
from fmrl_dist.base.errors import run_command
from fmrl_dist.checkpoint.export.parts import ExportedModel, Origin
from fmrl_dist.deploy.item_vocabulary import ItemVocabulary
from fmrl_dist.deploy.recommender import Recommender

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
WIDTHS = (128, 1024)
NUM_ITEMS, FEATURE_DIM = 12_101, 384
K = 10
USERS = 10  # in a round
BOUND = 1e-4


def main(argv: list[str]) -> None:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        "python -m benchmarks.rivals.authors_latency",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--reference", type=Path, required=True, help="a checkout of github.com/yueqirex/fMRLRec")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    threadpool_limits(1)  # NumPy's products
    torch.set_flush_denormal(True)
    module = load_reference(arguments.reference)
    for name, value in ({"reference": describe_reference(arguments.reference)} | describe_setting()).items():
        print(f"{name:<10} {value}")
    print("\n| size | side | ms | over the session |\n|---|---|---|---|")
    for width in WIDTHS:
        with torch.inference_mode():
            measure(module, width, arguments.rounds)


def measure(module: ModuleType, width: int, rounds: int) -> None:
    """The rows of one size."""
    torch.manual_seed(0)
    case = Case(0, tuple(size for size in SIZES if size <= width), 2, (), (0.5, 0.99), True, NUM_ITEMS, FEATURE_DIM)
    features = F.normalize(torch.randn(2, NUM_ITEMS, FEATURE_DIM), dim=2)
    theirs = build_reference(module, case, features).eval()
    recommender = recommender_of(theirs, case, features)
    events = np.random.default_rng(0).integers(NUM_ITEMS, size=(USERS, MAX_LENGTH)).tolist()
    sessions = [recommender.session(history[:-1]) for history in events]
    projected = catalogue_of(theirs)

    def session(number: int) -> list[float]:
        sessions[number].observe(events[number][-1])  # of later rounds, once more
        return [item.score for item in sessions[number].recommend(K, exclude_seen=False)]

    def history(number: int) -> list[float]:
        (found,) = recommender.recommend([events[number]], K, exclude_seen=False)
        return [item.score for item in found]

    def published(number: int) -> list[float]:
        scores = theirs(torch.tensor([[item + 1 for item in events[number]]]))[-1, -1, 1:]
        return scores.topk(K).values.tolist()

    def lean(number: int) -> list[float]:
        return (last_state(theirs, events[number]) @ projected.T).topk(K).values.tolist()

    sides: dict[str, Callable[[int], list[float]]] = {
        "session": session,
        "history": history,
        "theirs": published,
        "theirs, lean": lean,
    }
    found = np.array([[side(number) for number in range(USERS)] for side in sides.values()])
    if np.abs(found - found[0]).max() > BOUND * np.abs(found).max():
        print(f"NOT EQUAL at size {width}: {found.tolist()}", file=sys.stderr)
        sys.exit(1)
    calls = {name: lambda _, side=side: [side(number) for number in range(USERS)] for name, side in sides.items()}
    times = interleave(calls, rounds)
    for name, timing in times.items():
        milliseconds = [1e3 / USERS * seconds for seconds in timing.seconds]
        print(
            f"| {width} | {name} | {np.median(milliseconds):.3g} ({min(milliseconds):.3g} … {max(milliseconds):.3g}) "
            f"| {timing.over(times['session'])} |",
            flush=True,
        )


def recommender_of(theirs: nn.Module, case: Case, features: Tensor) -> Recommender:
    """Ours with their weights and items 0 … V - 1."""
    ours = build_ours(case, theirs).eval()
    items = ours.encoder(torch.cat((features[0], features[1]), 1), torch.ones(NUM_ITEMS, 2, dtype=torch.bool))
    ids = np.arange(NUM_ITEMS)
    file = io.BytesIO()
    pq.write_table(pa.table({"item": ids, "external_id": ids, "train_count": np.ones_like(ids)}), file)
    exported = ExportedModel(ours, items, MAX_LENGTH, True, Origin("", 0, "", "", ""))
    return Recommender(exported, ItemVocabulary(file.getvalue(), "the benchmark's items"))


def catalogue_of(theirs: nn.Module) -> Tensor:
    """Their item embeddings [V, D], without the padding row."""
    embedding: nn.Module = theirs.embedding  # type: ignore[assignment]
    rows = torch.cat([embedding.token_lang.weight, embedding.token_img.weight], dim=-1)  # type: ignore[union-attr, list-item]
    projected: Tensor = embedding.projector(rows)[1:]  # type: ignore[operator]
    return projected


def last_state(theirs: nn.Module, events: list[int]) -> Tensor:
    """Their output [D] after the last event."""
    x, mask = theirs.embedding(torch.tensor([[item + 1 for item in events]]))  # type: ignore[operator]
    length = 1 << (len(events) - 1).bit_length()
    x, mask = F.pad(x, (0, 0, length - len(events), 0)), F.pad(mask, (length - len(events), 0))
    for block in theirs.model.lru_blocks:  # type: ignore[union-attr]
        x = block(x, mask)
    state: Tensor = x[0, -1]
    return state


if __name__ == "__main__":
    run_command(main)
