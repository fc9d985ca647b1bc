"""The model card of an export, its README.md, as the Hugging Face Hub reads it: a YAML header, then Markdown.

Figures are those of the run's own evaluation of the checkpoint that is exported; nothing is stated that is not known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fmrl_dist.base.errors import require
from fmrl_dist.checkpoint.export.parts import ExportedModel
from fmrl_dist.checkpoint.folder import Checkpoint
from fmrl_dist.checkpoint.run_folder import FINAL_EVALUATION
from fmrl_dist.data.store.manifest import LEAVE_ONE_OUT, Feature
from fmrl_dist.data.store.reader import Store
from fmrl_dist.deploy.card_source import folder_lines, loading_line
from fmrl_dist.evaluation.results.report import both_protocols

METRICS = ("ndcg@10", "recall@10")  # shown, if the evaluation has one of them
METRIC_NAMES = {"ndcg": "NDCG", "recall": "Recall", "mrr": "MRR"}
PROTOCOL_NAMES = ("all items", "seen items masked")
DEPLOYMENTS = {"sizes": "cut network", "vectors": "cut vectors"}
# Deployment, size, and metrics among all items and among unseen ones.
SizeFigures = tuple[str, str, tuple[Mapping[str, float], ...]]
FOLDER_OF_TEXT_MODEL = re.compile(r"(transformers:)(?!package:).*/(?=[^/\s])", re.DOTALL)  # up to its name
COMMIT = re.compile(r"[0-9a-f]{40}")  # the revision of a model from the Hub; of one in a folder it is a SHA-256
TAGS = ("recommender-systems", "sequential-recommendation", "matryoshka", "fmrlrec")


@dataclass(frozen=True)
class Licence:
    """Under which terms a model is published, in the words of the Hub's metadata; empty where nobody has said."""

    identifier: str = ""  # of the Hub's list, or "other"
    name: str = ""  # of a licence that is not in the list

    def __post_init__(self) -> None:
        require(
            (self.identifier == "other") == bool(self.name),
            "--license other needs the licence's name, --license-name NAME, and no other value of --license takes one",
        )


@dataclass(frozen=True)
class CardSubject:
    """What a card is about."""

    exported: ExportedModel
    store: Store
    dtype: str
    format_name: str
    quality: Mapping[str, Any]  # what the dtype costs
    figures: Mapping[str, Any] | None  # of the run's evaluation on test, of this catalogue
    is_whole: bool  # whether the size is the run's largest: only then it has cut vectors of the run's figures
    source: str  # the folder's name, or an id on the Hub
    on_hub: bool  # which of the two
    licence: Licence


