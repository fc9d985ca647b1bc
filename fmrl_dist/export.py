"""``python -m fmrl_dist.export --checkpoint RUN``: write a trained model and its catalogue as a folder to deploy.

Two ways to be small: ``--size M`` cuts the network, and the whole network, which is the default, serves every trained
size. With ``--vectors K`` only the vectors that are compared are cut, for a retrieval index: those of the items are
written, those of the users are outputs times the rotation, cut. ``--dtype`` makes files smaller; what it costs is
measured on validation users, printed and recorded. ``--format web`` writes a page that runs the model in a browser.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from fmrl_dist.base.errors import UserError, require, run_command
from fmrl_dist.checkpoint.export.files import check_no_changes, check_output, is_export_file
from fmrl_dist.checkpoint.export.parts import ExportedModel, ExportParts
from fmrl_dist.checkpoint.export.writing import write_export
from fmrl_dist.checkpoint.folder import Checkpoint, load_checkpoint
from fmrl_dist.checkpoint.restore import build_recommender
from fmrl_dist.checkpoint.run_folder import run_of_best
from fmrl_dist.config.command_line import CommandParser
from fmrl_dist.config.credentials import warn_of_credentials
from fmrl_dist.config.loading import config_from_dict
from fmrl_dist.config.sections import Config
from fmrl_dist.data.feature_identity import feature_encoders, with_origins
from fmrl_dist.data.store.manifest import VOCAB_FILE
from fmrl_dist.data.store.reader import Store
from fmrl_dist.deploy.dtype_loss import MEASURED_USERS, describe_quality, measure_quality
from fmrl_dist.deploy.hub import check_can_push, push_to_hub
from fmrl_dist.deploy.model_card import CardSubject, Licence, model_card, run_figures
from fmrl_dist.deploy.onnx_format import check_installed, write_onnx_export
from fmrl_dist.deploy.web.web_format import DEFAULT_NAME, check_web_output, write_web_export
from fmrl_dist.deploy.web.web_format import DTYPE as WEB_DTYPE
from fmrl_dist.deploy.web.web_format import FILES as WEB_FILES
from fmrl_dist.distributed.signals import StopRequest
from fmrl_dist.evaluation.cut_vectors import fit_rotations, sample_vectors
from fmrl_dist.evaluation.ranker import ranker_of_export
from fmrl_dist.model.export_config import FORMATS
from fmrl_dist.model.stored_tensors import DTYPES

WEB = "web"  # a format for browsers; the others are for programs


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    checkpoint = load_checkpoint(arguments.checkpoint, with_optimizer=False)
    config = config_from_dict(checkpoint.config)
    size = config.model.sizes[-1] if arguments.size is None else arguments.size
    output = (arguments.output or default_output(checkpoint, size, arguments)).resolve()
    check = check_web_output if arguments.format == WEB else check_output
    check(output, arguments.overwrite)
    check_no_changes(output)
    sizes = [each for each in config.model.sizes if each <= size]
    require(
        arguments.vectors in (0, *sizes),
        f"--vectors is {arguments.vectors}; expected one of the trained sizes up to {size}, {sizes}, or 0",
    )
    require(
        not arguments.vectors or arguments.format == "safetensors",
        f"--vectors is written with --format safetensors only; of format {arguments.format}, cut the item embeddings "
        "times the rotation",
    )
    store = Store.open(arguments.store or config.store.path, config.store)
    exported = rotated(build_recommender(checkpoint, config, store, torch.device("cpu"), size), config, store)
    require(
        not arguments.vectors or exported.rotation is not None,
        f"store {store.location} has no validation users, whose outputs say how to rotate; leave --vectors out",
    )
    if exported.rotation is None:
        print(f"store {store.location} has no validation users: the export has no rotation, its vectors cannot be cut")
    quality = measure_quality(exported, arguments.dtype, store, arguments.measure_users, arguments.vectors)
    subject = CardSubject(
        exported=exported,
        store=store,
        dtype=arguments.dtype,
        format_name=arguments.format,
        quality=quality,
        figures=run_figures(run_of_best(checkpoint), checkpoint, store),
        is_whole=size == config.model.sizes[-1],
        source=arguments.push_to_hub or output.name,
        on_hub=arguments.push_to_hub is not None,
        licence=arguments.licence,
    )
    described = with_origins(checkpoint.features, store)
    parts = ExportParts(
        vocab=store.read_table(VOCAB_FILE),
        encoders={name: by for name, by in feature_encoders(store).items() if name in described},
        fits={name: store.read_fit(name) for name in store.manifest.fits if name in described},
        vectors=arguments.vectors,
        dtype=arguments.dtype,
        quality=quality,
        card=model_card(subject),
    )
    if arguments.format == WEB:
        write_web_export(exported, output, parts, subject.figures, arguments.overwrite, arguments.name)
    else:
        write = write_onnx_export if arguments.format == "onnx" else write_export
        write(exported, output, parts, arguments.overwrite)
    num_parameters = sum(parameter.numel() for parameter in exported.model.parameters())
    print(f"size {size}: {num_parameters:,} parameters, {len(exported.items):,} items")
    print(describe_quality(quality, arguments.dtype))
    print(file_table(output))
    print(f"written: {output}", flush=True)
    if arguments.push_to_hub is not None:
        print(f"pushed: {push_to_hub(output, arguments.push_to_hub, arguments.private)}", flush=True)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command's arguments, with what can be refused before anything is read."""
    parser = CommandParser(prog="python -m fmrl_dist.export", description=__doc__, allow_abbrev=False)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run (its best) or a checkpoint")
    parser.add_argument("--size", type=int, help="one of the trained sizes (default: the largest, which serves all)")
    formats = (*FORMATS, WEB)
    parser.add_argument("--format", choices=formats, default="safetensors", help="of the files (default: safetensors)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help=f"of weights and item vectors in the files (default: float32; with --format {WEB}, {WEB_DTYPE})",
    )
    parser.add_argument("--vectors", type=int, default=0, metavar="K", help="also write item vectors cut to K channels")
    parser.add_argument(
        "--measure-users",
        type=int,
        default=MEASURED_USERS,
        metavar="N",
        help=f"measure NDCG@10 on at most so many validation users, 0 for none (default: {MEASURED_USERS})",
    )
    parser.add_argument("--output", type=Path, help="folder to write (default: export-SIZE[-FORMAT][-DTYPE])")
    parser.add_argument("--store", help="shard store of the catalogue, a folder or URL (default: the recorded one)")
    parser.add_argument("--name", metavar="NAME", help=f"of the catalogue, on the page of --format {WEB}")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing export")
    parser.add_argument("--license", default="", help="for the model card: an id of the Hub's list, or other")
    parser.add_argument("--license-name", default="", metavar="NAME", help="of a licence that is not in the list")
    parser.add_argument("--push-to-hub", metavar="REPO_ID", help="then upload the folder to the Hub, as owner/name")
    parser.add_argument("--private", action="store_true", help="make the repository on the Hub private")
    arguments = parser.parse_args(argv)
    warn_of_credentials(argv)
    require(arguments.measure_users >= 0, f"--measure-users is {arguments.measure_users}; expected 0 or more")
    arguments.licence = Licence(arguments.license, arguments.license_name)
    if arguments.format == "onnx":
        check_installed()
    require(not arguments.private or arguments.push_to_hub is not None, "--private is of --push-to-hub; give both")
    require(
        arguments.push_to_hub is None or arguments.format != WEB,
        f"--push-to-hub takes exports for programs; put the folder of --format {WEB} on a file server",
    )
    require(arguments.name is None or arguments.format == WEB, f"--name is of --format {WEB}; give both")
    if arguments.push_to_hub is not None:
        check_can_push(arguments.push_to_hub)
    arguments.name = arguments.name or DEFAULT_NAME
    arguments.dtype = arguments.dtype or (WEB_DTYPE if arguments.format == WEB else "float32")
    return arguments


