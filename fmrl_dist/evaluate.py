"""``python -m fmrl_dist.evaluate --checkpoint RUN``: rank the whole catalogue for every user, at every trained size.

``--part I/N`` evaluates a share of the users, and ``--join`` joins all parts into one report.
"""

from __future__ import annotations

import fmrl_dist.base.parent_process  # noqa: F401  # first: importing torch takes seconds, and the launcher may die in them

# isort: split
import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from fmrl_dist.base.errors import require, run_command
from fmrl_dist.base.parts import WHOLE, Part
from fmrl_dist.checkpoint.export.files import is_export
from fmrl_dist.checkpoint.export.parts import ExportedModel
from fmrl_dist.checkpoint.export.reading import export_sha256, read_export, read_export_vocabulary
from fmrl_dist.checkpoint.folder import load_checkpoint
from fmrl_dist.checkpoint.run_folder import run_of_best
from fmrl_dist.config.command_line import CommandParser
from fmrl_dist.config.credentials import warn_of_credentials
from fmrl_dist.config.data_section import StoreConfig
from fmrl_dist.config.loading import config_from_dict
from fmrl_dist.config.train_section import RANK_METRICS, EvalConfig
from fmrl_dist.data.store.manifest import VOCAB_FILE
from fmrl_dist.data.store.reader import Store, require_users
from fmrl_dist.data.vocabulary import external_ids, rows_of
from fmrl_dist.deploy.item_vocabulary import ItemVocabulary
from fmrl_dist.distributed.processes import Runtime, start_runtime
from fmrl_dist.distributed.signals import StopRequest
from fmrl_dist.evaluation.baselines import baseline_histograms
from fmrl_dist.evaluation.cut_vectors import count_deployments, cut_sizes
from fmrl_dist.evaluation.histograms import EvaluationProtocol
from fmrl_dist.evaluation.parts import (
    ComputeSetting,
    EvaluationIdentity,
    join_parts,
    parts_folder,
    remove_parts,
    write_part,
)
from fmrl_dist.evaluation.rank_counts import RankCounts
from fmrl_dist.evaluation.ranker import Ranker, ranker_of_checkpoint, ranker_of_export
from fmrl_dist.evaluation.results.figures import EvaluatedModel, num_users_in
from fmrl_dist.evaluation.results.report import report
from fmrl_dist.evaluation.segments import NUM_CELLS
from fmrl_dist.model.export_config import REMOVED, read_export_config


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint or an export to evaluate, before its catalogue is read."""

    build: Callable[[Runtime], Ranker]
    model: Callable[[], EvaluatedModel]  # called at the end, it refuses what has changed meanwhile
    sizes: list[int]
    eval_config: EvalConfig  # what to report, unless the command line says otherwise
    store: Store  # of the users
    folder: Path  # of the report
    has_rotation: bool = True  # or one can be learned: the vectors can be cut


def main(argv: list[str]) -> None:
    parser = CommandParser(prog="python -m fmrl_dist.evaluate", description=__doc__, allow_abbrev=False)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run (its best), a checkpoint or an export")
    parser.add_argument("--split", choices=("valid", "test"), default="test")
    parser.add_argument("--mask-seen", action="store_true", help="figures without the items of a user's history first")
    parser.add_argument("--cutoffs", type=numbers, help="k of the metrics, such as 5,10,20 (default: eval.cutoffs)")
    parser.add_argument("--metrics", type=words, help="such as recall,ndcg,coverage (default: eval.metrics)")
    parser.add_argument(
        "--per-user",
        action=argparse.BooleanOptionalAction,
        help="keep every user's ranks, for fmrl_dist.compare (default: eval.per_user)",
    )
    parser.add_argument(
        "--cut-vectors",
        action=argparse.BooleanOptionalAction,
        help="also rank with the whole network's vectors, rotated and cut (default: eval.cut_vectors)",
    )
    parser.add_argument("--store", help="shard store, a folder or URL (default: the recorded one)")
    parser.add_argument("--threads", type=int, default=0, help="threads per process (default: cores / processes)")
    share = parser.add_mutually_exclusive_group()
    share.add_argument("--part", type=Part.parse, help="evaluate only part I/N of the users, to be joined later")
    share.add_argument("--join", action="store_true", help="join all parts evaluated with the same options")
    arguments = parser.parse_args(argv)
    warn_of_credentials(argv)
    require(arguments.threads >= 0, f"--threads is {arguments.threads}; expected at least 1, or 0 to share the cores")

    open_source = open_export if is_export(arguments.checkpoint) else open_checkpoint
    runtime = start_runtime(arguments.threads or "auto", lanes=None)
    source = open_source(arguments.checkpoint, arguments.store, arguments.split)
    require(
        not arguments.cut_vectors or source.has_rotation,
        f"export {arguments.checkpoint} is from before there were cut vectors, or of a store without users; export it "
        "again, or leave --cut-vectors out",
    )
    eval_config = changed(source.eval_config, arguments)
    protocol = EvaluationProtocol.of_report(source.store, arguments.split, arguments.mask_seen, eval_config)
    stop, baselines = StopRequest(), {}
    if arguments.part is None:
        baselines = baseline_histograms(eval_config.baselines, source.store, arguments.split, runtime, stop)
    if not arguments.join:
        evaluate(source, protocol, baselines, runtime, arguments.part)
    elif runtime.is_main:
        join(source, protocol, baselines)
    runtime.leave()


def words(text: str) -> tuple[str, ...]:
    """Words between commas."""
    return tuple(word.strip() for word in text.split(","))


def numbers(text: str) -> tuple[int, ...]:
    """Numbers between commas."""
    try:
        return tuple(map(int, words(text)))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers; expected such as 5,10,20") from None


def changed(config: EvalConfig, arguments: argparse.Namespace) -> EvalConfig:
    """The configuration of an evaluation, with what the command line says."""
    names = ("cutoffs", "metrics", "per_user", "cut_vectors")
    keys = {name: getattr(arguments, name) for name in names}
    given = {key: value for key, value in keys.items() if value is not None}
    cutoffs, metrics = given.get("cutoffs", config.cutoffs), given.get("metrics", config.metrics)
    of_ranks = [name for name in metrics if name in RANK_METRICS] or ["recall"]
    return replace(config, **given, metric=f"{of_ranks[0]}@{cutoffs[0]}")  # the best is chosen already


def evaluate(
    source: ModelSource,
    protocol: EvaluationProtocol,
    baselines: Mapping[str, Tensor],
    runtime: Runtime,
    part: Part | None,
) -> None:
    """Evaluate all users and report, or evaluate one part and write it."""
    counts = count_deployments(source.build(runtime), protocol, runtime, StopRequest(), part or WHOLE)
    model = source.model()  # in every process: each has read it for itself
    if not runtime.is_main:
        return
    if part is None:
        report(counts, baselines, source.sizes, protocol, model, source.folder)
    else:
        setting = ComputeSetting(torch.get_num_threads(), runtime.device.type, counts.rotation)
        save_part(source, protocol, model, part, setting, counts)


def save_part(
    source: ModelSource,
    protocol: EvaluationProtocol,
    model: EvaluatedModel,
    part: Part,
    setting: ComputeSetting,
    counts: RankCounts,
) -> None:
    """Write one part, and print its path."""
    identity = identity_of(source, protocol, model)
    path = write_part(parts_folder(source.folder, identity, model.manifest_sha256), part, identity, setting, counts)
    print(f"{protocol.split}, part {part}: {counts.num_users:,} users\nwritten: {path}", flush=True)


def join(source: ModelSource, protocol: EvaluationProtocol, baselines: Mapping[str, Tensor]) -> None:
    """Join all parts into one report, and remove them."""
    model = source.model()
    identity = identity_of(source, protocol, model)
    folder = parts_folder(source.folder, identity, model.manifest_sha256)
    report(join_parts(folder, identity), baselines, source.sizes, protocol, model, source.folder)
    remove_parts(folder)


def identity_of(source: ModelSource, protocol: EvaluationProtocol, model: EvaluatedModel) -> EvaluationIdentity:
    return EvaluationIdentity(
        checkpoint_sha256=model.sha256,
        manifest_sha256=source.store.manifest.sha256,
        split=protocol.split,
        mask_seen=protocol.mask_seen,
        sizes=source.sizes,
        vector_sizes=list(cut_sizes(source.sizes, protocol)),
        users=num_users_in(protocol),
        cells=NUM_CELLS,
        cutoff=protocol.cutoff,
        keep_users=protocol.keep_users,
        list_lengths=protocol.list_lengths,
    )


def open_checkpoint(path: Path, store_path: str | None, split: str) -> ModelSource:
    """A run or one of its checkpoints, with the store's catalogue."""
    checkpoint = load_checkpoint(path, with_optimizer=False)
    config = config_from_dict(checkpoint.config)
    store = open_store(store_path or config.store.path, split, config.store)
    return ModelSource(
        build=partial(ranker_of_checkpoint, checkpoint, config, store),
        model=lambda: EvaluatedModel(checkpoint.state.step, checkpoint.sha256, checkpoint.manifest_sha256),
        sizes=list(config.model.sizes),
        eval_config=config.eval,
        store=store,
        folder=run_of_best(checkpoint) or checkpoint.path,
    )


