"""``benchmarks.paper``: rows are configurations, trained once by the real command; the page says what the runs say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.paper.__main__ import main
from benchmarks.paper.rows import MODELS, RIVALS, SETS, Places, Row
from fmrl_dist.base.errors import UserError
from fmrl_dist.config.loading import load_config
from tests.fixtures.config_keys import flat
from tests.fixtures.processes import REPOSITORY
from tests.fixtures.training import contents

FEW = ["--train.max_steps", "3", "--eval.users", "200", "--eval.cut_vectors", "false", "--run.tensorboard", "false"]


@pytest.mark.parametrize("model", MODELS)
def test_a_rival_is_the_same_on_both_sets(model: str) -> None:
    """But for the tables, and what is named for the set."""
    one, other = (load_config(REPOSITORY / Row(of_set, model).config).to_dict() for of_set in SETS)
    assert one["model"] == other["model"] and one["loss"] == other["loss"] and one["train"] == other["train"]
    changed = {key for key, value in flat(one["data"]).items() if flat(other["data"])[key] != value}
    assert changed <= {"sequences.path", "items.path", "items.title", "features.text.path"}


def test_every_config_of_a_rival_is_a_row() -> None:
    rows = {Row(of_set, model).config.name for of_set in SETS for model in RIVALS}
    assert rows == {path.name for path in (REPOSITORY / "configs" / "rivals").iterdir()}


@pytest.mark.parametrize("path", sorted((REPOSITORY / "benchmarks/results/paper").glob("*.json")), ids=lambda p: p.stem)
def test_the_records_are_of_the_rows_as_they_are(path: Path, tmp_path: Path) -> None:
    """A new default would make another model of a row, and its record worthless."""
    places = Places("data", tmp_path, tmp_path, ("--eval.every_steps", "700"))
    of_set, _, model = path.stem.partition("-")
    assert places.is_meaning(json.loads(path.read_text())["meaning"], Row(of_set, model))


def test_it_prints_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--dry-run", "--sets", "sports", "--models", "sasrec", "ours-projection-attention", "--train.seed", "3"])
    build, train, _, attention = capsys.readouterr().out.splitlines()
    assert "shards.build --config configs/rivals/sports-sasrec.yaml --keep" in build
    assert "fmrl_dist.train --config configs/rivals/sports-sasrec.yaml --resume auto" in train
    assert train.endswith("--train.seed 3") and "--model.mixer attention" in attention


def test_a_page_without_a_finished_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no row in .* is finished"):
        main(["--table", *(f"--{name}={tmp_path / name}" for name in ("runs", "records"))])
    assert list(tmp_path.iterdir()) == []


def test_a_page_is_made_of_the_records_that_are_of_the_rows_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [f"--{name}={tmp_path / name}" for name in ("runs", "records", "output")]
    places = Places("", tmp_path / "stores", tmp_path / "runs")
    (tmp_path / "records").mkdir()
    values = {"ndcg@10": 0.01234, "recall@10": 0.5}
    figures = {"sizes": {"8": values}, "baselines": {}}
    for model in ("sasrec", "lrurec"):
        row = Row("beauty", model)
        setting, meaning = {"commit": f"of {model}"}, places.meaning(row)
        record = {"setting": setting, "meaning": meaning, "evaluation": figures | {"masked": figures}}
        if model == "lrurec":  # another default, which no configuration names
            meaning["config"]["model"]["id_init"] = 0.5
        (tmp_path / "records" / f"{row.name}.json").write_text(json.dumps(record))
    main(["--table", *paths])
    page = (tmp_path / "output" / "paper-table.md").read_text()
    assert "Measured with commit of sasrec." in page and "| sasrec | 0.0123 &#124; 0.0123 |" in page
    assert "| lrurec |" not in page
    said = capsys.readouterr().err
    assert "beauty-lrurec: not in the table, for its configuration has changed since" in said
    assert "beauty-bsarec: not in the table, for it is not finished" in said
    (tmp_path / "records" / "beauty-sasrec.json").write_text("[]")
    with pytest.raises(UserError, match="beauty-sasrec.json is no record of a row; delete it, and run the row again"):
        main(["--table", *paths])


@pytest.mark.slow
@pytest.mark.real_data
def test_rows_are_trained_and_not_repeated(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--data", shared_data, "--runs", tmp_path / "runs", "--stores", tmp_path / "stores"]
    rows = ["--sets", "beauty", "--models", "sasrec", "fmlprec", "--output", tmp_path / "docs"]
    places += ["--records", tmp_path / "records"]
    words = [str(word) for word in (*places, *rows, *FEW)]
    main(words)
    page = (tmp_path / "docs" / "paper-table.md").read_text()
    evaluation = json.loads((tmp_path / "runs" / "beauty-sasrec" / "evaluation.json").read_text())
    masked, unmasked = (rows["64"]["ndcg@10"] for rows in (evaluation["masked"]["sizes"], evaluation["sizes"]))
    assert f"| {masked:.4f} &#124; {unmasked:.4f} |  | 0.0364 |" in page
    assert (tmp_path / "docs" / "paper-table-beauty.png").read_bytes()[:4] == b"\x89PNG"
    before = contents(tmp_path / "runs")
    capsys.readouterr()
    main(words)
    assert "2 of 2 rows are finished" in capsys.readouterr().out
    assert contents(tmp_path / "runs") == before
    record = json.loads((tmp_path / "records" / "beauty-sasrec.json").read_text())
    assert record["evaluation"]["masked"]["sizes"] == evaluation["masked"]["sizes"]
    with pytest.raises(UserError, match="beauty-sasrec is no run of .* with the words --train.max_steps 4 .*; delete"):
        main(["4" if word == "3" else word for word in words])
    with pytest.raises(UserError, match="1 of 1 rows failed: beauty-lrurec; the logs in .* say why"):
        main([str(w) for w in (*places, "--sets", "beauty", "--models", "lrurec", "--model.nonsense", "1")])