def run_figures(run: Path | None, checkpoint: Checkpoint, store: Store) -> dict[str, Any] | None:
    """The run's evaluation on test, if it is of this checkpoint and on ``store``, whose catalogue is exported."""
    try:
        figures = json.loads((run / FINAL_EVALUATION).read_text(encoding="utf-8")) if run is not None else {}
        is_ours = figures["checkpoint"]["sha256"] == checkpoint.sha256
        return figures if is_ours and figures["manifest_sha256"] == store.manifest.sha256 else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def model_card(subject: CardSubject) -> str:
    """The whole text of README.md."""
    header = yaml.safe_dump(_header(subject), sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{header}---\n" + "\n\n".join(_sections(subject)) + "\n"


def _header(subject: CardSubject) -> dict[str, Any]:
    """``pipeline_tag: other``: the Hub has no task for recommenders."""
    name = _data_name(subject)
    header: dict[str, Any] = {"library_name": "fmrl-dist", "pipeline_tag": "other", "tags": list(TAGS)}
    if subject.licence.identifier:
        header["license"] = subject.licence.identifier
    if subject.licence.name:
        header["license_name"] = subject.licence.name
    results = list(_results(subject))
    if results:
        header["model-index"] = [
            {"name": f"fMRLRec on {name}, size {subject.exported.model.width}", "results": results}
        ]
    return header


def _results(subject: CardSubject) -> Iterator[dict[str, Any]]:
    """One entry a size and deployment, each with all metrics, among all items and among unseen ones."""
    found = list(_figures_by_size(subject))
    named = _shown_metrics(found)
    for key, size, rows in found:
        assert subject.figures is not None
        what = f"size {size}, {DEPLOYMENTS[key]}"
        metrics = [
            {
                "type": metric.replace("@", "_at_"),
                "name": f"{_spelled(metric)}, {protocol}, {what}",
                "value": row[metric],
            }
            for protocol, row in zip(PROTOCOL_NAMES, rows, strict=True)
            for metric in named
        ]
        if metrics:
            yield {
                "task": {"type": "other", "name": "Sequential recommendation"},
                "dataset": {
                    "type": "custom",
                    "name": f"{_data_name(subject)}, {subject.figures['users']:,} users",
                    "config": what,
                    "split": subject.figures["split"],
                },
                "metrics": metrics,
            }


def _figures_by_size(subject: CardSubject) -> Iterator[SizeFigures]:
    """Deployment, size, and metrics among all items and among unseen ones, of the sizes that the export has."""
    for key in DEPLOYMENTS if subject.figures is not None else ():
        assert subject.figures is not None
        if key == "vectors" and not (subject.is_whole and "vectors" in subject.figures):
            continue
        pair = both_protocols(subject.figures, (key,))
        for size in pair[0]:
            if size.isdigit() and int(size) in subject.exported.model.sizes:
                yield key, size, (pair[0][size], pair[1][size])


def _shown_metrics(rows: Sequence[SizeFigures]) -> list[str]:
    """The usual metrics; those of the largest cut-off where a run has none of them."""
    found = list(rows[0][2][0]) if rows else []
    usual = [metric for metric in METRICS if metric in found]
    return usual or [metric for metric in found if metric.split("@")[1] == found[-1].split("@")[1]]


def _spelled(metric: str) -> str:
    name, cutoff = metric.split("@")
    return f"{METRIC_NAMES[name]}@{cutoff}"


def _data_name(subject: CardSubject) -> str:
    return subject.store.location.rstrip("/").rpartition("/")[2] or "a store"


def _sections(subject: CardSubject) -> Iterator[str]:
    exported, manifest = subject.exported, subject.store.manifest
    num_events = sum(block.events for block in manifest.splits["train"])
    sizes = ", ".join(map(str, exported.model.sizes))
    yield (
        f"# fMRLRec on {_data_name(subject)}\n\n"
        f"A sequential recommender: from the items a user has interacted with, in their order, to a score for each of "
        f"{len(exported.items):,} items. Its weights are nested: cut to their first *m* channels, they are a complete "
        f"model, for each *m* of {sizes}. Trained with fmrl-dist after [Wang et al., EMNLP 2024 "
        f"Findings](https://arxiv.org/abs/2409.16627). Written as {subject.format_name}, {subject.dtype}."
    )
    yield "## Use\n\n" + _snippet(subject)
    yield "## Quality\n\n" + _quality(subject)
    yield (
        f"## Data\n\nTrained on {num_events:,} events of {manifest.num_users:,} users; the catalogue has "
        f"{manifest.num_items:,} items. {_split(manifest.split_rule)}\n\n" + "\n".join(_features(subject))
        if _is_of_training(subject)
        else f"## Data\n\nThe catalogue has {manifest.num_items:,} items; it is not the one that was trained on.\n\n"
        + "\n".join(_features(subject))
    )
    yield (
        "## What is in the files\n\n`vocab.parquet` holds the catalogue's own ids, how often each item occurs in "
        "training, and its title if it has one: whoever has the files has those, too. No user's history is in them. "
        "`config.json` names what the model was made from and has the hashes of all files."
    )
    licence = subject.licence.name or subject.licence.identifier
    yield f"## Licence\n\n{licence or 'None has been stated.'}"


def _split(rule: str) -> str:
    if rule == LEAVE_ONE_OUT:
        return (
            "Of each user with at least three events the last one is the test target and the one before it the "
            "validation target: neither is among them."
        )
    return f"The split: {rule}. No event of validation or test is among them."


def _is_of_training(subject: CardSubject) -> bool:
    origin = subject.exported.origin
    return origin.manifest_sha256 == origin.training_manifest_sha256


def _features(subject: CardSubject) -> Iterator[str]:
    read = subject.exported.model.encoder.feature_dims
    if not read:
        yield "The model reads no features of items, only which items they are."
        return
    yield "| feature | channels | made by | revision | items that have it |\n|---|---|---|---|---|"
    for feature in subject.store.manifest.features:
        if feature.name in read:
            yield (
                f"| {feature.name} | {feature.dim} | {_shown_encoder(feature)} | `{feature.revision[:12]}` "
                f"| {feature.present:,} |"
            )


def _shown_encoder(feature: Feature) -> str:
    """What made a feature; of a text model in a folder the folder's name, of one on the Hub its id."""
    found = FOLDER_OF_TEXT_MODEL.match(feature.encoder)
    if found is None or COMMIT.fullmatch(feature.revision):
        return feature.encoder
    return f"{found[1]}{feature.encoder[found.end() :]}"


def _quality(subject: CardSubject) -> str:
    figures, rows = subject.figures, list(_figures_by_size(subject))
    named, parts = _shown_metrics(rows), []
    if figures is None or not named:
        parts.append(
            "No evaluation on test users was at hand when these files were written."
            if _is_of_training(subject)
            else "Quality on test users was not measured on this catalogue, which is not the one that was trained on."
        )
    else:
        heads = [f"{_spelled(metric)}, {protocol}" for metric in named for protocol in PROTOCOL_NAMES]
        table = [f"| size | deployment | {' | '.join(heads)} |", "|" + "---|" * (2 + len(heads))]
        for key, size, pair in rows:
            values = [f"{row[metric]:.4f}" for metric in named for row in pair]
            table.append(f"| {size} | {DEPLOYMENTS[key]} | {' | '.join(values)} |")
        parts.append(
            f"Test figures of {figures['users']:,} users, {figures['split_rule']}; all {figures['items']:,} items are "
            f"ranked, ties count {figures['ties']}. *Cut network*: all weights cut to a size. *Cut vectors*: the whole "
            "network, its outputs and item vectors rotated, then cut. Figures are of float32.\n\n" + "\n".join(table)
        )
    quality = subject.quality
    if subject.dtype != "float32":
        if "not_measured" in quality:
            parts.append(f"What {subject.dtype} costs was not measured: {quality['not_measured']}.")
        else:
            pairs = [
                f"{size}: {before - quality['masked'][subject.dtype][size]:+.5f} of {before:.4f}"
                for size, before in quality["masked"]["float32"].items()
            ]
            parts.append(
                f"Loss of NDCG@10 (seen items masked) by {subject.dtype} against float32, on {quality['users']:,} "
                f"validation users, by size: {'; '.join(pairs)}."
            )
    return "\n\n".join(parts)


def _snippet(subject: CardSubject) -> str:
    if subject.format_name == "onnx":
        return _onnx_snippet(subject)
    some = subject.exported.model.sizes[0]
    return f"""```python
from fmrl_dist import Recommender

recommender = {loading_line(subject.source)}  # size={some}: the smallest of its models
history = recommender.item_ids[:3]  # ids of the catalogue, oldest first
for item in recommender.recommend([history], k=5)[0]:
    print(f"{{item.score:.2f}}  {{item.item_id}}  {{item.title}}")
```"""


def _onnx_snippet(subject: CardSubject) -> str:
    model = subject.exported.model
    items = 'np.load(folder / "item_embeddings.npy").astype(np.float32)'
    if subject.dtype == "int8":
        items += ' * np.load(folder / "item_scales.npy")[:, None]'
    scores = "items @ outputs[0]"
    if subject.exported.normalize:
        scores += " / (np.linalg.norm(items, axis=1) * np.linalg.norm(outputs[0]))"
    return f"""```python
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
{folder_lines(subject.source, subject.on_hub)}items = {items}
step = onnxruntime.InferenceSession(folder / "step.onnx")
state = np.zeros((1, {model.depth}, 2, {model.width}), np.float32)
for item in [3, 14, 15]:  # rows of vocab.parquet, oldest first
    state, outputs = step.run(None, {{"state": state, "embeddings": items[[item]]}})
scores = {scores}
vocabulary = pq.read_table(folder / "vocab.parquet")
if "removed" in vocabulary.column_names:  # items that must not be recommended
    scores[vocabulary["removed"].to_numpy()] = -np.inf
print(np.argsort(-scores)[:10])
```

An empty history is one event whose embedding is `start.npy`. `item_encoder.onnx` embeds an item that is not in the
catalogue from its raw features."""
