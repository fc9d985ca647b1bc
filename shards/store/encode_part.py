"""One part of a build: its share of the encoding, kept in the build folder, where the build that follows finds it."""

from __future__ import annotations

from fmrl_dist.base.parts import Part
from fmrl_dist.config.sections import Config
from shards.encoders.sources import can_share, encode_part_of_feature
from shards.encodings.kept_rows import encodings_folder
from shards.store.builder import make_demo_data, store_folder
from shards.store.raw_data import RawData


def encode_part(config: Config, part: Part) -> list[str]:
    """Encode a part's share of every feature whose encoding can be shared out.

    Parts may run at once, on any number of machines that share the build folder, and again after they were killed:
    what is kept is not encoded again.

    Returns:
        The names of these features.

    Raises:
        UserError: the store's path cannot serve, the raw data are refused, or an encoder fails.
    """
    store_folder(config)
    data = config.data
    names = [name for name, feature in data.features.items() if can_share(feature)]
    if not names:
        return names
    make_demo_data(data)
    items = RawData.read(config, patient=True).items
    for name in names:
        encode_part_of_feature(name, data, items.table, items.ids, encodings_folder(config.store), part)
    return names
