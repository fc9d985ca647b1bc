"""The LRU event by event, in NumPy: what :meth:`fmrl_dist.model.fmrlrec.FMRLRec.step` specifies, prepared once.

An event of one user is some hundred operators on small arrays, and of these PyTorch's cost ten times as much as
NumPy's. So the weights are put together beforehand: masks applied, γ and the layer-norms' weights multiplied in, real
and imaginary parts and the two inputs of the gate stacked. A block is then four products.

Many histories are read in step, the first event of each, then the second, and so on. That needs neither padding nor the
rounds of a parallel scan, its arrays stay in the processor's cache, and what the last block makes of its state is
computed only after a history's last event.

... stands for nothing (one history) or B histories; D width, S sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from fmrl_dist.model.block import ResidualBlock
from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.model.mixers.lru import LRU
from fmrl_dist.model.nested import LAYER_NORM_EPS, NestedLayerNorm, chunks, nested_mask

HISTORIES_IN_STEP = 256


class OneEvent:
    """The step of a model, in the dtype of its weights.

    Args:
        model: in evaluation mode, on the CPU; its mixer is the LRU. Later changes of its weights are not seen.
    """

    def __init__(self, model: FMRLRec) -> None:
        self.width, self.depth = model.width, model.depth
        self.start_row: np.ndarray = model.encoder.bias.detach().numpy()  # [D], the input of an empty history
        standardize = _Standardize(model.sizes, self.start_row.dtype)
        self._blocks = [_Block(block, model.sizes, standardize) for block in model.blocks]
        self._input_norm = _Norm(model.input_norm, standardize)
        self._output_norm = _Norm(model.output_norm, standardize)

    def start_output(self) -> np.ndarray:
        """Output of an empty history, [D]."""
        return self(self.initial_state(), self.start_row)

    def initial_state(self, *num_histories: int) -> np.ndarray:
        """State before the first event, [..., depth, 2, D]."""
        return np.zeros((*num_histories, self.depth, 2, self.width), self.start_row.dtype)

    def __call__(self, state: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
        """One event: ``state`` [..., depth, 2, D] is replaced by the next; item embeddings [..., D] → z [..., D]."""
        with np.errstate(over="ignore"):  # of SiLU, far below zero
            x = self._input_norm(embeddings)
            for layer, block in enumerate(self._blocks):
                of_block = state[..., layer, :, :]
                block.advance(of_block, x)
                x = block.output(of_block, x)
            return self._output_norm(x)

    def last_outputs(self, items: np.ndarray, histories: Sequence[np.ndarray]) -> np.ndarray:
        """Outputs after the last event of each history.

        Args:
            items: embeddings [V, D].
            histories: rows of items, oldest first, B arrays of integers; none is empty.

        Returns:
            z [B, D].
        """
        outputs = np.empty((len(histories), self.width), self.start_row.dtype)
        lengths = np.array([len(history) for history in histories], np.int64)
        order = np.argsort(-lengths, kind="stable")
        for first in range(0, len(order), HISTORIES_IN_STEP):
            users = order[first : first + HISTORIES_IN_STEP]
            padded = np.zeros((lengths[users[0]], len(users)), np.int64)
            for place, user in enumerate(users):
                padded[: lengths[user], place] = histories[user]
            outputs[users] = self._read_in_step(items, padded, lengths[users])
        return outputs

    def _read_in_step(self, items: np.ndarray, rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Outputs [b, D] after histories of descending ``lengths`` [b], of ``rows`` [longest, b]."""
        outputs = np.empty((len(lengths), self.width), self.start_row.dtype)
        states = np.zeros((self.depth, len(lengths), 2, self.width), self.start_row.dtype)
        num_longer = np.searchsorted(-lengths, -np.arange(len(rows) + 1), "left")  # than so many events
        *first_blocks, last_block = self._blocks
        with np.errstate(over="ignore"):
            for event, of_event in enumerate(rows):
                count, going_on = num_longer[event : event + 2]
                x = self._input_norm(items[of_event[:count]])
                for layer, block in enumerate(first_blocks):
                    block.advance(states[layer, :count], x)
                    x = block.output(states[layer, :count], x)
                last_block.advance(states[-1, :count], x)
                if going_on < count:
                    ended = slice(going_on, count)
                    outputs[ended] = self._output_norm(last_block.output(states[-1, ended], x[ended]))
        return outputs


