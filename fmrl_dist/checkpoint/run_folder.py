"""A run's folder: whether it may be written, and where a run resumes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.files import file_sha256, home_folder, write_atomically
from fmrl_dist.base.locks import LockHeldError, lock_file
from fmrl_dist.checkpoint.folder import (
    Checkpoint,
    TrainState,
    latest_sha256,
    linked_checkpoint,
    load_checkpoint,
    load_newest_whole,
    restore_links,
)
from fmrl_dist.checkpoint.fresh_start import check_nothing_is_lost, check_own_folder
from fmrl_dist.checkpoint.same_run import check_same_run
from fmrl_dist.config.loading import config_from_dict
from fmrl_dist.config.sections import Config
from fmrl_dist.data.feature_identity import with_origins
from fmrl_dist.data.store.manifest import VOCAB_FILE, fit_file
from fmrl_dist.data.store.reader import Store
from fmrl_dist.distributed.processes import Runtime

LOCK_FILE = ".lock"
FINISHED_FILE = "finished.json"
FINAL_EVALUATION = "evaluation.json"  # on test, seen items not masked
REPORT_FILE = "report.html"  # about the whole run
RESTART_PATIENCE_S = 150.0


def open_run(
    config: Config, resume: str | None, manifest_sha256: str, say: Callable[[str], None] = print
) -> Checkpoint | None:
    """The checkpoint to resume from, or None for a fresh run.

    The search for the best checkpoint restarts unless the run's folder holds one as good as the best that the
    checkpoint knows of, chosen by the same metric and size on the same users.

    Args:
        config: of this run.
        resume: None (a fresh run), "auto" (the run's newest intact checkpoint, if it has any) or a path.
        manifest_sha256: of the store.
        say: prints a message for each damaged checkpoint that is skipped.

    Raises:
        UserError: the folder exists and ``resume`` is None, it is of others, the checkpoint belongs to another run, or
            none is intact or there though the run was saved.
    """
    folder = Path(config.run.dir)
    others = (Path("/"), home_folder(), Path.cwd())
    require(
        folder.resolve() not in others and (folder.is_dir() or not folder.exists()),
        f"run.dir is {config.run.dir!r}; expected a folder of its own, such as runs/first",
    )
    if resume is None:
        if folder.exists():
            raise UserError(f"run folder {folder} exists; resume it with --resume auto, or choose another --run.dir")
        return None
    if resume == "auto":
        newest = load_newest_whole(folder / "checkpoints", say)
        if newest is None:
            check_own_folder(folder)
            check_nothing_is_lost(folder)
            return None
        checkpoint = newest
    else:
        check_own_folder(folder)
        checkpoint = load_checkpoint(Path(resume), "latest")
    best_step, known_best = _best_step(folder, say), checkpoint.state.best_step
    saved = config_from_dict(checkpoint.config)
    # Figures of other users, of another metric or of another size do not compare.
    chosen_otherwise = (saved.eval.users, saved.chosen_by) != (config.eval.users, config.chosen_by)
    if chosen_otherwise and known_best >= 0:
        say("the checkpoint's best was chosen by other eval.users, eval.metric or eval.size: the search restarts")
    # In this run, a later best is as good or better; another run's best says nothing about this one.
    if chosen_otherwise or best_step < known_best or (resume != "auto" and best_step != known_best):
        none = TrainState()
        state = replace(
            checkpoint.state,
            best_value=none.best_value,
            best_step=none.best_step,
            evaluations_without_gain=none.evaluations_without_gain,
        )
        checkpoint = replace(checkpoint, state=state)
    check_same_run(config, checkpoint, manifest_sha256)
    return checkpoint


@dataclass(frozen=True)
class RunClaim:
    """A run's folder that this process may write."""

    folder: Path
    lock: int | None = None  # descriptor of the folder's lock file; None on ranks that write nothing

    def check(self) -> None:
        """Refuse to go on where the folder is no longer the one that was claimed.

        What is written to its open files would be lost, and what is created by name would be half a run, or in another
        run's folder.

        Raises:
            UserError: it was deleted, moved or replaced.
        """
        is_there = self.lock is None
        if self.lock is not None:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                is_there = os.path.samestat((self.folder / LOCK_FILE).stat(), os.fstat(self.lock))
        require(
            is_there,
            f"run folder {self.folder} is gone: it was deleted, moved or replaced while the run wrote to it; "
            "if it was moved, resume with --resume auto and --run.dir at its new place, else start again",
        )


@contextmanager
def locked(folder: Path, say: Callable[[str], None] = print) -> Iterator[RunClaim]:
    """Prevent other processes, on any machine, from training into a run's folder, which is created if needed.

    The kernel, or the file server, releases the lock however the process ends; forked workers do not hold it. A file
    server may need a minute or two to notice that a machine is dead, so a job that SLURM restarts waits for the lock.

    Args:
        folder: of the run.
        say: prints a warning if the file system does not support locks.

    Raises:
        UserError: another process is training into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a+") as file:
        try:
            patience_s = RESTART_PATIENCE_S if "SLURM_RESTART_COUNT" in os.environ else 0
            lock_file(file.fileno(), patience_s, poll_s=1, across_machines=True)
        except LockHeldError:
            file.seek(0)
            raise UserError(
                f"{file.read().strip() or 'another process'} is training into {folder}; wait until it ends, or "
                f"choose another --run.dir (if its machine is dead, delete {folder / LOCK_FILE})"
            ) from None
        except OSError as error:
            say(f"{folder} cannot be locked ({error.strerror}): nothing prevents a second run from training into it")
        file.truncate(0)
        print(f"process {os.getpid()} of {socket.gethostname()}", file=file, flush=True)
        try:
            yield RunClaim(folder, file.fileno())
        finally:
            file.truncate(0)


def wait_for_earlier_life(folder: Path, runtime: Runtime) -> None:
    """After SLURM has restarted a job, wait until what may be left of it elsewhere no longer trains into the folder.

    Before the run looks for the checkpoint to resume: the earlier life saves one as it ends.

    Raises:
        UserError: on every rank; it still trains.
    """
    refusal = ""
    if runtime.is_main and "SLURM_RESTART_COUNT" in os.environ and folder.is_dir():
        try:
            with locked(folder, runtime.say):
                pass
        except UserError as error:
            refusal = str(error)
    if runtime.agree(bool(refusal))[0]:
        raise UserError(refusal or f"another run is training into {folder}")


@contextmanager
def claimed_run_folder(
    folder: Path, config: Config, runtime: Runtime, store_files: Mapping[str, bytes], found: Container[str]
) -> Iterator[RunClaim]:
    """Claim the run's folder, once nothing can be refused any more, and clear its mark that the run is finished.

    Args:
        folder: of the run.
        config: of the run, kept in it.
        runtime: this process and its group.
        store_files: :func:`files_of_store`, to be kept in it; only rank 0 needs them.
        found: hashes that its latest checkpoint may have, "" for none: of the link when the run looked for one to
            resume, and of what it resumed, since a network file system may show an old link.

    Raises:
        UserError: on every rank; another run is training into it, or has done since. Later, on the first rank: the
            folder is gone.
    """
    claim = RunClaim(folder)
    runtime.accelerator.wait_for_everyone()  # every rank has looked at the folder before one writes to it
    with ExitStack() as stack:
        refusal = ""
        if runtime.is_main:
            try:
                claim = stack.enter_context(locked(folder, runtime.say))
                require(
                    latest_sha256(folder / "checkpoints") in found,
                    f"another run has trained into {folder} while this one started; go on from there with "
                    "--resume auto, or choose another --run.dir",
                )
                restore_links(folder / "checkpoints", config.train.keep_checkpoints)
            except UserError as error:
                refusal = str(error)
        if runtime.agree(bool(refusal))[0]:
            raise UserError(refusal or f"another run is training into {folder}")
        if runtime.is_main:
            write_atomically(folder / "config.yaml", config.to_yaml().encode())
            for name, data in store_files.items():
                write_atomically(folder / name, data)
            (folder / FINISHED_FILE).unlink(missing_ok=True)
            (folder / FINAL_EVALUATION).unlink(missing_ok=True)
            (folder / REPORT_FILE).unlink(missing_ok=True)
        try:
            yield claim
        except (UserError, OSError):
            claim.check()  # the cause of what could not be written, or found
            raise


def files_of_store(store: Store, features: Iterable[str], has_id_table: bool) -> dict[str, bytes]:
    """What a run keeps of its store, by file name: it says what the run's weights mean when the store is built again.

    Args:
        store: that it trains on.
        features: that its model reads; the fits of those that were fitted, and of what they are codes of.
        has_id_table: then also the vocabulary, which says whose rows it has.

    Raises:
        UserError: one of them is missing or damaged.
    """
    kept = [name for name in with_origins(features, store) if name in store.manifest.fits]
    files = {fit_file(name): store.read_fit(name) for name in kept}
    return files | ({VOCAB_FILE: store.read_table(VOCAB_FILE)} if has_id_table else {})


def evaluation_file(split: str, mask_seen: bool, other_manifest: str = "") -> str:
    """File name without extension: evaluation[-valid][-masked][-on-MANIFEST].

    Args:
        split: valid or test.
        mask_seen: whether the items of a user's history were left out.
        other_manifest: sha256 of the store's manifest, where that is not the store of the run or export.
    """
    parts = ["evaluation"] + ["valid"] * (split == "valid") + ["masked"] * mask_seen
    return "-".join(parts + ([f"on-{other_manifest[:12]}"] if other_manifest else []))


def mark_finished(folder: Path, best: Checkpoint) -> None:
    """Record that the run has trained to its end and evaluated its best checkpoint."""
    record = {
        "latest_sha256": latest_sha256(folder / "checkpoints"),
        "best_step": best.state.step,
        "best_sha256": best.sha256,
        "evaluation_sha256": file_sha256(folder / FINAL_EVALUATION),
    }
    write_atomically(folder / FINISHED_FILE, json.dumps(record, indent=1).encode() + b"\n")


def is_finished(folder: Path) -> bool:
    """Whether the run's own record says that it is finished, and its evaluation, and nothing was trained since.

    Figures that are damaged, or of another store, are thus replaced by a run that resumes.
    An ``evaluation.json`` does not say so: ``fmrl_dist.evaluate`` writes one for a run that still trains.
    """
    try:
        record = json.loads((folder / FINISHED_FILE).read_text())
        evaluation = file_sha256(folder / FINAL_EVALUATION)
        known = record.get("evaluation_sha256", evaluation)  # missing from older records
        return bool((record["latest_sha256"], known) == (latest_sha256(folder / "checkpoints"), evaluation))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False


def training_is_over(config: Config, checkpoint: Checkpoint, total_steps: int) -> bool:
    """Whether a checkpoint's run has nothing left to train."""
    if checkpoint.state.validation_is_due:
        return False
    return checkpoint.state.step >= total_steps or out_of_patience(config, checkpoint.state.evaluations_without_gain)


def out_of_patience(config: Config, evaluations_without_gain: int) -> bool:
    """Early stopping's rule; patience 0 never stops."""
    return evaluations_without_gain >= (config.train.patience or math.inf)


def run_of_best(checkpoint: Checkpoint) -> Path | None:
    """The run whose best checkpoint this is, else None: a run's figures and exports are those of its best."""
    run = checkpoint.path.parent.parent
    return run if linked_checkpoint(run / "checkpoints", "best") == checkpoint.path else None


def _best_step(folder: Path, say: Callable[[str], None]) -> int:
    """Step of the folder's best checkpoint, -1 if there is none or it is damaged."""
    best = linked_checkpoint(folder / "checkpoints", "best")
    if best is None or not best.exists():
        return -1
    try:
        return load_checkpoint(best, with_optimizer=False).state.step
    except UserError as error:
        say(f"{error}; the search for the best restarts")
        return -1
