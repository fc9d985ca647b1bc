"""How an export stores its matrices: float32, float16, or int8 with a float32 scale per row (docs/format.md).

A row is an output channel of a weight, an item of the catalogue, or a code. It keeps its scale when it is cut to its
first channels, so a slice of a stored model is a stored model. A scale per row and chunk between two sizes was measured
and loses no less (docs/decisions.md, 75).

What is not a product's matrix stays float32: norms, biases, stand-ins, Λ, γ and how features are scaled.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

DTYPES = ("float32", "float16", "int8")
# Last words of their names.
MATRICES = ("weight", "B", "C", "qkv", "out", "id_table", "code_table", "item_embeddings", "item_vectors")
SCALE = ".scale"  # ends the name of an int8 matrix' scales
LARGEST = 127  # of int8: symmetric, so -128 is not used


def stored(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Float32 tensors as a file of ``dtype`` has them; int8 matrices [..., D] come with scales [...].

    Raises:
        ValueError: a number is not finite, or too large for float16.
    """
    result = {}
    for name, tensor in tensors.items():
        if not is_matrix(name, tensor) or dtype == "float32":
            result[name] = tensor
            continue
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite")
        if dtype == "int8":
            result[name], result[name + SCALE] = quantize(tensor)
        else:
            result[name] = tensor.half()
            if not result[name].isfinite().all():
                raise ValueError(f"{name} holds numbers of more than 65,504, the largest of float16")
    return result


def restored(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """What :func:`stored` was given, all float32, up to what ``dtype`` cannot hold.

    Raises:
        ValueError: a tensor has another dtype, or its scales are missing, misshapen or not finite.
    """
    stored_dtype = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}[dtype]
    result, used = {}, set()
    for name, tensor in tensors.items():
        if dtype == "int8" and name.endswith(SCALE):
            continue
        expected = stored_dtype if is_matrix(name, tensor) else torch.float32
        if tensor.dtype != expected:
            raise ValueError(f"{name} is {tensor.dtype}; expected {expected}")
        if expected == torch.int8:
            used.add(name + SCALE)
            result[name] = dequantize(tensor, _scales_of(name, tensor, tensors))
        else:
            result[name] = tensor.float()
        if not result[name].isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite")
    unused = [name for name in tensors if dtype == "int8" and name.endswith(SCALE) and name not in used]
    if unused:
        raise ValueError(f"{unused[0]} belongs to no matrix")
    return result


def rounded(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """What a reader of :func:`stored` tensors computes with, float32.

    Raises:
        ValueError: as :func:`stored`.
    """
    return restored(stored(tensors, dtype), dtype)


def is_matrix(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is stored in the export's dtype; all others are float32."""
    return tensor.ndim >= 2 and name.rpartition(".")[2] in MATRICES


def quantize(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 [..., D] → int8 [..., D] and scales, float32 [...]: a row's largest magnitude becomes 127, zeros stay."""
    scales = matrix.abs().amax(-1) / LARGEST if matrix.shape[-1] else matrix.new_zeros(matrix.shape[:-1])
    scales = torch.where(scales > torch.finfo(scales.dtype).tiny, scales, 1.0)
    return (matrix / scales[..., None]).round().clamp(-LARGEST, LARGEST).to(torch.int8), scales


def dequantize(matrix: Tensor, scales: Tensor) -> Tensor:
    """What :func:`quantize` was given, to half a scale: float32 [..., D]."""
    return matrix.float() * scales[..., None]


def _scales_of(name: str, matrix: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    scales = tensors.get(name + SCALE)
    if scales is None or scales.dtype != torch.float32 or scales.shape != matrix.shape[:-1]:
        found = "nothing" if scales is None else f"{scales.dtype} {list(scales.shape)}"
        raise ValueError(f"{name}{SCALE} is {found}; expected float32 {list(matrix.shape[:-1])}")
    return scales