def rotated(exported: ExportedModel, config: Config, store: Store) -> ExportedModel:
    """With the rotations of cut vectors and of a funnel's prefix, if the store has validation users to fit them to."""
    temperatures = tuple(map(config.temperature_of, exported.model.sizes))
    ranker = replace(ranker_of_export(exported), temperatures=temperatures)
    sample = sample_vectors(ranker, store, StopRequest())
    if not len(sample.outputs):
        return exported
    rotation, of_search = fit_rotations(ranker, sample)
    return replace(exported, rotation=rotation, search_rotation=of_search)


def default_output(checkpoint: Checkpoint, size: int, arguments: argparse.Namespace) -> Path:
    """``export-SIZE[-FORMAT][-DTYPE]`` in the run whose best checkpoint this is."""
    run = run_of_best(checkpoint)
    if run is None:
        raise UserError(f"checkpoint {checkpoint.path} is not the best of its run; choose a folder with --output")
    usual = ("safetensors", WEB_DTYPE if arguments.format == WEB else "float32")
    words = [word for word in (arguments.format, arguments.dtype) if word not in usual]
    return run / "-".join(["export", str(size), *words])


def file_table(folder: Path) -> str:
    """Bytes of each file of an export, and in total."""
    names = sorted(path.name for path in folder.iterdir() if is_export_file(path.name) or path.name in WEB_FILES)
    rows = [((folder / name).stat().st_size, name) for name in names]
    rows.append((sum(num_bytes for num_bytes, _ in rows), "total"))
    return "\n".join(f"{num_bytes:>15,} bytes  {name}" for num_bytes, name in rows)


if __name__ == "__main__":
    run_command(main)
