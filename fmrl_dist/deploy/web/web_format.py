"""``--format web``: a folder for any file server. docs/web.md describes it.

    index.html, style.css, app.js, model.js, service-worker.js, manifest.webmanifest, icon.svg   the page
    model.json    sizes, figures, what is where in model.bin, all hashes
    model.bin     weights and item vectors of all sizes (:mod:`~fmrl_dist.deploy.web.nested_file`)
    items.json    external ids and titles

The hash of an export is that of everything in it; it is in the addresses of its files and the name of the browser's
cache, so that a new export replaces an old one as a whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.files import final_name, foreign_entries, json_sha256, replaced_folder
from fmrl_dist.checkpoint.export.parts import ExportedModel, ExportParts
from fmrl_dist.data.store.manifest import VOCAB_FILE
from fmrl_dist.deploy.item_vocabulary import ItemVocabulary
from fmrl_dist.deploy.web.nested_file import pack
from fmrl_dist.deploy.web.page_files import PAGE_FILES, SERVICE_WORKER, page_sources, rendered_page
from fmrl_dist.deploy.whole_histories import check_has_state

FORMAT, FORMAT_VERSION = "fmrl_dist web export", 1
MODEL_JSON, MODEL_BIN, ITEMS_JSON = "model.json", "model.bin", "items.json"
FILES = (*PAGE_FILES, SERVICE_WORKER, MODEL_JSON, MODEL_BIN, ITEMS_JSON)
METRICS = ("ndcg@10", "recall@10")  # shown, if the evaluation has them
DTYPE = "int8"  # unless another is asked for: docs/decisions.md, 76
DEFAULT_NAME = "Catalogue"  # not the store's: a page says nothing of where it was made
POPULAR = 100  # items to show before the first event, where the model has no output for an empty history


def write_web_export(
    exported: ExportedModel,
    folder: Path,
    parts: ExportParts,
    figures: Mapping[str, Any] | None,
    overwrite: bool,
    name: str = DEFAULT_NAME,
) -> None:
    """Write ``folder``.

    Args:
        exported: the model and its catalogue; the page has all of the model's sizes.
        folder: to write.
        parts: vocabulary, dtype and what that was measured to cost; the rest is not for everybody's eyes.
        figures: content of the ``evaluation.json`` of the same checkpoint; None if there is none. Those of another
            catalogue are not shown.
        overwrite: replace an existing web export.
        name: of the catalogue, shown on the page.

    Raises:
        UserError: as :func:`check_web_output`; a number does not fit the dtype; the vocabulary is of other items, the
            figures of another checkpoint, or another process is writing ``folder``.
    """
    check_has_state(exported.model, "--format web needs")
    files = web_files(exported, parts, figures, name)
    with replaced_folder(folder) as aside:
        check_web_output(folder, overwrite)  # another process may have written it since it was looked at
        for file, data in files.items():
            (aside / file).write_bytes(data)
        if not overwrite:
            check_web_output(folder, overwrite)  # or meanwhile, where there are no locks


def check_web_output(folder: Path, overwrite: bool) -> None:
    """Refuse an existing folder, unless it is a web export to overwrite.

    Raises:
        UserError: it is something else, holds files that are not ours, or is not to be overwritten.
    """
    if not folder.exists():
        return
    require(is_web_export(folder), f"{folder} exists and is not a web export; choose another --output")
    foreign = foreign_entries(folder, lambda name: final_name(name) in FILES)
    require(
        not foreign,
        f"{folder} holds {', '.join(foreign[:3])}, which a web export does not have; move it away, or choose another "
        "--output",
    )
    require(overwrite, f"web export {folder} exists; keep it, or replace it with --overwrite")


def is_web_export(folder: Path) -> bool:
    """Whether ``folder`` is a web export, of any version."""
    try:
        manifest = json.loads((folder / MODEL_JSON).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def web_files(
    exported: ExportedModel, parts: ExportParts, figures: Mapping[str, Any] | None, name: str
) -> dict[str, bytes]:
    """Everything in the folder, by file name; see :func:`write_web_export`."""
    weights = pack(exported, parts.dtype)
    vocabulary = ItemVocabulary(parts.vocab, VOCAB_FILE)
    require(
        len(vocabulary.ids) == len(exported.items),
        f"the vocabulary has {len(vocabulary.ids):,} items and the model {len(exported.items):,}; they are of "
        "different stores",
    )
    titles = vocabulary.titles
    named = titles and [title if title and title.strip() else "" for title in titles]
    items = _json({"ids": list(map(str, vocabulary.ids)), "titles": named})
    model = exported.model.arguments
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "name": name,
        "num_items": len(exported.items),
        "sizes": model["sizes"],
        "depth": model["depth"],
        "max_length": exported.max_length,
        "predict_first": exported.predict_first,
        "normalize": exported.normalize,
        "input_norm": model["input_norm"],
        "output_norm": model["output_norm"],
        "popular": None if exported.predict_first else _most_popular(vocabulary.train_counts),
        "dtype": parts.dtype,
        "dtype_costs": None if parts.quality is None else largest_loss(parts.quality, parts.dtype),
        "figures": None if figures is None else masked_figures(figures, exported),
        "origin": {
            "fmrl_dist_version": exported.origin.fmrl_dist_version,
            "step": exported.origin.step,
            "manifest_sha256": exported.origin.manifest_sha256,
        },
        "items_sha256": hashlib.sha256(items).hexdigest(),
        "sections": weights.sections,
    }
    sources = {file: hashlib.sha256(data).hexdigest() for file, data in page_sources().items()}
    export = json_sha256({"model": manifest, "page": sources})[:32]
    data = {MODEL_JSON: _json({"export": export, **manifest}), MODEL_BIN: weights.data, ITEMS_JSON: items}
    return rendered_page(export, data) | data


def masked_figures(evaluation: Mapping[str, Any], exported: ExportedModel) -> dict[str, Any] | None:
    """What the page shows of an ``evaluation.json``: figures of the cut network, seen items masked.

    None if it is of another catalogue, or has none of ``METRICS`` at every size.

    Raises:
        UserError: it is of another checkpoint, or damaged.
    """
    try:
        step, sizes = evaluation["checkpoint"]["step"], list(map(str, exported.model.sizes))
        require(
            step == exported.origin.step,
            f"the evaluation is of step {step}, the model of step {exported.origin.step}; evaluate it again",
        )
        if evaluation["manifest_sha256"] != exported.origin.manifest_sha256:
            return None
        rows = (evaluation if evaluation["mask_seen"] else evaluation["masked"])["sizes"]
        metrics = [metric for metric in METRICS if all(metric in rows.get(size, {}) for size in sizes)]
        if not metrics:
            return None
        return {
            "metrics": metrics,
            "masked": True,
            "split": str(evaluation["split"]),
            "users": int(evaluation["users"]),
            "sizes": {size: {metric: float(rows[size][metric]) for metric in metrics} for size in sizes},
        }
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"the evaluation is damaged ({problem}); evaluate the run again") from None


def largest_loss(quality: Mapping[str, Any], dtype: str) -> float | None:
    """How far the dtype moves NDCG@10 at any size, seen items masked; None if that was not measured."""
    rows = quality.get("masked", {})
    if dtype not in rows:
        return None
    return max(abs(rows["float32"][size] - rows[dtype][size]) for size in rows[dtype])


def _most_popular(counts: np.ndarray) -> dict[str, list[Any]]:
    """Rows with the most training events, and their shares of all events, which are their scores."""
    rows = np.argsort(-counts, kind="stable")[:POPULAR]
    return {"rows": rows.tolist(), "shares": (counts[rows] / max(int(counts.sum()), 1)).tolist()}


def _json(value: Mapping[str, Any] | Sequence[Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
