"""What Accelerate prepares: the model, the item table and the loss behind one ``forward(batch) → losses``.

The model stays ignorant of ranks, and an engine wraps exactly one module. Items are embedded where they are needed:
those of the batch here, those of the catalogue tile by tile in the loss. Where the item encoder is no projection, or
scores are cosines, those of the catalogue are embedded here, too, and held whole for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fmrl_dist.data.batches import Packed, SampledBatch
from fmrl_dist.losses.item_tiles import RowMatrix
from fmrl_dist.losses.nested_cross_entropy import (
    Negatives,
    catalogue_cross_entropy,
    cosine_per_size,
    nested_cross_entropy,
    sampled_cross_entropy,
)
from fmrl_dist.losses.settings import LossSettings
from fmrl_dist.losses.split_catalogue import CatalogueSlice
from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.model.item_encoders.projection import ProjectionEncoder
from fmrl_dist.model.nested import add_prefix, matmul_linear
from fmrl_dist.model.objectives import Outputs, outputs_to_learn
from fmrl_dist.training.id_table.item_draws import ItemNoise
from fmrl_dist.training.id_table.rows import IdRows
from fmrl_dist.training.item_columns import DroppedColumns, FeatureDropout, SomeRows, columns_dtype


class TrainingModule(nn.Module):
    """fMRLRec with its nested cross-entropy, over the full catalogue or over the negatives that a batch brings.

    Args:
        model: the model.
        columns: [V, C], the catalogue as the model's item encoder takes it, of :func:`~.item_columns.columns_dtype`;
            None where batches bring the features of their items.
        settings: of the loss; its sizes are the model's.
        normalize: score by cosines, of each size's prefixes. Needs temperatures.
        part: the items that this rank scores for all ranks; None for all items, for its own positions. Only with a
            projection, and not with ``normalize``.
        id_rows: the model's id table as a step reads it; None for a model without one.
        feature_dropout: what leaves features of some items out of a step, if anything does.
        noise: of the items, for an encoder that takes some.
        mask_rate: share of a window's items that mixer bidirectional fills in.
        scored: int64, the rows of ``columns`` (of ``part``, if there is one) that the full softmax scores, every target
            among them; None for all.
    """

    def __init__(
        self,
        model: FMRLRec,
        columns: RowMatrix | None,
        settings: LossSettings,
        normalize: bool = False,
        part: CatalogueSlice | None = None,
        id_rows: IdRows | None = None,
        scored: Tensor | None = None,
        mask_rate: float = 0.2,
        feature_dropout: FeatureDropout | None = None,
        noise: ItemNoise | None = None,
    ) -> None:
        super().__init__()
        assert settings.sizes == model.sizes
        assert settings.temperatures is not None or not normalize, "the configuration asks for them"
        assert id_rows is not None or model.encoder.id_table is None, "a step would leave the ids out"
        self.model = model
        # A plain attribute, not a buffer: DDP would broadcast it, a checkpoint would hold it, and it may lie on disk.
        self.columns, self.part, self.id_rows = columns, part, id_rows
        self.feature_dropout, self.noise = feature_dropout, noise
        if feature_dropout is not None and columns is not None:
            self.columns = DroppedColumns(columns, feature_dropout)
        if feature_dropout is not None and part is not None:
            self.part = CatalogueSlice(DroppedColumns(part.columns, feature_dropout, part.begin), part.begin)
        self.settings, self.normalize, self.scored, self.mask_rate = settings, normalize, scored, mask_rate

    def begin_step(self, step: int) -> None:
        """Choose what the step leaves out, and its noise; the same on all ranks, for all micro-batches."""
        if self.id_rows is not None:
            self.id_rows.begin_step(step)
        if self.noise is not None:
            self.noise.begin_step(step)
        if self.feature_dropout is not None:
            self.feature_dropout.begin_step(step)

    def forward(self, batch: Packed) -> Tensor:
        """Loss of each size, summed over the batch's targets, [S]; zero for an empty batch.

        Where only some targets are predicted, it is their mean times the number of all.
        """
        encoder = self.model.encoder
        projection = encoder.projection() if isinstance(encoder, ProjectionEncoder) else None
        needed = [batch.items, batch.targets]
        if isinstance(batch, SampledBatch):
            needed.append(batch.negatives)
        ids, places = torch.cat(needed).unique(return_inverse=True)
        id_rows = None if self.id_rows is None else self.id_rows.of_batch(ids)
        items = self._embed(self._columns(ids, batch), ids, projection, id_rows)
        inputs, targets, *negatives = places.split([len(part) for part in needed])
        outputs = outputs_to_learn(
            self.model, items[inputs], items[targets], batch.starts, batch.from_start, self.mask_rate
        )
        share = len(outputs.z) / max(len(targets), 1)
        return self._loss(outputs, batch, projection, items, targets, negatives) / (share or 1)

    def _loss(
        self,
        outputs: Outputs,
        batch: Packed,
        projection: Tensor | None,
        items: Tensor,
        targets: Tensor,
        negatives: Sequence[Tensor],
    ) -> Tensor:
        """Loss of each size, summed over the targets that are predicted; places of all targets, of negatives."""
        z, own = outputs.z, items[outputs.of(targets)]
        if isinstance(batch, SampledBatch):
            return self._sampled(batch, outputs, own, items[negatives[0]])
        assert self.columns is not None, "the full softmax reads a table"
        catalogue, table = self._scored_catalogue(self.columns)
        if self.normalize or projection is None:
            assert not isinstance(catalogue, CatalogueSlice), "the configuration refuses it"
            right = outputs.of(batch.targets)
            ids = torch.arange(catalogue.shape[0], device=z.device)
            if self.scored is not None:
                right, ids = torch.searchsorted(self.scored, right), self.scored
            return self._of_every_size(
                lambda rows, settings: nested_cross_entropy(rows[0], rows[1], right, settings),
                [z, self._embed(catalogue[:], ids, projection, table)],
            )
        return catalogue_cross_entropy(z, own, catalogue, projection, table, self.settings)

    def _scored_catalogue(self, columns: RowMatrix) -> tuple[RowMatrix | CatalogueSlice, Tensor | None]:
        """What the full softmax scores, and its rows of the id table."""
        table = None if self.id_rows is None else self.id_rows.of_scored()
        if self.scored is None:
            return columns if self.part is None else self.part, table
        table = None if table is None else table.index_select(0, self.scored)
        if self.part is None:
            return SomeRows(columns, self.scored), table
        return CatalogueSlice(SomeRows(self.part.columns, self.scored), self.part.begin), table

    def _columns(self, ids: Tensor, batch: Packed) -> Tensor:
        """Columns of the batch's distinct items, [n, C]."""
        if self.columns is not None:
            return self.columns[ids]
        encoder, values, present = self.model.encoder, batch.feature_values, batch.feature_present
        assert values is not None and present is not None and len(values) == len(ids), "the stream brings just these"
        columns = encoder.columns(encoder.normalize(values, present), present)
        if self.feature_dropout is not None:
            columns = self.feature_dropout(columns, ids)
        return columns.to(columns_dtype(encoder, self.settings.dtype))

    def _sampled(self, batch: SampledBatch, outputs: Outputs, own: Tensor, others: Tensor) -> Tensor:
        """Sum over the groups, each against its own negatives: ``own`` [T, D] are the targets, ``others`` [K', D]."""
        position_starts = batch.position_starts
        if outputs.positions is not None:
            position_starts = torch.searchsorted(outputs.positions, position_starts)
        position_counts = position_starts.diff().tolist()
        negative_counts = batch.negative_starts.diff().tolist()
        groups = zip(
            outputs.z.split(position_counts),
            own.split(position_counts),
            outputs.of(batch.targets).split(position_counts),
            others.split(negative_counts),
            batch.negatives.split(negative_counts),
            batch.log_expected.split(negative_counts),
            strict=True,
        )
        losses = [
            self._group(z, own_items, targets, other_items, Negatives(ids, log_expected))
            for z, own_items, targets, other_items, ids, log_expected in groups
        ]
        if not losses:  # still a function of all that others take a gradient of
            nothing = outputs.z.sum() + own.sum() + others.sum()
            return nothing * nothing.new_zeros(len(self.model.sizes))
        return torch.stack(losses).sum(0)

    def _group(self, z: Tensor, own: Tensor, targets: Tensor, others: Tensor, negatives: Negatives) -> Tensor:
        return self._of_every_size(
            lambda rows, settings: sampled_cross_entropy(rows[0], rows[1], targets, rows[2], negatives, settings),
            [z, own, others],
        )

    def _of_every_size(
        self, loss: Callable[[Sequence[Tensor], LossSettings], Tensor], embeddings: Sequence[Tensor]
    ) -> Tensor:
        """``loss(embeddings, settings)``, or of cosines size by size."""
        if self.normalize:
            return cosine_per_size(loss, embeddings, self.settings)
        return loss(embeddings, self.settings)

    def _embed(self, columns: Tensor, ids: Tensor, projection: Tensor | None, table_rows: Tensor | None) -> Tensor:
        columns = columns.to(self.model.encoder.bias.dtype)
        if projection is None:
            embeddings = self.model.encoder.of_columns(columns, None if self.noise is None else self.noise(ids))
        else:
            embeddings = matmul_linear(columns, projection, self.settings.dtype)
        return embeddings if table_rows is None else add_prefix(embeddings, table_rows)
