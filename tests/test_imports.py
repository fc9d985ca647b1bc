"""Imports go one way: entries → checkpoint, evaluation, data, losses → model → ops; and nothing unpickles or evaluates.

Read from the source with ``ast``, so imports inside functions count too.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.fixtures.processes import REPOSITORY

PACKAGES = ("fmrl_dist", "shards", "launch")
# Parts of fmrl_dist from the bottom up; a part imports from its own layer and from those below. A part not named here
# belongs to the entries, on top.
LAYERS = (
    ("__version__", "errors", "files", "urls", "exchange"),
    ("ops",),
    ("model",),
    ("plain_values", "feature_config", "config"),
    ("data", "losses", "metrics", "checkpoint", "ranking", "catalogue", "evaluation", "split_catalogue"),
    ("export_folder",),
)
SHARDS_MAY_IMPORT = (
    *("fmrl_dist.__version__", "fmrl_dist.config", "fmrl_dist.config.features", "fmrl_dist.base.errors"),
    *("fmrl_dist.base.files", "fmrl_dist.base.urls", "fmrl_dist.data.store"),
)
LAUNCH_MAY_IMPORT = ("fmrl_dist.__version__", "fmrl_dist.config", "fmrl_dist.base.errors")
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
    """The layer of a name in fmrl_dist, such as ``fmrl_dist.data.store.reader.Store``; ``len(LAYERS)`` for an entry."""
    part = name.split(".")[1]
    return next((i for i, parts in enumerate(LAYERS) if part in parts), len(LAYERS))


def test_the_packages_are_there() -> None:
    assert {"fmrl_dist.config", "fmrl_dist.model.scan", "fmrl_dist.model.fmrlrec", "shards.build"} <= set(modules())


def test_fmrl_dist_imports_downwards() -> None:
    upwards = [
        f"{module} imports {name}"
        for module in modules()
        if module.startswith("fmrl_dist.")
        for name in imported_names(module)
        if is_under(name, ("fmrl_dist",)) and layer(name) > layer(module)
    ]
    assert upwards == []


def test_ops_and_model_know_no_rank_and_no_config() -> None:
    below_config = [m for m in modules() if is_under(m, ("fmrl_dist.model", "fmrl_dist.model.fmrlrec"))]
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
