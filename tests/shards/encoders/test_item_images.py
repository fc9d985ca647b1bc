"""Images by file name: only files below the table's folder are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.fixtures.optional import skip_module_without

skip_module_without("open_clip", "make images")

from shards.store.builder import build_store
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
    config = tiny_config(root, tmp_path / "store", items={}, features={"image": keys}, dirt={"max_bad_images": 0.99})
    store, features = build_store(config)
    present = {name for name, present in zip(names, features[0].present, strict=True) if present}
    assert present == set(good)
    images, missing = features[0].images, len(bad) - 2  # but for text.jpg, and for an empty name like null
    assert images is not None and (images.num_given, images.num_empty) == (len(names) - 2, 2)
    assert images.bad == {"not an image": 1, "missing": missing}
    assert store.manifest.features[0].present == len(good)
