"""Rows are found by content and recipe; what is damaged is never trusted, what is abandoned is removed."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from fmrl_dist.base.errors import UserError
from fmrl_dist.config.data_section import StoreConfig
from shards.encodings.content_keys import as_keys, content_key
from shards.encodings.kept_rows import ABANDONED_S, KeptRows, encodings_folder

DIM = 3
RECIPE = {"revision": "a"}


def keys_of(*words: str) -> np.ndarray:
    return as_keys(content_key(word.encode()) for word in words)


def rows_of(*words: str) -> np.ndarray:
    """A row that tells its word."""
    return np.array([[len(word), ord(word[0]), 1] for word in words], np.float16)


def opened(folder: Path, **recipe: str) -> KeptRows:
    return KeptRows(folder, "text", RECIPE | recipe, DIM)


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


def test_rows_are_found_by_content(tmp_path: Path) -> None:
    """By whoever opens the folder later; one content may be that of many items, and an item may have none."""
    kept = opened(tmp_path)
    assert kept.missing(keys_of("red", "blue")).tolist() == [True, True]
    kept.add(keys_of("red", "blue"), rows_of("red", "blue"), (keys_of("broken"), np.array([7], np.uint8)))
    kept.add(keys_of("mint"), rows_of("mint"))
    for found in (kept, opened(tmp_path)):
        asked = keys_of("mint", "broken", "red", "new")
        assert found.missing(asked).tolist() == [False, False, False, True]
        assert found.has_row(asked).tolist() == [True, False, True, False]
        assert found.causes(asked).tolist() == [7]
        items = keys_of("blue", "mint", "new", "blue", "red")
        rows = found.gather(items, np.array([True, True, False, True, True]))
        assert isinstance(rows, np.memmap) and rows.dtype == np.float16
        np.testing.assert_array_equal(rows[[0, 1, 3, 4]], rows_of("blue", "mint", "blue", "red"))
        assert not rows[2].any()
    names = {path.name for path in kept.folder.iterdir()}
    assert names == {"recipe.json", *(path.name for path in segments(tmp_path))}, "the file of rows has no name"


@given(words=st.lists(st.sets(st.text("abc", min_size=1, max_size=3), max_size=5), max_size=4))
def test_whatever_was_added_in_whatever_order_is_found(
    words: list[set[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("kept")
    kept = opened(folder)
    for added in words:
        kept.add(keys_of(*added), rows_of(*added) if added else np.empty((0, DIM), np.float16))
    every = sorted(set().union(*words))
    for found in (kept, opened(folder)):
        assert found.has_row(keys_of(*every)).all() and found.missing(keys_of("d", "dd")).all()
        if every:
            assert np.array_equal(found.gather(keys_of(*every), np.ones(len(every), bool)), rows_of(*every))


def test_what_is_noted_of_a_row_is_kept_with_it(tmp_path: Path) -> None:
    """Segments of older versions have no notes."""
    kept = opened(tmp_path)
    failures = keys_of("broken"), np.array([7], np.uint8)
    kept.add(keys_of("red", "blue"), rows_of("red", "blue"), failures, notes=np.array([0, 3], np.uint8))
    arrays = {"keys": keys_of("mint").view(np.uint8).reshape(-1, 32), "rows": rows_of("mint")}
    arrays |= {"failed": np.zeros((0, 32), np.uint8), "causes": np.zeros(0, np.uint8)}
    data = save(arrays)
    (kept.folder / f"{hashlib.sha256(data).hexdigest()}.safetensors").write_bytes(data)
    kept.refresh(at_once=True)
    for found in (kept, opened(tmp_path)):
        assert found.notes(keys_of("blue", "new", "broken", "red", "mint")).tolist() == [3, 0, 0, 0, 0]
        assert found.has_row(keys_of("mint")).all()


def test_another_recipe_is_another_folder(tmp_path: Path) -> None:
    opened(tmp_path).add(keys_of("red"), rows_of("red"))
    for other in (opened(tmp_path, precision="bf16"), KeptRows(tmp_path, "title", RECIPE, DIM)):
        assert other.missing(keys_of("red")).all()
    assert len(list(tmp_path.iterdir())) == 3


def test_what_others_add_is_seen(tmp_path: Path) -> None:
    first, second = opened(tmp_path), opened(tmp_path)
    second.add(keys_of("red"), rows_of("red"))
    first.refresh()
    assert first.missing(keys_of("red")).all(), "not every call reads the folder"
    first.refresh(at_once=True)
    assert first.has_row(keys_of("red")).all()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def of_others(path: Path) -> None:
    """A file with the right name for what it holds, which is something else."""
    nothing = {"failed": np.zeros((0, 32), np.uint8), "causes": np.zeros(0, np.uint8)}
    data = save({"keys": np.zeros((1, 32), np.uint8), "rows": np.zeros((1, DIM + 1), np.float16), **nothing})
    path.unlink()
    path.with_name(f"{hashlib.sha256(data).hexdigest()}.safetensors").write_bytes(data)


def unreadable(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [flip, cut, of_others, unreadable])
def test_a_damaged_segment_is_reported_ignored_and_made_again(
    damage: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened(tmp_path).add(keys_of("red"), rows_of("red"))
    damage(segments(tmp_path)[0])
    kept = opened(tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    assert f"{segments(tmp_path)[0]} is damaged (it" in line and "its rows are encoded again; remove it" in line
    kept.refresh(at_once=True)
    assert capsys.readouterr().out == "", "it is reported once"
    assert kept.missing(keys_of("red")).all()
    if damage is not unreadable:
        kept.add(keys_of("red"), rows_of("red"))
        assert opened(tmp_path).has_row(keys_of("red")).all()


def test_a_segment_that_is_damaged_during_the_build_ends_it(tmp_path: Path) -> None:
    kept = opened(tmp_path)
    kept.add(keys_of("red"), rows_of("red"))
    flip(segments(tmp_path)[0])
    with pytest.raises(UserError, match="has changed during the build .* build again"):
        kept.gather(keys_of("red"), np.ones(1, bool))


def test_only_abandoned_files_are_removed(tmp_path: Path) -> None:
    """What a killed process was writing goes once nobody can be writing it; files of others stay."""
    folder = opened(tmp_path).folder
    names = ("." + "a" * 64 + ".safetensors." + "0" * 16, ".rows.npy." + "1" * 16, ".recipe.json." + "2" * 16)
    for name in (*names, "notes.txt"):
        (folder / name).write_bytes(b"x")
        os.utime(folder / name, (0, time.time() - ABANDONED_S - 60))
    (folder / names[0]).touch()
    opened(tmp_path)
    assert {path.name for path in folder.iterdir()} == {"recipe.json", "notes.txt", names[0]}


def test_the_folder_is_beside_the_store_or_where_the_config_says(tmp_path: Path) -> None:
    assert encodings_folder(StoreConfig(path=str(tmp_path / "shop"))) == tmp_path / "shop.build" / "encodings"
    other = StoreConfig(path=str(tmp_path / "shop"), build_dir=str(tmp_path / "scratch"))
    assert encodings_folder(other) == tmp_path / "scratch" / "encodings"
