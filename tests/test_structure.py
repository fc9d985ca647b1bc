"""The house keeps its shape: folders are listed, imports go one way, a name means one thing; nothing is unpickled.

Read from the source with ``ast``, so imports inside functions count too.
"""

from __future__ import annotations

import ast
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from tests.fixtures.processes import REPOSITORY

PACKAGES = ("fmrl_dist", "shards", "launch")
# The folders of fmrl_dist from the bottom up: a folder imports from itself and from those before it. Its modules
# (train, evaluate, …) are commands, on top.
FOLDERS = ("base", "model", "config", "distributed", "losses", "data", "checkpoint", "evaluation", "deploy", "training")
SUBFOLDERS = {
    "fmrl_dist": {
        *FOLDERS,
        *(
            "base/pages",
            "model/item_encoders",
            "data/store",
            "evaluation/results",
            "model/mixers",
            "deploy/approximate",
            "deploy/catalogue",
            "deploy/report_page",
            "deploy/web",
            "deploy/service",
            "deploy/batch",
            "checkpoint/export",
            "training/id_table",
            "training/monitoring",
            "training/steps",
        ),
    },
    "shards": {
        *("tables", "tables/formats", "encoders", "encoders/fitted", "encodings", "images"),
        *("interactions", "store", "store_page", "demo"),
    },
    "launch": {"slurm", "sweeps", "local"},
    "benchmarks": {"clients", "gpu", "measuring", "paper", "rivals"},
}
COMMANDS = {
    "fmrl_dist": {
        "train",
        "evaluate",
        "export",
        "plan",
        "compare",
        "baselines",
        "report",
        "serve",
        "add_items",
        "recommend",
    },
    "shards": {"build", "encode", "verify", "inspect", "random_image_encoder"},
    "launch": {"submit", "sweep"},
}
MAX_FILES = 16  # of a folder
SHARDS_MAY_IMPORT = ("fmrl_dist.__version__", "fmrl_dist.base", "fmrl_dist.config", "fmrl_dist.data.store")
LAUNCH_MAY_IMPORT = ("fmrl_dist.__version__", "fmrl_dist.base", "fmrl_dist.config", "fmrl_dist.data.store")
RANKS_AND_LAUNCHERS = ("torch.distributed", "accelerate", "deepspeed")
SOURCES = sorted(path for folder in (*PACKAGES, "benchmarks") for path in (REPOSITORY / folder).rglob("*.py"))
UNPICKLERS = ("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the packages, by dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text(), str(path))
    return found


def imported_names(module: str) -> list[str]:
    """What ``module`` imports, down to the name: ``from a.b import c`` is ``a.b.c``."""
    names = []
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} imports relatively; write the whole name"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def imported_modules(module: str) -> set[str]:
    """The modules of ours among :func:`imported_names`."""
    names = imported_names(module)
    return {name if name in modules() else name.rpartition(".")[0] for name in names if is_under(name, PACKAGES)}