class _Standardize:
    """Layer-norm without its weights: each chunk of [..., D] centred and scaled by itself.

    Means of chunks are a product with a matrix [D, S], and so is their way back: faster than sums of slices.
    """

    def __init__(self, sizes: Sequence[int], dtype: np.dtype) -> None:
        self.dtype, self._eps = dtype, dtype.type(LAYER_NORM_EPS)
        widths = np.array([last - first for first, last in chunks(sizes)])
        self._spread = np.repeat(np.eye(len(widths), dtype=dtype), widths, axis=1)  # [S, D]
        self._mean = np.ascontiguousarray((self._spread / widths[:, None]).T, dtype)  # [D, S]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        centred: np.ndarray = x - (x @ self._mean) @ self._spread
        variance = (centred * centred) @ self._mean
        centred *= (1 / np.sqrt(variance + self._eps)) @ self._spread
        return centred


class _Norm:
    """A nested layer-norm, or nothing."""

    def __init__(self, norm: nn.Module, standardize: _Standardize) -> None:
        self._standardize = standardize
        self._affine: tuple[np.ndarray, np.ndarray] | None = None
        if isinstance(norm, NestedLayerNorm):
            self._affine = norm.weight.detach().numpy(), norm.bias.detach().numpy()

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return x if self._affine is None else self._standardize(x) * self._affine[0] + self._affine[1]


class _Block:
    """A residual block."""

    def __init__(self, block: nn.Module, sizes: Sequence[int], standardize: _Standardize) -> None:
        assert isinstance(block, ResidualBlock) and isinstance(block.mixer, LRU), "checked before"
        w = {name: tensor.double().numpy() for name, tensor in block.state_dict().items()}
        mask = nested_mask(sizes).double().numpy()
        with torch.no_grad():  # Λ and γ as the full pass rounds them: their error adds up over the events
            decay, gamma = block.mixer.decay().numpy(), torch.exp(block.mixer.gamma_log).numpy()
        self._standardize, self._width = standardize, sizes[-1]

        def put(values: np.ndarray) -> np.ndarray:
            return np.ascontiguousarray(values, standardize.dtype)

        def after_norm(norm: str, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            """A linear layer [O, D] with the weights of the layer-norm before it multiplied in, [D, O]."""
            return (weight * w[f"{norm}.weight"]).T, bias + weight @ w[f"{norm}.bias"]

        # Λ·h = (Re Λ, Re Λ)⊙(Re h, Im h) + (-Im Λ, Im Λ)⊙(Im h, Re h)
        self._decay, self._turn = put(np.stack((decay[0], decay[0]))), put(np.stack((-decay[1], decay[1])))
        B, C = w["lru.B"] * mask, w["lru.C"] * mask
        drive, drive_bias = after_norm("lru_norm", np.concatenate(tuple(B)), w["lru.b"].reshape(-1))
        self._drive, self._drive_bias = put(drive * np.tile(gamma, 2)), put(drive_bias * np.tile(gamma, 2))
        self._read, self._read_bias = put(np.concatenate((C[0], -C[1]), 1).T), put(w["lru.c"])
        gates, gate_bias = after_norm(
            "ffn_norm",
            np.concatenate((w["ffn.gate.weight"] * mask, w["ffn.w_1.weight"] * mask)),
            np.concatenate((w["ffn.gate.bias"], w["ffn.w_1.bias"])),
        )
        self._gates, self._gate_bias = put(gates), put(gate_bias)
        self._out, self._out_bias = put((w["ffn.w_2.weight"] * mask).T), put(w["ffn.w_2.bias"])

    def advance(self, state: np.ndarray, x: np.ndarray) -> None:
        """Replace ``state`` [..., 2, D] by the next, for the block's input x [..., D]."""
        driven = self._standardize(x) @ self._drive
        driven += self._drive_bias
        turned = self._turn * state[..., ::-1, :]
        state *= self._decay
        state += turned
        state += driven.reshape(state.shape)

    def output(self, state: np.ndarray, x: np.ndarray) -> np.ndarray:
        """The block's output [..., D] from the new state and its input."""
        read = state.reshape(*x.shape[:-1], 2 * self._width) @ self._read
        read += self._read_bias
        read += x
        hidden = self._standardize(read) @ self._gates
        hidden += self._gate_bias
        gate, value = hidden[..., : self._width], hidden[..., self._width :]
        value *= gate
        gate = np.exp(-gate)
        gate += 1
        value /= gate  # SiLU(gate)·value
        read += value @ self._out
        read += self._out_bias
        return read
