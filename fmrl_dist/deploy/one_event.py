"""One event of the recurrence, in NumPy: what :meth:`fmrl_dist.model.fmrlrec.FMRLRec.step` specifies, prepared once.

A service pays for each event some forty operators on small arrays, and of these PyTorch's cost several times as much as
NumPy's. So the weights are put together beforehand: masks applied, γ and the layer-norms' weights multiplied in, real
and imaginary parts and the two inputs of the gate stacked. A block is four products.

... stands for nothing (one history) or B histories; D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from fmrl_dist.model.fmrlrec import FMRLRec, ResidualBlock
from fmrl_dist.model.nested import LAYER_NORM_EPS, NestedLayerNorm, chunks, nested_mask


class OneEvent:
    """The step of a model, in the dtype of its weights.

    Args:
        model: in evaluation mode, on the CPU. Later changes of its weights are not seen.
    """

    def __init__(self, model: FMRLRec) -> None:
        self.width, self.depth = model.width, model.depth
        self.start_row: np.ndarray = model.encoder.bias.detach().numpy()  # [D], the input of an empty history
        self._center = _ChunkScale(model.sizes, self.start_row.dtype)
        self._blocks = [_Block(block, model.sizes, self._center) for block in model.blocks]
        self._input_norm, self._output_norm = (_affine(norm) for norm in (model.input_norm, model.output_norm))

    def initial_state(self, *num_histories: int) -> np.ndarray:
        """State before the first event, [..., depth, 2, D]."""
        return np.zeros((*num_histories, self.depth, 2, self.width), self.start_row.dtype)

    def __call__(self, state: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
        """One event: ``state`` [..., depth, 2, D] is replaced by the next; item embeddings [..., D] → z [..., D]."""
        x = embeddings
        with np.errstate(over="ignore"):  # of SiLU, far below zero
            if self._input_norm is not None:
                x = self._center(x) * self._input_norm[0] + self._input_norm[1]
            for layer, block in enumerate(self._blocks):
                x = block(state[..., layer, :, :], x)
            if self._output_norm is not None:
                x = self._center(x) * self._output_norm[0] + self._output_norm[1]
        return x


class _ChunkScale:
    """Layer-norm without its weights: each chunk of [..., D] centred and scaled by itself."""

    def __init__(self, sizes: Sequence[int], dtype: np.dtype) -> None:
        self.dtype = dtype
        widths = np.array([last - first for first, last in chunks(sizes)])
        self._firsts = np.array([first for first, _ in chunks(sizes)])
        self._share = (1 / widths).astype(dtype)
        self._eps = dtype.type(LAYER_NORM_EPS)
        self._chunk_of = np.repeat(np.arange(len(widths)), widths)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        mean = np.add.reduceat(x, self._firsts, axis=-1) * self._share
        centred = x - mean[..., self._chunk_of]
        variance = np.add.reduceat(centred * centred, self._firsts, axis=-1) * self._share
        centred *= (1 / np.sqrt(variance + self._eps))[..., self._chunk_of]
        return centred


class _Block:
    """A residual block."""

    def __init__(self, block: nn.Module, sizes: Sequence[int], scale: _ChunkScale) -> None:
        w = {name: tensor.double().numpy() for name, tensor in block.state_dict().items()}
        mask, width = nested_mask(sizes).double().numpy(), sizes[-1]
        assert isinstance(block, ResidualBlock)
        with torch.no_grad():  # Λ and γ as the full pass rounds them: their error adds up over the events
            decay, gamma = block.lru.decay().numpy(), torch.exp(block.lru.gamma_log).numpy()
        B, C = w["lru.B"] * mask, w["lru.C"] * mask
        self._scale, self._width = scale, width

        def put(values: np.ndarray) -> np.ndarray:
            return np.ascontiguousarray(values, scale.dtype)

        # Λ·h = (Re Λ, Re Λ)⊙(Re h, Im h) + (-Im Λ, Im Λ)⊙(Im h, Re h)
        self._decay = put(np.stack((decay[0], decay[0])))
        self._turn = put(np.stack((-decay[1], decay[1])))
        drive, drive_bias = _after_norm(w, "lru_norm", np.concatenate(tuple(B)), w["lru.b"].reshape(-1))
        self._drive = put(drive * np.tile(gamma, 2)[:, None]).T
        self._drive_bias = put(drive_bias * np.tile(gamma, 2))
        self._read, self._read_bias = put(np.concatenate((C[0], -C[1]), 1)).T, put(w["lru.c"])
        gates = np.concatenate((w["ffn.gate.weight"] * mask, w["ffn.w_1.weight"] * mask))
        gates, gate_bias = _after_norm(w, "ffn_norm", gates, np.concatenate((w["ffn.gate.bias"], w["ffn.w_1.bias"])))
        self._gates, self._gate_bias = put(gates).T, put(gate_bias)
        self._out, self._out_bias = put(w["ffn.w_2.weight"] * mask).T, put(w["ffn.w_2.bias"])

    def __call__(self, state: np.ndarray, x: np.ndarray) -> np.ndarray:
        """``state`` [..., 2, D] is replaced; x [..., D] → [..., D]."""
        driven = self._scale(x) @ self._drive + self._drive_bias
        new = self._decay * state
        new += self._turn * state[..., ::-1, :]
        new += driven.reshape(new.shape)
        state[...] = new
        x = x + (new.reshape(driven.shape) @ self._read + self._read_bias)
        hidden = self._scale(x) @ self._gates + self._gate_bias
        gate, value = hidden[..., : self._width], hidden[..., self._width :]
        x += (gate / (1 + np.exp(-gate)) * value) @ self._out + self._out_bias
        return x


def _after_norm(
    w: dict[str, np.ndarray], norm: str, weight: np.ndarray, bias: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A linear layer [O, D] with the weights of the layer-norm before it multiplied in."""
    return weight * w[f"{norm}.weight"], bias + weight @ w[f"{norm}.bias"]


def _affine(norm: nn.Module) -> tuple[np.ndarray, np.ndarray] | None:
    if not isinstance(norm, NestedLayerNorm):
        return None
    return norm.weight.detach().numpy(), norm.bias.detach().numpy()
