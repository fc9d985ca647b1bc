"""``python -m fmrl_dist.export --checkpoint RUN --size M``: cut out the model of one trained size, ready to deploy.

Two ways to be small: a small M cuts the network. The whole network with ``--vectors K`` cuts only the vectors that are
compared, for a retrieval index: those of the items are written, those of the users are outputs times the rotation, cut.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from fmrl_dist.base.errors import UserError, require, run_command
from fmrl_dist.checkpoint.export_folder import FILES, check_output, write_export
from fmrl_dist.checkpoint.folder import Checkpoint, load_checkpoint
from fmrl_dist.checkpoint.restore import build_recommender
from fmrl_dist.checkpoint.run_folder import run_of_best
from fmrl_dist.config.command_line import CommandParser
from fmrl_dist.config.credentials import warn_of_credentials
from fmrl_dist.config.loading import config_from_dict
from fmrl_dist.data.feature_identity import feature_encoders
from fmrl_dist.data.store.manifest import VOCAB_FILE
from fmrl_dist.data.store.reader import Store
from fmrl_dist.distributed.signals import StopRequest
from fmrl_dist.evaluation.cut_vectors import fit_rotation, sample_vectors
from fmrl_dist.evaluation.ranker import ranker_of_export


def main(argv: list[str]) -> None:
    parser = CommandParser(prog="python -m fmrl_dist.export", description=__doc__, allow_abbrev=False)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run (its best) or a checkpoint")
    parser.add_argument("--size", type=int, required=True, help="one of the trained sizes")
    parser.add_argument("--vectors", type=int, default=0, metavar="K", help="also write item vectors cut to K channels")
    parser.add_argument("--output", type=Path, help="folder to write (default: export-SIZE in the run)")
    parser.add_argument("--store", help="shard store of the catalogue, a folder or URL (default: the recorded one)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing export")
    arguments = parser.parse_args(argv)
    warn_of_credentials(argv)

    checkpoint = load_checkpoint(arguments.checkpoint, with_optimizer=False)
    config = config_from_dict(checkpoint.config)
    output = (arguments.output or default_output(checkpoint, arguments.size)).resolve()
    check_output(output, arguments.overwrite)
    sizes = [size for size in config.model.sizes if size <= arguments.size]
    require(
        arguments.vectors in (0, *sizes),
        f"--vectors is {arguments.vectors}; expected one of the trained sizes up to {arguments.size}, {sizes}, or 0",
    )
    store = Store.open(arguments.store or config.store.path, config.store)
    recommender = build_recommender(checkpoint, config, store, torch.device("cpu"), arguments.size)
    ranker = replace(ranker_of_export(recommender), temperature=config.temperature_of(arguments.size))
    outputs, items = sample_vectors(ranker, store, StopRequest())
    require(
        not arguments.vectors or len(outputs) > 0,
        f"store {store.location} has no validation users, whose outputs say how to rotate; leave --vectors out",
    )
    if len(outputs) > 0:
        recommender = replace(recommender, rotation=fit_rotation(ranker, outputs, items))
    else:
        print(f"store {store.location} has no validation users: the export has no rotation, its vectors cannot be cut")
    encoders = {name: made_by for name, made_by in feature_encoders(store).items() if name in checkpoint.features}
    fits = {name: store.read_fit(name) for name in store.manifest.fits if name in checkpoint.features}
    write_export(
        recommender, output, store.read_table(VOCAB_FILE), encoders, fits, arguments.overwrite, arguments.vectors
    )
    num_parameters = sum(parameter.numel() for parameter in recommender.model.parameters())
    print(f"size {arguments.size}: {num_parameters:,} parameters, {len(recommender.items):,} items")
    print(file_table(output))
    print(f"written: {output}", flush=True)


def default_output(checkpoint: Checkpoint, size: int) -> Path:
    """``export-SIZE`` in the run whose best checkpoint this is."""
    run = run_of_best(checkpoint)
    if run is None:
        raise UserError(f"checkpoint {checkpoint.path} is not the best of its run; choose a folder with --output")
    return run / f"export-{size}"


def file_table(folder: Path) -> str:
    """Bytes of each file of an export, and in total."""
    present = {path.name for path in folder.iterdir()}
    others = sorted({name for name in present if name.endswith(".safetensors")} - set(FILES))
    names = [name for name in FILES if name in present] + others
    rows = [((folder / name).stat().st_size, name) for name in names]
    rows.append((sum(num_bytes for num_bytes, _ in rows), "total"))
    return "\n".join(f"{num_bytes:>15,} bytes  {name}" for num_bytes, name in rows)


if __name__ == "__main__":
    run_command(main)
