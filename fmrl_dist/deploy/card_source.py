"""The lines of a model card's code that say where the export is: in a folder, or in a repository on the Hub.

They are replaced when the export goes elsewhere. The rest of a card does not depend on the place.
"""

from __future__ import annotations

import json
import re

TEXT = r'"(?:[^"\\\n]|\\.)*"'
LOADED = re.compile(rf"\bRecommender\.from_pretrained\({TEXT}\)")
FOLDER = re.compile(
    r"(?:from huggingface_hub import snapshot_download\n)?\n"
    rf"folder = (?:Path\({TEXT}\)|Path\(snapshot_download\({TEXT}\)\))\n"
)


def loading_line(source: str) -> str:
    """The call that loads an export for this library, from a folder or from the Hub."""
    return f"Recommender.from_pretrained({_quoted(source)})"


def folder_lines(source: str, on_hub: bool) -> str:
    """The line that names the folder of an export, with an import before it if it comes from the Hub."""
    if on_hub:
        return f"from huggingface_hub import snapshot_download\n\nfolder = Path(snapshot_download({_quoted(source)}))\n"
    return f"\nfolder = Path({_quoted(source)})\n"


def with_source(card: str, source: str, on_hub: bool) -> str:
    """The card of an export that is now elsewhere.

    Args:
        card: the text of README.md.
        source: name of a folder, or id of a repository on the Hub.
        on_hub: which of the two it is.
    """
    card = LOADED.sub(lambda _: loading_line(source), card, count=1)
    return FOLDER.sub(lambda _: folder_lines(source, on_hub), card, count=1)


def _quoted(source: str) -> str:
    return json.dumps(source, ensure_ascii=False)
