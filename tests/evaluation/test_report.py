"""The per-size table, evaluation.json and its plot; and files that are either complete or absent."""

from __future__ import annotations

import io
import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fmrl_dist.base.files import write_atomically
from fmrl_dist.evaluation.metrics import METRICS
from fmrl_dist.evaluation.results.report import describe, evaluation_file, write_report

OWN = "ab" * 32  # of the manifest of the model's own store


def make_result(**changes: Any) -> dict[str, Any]:
    sizes = {str(8 * 2**j): {metric: (j + 1) / 8 + i / 100 for i, metric in enumerate(METRICS)} for j in range(3)}
    masked = {size: {metric: value + 0.01 for metric, value in row.items()} for size, row in sizes.items()}
    whole = {"split": "test", "split_rule": "leave-one-out", "users": 1234, "items": 5000, "ties": "half"}
    segments = {"cold target": {"users": 7, "sizes": sizes, "masked": {"sizes": masked}}}
    figures = {"mask_seen": False, "sizes": sizes, "masked": {"sizes": masked}, "segments": segments}
    return whole | figures | {"manifest_sha256": OWN} | changes


@pytest.mark.parametrize(
    ("split", "mask_seen", "name"),
    [
        ("test", False, "evaluation"),
        ("valid", False, "evaluation-valid"),
        ("test", True, "evaluation-masked"),
        ("valid", True, "evaluation-valid-masked"),
    ],
)
def test_names_of_the_files(tmp_path: Path, split: str, mask_seen: bool, name: str) -> None:
    assert evaluation_file(split, mask_seen) == name
    paths = write_report(tmp_path, make_result(split=split, mask_seen=mask_seen), OWN)
    assert paths == (tmp_path / f"{name}.json", tmp_path / f"{name}.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.json", f"{name}.png"]


def test_the_json_is_the_result(tmp_path: Path) -> None:
    text = write_report(tmp_path, make_result(), OWN)[0].read_text()
    assert text.endswith("}\n")
    assert json.loads(text) == make_result()
    assert list(json.loads(text)["sizes"]) == ["8", "16", "32"]


def test_table() -> None:
    """Both protocols side by side, and how ranks were made."""
    lines = describe(make_result()).splitlines()
    assert lines[0] == "test, 1,234 users, whole catalogue ranked (5,000 items), leave-one-out, ties count half;"
    assert lines[1] == "pairs of figures: all items ranked | seen items masked"
    assert lines[2].split() == ["size", *METRICS]
    assert lines[3].split()[:5] == ["8", "0.1250", "0.1350", "0.1350", "0.1450"]
    assert lines[5].split()[:5] == ["32", "0.3750", "0.3850", "0.3850", "0.3950"]
    assert len({len(line) for line in lines[2:6]}) == 1
    assert lines[7] == "by segment (users), at size 32:"
    assert lines[9].split()[:5] == ["cold", "target", "(7)", "0.3750", "0.3850"]


def test_masked_figures_first_are_shown_the_same_way() -> None:
    """``--mask-seen`` moves the masked figures to the front of the JSON; the table keeps its order."""
    plain = make_result()
    flip = {"mask_seen": True, "sizes": plain["masked"]["sizes"], "unmasked": {"sizes": plain["sizes"]}}
    masked = {key: value for key, value in plain.items() if key != "masked"} | flip | {"segments": {}}
    assert describe(masked).splitlines() == describe(plain | {"segments": {}}).splitlines()


def test_many_metrics_make_several_tables() -> None:
    names = [f"{metric}@{k}" for k in (5, 10, 20) for metric in ("recall", "ndcg", "mrr")]
    sizes = {"8": dict.fromkeys(names, 0.5)}
    lines = describe(make_result(sizes=sizes, masked={"sizes": sizes}, segments={})).splitlines()
    assert [line.split() for line in lines[2::2]] == [["size", *names[:6]], ["size", *names[6:]]]


@pytest.mark.parametrize("sizes", [["8", "16", "48", "1024"], ["8"]])
@pytest.mark.parametrize("value", [0.0, 0.3])
def test_a_picture_is_drawn_without_a_warning(tmp_path: Path, sizes: list[str], value: float) -> None:
    rows = {size: dict.fromkeys(METRICS, value) for size in sizes}
    result = make_result(sizes=rows, masked={"sizes": rows})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = write_report(tmp_path, result, OWN)[1]
    with Image.open(io.BytesIO(path.read_bytes())) as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width > 400
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 10  # lines and text, not one colour


def test_a_file_is_replaced_and_no_other_file_remains(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_atomically(path, b"first, the longer one")
    write_atomically(path, b"second")
    assert path.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_writers_with_the_same_process_id_do_not_mix(tmp_path: Path) -> None:
    """Threads here; on a cluster, the first process of each container."""
    path = tmp_path / "table.npy"
    contents = [bytes([writer]) * 200_000 for writer in range(6)]

    def write(content: bytes) -> None:
        for _ in range(10):
            write_atomically(path, content)
            assert path.read_bytes() in contents

    with ThreadPoolExecutor(len(contents)) as writers:
        list(writers.map(write, contents))
    assert list(tmp_path.iterdir()) == [path]