def open_export(path: Path, store_path: str | None, split: str) -> ModelSource:
    """An export, with its own item embeddings."""
    sha256 = sha256_if_there(path)  # before it is read: what is read is then that, or a change is seen at the end
    recommender = read_export(path)
    origin = recommender.origin
    store = open_store(store_path or origin.store, split)
    refuse_removed(path, store)
    if store.manifest.sha256 != origin.manifest_sha256 or len(recommender.items) != store.manifest.num_items:
        recommender = with_items_of(recommender, path, store)
    return ModelSource(
        build=lambda runtime: ranker_of_export(recommender.to(runtime.device)),
        model=lambda: EvaluatedModel(origin.step, unchanged_sha256(path, sha256), origin.manifest_sha256),
        sizes=list(recommender.model.sizes),
        eval_config=EvalConfig(cut_vectors=recommender.rotation is not None),
        store=store,
        folder=path,
        has_rotation=recommender.rotation is not None,
    )


def sha256_if_there(path: Path) -> str:
    """Hash of an export; "" where files are missing, which reading it complains of."""
    try:
        return export_sha256(path)
    except OSError:
        return ""


def unchanged_sha256(path: Path, before: str) -> str:
    """``before``, if it is still the hash of the export at ``path``: the figures would be said to be of another one.

    Raises:
        UserError: it is not.
    """
    require(
        sha256_if_there(path) == before,
        f"export {path} was changed or removed while it was evaluated; nothing is written: evaluate it again",
    )
    return before


