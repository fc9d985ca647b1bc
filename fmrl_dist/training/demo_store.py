"""The demo's store, built by the first run that needs it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.locks import lock_path
from fmrl_dist.base.urls import is_url
from fmrl_dist.config.sections import Config
from fmrl_dist.data.store.manifest import MANIFEST_FILE

POLL_S = 0.5


def build_missing_demo_store(config: Config) -> None:
    """Build the demo's store if it is missing: rank 0 does so before joining the others, which wait for it.

    The others do not even look: a network file system may report for a minute that a new file is missing.
    """
    if config.data.demo is None or os.environ.get("RANK", "0") != "0":
        return
    if is_url(config.store.path) or (Path(config.store.path) / MANIFEST_FILE).exists():
        return
    print(f"building the demo store {config.store.path} …", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        with_config = Path(folder) / "config.yaml"
        with_config.write_text(config.to_yaml())
        built = subprocess.run([sys.executable, "-m", "shards.build", "--config", str(with_config)], check=False)
    lock = lock_path(Path(config.store.path).resolve())
    while built.returncode != 0 and lock.exists():  # another run builds it
        time.sleep(POLL_S)
    if not (Path(config.store.path) / MANIFEST_FILE).exists():
        raise UserError("the demo store could not be built; see the lines above")
