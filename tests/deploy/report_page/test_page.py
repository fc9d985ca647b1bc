"""The page about a run: its figures are the run's, its text is text, and it stands alone."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml

from fmrl_dist import report, train
from fmrl_dist.base.errors import UserError
from fmrl_dist.checkpoint.folder import load_checkpoint
from fmrl_dist.checkpoint.restore import build_recommender, restore_model
from fmrl_dist.config.loading import config_from_dict
from fmrl_dist.data.store.manifest import VOCAB_FILE
from fmrl_dist.deploy.item_vocabulary import ItemVocabulary
from fmrl_dist.deploy.recommender import Recommender
from fmrl_dist.deploy.report_page import latency
from fmrl_dist.deploy.report_page import page as page_module
from fmrl_dist.deploy.report_page.choice import frontier
from fmrl_dist.deploy.report_page.measures import Cut, cuts_of, measure
from fmrl_dist.deploy.report_page.page import write_final_page, write_page
from fmrl_dist.deploy.report_page.run_facts import read_run
from fmrl_dist.deploy.report_page.size_costs import SEEN_ITEM_BYTES, size_costs
from fmrl_dist.evaluation.target_ranks import ALL, UNSEEN
from fmrl_dist.model.stored_tensors import DTYPES, stored
from tests.fixtures.training import contents, evaluation, make_shop, refusal, run_here, train_here

SIZES = (4, 8, 16)
OPTIONS = ("--model.sizes", "[4, 8, 16]", "--model.width", 16, "--eval.cut_vectors", "true", "--model.id_table", "true")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shop(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def trained(shop: Path) -> Path:
    """A finished run; tests must not change it."""
    return train_here(shop, shop.parent / "run", *OPTIONS)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return shutil.copytree(trained, tmp_path / "run", symlinks=True)


def recommender_of(run: Path, size: int) -> Recommender:
    """What a run serves, without an export in between."""
    facts = read_run(run)
    assert facts.store is not None and facts.checkpoint is not None
    exported = build_recommender(facts.checkpoint, facts.config, facts.store, torch.device("cpu"))
    return Recommender(exported, ItemVocabulary(facts.store.read_table(VOCAB_FILE), VOCAB_FILE), size)


class Reader(HTMLParser):
    """Tables as texts, elements and their attributes of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._open: list[str] = []
        self._caption = ""
        self._rows: list[list[str]] = []
        self.feed(html)
        self.close()
        assert self._open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br"):
            self._open.append(tag)
        if tag == "table":
            self._caption, self._rows = str(dict(attrs)["aria-label"]), []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("th", "td"):
            self._rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"{tag} is closed in its place"
        if tag == "table":
            assert self._caption not in self.tables
            self.tables[self._caption] = self._rows

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data
        if self._open[-1:] and {"th", "td"} & set(self._open):
            self._rows[-1][-1] += data


def read(path: Path) -> Reader:
    return Reader(path.read_text(encoding="utf-8"))


def make_report(run: Path, *words: object) -> Reader:
    run_here(report.main, [run, "--no-timing", *words])
    return read(run / "report.html")


