"""Images by file name: only files below the table's folder are read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.fixtures.optional import skip_module_without

skip_module_without("open_clip", "make images")

from fmrl_dist.base.errors import UserError
from fmrl_dist.config.features import PixelsFeature
from shards.encoders.item_images import ImageTable
from shards.store.builder import build_store
from shards.tables.item_ids import ItemIds
from tests.fixtures.image_model import MODEL, write_image_shop
from tests.fixtures.images import photo
from tests.fixtures.stores import tiny_config


@pytest.mark.parametrize("source", ["pixels", "open_clip"])
def test_a_file_name_may_not_leave_the_folder(source: str, weights: Path, tmp_path: Path) -> None:
    """Every name leads to a good image, or to nothing; only those below the table's folder are read."""
    root, outside = tmp_path / "raw", tmp_path / "outside.png"
    (root / "deep").mkdir(parents=True)
    outside.write_bytes(photo(0))
    for inside in ("a.png", "deep/b.png"):
        (root / inside).write_bytes(photo(1))
    (root / "link-out.png").symlink_to(outside)
    (root / "link-in.png").symlink_to(root / "a.png")
    (root / "circle.png").symlink_to(root / "circle.png")
    (root / "up").symlink_to(tmp_path)
    (root / "text.jpg").write_text("no image")
    good = ["a.png", "deep/b.png", "deep/../a.png", "link-in.png", str(root / "a.png")]
    bad = ["../outside.png", str(outside), "link-out.png", "up/outside.png", "deep/../../outside.png", "circle.png"]
    bad += ["text.jpg", "missing.png", "deep", "", ".", "a\0b.png", "x" * 5000, "/etc/passwd", "/dev/zero"]
    names = [*good, *bad, None]
    write_image_shop(root, pa.array(names, pa.string()), list(range(len(names))))
    keys: dict[str, Any] = {"source": source, "path": "images.parquet"}
    if source == "open_clip":
        keys |= {"model": str(MODEL), "pretrained": str(weights), "workers": 0}
    store, features = build_store(tiny_config(root, tmp_path / "store", items={}, features={"image": keys}))
    present = {name for name, present in zip(names, features[0].present, strict=True) if present}
    assert present == set(good)
    assert features[0].note == f"{len(bad) + 1} images unreadable"
    assert store.manifest.features[0].present == len(good)


def test_pieces_of_a_table_do_not_end_with_its_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [None if row == 4 else bytes([row]) * 1000 for row in range(10)]
    pq.write_table(pa.table({"item_id": range(10), "image": images}), tmp_path / "images.parquet", row_group_size=3)
    table = ImageTable.open(PixelsFeature(path="images.parquet"), tmp_path, ItemIds(pa.array(range(10))))
    pieces = list(table.rows(4))
    assert [len(piece.images) for piece in pieces] == [4, 4, 2]
    assert [image for piece in pieces for image in piece.images] == images
    assert np.concatenate([piece.items for piece in pieces]).tolist() == list(range(10))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=10_000))
    with pytest.raises(UserError, match=r"images of 3,000 bytes in \d rows; this machine's memory cannot hold that"):
        list(table.rows(4))
