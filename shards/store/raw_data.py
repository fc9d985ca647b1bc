"""All that a store is built from: the item table and the histories, as read or as prepared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fmrl_dist.base.progress import Progress
from fmrl_dist.base.table_files import rooted, shown_places
from fmrl_dist.config.sections import Config
from fmrl_dist.data.store.manifest import LEAVE_ONE_OUT
from shards.encoders.sources import check_source
from shards.interactions.history_file import read_prepared
from shards.interactions.prepare import Prepared, needs_engine, prepare
from shards.store.inputs import downloads_folder, input_files, input_states
from shards.store.raw_items import RawItems, check_raw_items, items_of_ids, read_raw_items
from shards.tables.file_states import FileState, check_unchanged
from shards.tables.histories import Histories, check_histories, read_histories
from shards.tables.item_ids import ItemIds


def interactions_folder(config: Config) -> Path:
    """Where prepared histories are kept."""
    return config.store.build_folder / "interactions"


@dataclass(frozen=True)
class RawData:
    """The items of the catalogue, and where the histories are."""

    config: Config
    items: RawItems
    files: dict[str, str]  # hashes of the input files, by config key
    prepared: Prepared | None  # None: histories are read as they are
    states: dict[Path, FileState]  # of the input files, before any was read

    @classmethod
    def read(cls, config: Config, patient: bool = False) -> RawData:
        """Read the item table and prepare the events; refuse what can be seen to be wrong with anything else.

        Args:
            config: that names them.
            patient: wait where another process prepares the events already.

        Raises:
            UserError: a table or feature cannot be read, or has columns that cannot serve; or events changed while they
                were prepared.
        """
        data, downloads = config.data, downloads_folder(config)
        is_prepared = needs_engine(data)
        items = None
        if data.items.path:
            check_raw_items(data, downloads)
        check_histories(data, downloads)
        states = input_states(config)
        if data.items.path:
            items = read_raw_items(data, downloads)
            for name in data.features:
                check_source(name, data, len(items.ids.external))
        files = input_files(config)
        if not is_prepared:
            assert items is not None
            return cls(config, items, files, None, states)
        catalogue = items.ids.external if items else None
        prepared = prepare(
            data,
            interactions_folder(config),
            downloads,
            catalogue,
            files,
            patient,
            check_inputs=lambda: check_unchanged(states, input_states(config)),
        )
        print("\n".join(prepared.funnel.lines()), flush=True)
        # What is fitted to items that only held-out events name would know of these events.
        fitted = None if prepared.split_rule == LEAVE_ONE_OUT else prepared.trained
        if items is None:
            chosen = items_of_ids(prepared.item_ids, data, fitted)
        else:
            chosen = items.take(prepared.item_rows, prepared.item_ids, fitted)
        return cls(config, chosen, files, prepared, states)

    def check_inputs(self) -> None:
        """Refuse what was read of tables that changed since :meth:`read` began: their hashes are of something else.

        Raises:
            UserError: a file was replaced, written to or removed, or has come.
        """
        check_unchanged(self.states, input_states(self.config))

    @property
    def ids(self) -> ItemIds:
        return self.items.ids

    @property
    def num_items(self) -> int:
        return len(self.ids.external)

    @property
    def split_rule(self) -> str:
        return self.prepared.split_rule if self.prepared else LEAVE_ONE_OUT

    @property
    def history_path(self) -> str:
        return shown_places(rooted(self.config.data.root, self.config.data.sequences.path))

    def histories(self, purpose: str) -> Iterator[Histories]:
        """All histories, batch by batch; ``purpose`` names the progress that is shown."""
        if self.prepared is not None:
            found = read_prepared(self.prepared.histories)
        else:
            found = read_histories(self.config.data, self.ids, downloads_folder(self.config))
        progress = Progress("user", found.num_users, name=purpose)
        for batch in found.batches:
            yield batch
            progress.advance(len(batch.users))
        progress.close()
