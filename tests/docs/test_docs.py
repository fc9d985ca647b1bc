"""The pages: code blocks run, commands exist with their options, links and the names beside them lead somewhere.

An ``sh`` or ``python`` block is run in a folder with a small trained demo and its export, unless the line above it says
``<!-- not run: REASON -->``. Commands of those are parsed too: files, modules, options and config keys must exist.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from fmrl_dist import export, train
from fmrl_dist.checkpoint.export.reading import read_export
from shards.build import main as build_main
from tests.fixtures.markdown import CodeBlock, Page, read_page
from tests.fixtures.processes import REPOSITORY, clean_environment
from tests.fixtures.training import run_here

PATHS = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = {page.name: page for page in map(read_page, [*PATHS, *sorted(REPOSITORY.glob("docs/*.md"))])}
LANGUAGES = ("sh", "python", "text")
ON_A_CLUSTER = "docs/cluster.md"  # its commands need a SLURM cluster: tests/launch runs their scripts
CONFIG_DRIVEN = ("fmrl_dist.train", "fmrl_dist.plan", "shards.build", "launch.submit")
FOLDERS = ("fmrl_dist", "shards", "launch", "configs", "tests", "benchmarks", "docs")
PATH = re.compile(rf"(?:{'|'.join(FOLDERS)})/[\w./-]*\.(?:py|md|yaml|json|slurm|sh|png)")
SMALL = (
    *("--data.demo.users", "300", "--data.demo.items", "200", "--data.features.text.dim", "16"),
    *("--train.max_steps", "4", "--train.threads", "1", "--train.workers", "0", "--run.tensorboard", "false"),
)

Main = Callable[[list[str]], None]


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the repository after ``make train``, but for a smaller shop and four steps."""
    folder = tmp_path_factory.mktemp("demo")
    for name in ("configs", "launch"):
        (folder / name).symlink_to(REPOSITORY / name)
    with contextlib.chdir(folder):
        build_main([*SMALL])
        run_here(train.main, SMALL)
    return folder


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_a_block_says_what_it_is(page: Page) -> None:
    if page.name != ON_A_CLUSTER:
        assert [(block.line, block.language) for block in page.blocks if block.language not in LANGUAGES] == []


def runnable(page: Page) -> list[CodeBlock]:
    return [block for block in page.blocks if block.language in ("sh", "python") and not block.not_run]


@pytest.mark.parametrize("name", [page.name for page in PAGES.values() if runnable(page)])
def test_the_blocks_of_a_page_run(name: str, demo_folder: Path, tmp_path: Path) -> None:
    """In their order, so that one can use what the one before has written; each page begins after ``make train``."""
    folder = shutil.copytree(demo_folder, tmp_path / "demo", symlinks=True)
    for block in runnable(PAGES[name]):
        if block.language == "python":
            run_python(block.text, folder)
            continue
        for words in block.commands:
            assert words[:2] == ["python", "-m"], f"{name}, line {block.line}: {words} cannot be run here"
            with contextlib.chdir(folder):
                run_here(main_of(words[2]), words[3:])


@cache
def run_python(code: str, folder: Path) -> str:
    """What a program prints that is run in ``folder``; the same one is not run twice."""
    environment = clean_environment() | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, f"{code}\n{ended.stderr}"
    return ended.stdout


def main_of(module: str) -> Main:
    main: Main = importlib.import_module(module).main
    return main


def test_the_quickstart_prints_the_best_titles(demo_folder: Path) -> None:
    with contextlib.chdir(demo_folder):
        run_here(export.main, ["--checkpoint", "runs/demo"])
    (block,) = [block for block in PAGES["README.md"].blocks if block.language == "python"]
    best = [line.split("  ", 1) for line in run_python(block.text, demo_folder).splitlines() if "  " in line]
    exported = read_export(demo_folder / "runs/demo/export-128")
    (call,) = re.findall(r"recommender\.recommend\(\[\[(.*?)\]\], k=5\)", block.text)
    history = [int(number) for number in re.findall(r"item-(\d+)", call)]
    (size,) = map(int, re.findall(r"size=(\d+)\)", block.text))
    model, items = exported.model.truncate(size), exported.items[:, :size]
    with torch.no_grad():
        z = model(items[history], torch.tensor([0, len(history)]), torch.tensor([False]))[-1]
    scores = items @ z
    scores[history] = -torch.inf
    top = scores.topk(5)
    titles = pq.read_table(demo_folder / "data/demo/items.parquet")["title"].to_pylist()
    assert [title for _, title in best] == [titles[item] for item in top.indices.tolist()]
    assert [float(score) for score, _ in best] == pytest.approx(top.values.tolist(), abs=0.006)


