"""What a command that ended must not leave in its folder."""

from __future__ import annotations

import re
from pathlib import Path

ASIDE = re.compile(r"\..+\.([0-9a-f]{16}(\.old)?|lock)")  # temporary files and folders, locks that are released
HELD = re.compile(r"process \d+ of ")


def leftovers(folder: Path) -> list[str]:
    """Temporary files and folders, and locks with a holder."""
    found = []
    for path in folder.rglob("*"):
        if ASIDE.fullmatch(path.name) or path.name.startswith("aside-"):
            found.append(str(path.relative_to(folder)))
        elif path.name == ".lock" and HELD.match(path.read_text()):
            found.append(f"{path.relative_to(folder)}: {path.read_text().strip()}")
    return found
