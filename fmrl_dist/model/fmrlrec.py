"""fMRLRec (paper section 3.3): frozen item features, nested LRU blocks, tied scores; every prefix is a model, too.

B histories, N packed items, P positions (items and start positions), V items, D width, F features' total dim, M
features. The model knows plain tensors and values only: no rank, no config object, no file but the two that
``from_pretrained`` reads.

    item encoder   E = X·W_proj + b_proj (+ stand-ins + id table)          eq. 7, or another of item_encoders
    block          x + Dropout(LRU(LayerNorm(x))), x + FFN(LayerNorm(x))    eq. 8-12
    scores         z·Eᵀ, cut to the first m channels for size m             eq. 13

Before the first and after the last block there may be a further layer-norm each, which the paper does not have: without
them the residual carries the last item's own embedding, at whatever scale it has, into its own score.

Every parameter is real and has the width as its leading channels, so cutting each dimension to its first m channels
gives the model of size m (``truncate``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fmrl_dist.base.errors import UserError
from fmrl_dist.model.block import ResidualBlock
from fmrl_dist.model.export_config import CONFIG_FILE, check_export_file, check_is_readable, read_export_config
from fmrl_dist.model.item_encoders.choice import make_item_encoder
from fmrl_dist.model.nested import NestedLayerNorm
from fmrl_dist.model.stored_tensors import restored

MAX_SIZES, MAX_DEPTH = 64, 1000  # far more than anyone trains
MODEL_FILE = "model.safetensors"


class FMRLRec(nn.Module):
    """The model.

    Args:
        sizes: Matryoshka sizes m_1 < … < m_S; the last is the width D.
        depth: number of blocks.
        feature_dims: name → dim of each frozen feature.
        num_items: rows of the trained id table; 0 for no table.
        dropout: rate on the input embeddings and in the FFN.
        lru_dropout: rate after the LRU.
        r_min, r_max: ring of |Λ| at initialisation.
        input_norm, output_norm: whether a nested layer-norm comes before the first block, and after the last.
        matmul_dtype: of the products' inputs in training mode; None keeps the parameters' own, and so does evaluation.
        scan: an implementation of :func:`fmrl_dist.model.scan.packed_scan`.
        id_width: w, the first channels that the id table is added to, one of ``sizes``; 0 for all.
        id_init: standard deviation of the id table's initial rows; None for 1/√D.
        item_encoder: projection, unisrec or vqrec (:mod:`fmrl_dist.model.item_encoders`).
        experts: of unisrec.
        codes: numbers that a code of vqrec can be.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        depth: int,
        feature_dims: Mapping[str, int],
        num_items: int = 0,
        dropout: float = 0.0,
        lru_dropout: float = 0.0,
        r_min: float = 0.0,
        r_max: float = 0.1,
        input_norm: bool = False,
        output_norm: bool = False,
        matmul_dtype: torch.dtype | None = None,
        scan: str = "auto",
        id_width: int = 0,
        id_init: float | None = None,
        item_encoder: str = "projection",
        experts: int = 8,
        codes: int = 256,
    ) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.depth, self.num_items, self.id_width = depth, num_items, id_width
        self.rates = {"dropout": dropout, "lru_dropout": lru_dropout}
        self.ring = {"r_min": r_min, "r_max": r_max}
        self.matmul_dtype, self.scan = matmul_dtype, scan
        self.encoder = make_item_encoder(
            item_encoder, self.width, feature_dims, num_items, matmul_dtype, id_width, id_init, experts, codes
        )
        self.input_norm = NestedLayerNorm(self.sizes) if input_norm else nn.Identity()
        self.input_dropout = nn.Dropout(dropout)
        self.output_norm = NestedLayerNorm(self.sizes) if output_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            ResidualBlock(self.sizes, dropout, lru_dropout, r_min, r_max, matmul_dtype, scan) for _ in range(depth)
        )

    @property
    def width(self) -> int:
        """D, the largest size."""
        return self.sizes[-1]

    def forward(self, embeddings: Tensor, starts: Tensor, from_start: Tensor) -> Tensor:
        """Outputs z of packed histories.

        A history flagged in ``from_start`` gets a start position before its first item: a stateless row of b_proj
        that predicts the first item and serves the empty history; the recurrence resets at it and after it.

        Args:
            embeddings: item embeddings of the histories' items, oldest first, [N, D].
            starts: int64 [B+1], first row of each history and, last, N.
            from_start: bool [B].

        Returns:
            z [P, D], P = N + from_start.sum(), each history's start position (if any) before its items.
        """
        rows, begins = self._insert_start_positions(embeddings, starts, from_start)
        x = self.input_dropout(self.input_norm(rows))
        for block in self.blocks:
            x = block(x, begins)
        z: Tensor = self.output_norm(x)
        return z

    def _insert_start_positions(self, embeddings: Tensor, starts: Tensor, from_start: Tensor) -> tuple[Tensor, Tensor]:
        inserted_before = F.pad(from_start.long().cumsum(0), (1, 0))  # [B+1]
        begins = starts + inserted_before
        start_rows = begins[:-1][from_start]
        num_positions = len(embeddings) + len(start_rows)
        is_item = torch.ones(num_positions, dtype=torch.bool, device=embeddings.device).index_fill(0, start_rows, False)
        source = torch.where(is_item, is_item.long().cumsum(0) - 1, len(embeddings))
        rows = torch.cat((embeddings, self.encoder.bias[None]))[source]
        return rows, torch.cat((begins, start_rows + 1)).sort().values

    def initial_state(self, num_histories: int) -> Tensor:
        """State before the first event, [B, depth, 2, D]."""
        return self.encoder.bias.new_zeros(num_histories, self.depth, 2, self.width)

    def step(self, state: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """One event of each of B histories: state [B, depth, 2, D], item embeddings [B, D] → new state, z [B, D]."""
        x, new_states = self.input_dropout(self.input_norm(embeddings)), []
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, ResidualBlock)
            new_state, x = block.step(state[:, layer], x)
            new_states.append(new_state)
        return torch.stack(new_states, 1), self.output_norm(x)

    @property
    def arguments(self) -> dict[str, Any]:
        """What defines the model, as JSON can carry it; ``matmul_dtype`` and ``scan`` say how to compute it."""
        return {
            "sizes": list(self.sizes),
            "depth": self.depth,
            "feature_dims": self.encoder.feature_dims,
            "num_items": self.num_items,
            "id_width": self.id_width,
            **self.rates,
            **self.ring,
            "input_norm": isinstance(self.input_norm, NestedLayerNorm),
            "output_norm": isinstance(self.output_norm, NestedLayerNorm),
            **self.encoder.arguments,
        }

    def truncate(self, size: int) -> FMRLRec:
        """A stand-alone copy of the model of ``size``: every weight cut to its prefix (section 3.2).

        Raises:
            UserError: ``size`` is not one of the trained sizes.
        """
        if size not in self.sizes:
            raise UserError(f"size {size} was not trained; the trained sizes are {list(self.sizes)}")
        sizes = self.sizes[: self.sizes.index(size) + 1]
        computed = {"matmul_dtype": self.matmul_dtype, "scan": self.scan}
        nested = {"sizes": sizes, "id_width": min(self.id_width, size)}
        small = FMRLRec(**self.arguments | nested | computed).to(self.encoder.bias)
        full = self.state_dict()
        small.load_state_dict({k: full[k][tuple(map(slice, v.shape))] for k, v in small.state_dict().items()})
        return small.train(self.training)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> FMRLRec:
        """The model of an exported folder of any dtype, float32 on the CPU, in evaluation mode.

        Reads ``config.json`` and ``model.safetensors`` (docs/format.md, "The export") and nothing else.

        Raises:
            UserError: the folder is not an export, is damaged, or of another version.
        """
        folder = Path(folder)
        if not (folder / CONFIG_FILE).is_file():
            raise UserError(f"{folder} is not an export: it has no {CONFIG_FILE}; make one with fmrl_dist.export")
        try:
            config = read_export_config(folder)
            check_is_readable(folder, config)
            check_export_file(folder, config, MODEL_FILE)
            tensors = restored(load_file(folder / MODEL_FILE), config["dtype"])
            if not (len(config["model"]["sizes"]) <= MAX_SIZES and config["model"]["depth"] <= MAX_DEPTH):
                raise ValueError(f"more than {MAX_SIZES} sizes or {MAX_DEPTH} blocks")  # before they are constructed
            with torch.device("meta"):  # the file's tensors become the parameters: nothing is drawn, then overwritten
                model = cls(**config["model"])
            model.load_state_dict(tensors, assign=True)
        except UserError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            problem = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"export {folder} is damaged ({problem}); export it again") from None
        return model.eval()