def test_the_documented_reader_reads_a_shard(demo_folder: Path) -> None:
    code = next(block.text for block in PAGES["docs/format.md"].blocks if "def read(" in block.text)
    code += "\nprint(*sorted(next(read('stores/demo/items-000000.tar'))))"
    assert run_python(code, demo_folder).split() == ["ids.npy", "image.mask.npy", "image.npy", "text.npy"]


def module_commands() -> list[tuple[str, int, str, list[str]]]:
    """Every ``… -m MODULE words`` of the pages: page, line of the block, module, its words."""
    found = []
    for page in PAGES.values():
        for block in page.blocks:
            if block.language in ("sh", ""):
                for words in block.commands:
                    if "-m" in words:
                        place = words.index("-m")
                        found.append((page.name, block.line, words[place + 1], words[place + 2 :]))
    return found


@pytest.mark.parametrize(("page", "line", "module", "words"), module_commands())
def test_commands_and_their_options_exist(
    page: str, line: int, module: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main, where = main_of(module), f"{page}, line {line}: {module}"
    with pytest.raises(SystemExit):
        main(["--help"])
    options = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    plain = {word.partition("=")[0] for word in words if word.startswith("--") and "." not in word.partition("=")[0]}
    assert plain <= options, where
    if module in CONFIG_DRIVEN:
        with pytest.raises(SystemExit) as ended, contextlib.chdir(REPOSITORY):
            main([*words, "--print-config"])
        assert ended.value.code in (0, None), where


def test_paths_in_code_and_text_exist() -> None:
    for page in PAGES.values():
        if page.name == "CHANGELOG.md":  # of files that have been renamed since, too
            continue
        text = "\n".join([*re.findall(r"`([^`\n]+)`", page.prose), *(block.text for block in page.blocks)])
        missing = {path for path in PATH.findall(text) if not (REPOSITORY / path).exists()}
        assert missing == set(), page.name


def test_make_targets_exist() -> None:
    targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    for page in PAGES.values():
        text = "\n".join([*re.findall(r"`([^`\n]+)`", page.prose), *(block.text for block in page.blocks)])
        assert set(re.findall(r"^make ([\w-]+)", text, re.MULTILINE)) <= set(targets), page.name


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_links_lead_somewhere(page: Page) -> None:
    broken = []
    for target in page.links:
        name, _, anchor = target.partition("#")
        path = (page.path.parent / name).resolve() if name else page.path
        if not path.exists():
            broken.append(target)
        elif anchor:
            linked = PAGES.get(os.path.relpath(path, REPOSITORY))
            if linked is None or anchor not in linked.anchors:
                broken.append(target)
    assert broken == []


def names_in(path: Path) -> set[str]:
    """Functions, classes, methods, fields and constants of a module: ``Name`` and ``Class.name``."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        found |= _defined(node)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name}" for part in node.body for name in _defined(part)}
    return found


def _defined(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_code_named_beside_a_link_is_there(page: Page) -> None:
    missing = [f"{name} in {path.name}" for name, path in page.named_code if name not in names_in(path)]
    assert missing == []


def test_the_architecture_draws_every_folder() -> None:
    drawn = [line.strip().split()[0] for line in PAGES["docs/architecture.md"].blocks[0].text.splitlines()]
    expected = {"configs/", "benchmarks/", "tests/", "docs/"}
    for package in ("fmrl_dist", "shards", "launch"):
        folders = {path.parent for path in (REPOSITORY / package).rglob("*.*") if "__pycache__" not in path.parts}
        expected |= {f"{folder.name}/" for folder in folders}
    assert {name for name in drawn if name.endswith("/")} == expected
    commands = {path.name for path in (REPOSITORY / "fmrl_dist").glob("*.py")} - {"__init__.py"}
    assert {name for name in drawn if name.endswith(".py")} == commands


def test_the_import_order_is_the_one_that_is_tested() -> None:
    tested = re.search(r"^FOLDERS = \((.*)\)$", (REPOSITORY / "tests/test_structure.py").read_text(), re.MULTILINE)
    assert tested is not None
    order = " < ".join([*re.findall(r'"(\w+)"', tested[1]), "commands"])
    for name in ("docs/architecture.md", "CONTRIBUTING.md"):
        text = " ".join((REPOSITORY / name).read_text().replace("`", "").split())
        assert order in text, name