def refuse_removed(path: Path, store: Store) -> None:
    """Refuse a store with items that an export does not recommend any more: they would be ranked among the others.

    Raises:
        UserError: it has such items.
    """
    if not read_export_config(path).get(REMOVED):
        return
    vocabulary = ItemVocabulary(read_export_vocabulary(path), str(path / VOCAB_FILE))
    removed = pa.array([str(vocabulary.ids[row]) for row in vocabulary.removed], pa.large_string())
    known = external_ids(store.read_table(VOCAB_FILE), f"{store.location}/{VOCAB_FILE}")
    found = known.filter(pc.is_in(known, value_set=removed))
    require(
        len(found) == 0,
        f"export {path} does not recommend {len(found):,} of the items of store {store.location}, such as "
        f"{found[0].as_py() if len(found) else ''!r}: evaluate it before they are removed, or on a store without them",
    )


def with_items_of(recommender: ExportedModel, path: Path, store: Store) -> ExportedModel:
    """An export with the items of another store, in its order.

    Raises:
        UserError: the store has items that the export does not have.
    """
    rows = rows_of(
        external_ids(store.read_table(VOCAB_FILE), f"{store.location}/{VOCAB_FILE}"),
        external_ids(read_export_vocabulary(path), str(path / VOCAB_FILE)),
        f"store {store.location}",
        f"export {path}",
    )
    return recommender if rows is None else replace(recommender, items=recommender.items[torch.from_numpy(rows)])


def open_store(path: str, split: str, access: StoreConfig | None = None) -> Store:
    """The store at ``path``, which must have users in ``split``."""
    store = Store.open(path, access)
    require_users(store, split)
    return store


if __name__ == "__main__":
    run_command(main)
