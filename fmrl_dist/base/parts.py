"""``--part I/N``: one of the equal shares into which a command's work is divided."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

PART = re.compile(r"([1-9][0-9]{0,5})/([1-9][0-9]{0,5})")


@dataclass(frozen=True)
class Part:
    """Part ``number`` of ``count``, counted from 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Parse ``I/N``, as given on the command line."""
        found = PART.fullmatch(text)
        if not found or int(found[1]) > int(found[2]):
            raise argparse.ArgumentTypeError(f"{text!r} is not a part; expected I/N with I from 1 to N")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def share(self, num_blocks: int) -> range:
        """The blocks of this part; none if there are fewer blocks than parts."""
        return range(self.number - 1, num_blocks, self.count)


WHOLE = Part(1, 1)
