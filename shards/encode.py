"""``python -m shards.encode EXPORT --items TABLE --output FOLDER``: features of new items, as an export's were made.

``fmrl_dist.add_items`` runs this. By itself, it is for machines that have the encoders, such as one with a GPU.

    vocab.parquet          the new items: item, external_id, train_count (0), title if there are titles
    features.safetensors   for each feature its rows, float16 [n, dim], and <feature>.mask, bool [n]: who has it
    encoders.json          for each feature: encoder, revision, recipe
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from fmrl_dist.base.errors import UserError, require, run_command
from fmrl_dist.base.files import replaced_folder
from fmrl_dist.base.id_columns import IdKind
from fmrl_dist.config.command_line import CommandParser
from fmrl_dist.data.store.manifest import VOCAB_FILE
from shards.store.new_items import EncodedFeatures, NewItems, encode_new_items
from shards.store.parquet_tables import vocab_table

FEATURES_FILE, ENCODERS_FILE = "features.safetensors", "encoders.json"


def main(argv: list[str]) -> None:
    parser = CommandParser(prog="python -m shards.encode", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("export", type=Path, help="folder of an export, whose config.json says how to encode")
    parser.add_argument("--items", type=Path, required=True, help="table of the new items: a file, or a folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; it must not exist")
    parser.add_argument("--id", default="item_id", metavar="COLUMN", help="of item ids (default: item_id)")
    parser.add_argument("--title", default="title", metavar="COLUMN", help='of titles (default: title; "" for none)')
    parser.add_argument("--ids", choices=("text", "integer"), help="what ids are (default: what the export's are)")
    parser.add_argument("--feature", action="append", default=[], type=pair, metavar="NAME=FILE")
    parser.add_argument("--without", action="append", default=[], metavar="NAME", help="no new item has this feature")
    parser.add_argument("--encoder", action="append", default=[], type=pair, metavar="NAME=MODEL")
    parser.add_argument("--image-columns", nargs=2, default=("item_id", "image"), metavar=("ID", "IMAGE"))
    arguments = parser.parse_args(argv)
    require(not arguments.output.exists(), f"{arguments.output} exists; choose another --output")
    new = NewItems.of(
        arguments.items,
        arguments.id,
        arguments.title,
        ids=arguments.ids or ids_of(arguments.export),
        files={name: Path(file) for name, file in arguments.feature},
        lacking=frozenset(arguments.without),
        models=dict(arguments.encoder),
        image_columns=tuple(arguments.image_columns),
    )
    with tempfile.TemporaryDirectory(prefix="fmrl-encoding-") as encoding:
        found = encode_new_items(arguments.export, new, Path(encoding))
        with replaced_folder(arguments.output.absolute()) as aside:
            write(found, aside)
    if found.items.bad:
        causes = ", ".join(f"{cause}: {count:,}" for cause, count in found.items.bad.items())
        print(f"left out {sum(found.items.bad.values()):,} rows of {arguments.items} that cannot be used ({causes})")
    for feature in found.features:
        note = f" ({feature.note})" if feature.note else ""
        present = int(feature.present.sum())
        print(f"feature {feature.name}: {present:,} of {len(feature.present):,} items have it, {feature.encoder}{note}")


def ids_of(export: Path) -> IdKind:
    """What the ids of an export's items are; text where its vocabulary is not at hand."""
    path = export / VOCAB_FILE
    if not path.is_file():
        return "text"
    try:
        kind = pq.read_schema(path).field("external_id").type
    except (pa.ArrowException, OSError, KeyError) as error:
        raise UserError(f"{path} is not the vocabulary of an export ({error}); export again") from None
    return "integer" if pa.types.is_integer(kind) else "text"


def pair(text: str) -> tuple[str, str]:
    """``NAME=VALUE``."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, value


def write(found: EncodedFeatures, folder: Path) -> None:
    """Write the three files."""
    tensors: dict[str, np.ndarray] = {}
    for feature in found.features:
        tensors |= {feature.name: np.ascontiguousarray(feature.rows), f"{feature.name}.mask": feature.present}
    encoders = {
        feature.name: {"encoder": feature.encoder, "revision": feature.revision, "recipe": feature.recipe}
        for feature in found.features
    }
    ids = found.items.ids.external
    pq.write_table(vocab_table(ids, np.zeros(len(ids), np.int64), found.items.titles), folder / VOCAB_FILE)
    save_file(tensors, folder / FEATURES_FILE)
    (folder / ENCODERS_FILE).write_text(json.dumps(encoders, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
