"""``python -m fmrl_dist.add_items EXPORT --items TABLE``: an export with items that came after training.

New items are encoded by the encoders that the export records, projected by its model, and appended; nothing is trained.
Rows never move, so ids, sessions and whatever else was kept stay valid. ``--update`` gives items that are there other
features, ``--remove`` takes items out of all recommendations. The export is replaced in one step, or not at all.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fmrl_dist.base.errors import require, run_command
from fmrl_dist.base.files import replaced_folder
from fmrl_dist.checkpoint.export.files import check_output, is_evaluation
from fmrl_dist.config.command_line import CommandParser
from fmrl_dist.deploy.catalogue.changes import Changes, Counts, OpenExport, write_changed
from fmrl_dist.deploy.catalogue.encoded_items import EncodedItems, read_encoded, run_encoders
from fmrl_dist.deploy.catalogue.vocabulary_changes import read_ids


def main(argv: list[str]) -> None:
    parser = CommandParser(prog="python -m fmrl_dist.add_items", description=__doc__, allow_abbrev=False)
    parser.add_argument("export", type=Path, help="folder of an export")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--items", type=Path, metavar="TABLE", help="the items: Parquet or CSV, or a folder of parts")
    source.add_argument("--encoded", type=Path, metavar="FOLDER", help="what shards.encode has made of such a table")
    parser.add_argument("--update", action="store_true", help="the items are known ones, with new features")
    parser.add_argument("--remove", type=Path, metavar="FILE", help="ids, one a line, or a .parquet table")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", type=Path, help="folder to write")
    target.add_argument("--in-place", action="store_true", help="replace the export itself, in one step")
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is at --output")
    parser.add_argument("--id", metavar="COLUMN", help="of item ids (default: item_id)")
    parser.add_argument("--title", metavar="COLUMN", help='of titles (default: title; "" for none)')
    parser.add_argument(
        "--feature",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a precomputed feature's array, a row for each item; or the table of images of an image feature",
    )
    parser.add_argument("--without", action="append", default=[], metavar="NAME", help="no item has this feature")
    parser.add_argument(
        "--encoder", action="append", default=[], metavar="NAME=MODEL", help="where a feature's model is now"
    )
    parser.add_argument(
        "--image-columns", nargs=2, metavar=("ID", "IMAGE"), help="of tables of images (default: item_id image)"
    )
    arguments = parser.parse_args(argv)
    require(
        bool(arguments.items or arguments.encoded or arguments.remove),
        "nothing to do: give --items TABLE, --encoded FOLDER or --remove FILE",
    )
    has_items = bool(arguments.items or arguments.encoded)
    require(has_items or not arguments.update, "--update needs the items: give --items TABLE or --encoded FOLDER")
    check_options(arguments)
    folder = arguments.export.resolve()
    output = folder if arguments.in_place else arguments.output.resolve()
    require(arguments.in_place or output != folder, f"--output is the export itself, {folder}; say --in-place")
    require(not (arguments.in_place and arguments.overwrite), "--overwrite goes with --output, not with --in-place")
    if not arguments.in_place:
        check_output(output, arguments.overwrite)
    OpenExport.read(folder)  # before a lock is taken beside what is no export
    # Locked while the export is read: a second change would lose the first. Evaluations that end meanwhile are of the
    # catalogue before, like those that are there.
    with replaced_folder(output, is_kept=lambda name: not is_evaluation(name)) as aside:
        export = OpenExport.read(folder)
        check_output(output, arguments.overwrite or arguments.in_place)
        counts = write_changed(export, changes_asked_for(arguments, export), aside, output.name)
        export.check_unchanged()  # --output does not lock it
        left_out = evaluations_in(output) if output.exists() else []
    report(counts, output, left_out)
    if counts.added and not export.can_lend_ids:
        print(
            "note: the model has ids, of which an export of format onnx holds none: the new items have features "
            "alone, and will hardly be recommended; add items to a safetensors export of the run"
        )


def check_options(arguments: argparse.Namespace) -> None:
    """Refuse options that would be ignored: those that say how to read ``--items``, without it.

    Raises:
        UserError: there are such.
    """
    if arguments.items:
        return
    ignored = [name for name in ("feature", "without", "encoder", "image_columns") if getattr(arguments, name)]
    if arguments.id is not None and not arguments.remove:
        ignored.append("id")
    if arguments.title or (arguments.title is not None and not arguments.encoded):
        ignored.append("title")
    options = ", ".join("--" + name.replace("_", "-") for name in ignored)
    mend = "give them to shards.encode, which made" if arguments.encoded else "leave them out with"
    given = str(arguments.encoded or "--remove alone")
    require(not ignored, f"{options}: options of --items TABLE, without which they do nothing; {mend} {given}")


def changes_asked_for(arguments: argparse.Namespace, export: OpenExport) -> Changes:
    """What the command line asks for, with the items encoded.

    Raises:
        UserError: a table or file cannot be read or does not fit, or items cannot be encoded.
    """
    id_column = "item_id" if arguments.id is None else arguments.id
    removed = None if arguments.remove is None else read_ids(arguments.remove, id_column, export.items)
    if not (arguments.items or arguments.encoded):
        return Changes(removed=removed)
    encoders = export.encoders
    if arguments.encoded:
        encoded = read_encoded(arguments.encoded, export.feature_dims, encoders)
        require(
            encoded.titles is not None or not export.items.has_titles or arguments.update or arguments.title == "",
            f"{arguments.encoded} holds no titles, and the items of {export.folder} have some; encode again with "
            'shards.encode --title COLUMN, or add items without titles with --title ""',
        )
    else:
        encoded = encode(arguments, export, id_column)
    export.items.check_kind(encoded.ids, str(arguments.items or arguments.encoded))
    if arguments.update:
        return Changes(updated=encoded, removed=removed)
    return Changes(added=encoded, removed=removed)


def encode(arguments: argparse.Namespace, export: OpenExport, id_column: str) -> EncodedItems:
    """Encode the table of new items in a process of its own."""
    title = "title" if arguments.title is None else arguments.title
    words: list[object] = [export.folder, "--items", arguments.items, "--id", id_column]
    words += ["--title", title if export.items.has_titles else ""]
    words += ["--ids", "text" if export.items.has_text_ids else "integer"]
    for name in ("feature", "without", "encoder"):
        words += flagged(f"--{name}", getattr(arguments, name))
    if arguments.image_columns:
        words += ["--image-columns", *arguments.image_columns]
    with tempfile.TemporaryDirectory(prefix="fmrl-items-") as folder:
        encoded = Path(folder) / "encoded"
        run_encoders([*words, "--output", encoded], Path(folder))
        return read_encoded(encoded, export.feature_dims, export.encoders)


def flagged(option: str, values: Sequence[str]) -> list[str]:
    """An option before each value."""
    return [word for value in values for word in (option, value)]


def evaluations_in(folder: Path) -> list[str]:
    """Files that evaluations have put into an export: they are of the catalogue before."""
    return sorted(path.name for path in folder.iterdir() if is_evaluation(path.name))


def report(counts: Counts, output: Path, left_out: Sequence[str]) -> None:
    """Print what was done."""
    print(f"added {counts.added:,}, updated {counts.updated:,}, removed {counts.removed:,} items")
    print(f"{counts.num_items:,} items, of which {counts.num_items - counts.num_removed:,} are recommended")
    if left_out:
        print(f"note: {', '.join(left_out)} were of the catalogue before, and are gone; evaluate again")
    print(f"written: {output}", flush=True)


if __name__ == "__main__":
    run_command(main)
