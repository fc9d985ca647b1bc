"""The demo's store, built by the first run that needs it, and refused if another config built it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.launch_variables import without_launcher
from fmrl_dist.base.locks import lock_path
from fmrl_dist.base.urls import is_url
from fmrl_dist.config.sections import Config
from fmrl_dist.data.store.built_from import list_differences, recorded_keys
from fmrl_dist.data.store.manifest import MANIFEST_FILE
from fmrl_dist.data.store.reader import Store

POLL_S = 0.5


def build_missing_demo_store(config: Config) -> None:
    """Build the demo's store if it is missing: rank 0 does so before joining the others, which wait for it.

    The others do not even look: a network file system may report for a minute that a new file is missing.

    Raises:
        UserError: it cannot be built, or the one that is there was built from another config.
    """
    if config.data.demo is None or os.environ.get("RANK", "0") != "0":
        return
    if is_url(config.store.path):
        return
    if (Path(config.store.path) / MANIFEST_FILE).exists():
        _check_same_keys(config)
        return
    print(f"building the demo store {config.store.path} …", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        with_config = Path(folder) / "config.yaml"
        with_config.write_text(config.to_yaml())
        command = [sys.executable, "-m", "shards.build", "--config", str(with_config)]
        built = subprocess.run(command, check=False, env=without_launcher(os.environ))  # the others do not build
    lock = lock_path(Path(config.store.path).resolve())
    while built.returncode != 0 and lock.exists():  # another run builds it
        time.sleep(POLL_S)
    if not (Path(config.store.path) / MANIFEST_FILE).exists():
        raise UserError("the demo store could not be built; see the lines above")


def _check_same_keys(config: Config) -> None:
    """Refuse a demo store of other sizes or features. Its raw tables are made from the config, so keys say all."""
    store = Store.open(config.store.path, config.store)
    built_from = store.manifest.built_from
    if built_from is None:
        print(f"note: an older version built {store.location}, and did not record what from: nothing was compared")
        return
    differences = built_from.differences(recorded_keys(config))
    require(
        not differences,
        f"demo store {store.location} was built from something else: {list_differences(differences)}; build it again "
        "with python -m shards.build --overwrite and the same options, or choose another --store.path",
    )
