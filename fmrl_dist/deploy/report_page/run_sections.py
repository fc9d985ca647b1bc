"""The page's sections on the run: curves, settings, data, and where all of it came from."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fmrl_dist import __version__
from fmrl_dist.base.pages.charts import NETWORK, Axis, Series, line_chart, ramp
from fmrl_dist.base.pages.markup import Markup, element, facts, joined, paragraph, table
from fmrl_dist.base.pages.numbers import number_of_bytes, percent
from fmrl_dist.config.sections import Config
from fmrl_dist.data.store.manifest import dropped_why
from fmrl_dist.deploy.report_page.run_facts import RunFacts
from fmrl_dist.deploy.report_page.words import short

GIT_PATIENCE_S = 2.0


def curves(run: RunFacts) -> Markup:
    """Loss, validation, learning rate and throughput, by epoch."""
    if not run.train_log:
        return paragraph("There are no curves: nothing has been logged yet.", class_="missing")
    steps = steps_per_epoch([*run.train_log, *run.valid_log])
    label = "epoch" if steps else "step"
    metric = run.config.eval.metric
    sizes = run.sizes
    loss = [
        _curve(run.train_log, f"loss@{size}", steps, str(size), ramp(n, len(sizes))) for n, size in enumerate(sizes)
    ]
    valid = [
        _curve(run.valid_log, f"{metric}@{size}", steps, str(size), ramp(n, len(sizes))) for n, size in enumerate(sizes)
    ]
    rate = [_curve(run.train_log, "lr", steps, "learning rate", NETWORK)]
    tokens = [_curve(run.train_log, "tokens_per_s", steps, "events a second", NETWORK)]
    best = None
    if run.checkpoint is not None and run.valid_log:
        best = (run.checkpoint.state.best_step / (steps or 1), "best")
    charts = [
        _chart("loss", "Loss of each size", loss, label, best=None),
        _chart("valid", f"Validation {metric} of each size", valid, label, best, from_zero=True),
        _chart("lr", "Learning rate", rate, label, best=None, from_zero=True),
        _chart("speed", "Throughput of training, events a second", tokens, label, best=None, from_zero=True),
    ]
    last = run.train_log[-1]
    chosen = run.config.chosen_by
    about = f"Logged up to step {last['step']:,.0f}"
    if best is not None and run.checkpoint is not None:
        state = run.checkpoint.state
        about += (
            f"; the best checkpoint is that of step {state.best_step:,}, {chosen} {state.best_value:.4f} in validation"
        )
    caption = element("figcaption", f"{about}.")
    return element("figure", element("div", *charts, class_="charts"), caption)


def _curve(
    log: Sequence[Mapping[str, float]], key: str, steps: int | None, label: str, colour: tuple[str, str]
) -> Series:
    points = [(record["step"] / (steps or 1), record[key]) for record in log if key in record]
    return Series(f"{key}", points, colour, label=label if "@" in key else "")


def _chart(
    name: str,
    title: str,
    series: Sequence[Series],
    x_label: str,
    best: tuple[float, str] | None,
    from_zero: bool = False,
) -> Markup:
    if not any(one.points for one in series):
        return element("div", element("h3", title), paragraph("Not logged.", class_="missing"))
    ends = "; ".join(
        f"{one.name} from {one.points[0][1]:.4g} to {one.points[-1][1]:.4g}" for one in series if one.points
    )
    y = Axis(from_zero=from_zero)
    chart = line_chart(f"curve-{name}", title, f"{title} by {x_label}: {ends}.", series, Axis(x_label), y, best)
    return element("div", element("h3", title), chart)


def steps_per_epoch(log: Sequence[Mapping[str, float]]) -> int | None:
    """The least number of steps that puts every record into the epoch it names; None if there is none.

    Step s, the s-th, is of epoch ⌊(s - 1) / steps⌋.
    """
    least, most = 1, None
    for record in log:
        before, epoch = int(record["step"]) - 1, int(record["epoch"])
        least = max(least, before // (epoch + 1) + 1)
        if epoch > 0:
            most = min(before // epoch, most or before // epoch)
    return least if most is None or least <= most else None


def settings(config: Config) -> Markup:
    """What differs from the defaults, then everything."""
    recorded, defaults = _flat(config.to_dict()), _flat(Config().to_dict())
    changed = [(key, value, defaults.get(key, "")) for key, value in recorded.items() if value != defaults.get(key)]
    rows = [
        (element("code", key), element("code", value), element("code", default) if default else "—")
        for key, value, default in changed
    ]
    whole = element("pre", config.to_yaml())
    note = paragraph(
        f"The recorded config, {config.hash}. What was “auto” stands here as the value that it had for this store.",
        class_="note",
    )
    folded = element("details", element("summary", "The whole config"), whole)
    return joined((table("Differs from the defaults", ("key", "this run", "default"), rows), note, folded))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = (
                value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
            )
    return flat


def data(run: RunFacts) -> Markup:
    """Users, items, events, and what made the features."""
    parts: list[Markup] = []
    pairs: list[tuple[str, str | Markup]] = []
    if run.store is not None:
        manifest = run.store.manifest
        dropped = f" ({manifest.num_dropped_users:,} were left out: {dropped_why(manifest.split_rule)})"
        pairs += [
            ("store", run.store.location),
            ("users", f"{manifest.num_users:,}{dropped if manifest.num_dropped_users else ''}"),
            ("items", f"{manifest.num_items:,}"),
            ("events", f"{manifest.num_events:,}"),
        ]
        for split, blocks in manifest.splits.items():
            pairs.append((f"{split} users", f"{sum(block.count for block in blocks):,}"))
    elif run.checkpoint is not None:
        pairs += [("store", run.config.store.path), ("items", f"{run.checkpoint.num_items:,}")]
        parts.append(paragraph("The store is not there: numbers of users and events are missing.", class_="missing"))
    pairs += [
        ("windows", f"{run.config.data.windows}, at most {run.config.data.max_length} events"),
    ]
    if run.figures is not None:
        raw = run.figures.raw
        pairs.append(("split", f"{raw['split_rule']}; figures are of {raw['users']:,} {raw['split']} users"))
    parts.insert(0, facts(pairs))
    parts.append(_features(run))
    if run.store is not None and run.store.manifest.built_from is not None:
        built = run.store.manifest.built_from
        hashes = [(key, short(str(value))) for key, value in built.files.items()]
        made_with = ", ".join(f"{name} {version}" for name, version in built.made_with.items())
        parts.append(table("Raw tables that the store was built from", ("key", "sha256 of the content"), hashes))
        parts.append(paragraph(f"Built with {made_with}.", class_="note"))
    return joined(parts)


def _features(run: RunFacts) -> Markup:
    checkpoint = run.checkpoint
    if checkpoint is None:
        return paragraph("What features the model reads is not known without a checkpoint.", class_="missing")
    present = (
        {f.name: f.present / max(run.store.manifest.num_items, 1) for f in run.store.manifest.features}
        if run.store is not None
        else {}
    )
    rows = []
    for name, dim in checkpoint.features.items():
        known = checkpoint.feature_encoders.get(name, {})
        made = {"encoder": known} if isinstance(known, str) else known  # a text in older checkpoints
        recipe = made.get("recipe")
        how = element("code", json.dumps(recipe, ensure_ascii=False)) if recipe else "not recorded"
        share = percent(present[name]) if name in present else "unknown"
        encoder, revision = str(made.get("encoder", "not recorded")), str(made.get("revision", "not recorded"))
        rows.append((name, f"{dim:,}", share, encoder, short(revision), how))
    if not rows:
        return paragraph("The model reads no features: items are known by their ids alone.")
    head = ("feature", "channels", "items that have it", "encoder", "revision", "recipe")
    ids = "Items have trained rows of an id table too." if run.config.model.has_ids else "There is no id table."
    return joined((table("Features that the model reads", head, rows), paragraph(ids, class_="note")))


def provenance(run: RunFacts) -> Markup:
    """Versions, dates and hashes."""
    pairs: list[tuple[str, str | Markup]] = [("run", str(run.folder)), ("state", run.state)]
    checkpoint = run.checkpoint
    if checkpoint is not None:
        name = f"step {checkpoint.state.step:,}, {checkpoint.path.name}"
        record = checkpoint.path / "state.json"
        pairs += [
            ("best checkpoint", name),
            ("its hash", short(checkpoint.sha256)),
            ("written", _date_of(record)),
            ("store manifest", short(checkpoint.manifest_sha256)),
            ("seed", str(run.config.train.seed)),
        ]
        if "file" in checkpoint.vocabulary:
            pairs.append(("vocabulary", short(checkpoint.vocabulary["file"])))
        moments = checkpoint.path / "optimizer.safetensors"
        if moments.is_file():
            pairs.append(("optimiser state on disk", number_of_bytes(moments.stat().st_size)))
    if run.figures is not None:
        version = str(run.figures.raw.get("fmrl_dist_version", "not recorded"))
        pairs.append(("figures by", f"fmrl-dist {version}, {_date_of(run.folder / 'evaluation.json')}"))
    commit = commit_of_source()
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    pairs.append(("this page by", f"fmrl-dist {__version__}{f', commit {commit}' if commit else ''}, {now}"))
    return facts(pairs)


def _date_of(file: Path) -> str:
    """When a file was last changed."""
    try:
        return datetime.fromtimestamp(file.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except OSError:
        return "unknown"


def commit_of_source() -> str:
    """The commit of the checkout that this code runs from, "+" if files differ from it; "" where there is none."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return ""
    try:
        git = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        done = subprocess.run(git, capture_output=True, text=True, timeout=GIT_PATIENCE_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