def test_training_ends_with_the_page(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train_here(shop, tmp_path / "run", "--train.epochs", 1)
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {run / 'report.html'}"
    page = read(run / "report.html")
    assert "finished" in page.text and "What is missing" not in page.text
    run_here(train.main, ["--config", str(shop), "--run.dir", str(run), "--train.epochs", "1", "--resume", "auto"])
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {run / 'report.html'}"


def test_figures_are_those_of_the_evaluation(trained: Path) -> None:
    """To the printed digits, in both protocols and both deployments; intervals contain them."""
    figures, tables = evaluation(trained), read(trained / "report.html").tables
    rows = {row[0]: row[1:] for row in tables["Quality of every size, in both deployments"][2:]}
    expected = {}
    for size in map(str, SIZES):
        name = f"network {size}" if size != "16" else "whole network 16"
        expected[name] = figures["masked"]["sizes"][size], figures["sizes"][size]
    for size in ("4", "8"):
        expected[f"vectors {size}"] = figures["masked"]["vectors"][size], figures["vectors"][size]
    for name in figures["baselines"]:
        expected[f"baseline: {name}"] = figures["masked"]["baselines"][name], figures["baselines"][name]
    assert rows.keys() == expected.keys() and len(figures["baselines"]) == 3
    for name, (masked, unmasked) in expected.items():
        values = [part[metric] for metric in ("ndcg@10", "recall@10") for part in (masked, unmasked)]
        for cell, value in zip(rows[name], values, strict=True):
            shown = re.fullmatch(r"(\d\.\d{4})(?: \[(\d\.\d{4}), (\d\.\d{4})\])?", cell)
            assert shown is not None and shown[1] == f"{value:.4f}"
            assert (shown[2] is None) == name.startswith("baseline")
            assert shown[2] is None or float(shown[2]) <= float(shown[1]) <= float(shown[3])
    of_all = {row[0]: row[1:] for row in tables["Every metric, all items"][1:]}
    assert of_all["network 8"] == [f"{value:.4f}" for value in figures["sizes"]["8"].values()]


def test_the_conditions_of_the_figures_are_said(trained: Path) -> None:
    text, figures = read(trained / "report.html").text, evaluation(trained)
    for condition in (
        f"test split, leave-one-out, {figures['users']} users; the whole catalogue of 40 items is ranked",
        "ties count half",
        "seen items masked",
        "cut vectors",
        "another seed",
    ):
        assert condition in text


def test_differences_are_paired(trained: Path) -> None:
    """The difference's mean is that of the figures, and its interval is narrower than two independent ones."""
    measures = measure(read_run(trained))
    assert measures is not None
    whole = measures.judged(Cut(16))
    for cut in measures.cuts[:2]:
        worth = measures.judged(cut)
        assert worth.difference is not None and worth.estimate is not None and whole.estimate is not None
        assert worth.difference.mean == pytest.approx(worth.value - whole.value, abs=1e-12)
        widths = [e.high - e.low for e in (worth.difference, worth.estimate, whole.estimate)]
        assert widths[0] < (widths[1] ** 2 + widths[2] ** 2) ** 0.5


def test_parameters_are_those_of_the_cut_model(trained: Path) -> None:
    checkpoint = load_checkpoint(trained, with_optimizer=False)
    config = config_from_dict(checkpoint.config)
    model = restore_model(config.model, checkpoint)
    costs = size_costs(config.model, checkpoint.features, checkpoint.num_items, config.data.max_length)
    assert list(costs) == list(SIZES)
    for size, cost in costs.items():
        cut = model.truncate(size)
        assert cost.parameters == sum(parameter.numel() for parameter in cut.parameters())
        nested = [p for name, p in cut.named_parameters() if name.startswith("blocks.")]
        assert cost.masked == sum(int((p == 0).sum()) for p in nested)
        of_items = ("encoder.weight", "encoder.stand_ins", "encoder.id_table")
        served = {name: p for name, p in cut.named_parameters() if name not in of_items}
        items = torch.randn(40, size)
        for dtype in DTYPES:
            assert cost.network_bytes[dtype] == sum(t.nbytes for t in stored(served, dtype).values())
            assert cost.item_bytes[dtype] == sum(t.nbytes for t in stored({"item_embeddings": items}, dtype).values())
        recommender = recommender_of(trained, size)
        session = recommender.session()
        assert session.state().nbytes == cost.state_bytes
        session.observe(recommender.item_ids[3])
        assert session.state().nbytes == cost.state_bytes + SEEN_ITEM_BYTES
    moments = load_checkpoint(trained).optimizer
    of_adam = sum(4 * t.numel() for name, t in moments.items() if name.split("/")[0] in ("exp_avg", "exp_avg_sq"))
    assert costs[16].moment_bytes == of_adam
    rows = read(trained / "report.html").tables["Parameters and bytes of every size"][2:]
    assert [row[:2] for row in rows] == [[str(size), f"{cost.parameters:,}"] for size, cost in costs.items()]


def test_the_page_stands_alone(trained: Path) -> None:
    html, page = (trained / "report.html").read_text(), read(trained / "report.html")
    assert len(html) < 500_000
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "iframe", "object", "embed", "form", "base"}
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert name not in ("src", "srcset", "action", "data", "background") and not name.startswith("on")
            if name == "href":
                assert value == "data:," or str(value).removeprefix("#") in ids
            if name == "aria-labelledby":
                assert set(str(value).split()) <= set(ids)
        if tag == "svg":
            assert attributes["role"] == "img" and attributes["aria-labelledby"]
    assert "url(" not in html and "@import" not in html and "://" not in html


def test_best_within_a_budget(trained: Path) -> None:
    """A row of a budget table is the best that fits its budget, and there is a row for each such deployment."""
    measures = measure(read_run(trained))
    assert measures is not None
    costs = {cut: float(cut.size) for cut in measures.cuts}
    steps = frontier(costs, measures)
    assert steps[0].budget == 4
    for budget in (4, 5, 8, 12, 16, 100):
        taken = [step.cut for step in steps if step.budget <= budget][-1]
        best = max(measures.judged(cut).value for cut in measures.cuts if costs[cut] <= budget)
        assert measures.judged(taken).value == best
    assert len({step.budget for step in steps}) == len(steps)


