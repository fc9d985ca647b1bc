"""Why an image cannot be used, and how many of a feature's images cannot, by cause."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from fmrl_dist.base.errors import require

# Finished blocks of an encoding hold a count for each, in this order: whoever changes it raises DECODING.
CAUSES = (
    "empty",  # nothing was given: a null, an empty name or no bytes
    "missing",  # a file that does not exist, cannot be read, or lies outside the table's folder
    "too large",  # in bytes
    "not an image",  # of no format that is opened
    "truncated",  # the file ends before its image does
    "bomb",  # more pixels than are decoded
    "too small",  # in pixels per side, such as a tracking pixel
    "aspect",  # a line: one side is a hundred times as long as the other
    "damaged",  # the decoder refuses what the file holds
)


class UnreadableImageError(Exception):
    """An image that cannot be used; ``cause`` is one of :data:`CAUSES`."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


@dataclass
class ImageCounts:
    """What became of the images of one feature."""

    num_given: int = 0  # images of known items, without those that are empty
    bad: Counter[str] = field(default_factory=Counter)  # how many cannot be used, by cause; empty ones are apart
    num_empty: int = 0
    num_unknown: int = 0  # of items that are not in the item table

    @classmethod
    def of(cls, num_rows: int, num_unknown: int, failed: Counter[str]) -> ImageCounts:
        """Counts of ``num_rows`` images of known items, of which some failed by cause."""
        num_empty = failed["empty"]
        bad = Counter({cause: failed[cause] for cause in CAUSES if failed[cause] and cause != "empty"})
        return cls(num_rows - num_empty, bad, num_empty, num_unknown)

    @property
    def num_bad(self) -> int:
        return self.bad.total()

    def by_cause(self) -> str:
        """In words: the causes with their counts, in the order of :data:`CAUSES`."""
        return ", ".join(f"{self.bad[cause]:,} {cause}" for cause in CAUSES if self.bad[cause])

    def note(self) -> str:
        """On images that were not used; "" if all were."""
        notes = [f"{self.num_bad:,} images unreadable: {self.by_cause()}"] * (self.num_bad > 0)
        notes += [f"{self.num_empty:,} empty"] * (self.num_empty > 0)
        notes += [f"{self.num_unknown:,} of unknown items"] * (self.num_unknown > 0)
        return "; ".join(notes)

    def check(self, feature: str, max_bad: float) -> None:
        """Refuse too many images that cannot be used.

        Args:
            feature: its name.
            max_bad: ``data.dirt.max_bad_images``, largest share of the images that were given.

        Raises:
            UserError: there are more; says how many, and why.
        """
        require(
            self.num_bad <= max_bad * self.num_given,
            f"feature {feature!r}: {self.num_bad:,} of {self.num_given:,} images cannot be used ({self.by_cause()}); "
            f"data.dirt.max_bad_images permits a share of {max_bad:g}: mend the images, or raise it",
        )
