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
from fmrl_dist.model.dropout import NestedDropout, rates_of_sizes
from fmrl_dist.model.export_config import CONFIG_FILE, check_export_file, check_is_readable, read_export_config
from fmrl_dist.model.item_encoders.choice import make_item_encoder
from fmrl_dist.model.mixers.mixing import Mixing
from fmrl_dist.model.nested import NestedLayerNorm
from fmrl_dist.model.packing import places_in_sequences, prefixes
from fmrl_dist.model.stored_tensors import restored

MAX_SIZES, MAX_DEPTH = 64, 1000  # far more than anyone trains
MODEL_FILE = "model.safetensors"
ROW_DEVIATION = 0.02  # of learned positions, and of the mask


class FMRLRec(nn.Module):
    """The model.

    Args:
        sizes: Matryoshka sizes m_1 < … < m_S; the last is the width D.
        depth: number of blocks.
        feature_dims: name → dim of each frozen feature.
        num_items: rows of the trained id table; 0 for no table.
        dropout: rate on the input embeddings and in the FFN.
        lru_dropout: rate after the mixer.
        dropout_power: how fast both rates fall towards smaller sizes (:mod:`fmrl_dist.model.dropout`).
        r_min, r_max: ring of |Λ| at initialisation, of the LRU.
        input_norm, output_norm: whether a nested layer-norm comes before the first block, and after the last.
        matmul_dtype: of the products' inputs in training mode; None keeps the parameters' own, and so does evaluation.
        scan: an implementation of :func:`fmrl_dist.model.scan.packed_scan`; "plain" is any mixer's specification.
        id_width: w, the first channels that the id table is added to, one of ``sizes``; 0 for all.
        id_init: standard deviation of the id table's initial rows; None for 1/√D.
        mixer, head_width, positions, window, low_pass, low_pass_share: of
            :class:`~fmrl_dist.model.mixers.mixing.Mixing`.
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
        mixer: str = "lru",
        head_width: int = 32,
        positions: str = "rotary",
        window: int = 50,
        low_pass: int = 5,
        low_pass_share: float = 0.7,
        item_encoder: str = "projection",
        experts: int = 8,
        codes: int = 256,
        dropout_power: float = 0.0,
    ) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.depth, self.num_items, self.id_width = depth, num_items, id_width
        self.rates = {"dropout": dropout, "lru_dropout": lru_dropout}
        self.dropout_power = dropout_power
        self.mixing = Mixing(mixer, r_min, r_max, head_width, positions, window, low_pass, low_pass_share)
        self.matmul_dtype, self.scan = matmul_dtype, scan
        self.encoder = make_item_encoder(
            item_encoder, self.width, feature_dims, num_items, matmul_dtype, id_width, id_init, experts, codes
        )
        self.input_norm = NestedLayerNorm(self.sizes) if input_norm else nn.Identity()
        self.input_dropout = NestedDropout(self.sizes, dropout, dropout_power)
        self.output_norm = NestedLayerNorm(self.sizes) if output_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            ResidualBlock(self.sizes, self.mixing, dropout, lru_dropout, matmul_dtype, dropout_power, scan)
            for _ in range(depth)
        )
        self.positions = self.mask = None
        if self.mixing.learns_positions:
            self.positions = nn.Parameter(torch.randn(window, self.width) * ROW_DEVIATION)
        if mixer == "bidirectional":
            self.mask = nn.Parameter(torch.randn(self.width) * ROW_DEVIATION)

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
        if self.mask is not None:
            return self._with_mask_after_the_last(embeddings, starts, from_start)
        rows, begins = self._insert_start_positions(embeddings, starts, from_start)
        return self.mixed(rows, begins)

    def mixed(self, rows: Tensor, starts: Tensor) -> Tensor:
        """All blocks over packed rows as they are: rows [P, D], starts int64 [·+1] → z [P, D].

        Raises:
            UserError: a sequence is longer than the mixer's window, and the mixer has such a limit.
        """
        x = self.input_norm(rows)
        if self.mixing.has_limit and len(starts) > 1:
            longest = int(starts.diff().max())
            if longest > self.mixing.window:
                raise UserError(
                    f"a history has {longest} events, and a model with mixer {self.mixing.mixer} reads at most "
                    f"{self.mixing.window} (model.window); give its last ones"
                )
        if self.positions is not None:
            x = x + self.positions[places_in_sequences(starts, len(x))]
        x = self.input_dropout(x)
        for block in self.blocks:
            x = block(x, starts)
        z: Tensor = self.output_norm(x)
        return z

    def of_prefixes(self, embeddings: Tensor, starts: Tensor, from_start: Tensor) -> Tensor:
        """:meth:`forward` of every prefix of every history by itself, and of each its last output.

        What trains a mixer whose outputs have seen their future, without showing it: z [P, D] as of :meth:`forward`. It
        costs (n + 1) / 2 times as much for histories of n events.
        """
        rows, begins = self._insert_start_positions(embeddings, starts, from_start)
        of_rows, prefix_starts = prefixes(begins)
        return self.mixed(rows[of_rows], prefix_starts)[prefix_starts[1:] - 1]

    def of_masked(self, embeddings: Tensor, starts: Tensor, is_masked: Tensor) -> Tensor:
        """Outputs at masked items, which the model sees as the mask (BERT4Rec's Cloze, arXiv 1904.06690, section 3.6).

        Args:
            embeddings: of all items, [N, D].
            starts: int64 [B+1], first row of each history and, last, N.
            is_masked: bool [N].

        Returns:
            z of the masked items, in their order.
        """
        assert self.mask is not None, "this mixer masks nothing"
        mask = self.mask + 0.0 * self.encoder.bias  # engines want a gradient of every parameter
        return self.mixed(torch.where(is_masked[:, None], mask, embeddings), starts)[is_masked]

    def _with_mask_after_the_last(self, embeddings: Tensor, starts: Tensor, from_start: Tensor) -> Tensor:
        """Outputs where the next item is asked for by the mask after the last one, or alone at a start position.

        The outputs of all other items are their own. Of a history that fills the window, the oldest item makes room for
        the mask, as in training.
        """
        assert self.mask is not None
        last_rows = (starts[1:] - 1)[starts.diff() > 0]
        is_last = torch.zeros(len(embeddings), dtype=torch.long, device=starts.device).index_fill(0, last_rows, 1)
        before = F.pad(is_last.cumsum(0), (1, 0))  # masks before each item, and in all
        items = torch.arange(len(embeddings), device=starts.device) + before[:-1]
        rows = self.mask.expand(len(embeddings) + len(last_rows) + 1, -1).index_copy(0, items, embeddings)
        begins = torch.cat((starts + before[starts], starts.new_tensor([len(rows)])))
        too_long = begins.diff() > self.mixing.window  # with its mask: the events that are read are the last ones
        z = self.mixed(rows, torch.cat((begins, begins[1:][too_long] - self.mixing.window)).sort().values)
        z_items, z_start = z[items + is_last], z[-1:]  # the last row is a mask by itself
        inserted, _ = self._insert_start_positions(z_items, starts, from_start, z_start)
        return inserted

    def _insert_start_positions(
        self, rows: Tensor, starts: Tensor, from_start: Tensor, start_row: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``rows`` [N, D] with a row before each flagged history, [P, D], and where sequences then begin."""
        inserted_before = F.pad(from_start.long().cumsum(0), (1, 0))  # [B+1]
        begins = starts + inserted_before
        start_rows = begins[:-1][from_start]
        num_positions = len(rows) + len(start_rows)
        is_item = torch.ones(num_positions, dtype=torch.bool, device=rows.device).index_fill(0, start_rows, False)
        source = torch.where(is_item, is_item.long().cumsum(0) - 1, len(rows))
        start_row = self.encoder.bias[None] if start_row is None else start_row
        return torch.cat((rows, start_row))[source], torch.cat((begins, start_rows + 1)).sort().values

    def initial_state(self, num_histories: int) -> Tensor:
        """State before the first event, [B, depth, …]: of the LRU [B, depth, 2, D], of others growing with the events.

        Raises:
            UserError: the mixer has no step.
        """
        self.check_has_step()
        states = []
        for block in self.blocks:
            assert isinstance(block, ResidualBlock)
            states.append(block.mixer.initial_state(num_histories))
        return torch.stack(states, 1)

    def step(self, state: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """One event of each of B histories: state [B, depth, …], item embeddings [B, D] → new state, z [B, D]."""
        x, new_states = self.input_norm(embeddings), []
        if self.positions is not None:
            x = x + self.positions[min(state.shape[2], self.mixing.window - 1)]
        x = self.input_dropout(x)
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, ResidualBlock)
            new_state, x = block.step(state[:, layer], x)
            new_states.append(new_state)
        return torch.stack(new_states, 1), self.output_norm(x)

    def check_has_step(self) -> None:
        """Refuse what needs one event at a time, if the mixer sees all of a history at once.

        Raises:
            UserError: it does.
        """
        if not self.mixing.has_step:
            raise UserError(
                f"model.mixer {self.mixing.mixer} reads a history as a whole and has no step for one more event; "
                "recommend from whole histories, or train with lru, attention or filter"
            )

    @property
    def arguments(self) -> dict[str, Any]:
        """What defines the model, as JSON can carry it; ``matmul_dtype``, ``scan``, ``dropout_power``: how to train."""
        return {
            "sizes": list(self.sizes),
            "depth": self.depth,
            "feature_dims": self.encoder.feature_dims,
            "num_items": self.num_items,
            "id_width": self.id_width,
            **self.rates,
            **self.mixing.arguments,
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
        computed = {"matmul_dtype": self.matmul_dtype, "scan": self.scan, "dropout_power": self.dropout_power}
        nested = {"sizes": sizes, "id_width": min(self.id_width, size)}
        rates = {
            name: rates_of_sizes(self.sizes, rate, self.dropout_power)[len(sizes) - 1]
            for name, rate in self.rates.items()
        }
        small = FMRLRec(**self.arguments | nested | rates | computed).to(self.encoder.bias)
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