def test_settings_that_differ_come_first(trained: Path) -> None:
    tables = read(trained / "report.html").tables
    rows = {row[0]: row[1:] for row in tables["Differs from the defaults"][1:]}
    assert rows["train.lr"] == ["0.03", "0.002"] and rows["model.depth"] == ["1", "2"]
    assert "train.clip_norm" not in rows
    assert "clip_norm: 5.0" in read(trained / "report.html").text


def test_latency_is_measured(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "TIMING_S", 0.2)
    run_here(report.main, [run])
    rows = read(run / "report.html").tables["Time of every deployment"][2:]
    assert len(rows) == len(cuts_of(SIZES))
    for row in rows:
        event, top, both = ([float(number) for number in cell.split(" / ")] for cell in row[1:4])
        assert all(0 < median <= high for median, high in (event, top, both))
        assert max(event[0], top[0]) < both[0]
        assert all(int(cell.replace(",", "")) > 0 for cell in row[4:])
    assert "beside other work unknown" in read(run / "report.html").text
    assert any(title.startswith("By time") for title in read(run / "report.html").tables)
    assert capsys.readouterr().out.splitlines()[-2:] == ["run: finished", f"written: {run / 'report.html'}"]


def test_no_time_without_items(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_here(report.main, [run, "--store", tmp_path / "gone"])
    assert "missing: no latency: the store is not there, and with it the items" in capsys.readouterr().out
    assert "Not measured: the store is not there" in read(run / "report.html").text


def test_time_of_a_large_catalogue_is_not_measured_here(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "MOST_ITEM_BYTES", 4 * 40 * (4 + 8 + 16 + 4 + 8) - 1)
    facts = read_run(trained)
    assert facts.checkpoint is not None
    with pytest.raises(UserError, match="40 items are too many for this page's short measurement"):
        latency.time_cuts(facts.checkpoint, facts.config, facts.store, cuts_of(SIZES), 0.1)


HOSTILE = "<script>alert(1)</script>\"'&</pre></svg>\u202e"


def test_text_is_never_markup(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "<img src=x onerror=alert(1)>&'\"", symlinks=True)
    figures = json.loads((run / "evaluation.json").read_text())
    figures |= {
        "split_rule": HOSTILE,
        "fmrl_dist_version": HOSTILE,
        "segments": {HOSTILE: figures["segments"]["head target"]},
    }
    for part in (figures, figures["masked"]):
        part["baselines"][HOSTILE] = part["baselines"].pop("cosine")
    (run / "evaluation.json").write_text(json.dumps(figures))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "epoch": 0, "split": "train", HOSTILE: 1.0}) + "\n")
    page = make_report(run)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img"}
    shown = HOSTILE.replace("\u202e", "\\u202e")
    assert page.text.count(shown) >= 4 and "\u202e" not in page.text
    assert run.name in page.text


def test_credentials_are_hidden(run: Path) -> None:
    figures = json.loads((run / "evaluation.json").read_text())
    figures["split_rule"] = "see https://me:secret@host/rule?token=secret"
    (run / "evaluation.json").write_text(json.dumps(figures))
    assert "secret" not in make_report(run).text


def test_an_unfinished_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("finished.json", "evaluation.json", "evaluation-users.parquet", "report.html"):
        (run / name).unlink()
    page = make_report(run)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"missing: no figures: {run / 'evaluation.json'} does not exist; evaluate with")
    assert lines[-2].startswith("run: not finished")
    assert "not finished" in page.text and "There are no figures yet" in page.text
    assert "Parameters and bytes of every size" in page.tables
    assert sum(tag == "svg" for tag, _ in page.elements) == 6  # Figure 4 and the curves


