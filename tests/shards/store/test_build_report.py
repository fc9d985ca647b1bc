"""``build-report.json``: what a build counted, by cause; damaged ones are refused, and no store depends on it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fmrl_dist.base.errors import UserError
from fmrl_dist.data.store.reader import Store
from shards.build import main as build_main
from shards.store.build_report import BUILD_REPORT_FILE, BuildReport, FunnelStep, num_lacking, read_report
from shards.store.builder import build_store
from shards.store.problems import foreign_names, store_problems
from shards.store.report_text import WIDTH, report_lines
from tests.fixtures.stores import png, tiny_config, write_histories, write_raw

TIMES_VARY = ("written", "seconds")


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """Histories with times, of which some are out of order or stand twice, and images of which some are bad."""
    write_raw(tmp_path)
    histories = {"u1": ["a", "b", "b", "d"], "u2": ["c"], "u3": ["e", "a"], "u4": []}
    times = {"u1": [1, 2, 2, 9], "u2": [1], "u3": [5, 4], "u4": []}
    write_histories(tmp_path / "sequences.parquet", histories, times)
    images = {"a": png((200, 0, 0)), "b": b"<html>", "c": None, "d": png((9, 9, 9), side=1), "e": png((0, 99, 0))}
    images |= {"f": png((0, 0, 99)), "nobody's": png((1, 1, 1))}
    pq.write_table(pa.table({"item_id": list(images), "image": list(images.values())}), tmp_path / "images.parquet")
    features = {"image": {"source": "pixels", "path": "images.parquet"}, "words": {"source": "tfidf", "dim": 2}}
    return tiny_config(tmp_path, tmp_path / "store", features=features, sequences={"times": "times"})


def test_a_build_says_what_it_left_out(config: Any) -> None:
    store, _ = build_store(config, config_name="tiny.yaml")
    report = read_report(store)
    assert report is not None and report.config == "tiny.yaml"
    assert {name: one.rows for name, one in report.tables.items()} == {"data.items": 6, "data.sequences": 4}
    assert report.funnel == (
        FunnelStep("read", "remain", 4, 6, 7),
        FunnelStep("users with fewer than 2 events", "removed", 2, None, 1),
        FunnelStep("in the store", "remain", 2, 6, 6),
        FunnelStep("users whose events were out of order, sorted", "noted", 1),
        FunnelStep("events equal to an earlier one, kept", "noted", events=1),
    )
    assert asdict(report.catalogue) == {"items": 6, "untitled": 0, "without": {"price": 2, "brand": 3, "categories": 0}}
    image = report.features["image"]
    assert image.images is not None and (image.present, image.absent) == (3, 3)
    assert asdict(image.images) == {
        "given": 5,
        "bad": {"not an image": 1, "too small": 1},
        "empty": 1,
        "unknown_items": 1,
    }
    assert report.features["words"].images is None
    assert set(report.seconds) == {"raw tables", "feature image", "feature words", "item blocks", "histories"}
    assert report.made_with["pillow"] == store.manifest.built_from.made_with["pillow"]  # type: ignore[union-attr]


def test_the_same_input_gives_the_same_report_but_for_times(config: Any) -> None:
    reports = []
    for _ in range(2):
        store, _ = build_store(config, overwrite=True)
        reports.append(json.loads((store.path / BUILD_REPORT_FILE).read_text()))
    for report in reports:
        for key in TIMES_VARY:
            del report[key]
    assert reports[0] == reports[1]


def test_the_report_is_no_part_of_the_store(config: Any) -> None:
    """With it, the store is sound and can be replaced; without it, it is the same store."""
    store, _ = build_store(config)
    sha256 = store.manifest.sha256
    assert list(store_problems(store)) == [] and foreign_names(store) == []
    (store.path / BUILD_REPORT_FILE).unlink()
    again = Store.open(store.path)
    assert read_report(again) is None and list(store_problems(again)) == []
    assert again.manifest.sha256 == sha256
    assert build_store(config, overwrite=True)[0].manifest.sha256 == sha256


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (b"\xff", "is not UTF-8"),
        (b"{", "is not JSON"),
        (b"[]", "holds a list; expected an object"),
        ({"schema_version": 2}, "is of version '2', expected 1"),
        ({"schema_version": True}, "is of version 'True'"),
        ({"tables": None}, "tables is None; expected a mapping"),
        ({"funnel": [{"effect": "eaten"}]}, "eaten"),
        ({"funnel": [{"events": -1}]}, r"funnel\[0\].events is -1; expected at least 0"),
        ({"features": {"image": {"present": -1}}}, "features.image.present is -1; expected at least 0"),
        ({"seconds": {"items": float("nan")}}, "expected a finite number"),
        ({"password": "x"}, "password"),
    ],
)
def test_a_damaged_report_is_refused_in_one_line(damage: bytes | dict[str, Any], problem: str) -> None:
    if isinstance(damage, dict):
        damage = json.dumps(asdict(BuildReport()) | damage).encode()
    with pytest.raises(UserError, match=problem) as raised:
        BuildReport.from_bytes(damage)
    assert "build the store again, or remove the file" in str(raised.value) and "\n" not in str(raised.value)


def test_a_report_without_a_part_is_refused() -> None:
    raw = asdict(BuildReport())
    del raw["funnel"]
    with pytest.raises(UserError, match="build-report.json lacks funnel"):
        BuildReport.from_bytes(json.dumps(raw).encode())


def test_in_words(config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Printed at the end of a build, no line longer than the screen."""
    store, _ = build_store(config)
    report = read_report(store)
    assert report is not None
    lines = report_lines(report)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= WIDTH
    assert "table sequences 4 rows, none bad" in text.replace("  ", " ")
    assert "items           6, 2 without price, 3 without brand" in text
    assert "feature image   3 items have it, 3 do not; 5 images, 2 bad: 1 not an image, 1 too small; 1 cells" in text
    assert [line.split() for line in lines if "fewer than 2" in line] == [
        "- users with fewer than 2 events 2 1".split()  # noqa: SIM905 - as it is read
    ]


def test_a_build_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_raw(tmp_path)
    config = tiny_config(tmp_path, tmp_path / "store")
    (tmp_path / "tiny.yaml").write_text(config.to_yaml())
    build_main(["--config", str(tmp_path / "tiny.yaml")])
    shown = capsys.readouterr().out
    assert "- users with fewer than 2 events" in shown and "  split: leave-one-out" in shown.splitlines()
    report = read_report(Store.open(tmp_path / "store"))
    assert report is not None and report.config == "tiny.yaml" and report.written.endswith("+00:00")


def test_what_counts_as_lacking() -> None:
    columns = {
        2: pa.array([1.5, None, float("nan")]),
        3: pa.array(["a", "", " \t", None]),
        1: pa.array([[1], []], pa.list_(pa.int64())),
        0: pa.array([0, 1]),
    }
    for expected, column in columns.items():
        assert num_lacking(pa.chunked_array([column])) == expected
    assert num_lacking(pa.chunked_array([], pa.string())) == 0