def is_under(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def layer(name: str) -> int:
    """Place of a name's folder in FOLDERS, such as of ``fmrl_dist.data.order.Order``; above all for a command."""
    part = name.split(".")[1]
    return FOLDERS.index(part) if part in FOLDERS else (-1 if part == "__version__" else len(FOLDERS))


def folders_of(package: str) -> dict[str, list[str]]:
    """Python files of each folder below a package, by relative path; "" is the package's own."""
    found: dict[str, list[str]] = {}
    for path in (REPOSITORY / package).rglob("*.py"):
        relative = path.relative_to(REPOSITORY / package)
        found.setdefault(relative.parent.as_posix().removeprefix("."), []).append(path.stem)
    return found


@pytest.mark.parametrize("package", SUBFOLDERS)
def test_folders_are_listed(package: str) -> None:
    """A new folder is named here, with its place among the others."""
    assert set(folders_of(package)) - {""} == SUBFOLDERS[package]


@pytest.mark.parametrize("package", SUBFOLDERS)
def test_a_folder_can_be_taken_in_at_a_glance(package: str) -> None:
    crowded = {folder: len(names) for folder, names in folders_of(package).items() if len(names) > MAX_FILES + 1}
    assert crowded == {}, "with its __init__; split the folder by what its files are about"


@pytest.mark.parametrize("package", COMMANDS)
def test_above_the_folders_are_commands(package: str) -> None:
    assert set(folders_of(package)[""]) - {"__init__"} == COMMANDS[package]


def test_nothing_imports_a_command() -> None:
    commands = tuple(f"{package}.{name}" for package, names in COMMANDS.items() for name in names)
    found = [
        f"{module} imports {name}"
        for module in modules()
        for name in imported_names(module)
        if is_under(name, commands)
    ]
    assert found == [], "what two commands share belongs into a folder"


def test_a_public_class_name_exists_once() -> None:
    names = Counter(
        node.name
        for path in SOURCES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert {name: count for name, count in names.items() if count > 1} == {}


def test_fmrl_dist_imports_downwards() -> None:
    upwards = [
        f"{module} imports {name}"
        for module in modules()
        if module.startswith("fmrl_dist.")
        for name in imported_names(module)
        if is_under(name, ("fmrl_dist",)) and layer(name) > layer(module)
    ]
    assert upwards == []


TESTS = sorted((REPOSITORY / "tests").rglob("*.py"))


def test_tests_import_no_test() -> None:
    """What tests share lives in tests/fixtures."""
    found = []
    for path in TESTS:
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if module.startswith("tests.") and module.rpartition(".")[2].startswith("test_"):
                found.append(f"{path.relative_to(REPOSITORY)} imports {module}")
    assert found == []


def test_tests_mirror_the_packages() -> None:
    """tests/losses for fmrl_dist/losses, tests/shards/encoders for shards/encoders; some folders are of tests alone."""
    of_tests_alone = {"", "fixtures", "commands", "docs", "benchmarks", "fuzz", "launch/golden"}
    mirrored = {folder for folder in folders_of("fmrl_dist") if folder}
    for package in ("shards", "launch"):
        mirrored |= {f"{package}/{folder}".rstrip("/") for folder in folders_of(package)}
    assert set(folders_of("tests")) <= mirrored | of_tests_alone


def test_the_model_knows_no_process_and_no_config() -> None:
    below_config = [m for m in modules() if is_under(m, ("fmrl_dist.model",))]
    found = [f"{m} imports {name}" for m in below_config for name in imported_names(m)]
    assert [line for line in found if is_under(line.split()[-1], (*RANKS_AND_LAUNCHERS, "fmrl_dist.config"))] == []


@pytest.mark.parametrize(
    ("package", "allowed"),
    [("fmrl_dist", ("fmrl_dist",)), ("shards", ("shards", *SHARDS_MAY_IMPORT)), ("launch", LAUNCH_MAY_IMPORT)],
)
def test_packages_import_only_what_they_may(package: str, allowed: tuple[str, ...]) -> None:
    found = [
        f"{module} imports {name}"
        for module in modules()
        if is_under(module, (package,))
        for name in imported_names(module)
        if is_under(name, PACKAGES) and not is_under(name, (*allowed, package))
    ]
    assert found == []


def test_no_import_cycle() -> None:
    imports = {module: imported_modules(module) - {module} for module in modules()}
    while leaves := [module for module, needed in imports.items() if not needed & set(imports)]:
        for module in leaves:
            del imports[module]
    assert imports == {}, "these modules import each other in a circle, or something that does"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_nothing_unpickles_or_evaluates(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            assert not [a.name for a in node.names if is_under(a.name, UNPICKLERS)], where
        elif isinstance(node, ast.ImportFrom):
            assert not is_under(node.module or "", UNPICKLERS), where
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "torch.load"), f"{where} calls {called}"
            assert all(k.arg != "allow_pickle" or ast.unparse(k.value) == "False" for k in node.keywords), where