def test_a_run_before_its_first_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in run.iterdir():
        if path.name not in ("config.yaml", "metrics.jsonl"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = make_report(run)
    assert "it has no checkpoint yet" in page.text
    assert "missing: no best checkpoint: " in capsys.readouterr().out
    assert "Differs from the defaults" in page.tables


def damaged_runs() -> Iterator[tuple[str, str, str]]:
    """File, its new content, and what is said to be missing."""
    yield "evaluation.json", "{", "missing: no figures: evaluation"
    yield "evaluation.json", "[]", "missing: no figures: evaluation"
    yield "evaluation.json", "{}", "missing: no figures: "
    yield "evaluation-users.parquet", "PAR1", "missing: no intervals: "
    yield "metrics.jsonl", '{"step": 1}\n[]\n', "missing: some of the curves: "
    yield "metrics.jsonl", '{"step": 1, "epoch": 0, "split": "train", "loss": NaN}\n', "missing: 1 of the records in "
    yield "ranks.jsonl", "?\n", "run: finished"
    yield "finished.json", "{", "run: not finished: "
    yield "config.yaml", "{", "run: finished"  # the checkpoint has it


@pytest.mark.parametrize(("name", "content", "said"), list(damaged_runs()))
def test_a_damaged_part_is_named(
    name: str, content: str, said: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / name).write_text(content)
    make_report(run)
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("value", [float("nan"), 2.0, "0.5", True, None])
def test_figures_that_are_none_are_refused(value: object, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = json.loads((run / "evaluation.json").read_text())
    figures["vectors"]["8"]["ndcg@10"] = value
    (run / "evaluation.json").write_text(json.dumps(figures))
    assert "There are no figures yet" in make_report(run).text
    assert "missing: no figures: " in capsys.readouterr().out


def test_other_figures_than_the_ranks_have_no_intervals(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = json.loads((run / "evaluation.json").read_text())
    figures["masked"]["sizes"]["4"]["ndcg@10"] += 1e-4
    (run / "evaluation.json").write_text(json.dumps(figures))
    page = make_report(run)
    assert "missing: no intervals: the users' ranks give ndcg@10" in capsys.readouterr().out
    assert "[" not in page.tables["Quality of every size, in both deployments"][2][1]


def test_figures_of_another_checkpoint_are_not_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = json.loads((run / "evaluation.json").read_text())
    figures["checkpoint"] = {"step": 8, "sha256": "0" * 64}
    (run / "evaluation.json").write_text(json.dumps(figures))
    assert "There are no figures yet" in make_report(run).text
    assert "evaluation.json is of another one, step 8; evaluate again" in capsys.readouterr().out


def test_without_its_store(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = make_report(run, "--store", tmp_path / "gone")
    assert "missing: nothing about the store: " in capsys.readouterr().out
    assert "numbers of users and events are missing" in page.text
    assert "Quality of every size, in both deployments" in page.tables


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path) -> None:
    assert "is no folder; expected a run" in refusal(report.main, tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    assert "is no run: it has neither a config.yaml nor a checkpoint" in refusal(report.main, tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.yaml").write_text(yaml.safe_dump({"model": {"sizes": "many"}}))
    assert "model.sizes" in refusal(report.main, tmp_path / "damaged")


def test_nothing_is_half_written(run: Path, tmp_path: Path) -> None:
    before = contents(run)
    gone = tmp_path / "gone" / "b.html"
    assert "its folder does not exist" in refusal(report.main, run, "--no-timing", "--output", gone)
    assert "is a folder" in refusal(report.main, run, "--no-timing", "--output", tmp_path)
    assert contents(run) == before
    run_here(report.main, [run, "--no-timing", "--output", tmp_path / "b.html"])
    assert contents(run) == before and read(tmp_path / "b.html").tables


def test_a_failure_of_the_page_costs_nobody_the_run(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(page_module, "page", broken)
    run = train_here(shop, tmp_path / "run", "--train.epochs", 1)
    problem = "RuntimeError: first line\\nsecond line"
    mend = f"python -m fmrl_dist.report {run} tries again"
    assert capsys.readouterr().out.splitlines()[-1] == f"warning: no report was written ({problem}); {mend}"
    assert (run / "finished.json").is_file() and not (run / "report.html").exists()


def test_a_page_that_cannot_be_replaced(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    store = read_run(run).store
    assert store is not None
    write_final_page(run, store, took_s=0.0)
    assert capsys.readouterr().out.startswith("warning: no report was written (IsADirectoryError")
    assert not [path for path in run.iterdir() if path.name.startswith(".report")]


def test_training_goes_on_without_an_old_page(run: Path, shop: Path) -> None:
    """A page of before would stand beside figures that are no more."""
    (run / "finished.json").unlink()
    (run / "report.html").write_text("old")
    train_here(shop, run, *OPTIONS, "--resume", "auto")
    assert (run / "report.html").read_text() != "old"


def test_the_same_run_gives_the_same_page(run: Path) -> None:
    one, other = (write_page(run).path.read_text() for _ in range(2))
    undated = [re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", html) for html in (one, other)]
    assert undated[0] == undated[1]


def test_protocols_are_both_judged(trained: Path) -> None:
    measures = measure(read_run(trained))
    assert measures is not None
    assert {which for _, which, _ in measures.worth} == {ALL, UNSEEN}
