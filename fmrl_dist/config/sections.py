"""One YAML file drives build, train and evaluate; the files ``*_section.py`` beside this one define its keys.

Every section is a frozen dataclass. A field's annotation says which values it takes, and the comment beside it (or
right above it) says what they mean: docs/config.md and ``--help-config`` are made from both
(:mod:`fmrl_dist.config.reference`). An unknown key, a wrong value or an impossible combination is a
:class:`~fmrl_dist.base.errors.UserError` at construction, whose message says what to fix. Any key can be overridden on
the command line as ``--section.key value`` (the value is read as YAML).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from dataclasses import dataclass, field
from typing import Any

import yaml

from fmrl_dist.base.errors import require
from fmrl_dist.base.urls import hide_credentials
from fmrl_dist.config.data_section import DataConfig, StoreConfig
from fmrl_dist.config.model_section import LossConfig, ModelConfig, auto_dropout
from fmrl_dist.config.train_section import AUTO_EPOCHS, MIN_AUTO_STEPS, EvalConfig, RunConfig, TrainConfig

FULL_SOFTMAX_ITEMS = 4096  # so many are scored at once anyway
AUTO_ID_DROPOUT = 0.1
AUTO_ID_LR_POWER = 0.67


def _hidden(value: Any) -> Any:
    """Plain values with the credentials of every URL hidden."""
    if isinstance(value, str):
        return hide_credentials(value)
    if isinstance(value, list):
        return [_hidden(part) for part in value]
    return {key: _hidden(part) for key, part in value.items()} if isinstance(value, dict) else value


@dataclass(frozen=True)
class Config:
    """Everything a run needs, and nothing that it does not."""

    data: DataConfig = field(default_factory=DataConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        require(
            self.eval.size in ("mean", 0, *self.model.sizes),
            f"eval.size is {self.eval.size}, which is not trained; choose one of {list(self.model.sizes)}, or mean",
        )
        require(
            self.model.item_encoder == "projection" or self.loss.catalogue == "whole",
            f"loss.catalogue is split, which needs items that are projected, and model.item_encoder is "
            f"{self.model.item_encoder}; choose whole, or projection",
        )
        window, mixer = self.model.window, self.model.mixer
        require(
            mixer == "lru" or window == "auto" or window >= self.data.max_length,
            f"model.window is {window}, less than the {self.data.max_length} events of data.max_length that mixer "
            f"{mixer} is to read; leave model.window out, or shorten data.max_length",
        )
        require(
            mixer != "bidirectional" or (self.data.max_length if window == "auto" else window) > 1,
            "model.mixer is bidirectional with a window of one event, whose place its mask takes: it would read "
            "nothing; raise data.max_length",
        )
        components = 2 * ((self.data.max_length if window == "auto" else window) // 2) + 1
        require(
            mixer != "bsarec" or self.model.low_pass < components,
            f"model.low_pass is {self.model.low_pass}, which leaves no high frequencies of a window's {components}; "
            "lower it, or raise model.window",
        )
        require(
            mixer != "bidirectional" or self.loss.predict_first,
            "model.mixer is bidirectional and loss.predict_first is off: training would never see a history's first "
            "event; turn it on",
        )
        require(
            self.loss.softmax != "full" or self.train.id_lr_power in ("auto", 0),
            f"train.id_lr_power is {self.train.id_lr_power} and the softmax is full, whose optimiser has one rate for "
            "all channels of the ids; set it to 0, or loss.softmax to sampled",
        )
        for key in ("size_weights", "temperatures", "distillation"):
            values = getattr(self.loss, key)
            if isinstance(values, tuple):
                require(
                    len(values) == len(self.model.sizes),
                    f"loss.{key} has {len(values)} numbers; expected one for each of model.sizes "
                    f"{list(self.model.sizes)}",
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they may be printed and recorded: URLs without their credentials."""
        values = typing.cast(dict[str, Any], _hidden(json.loads(json.dumps(dataclasses.asdict(self)))))
        values["data"] |= {"text": list(self.data.text), "text_separator": self.data.text_separator}  # as they are
        return values

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @property
    def chosen_by(self) -> str:
        """The name in ``metrics.jsonl`` of the validation figure that chooses the best checkpoint."""
        return f"{self.eval.metric}@{self.eval.size or self.model.width}"

    @property
    def temperatures(self) -> tuple[float, ...]:
        """τ_m of each size."""
        power = self.loss.temperature_power
        return self.loss.temperatures or tuple((size / self.model.width) ** power for size in self.model.sizes)

    def temperature_of(self, size: int) -> float:
        """What a trained size's scores are divided by."""
        return self.temperatures[self.model.sizes.index(size)]

    def resolved(self, num_items: int, num_users: int, num_events: int, has_features: bool) -> Config:
        """This configuration for a store: what is "auto" because it depends on one has its value.

        The targets of an epoch are estimated as those of so many average histories.

        Args:
            num_items: of the catalogue.
            num_users: that train.
            num_events: of their training histories.
            has_features: whether the model reads any.
        """
        inline = self.store.feature_mode == "inline"
        ids, softmax, epochs = self.model.id_table, self.loss.softmax, self.train.epochs
        id_dropout = self.model.id_dropout
        if ids == "auto":
            ids = not inline
        if id_dropout == "auto":
            id_dropout = AUTO_ID_DROPOUT if ids and has_features else 0.0
        if softmax == "auto":
            samples = self.loss.catalogue == "whole" and (inline or num_items > FULL_SOFTMAX_ITEMS)
            softmax = "sampled" if samples else "full"
        batch_size, targets_per_user = self.train.batch_size, num_events / num_users
        if self.data.windows == "last":
            targets_per_user = min(targets_per_user, self.data.max_length)
        if batch_size == "auto":
            batch_size = self.train.auto_batch_size(num_users, targets_per_user)
        if epochs == "auto":
            epochs = max(AUTO_EPOCHS, -(-MIN_AUTO_STEPS // -(-num_users // batch_size)))
        id_lr_power = self.train.id_lr_power
        if id_lr_power == "auto":
            id_lr_power = AUTO_ID_LR_POWER if softmax == "sampled" else 0.0
        window = self.model.window
        if window == "auto" and self.model.mixer != "lru":
            window = self.data.max_length
        dropout, lru_dropout = (
            auto_dropout(num_users * targets_per_user / num_items) if rate == "auto" else rate
            for rate in (self.model.dropout, self.model.lru_dropout)
        )
        return dataclasses.replace(
            self,
            model=dataclasses.replace(
                self.model,
                id_table=ids,
                id_dropout=id_dropout,
                window=window,
                dropout=dropout,
                lru_dropout=lru_dropout,
            ),
            loss=dataclasses.replace(self.loss, softmax=softmax),
            train=dataclasses.replace(self.train, epochs=epochs, batch_size=batch_size, id_lr_power=id_lr_power),
        )

    @property
    def hash(self) -> str:
        """Twelve hex digits that name this configuration."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]
