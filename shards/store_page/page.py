"""The whole page about a store: read from its blocks, its vocabulary and its build report."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import pyarrow as pa

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.files import write_atomically
from fmrl_dist.base.pages.document import Heading, Section, document
from fmrl_dist.base.pages.markup import Markup, element, joined
from fmrl_dist.base.parquet import bounded_table
from fmrl_dist.config.data_section import DataConfig
from fmrl_dist.data.store.manifest import VOCAB_FILE
from fmrl_dist.data.store.reader import Store
from fmrl_dist.data.store.tables import table_batches
from shards.store.build_report import BuildReport, read_report
from shards.store_page import examples, figures
from shards.store_page.dirt import dirt
from shards.store_page.near_duplicates import NearDuplicates, near_duplicates
from shards.store_page.survey import Survey, survey
from shards.store_page.words import ShownItems


def write_store_page(store: Store, output: Path, data: DataConfig | None = None) -> None:
    """Write the page, one file that needs no other.

    Args:
        store: to look at.
        output: file to write.
        data: section of the config that the store was built by; names the raw images to show. None shows none.

    Raises:
        UserError: a block, table or report of the store is damaged, the images cannot be read, or the file not written.
    """
    require(output.parent.is_dir(), f"{output.parent} is not a folder; make it, or choose another --html FILE")
    require(not output.is_dir(), f"{output} is a folder; expected a file to write, such as {output / 'store.html'}")
    report = read_report(store)
    vocabulary = _vocabulary(store)
    found, near = survey(store), near_duplicates(store)
    items = ShownItems(vocabulary, _pictures(data, vocabulary, found, near) if data is not None else {})
    write_atomically(output, page(store, items, found, near, report).encode())


def page(
    store: Store, items: ShownItems, found: Survey, near: Sequence[NearDuplicates], report: BuildReport | None
) -> Markup:
    """The HTML."""
    manifest = store.manifest
    sections = [
        Section("splits", "What is in it?", figures.split_table(manifest, found)),
        Section("lengths", "How long are the histories?", figures.lengths(found)),
        Section("popularity", "How popular are the items?", figures.popularity(items)),
        Section("times", "When did it happen?", figures.over_time(found.times)),
        Section("features", "Which features do the items have?", figures.coverage(manifest)),
        Section("examples", "What does a history look like?", examples.histories(found, items)),
        Section(
            "duplicates",
            "What stands in it twice?",
            joined((examples.repeats(found), examples.near_pairs(near, items))),
        ),
        Section("dirt", "What did the build leave out?", dirt(report)),
    ]
    style = files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    name = store.location.rstrip("/").rpartition("/")[2] or store.location
    return document(f"{name}: the store", _heading(store, name), sections, style)


def _heading(store: Store, name: str) -> Heading:
    manifest = store.manifest
    density = manifest.num_events / (manifest.num_users * manifest.num_items)
    tiles: list[tuple[str, str | Markup]] = [
        ("users", f"{manifest.num_users:,}"),
        ("items", f"{manifest.num_items:,}"),
        ("events", f"{manifest.num_events:,}"),
        (f"events a user, {100 * density:.3g} % of the items", f"{manifest.num_events / manifest.num_users:.2f}"),
    ]
    state = element("p", element("code", f"sha256 {manifest.sha256}", class_="hash"))
    return Heading("fmrl-dist · one shard store", name, state, tiles)


def _vocabulary(store: Store) -> pa.Table:
    """Columns item, external_id, train_count, and title where there are titles."""
    data = store.read_table(VOCAB_FILE)
    try:
        return bounded_table(table_batches(data, VOCAB_FILE), VOCAB_FILE).combine_chunks()
    except (pa.ArrowException, OSError, LookupError) as error:
        raise UserError(f"store {store.location}: {VOCAB_FILE} cannot be read ({error}); build it again") from None


def _pictures(
    data: DataConfig, vocabulary: pa.Table, found: Survey, near: Sequence[NearDuplicates]
) -> dict[int, bytes]:
    """Pictures of the items that the page shows."""
    from shards.images.thumbnails import item_thumbnails  # needs Pillow, which a page without pictures does without

    shown = {item for one in found.examples for item in one.items.tolist()}
    shown |= {item for one in near for pair in one.examples for item in pair[:2]}
    return item_thumbnails(data, vocabulary["external_id"].combine_chunks(), shown)
