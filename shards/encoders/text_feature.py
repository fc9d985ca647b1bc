"""Item texts to rows: what is kept is looked up, and the rest is encoded, in units that parts of a build share out.

Equal texts are encoded once, and a text that an earlier build has encoded not at all (``shards.encodings.kept_rows``).
The distinct texts of all items, longest first, are cut into units of a fixed number. A unit's missing texts are
tokenized, encoded, and saved before the next unit begins, so a build that is killed loses at most one unit. Memory
holds the texts, their keys and one unit's tensors.

``V`` items, ``n`` texts of a unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fmrl_dist.base.errors import require
from fmrl_dist.base.parts import WHOLE, Part
from fmrl_dist.base.progress import Progress
from fmrl_dist.config.features import TransformersFeature
from shards.encoders.item_feature import ItemFeature, TextCounts, packages_of
from shards.encoders.item_text import ItemTexts
from shards.encoders.text_encoder import TextEncoder, load_encoder
from shards.encodings.content_keys import KEY, as_keys, content_key
from shards.encodings.kept_rows import KeptRows

CUT = 1  # noted of a kept row: its text is longer than max_tokens
UNIT_TEXTS = 4096  # so that few batches are filled up; some minutes of BGE-large on a CPU core are lost


@dataclass(frozen=True)
class TextWork:
    """The texts of a feature, their encoder, and what is kept of their rows."""

    name: str  # of the feature
    items: ItemTexts
    encoder: TextEncoder
    described: str  # the encoder, as the manifest names it
    keys: np.ndarray  # KEY [V], of the texts; zeros for an item without one
    units: list[np.ndarray]  # items, int64 [n] each: every distinct text once
    kept: KeptRows

    @classmethod
    def open(cls, name: str, config: TransformersFeature, items: ItemTexts, encodings: Path) -> TextWork:
        """Load the encoder, and look up what is kept in ``encodings`` by its recipe.

        Raises:
            UserError: no item has a text, or the model cannot be found or is not a text encoder.
        """
        chosen = np.flatnonzero(items.present)
        require(len(chosen) > 0, f"feature {name!r}: no item has a text; check data.text against the item table")
        encoder = load_encoder(config)
        recipe = {
            "source": config.source,
            "revision": encoder.revision,
            "pooling": encoder.pooling,
            "max_tokens": encoder.max_tokens,
            "precision": encoder.compute.precision,
            "notes": {"cut": CUT},
            "made_with": packages_of(config.source) | {"device": encoder.compute.device.type},
        }
        keys = np.zeros(len(items.texts), KEY)
        keys[chosen] = as_keys(content_key(items.texts[i].encode()) for i in chosen)
        return cls(
            name=name,
            items=items,
            encoder=encoder,
            described=f"transformers:{config.model} {encoder.pooling} {encoder.max_tokens}",
            keys=keys,
            units=_units(items.texts, keys, chosen),
            kept=KeptRows(encodings, name, recipe, encoder.dim),
        )

    def encode(self, part: Part = WHOLE) -> None:
        """Encode the texts of a part's units that nobody has encoded yet, and keep their rows."""
        units = [self.units[unit] for unit in part.share(len(self.units))]
        total = sum(map(len, units))
        to_do = sum(int(self.kept.missing(self.keys[unit]).sum()) for unit in units)
        print(f"feature {self.name!r}: {self.described}, {self.encoder.compute}", flush=True)
        progress, encoded = Progress("text", total, total - to_do, name=self.name), 0
        for unit in units:
            self.kept.refresh()
            missing = unit[self.kept.missing(self.keys[unit])]
            if len(missing):
                found = self.encoder.encode([self.items.texts[i] for i in missing])
                self.kept.add(self.keys[missing], found.rows, notes=found.cut * np.uint8(CUT))
                encoded += len(missing)
                progress.update(total - to_do + encoded)
        progress.close()
        print(f"feature {self.name!r}: {encoded:,} texts encoded, {total - encoded:,} were kept", flush=True)

    def counts(self) -> TextCounts:
        """Of all items' texts, once they are encoded."""
        keys = self.keys[self.items.present]
        return TextCounts(len(keys), int((self.kept.notes(keys) == CUT).sum()), self.encoder.max_tokens)


def encode_part(name: str, config: TransformersFeature, items: ItemTexts, encodings: Path, part: Part) -> None:
    """Encode a part's share of the texts of feature ``name`` into the folder ``encodings``.

    Raises:
        UserError: as :meth:`TextWork.open`.
    """
    TextWork.open(name, config, items, encodings).encode(part)


def encode_texts(name: str, config: TransformersFeature, items: ItemTexts, encodings: Path) -> ItemFeature:
    """Rows of the texts, for feature ``name``; items without a text are absent.

    Rows are kept in the folder ``encodings``, and taken from it where they are there.

    Raises:
        UserError: as :meth:`TextWork.open`.
    """
    work = TextWork.open(name, config, items, encodings)
    work.encode()
    encoder = work.encoder
    return ItemFeature(
        name,
        work.kept.gather(work.keys, items.present),
        items.present,
        encoder=work.described,
        revision=encoder.revision,
        recipe={
            "pooling": encoder.pooling,
            "max_tokens": encoder.max_tokens,
            "precision": encoder.compute.precision,
        },
        device=encoder.compute.device.type,
        texts=work.counts(),
    )


def _units(texts: list[str], keys: np.ndarray, chosen: np.ndarray) -> list[np.ndarray]:
    """The items ``chosen`` that have distinct texts, longest text first, in units.

    The units depend on the texts alone, not on the items' order. Length in characters is close to that in tokens, and
    no text is tokenized for it.
    """
    _, first = np.unique(keys[chosen], return_index=True)
    distinct = chosen[first]  # in the order of their keys
    lengths = np.fromiter((len(texts[i]) for i in distinct), np.int64, len(distinct))
    order = distinct[np.argsort(-lengths, kind="stable")]
    return [order[low : low + UNIT_TEXTS] for low in range(0, len(order), UNIT_TEXTS)]
