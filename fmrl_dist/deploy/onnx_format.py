"""An export for onnxruntime: the one-event step and the item encoder as graphs, item vectors as arrays.

    step.onnx             state [B, depth, 2, M], embeddings [B, M] → new_state [B, depth, 2, M], outputs [B, M]
    item_encoder.onnx     features [N, F], present bool [N, features] → embeddings [N, M]; only if there are features
    item_embeddings.npy   [V, M] of the export's dtype
    item_scales.npy       float32 [V], only of int8: an item's vector is its row times its scale
    start.npy             float32 [M], the embedding of the start position, which serves an empty history
    rotation.npy          float32 [M, M], only if the vectors can be cut

The graphs are built by hand: complex numbers are pairs of reals, the batch is free, and weights are kept as float32,
float16 or int8 with a scale per output channel and become float32 in the graph. Both are checked by ``onnx.checker``
and against the model in onnxruntime before the folder gets its name. docs/format.md says how to use them.

B histories, N items, V items of the catalogue, F features' total dim, M width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.checkpoint.export.files import (
    ENCODER_FILE,
    ITEMS_ARRAY,
    ITEMS_TENSOR,
    ROTATION_ARRAY,
    SCALES_ARRAY,
    START_ARRAY,
    STEP_FILE,
)
from fmrl_dist.checkpoint.export.parts import ExportedModel, ExportParts, as_stored, stored_or_refused
from fmrl_dist.checkpoint.export.writing import folder_of_export
from fmrl_dist.deploy.whole_histories import check_has_state
from fmrl_dist.model.block import FeedForward, ResidualBlock
from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.model.item_encoders.item_encoder import DenseItemEncoder, ItemEncoder
from fmrl_dist.model.item_encoders.projection import ProjectionEncoder
from fmrl_dist.model.item_encoders.unisrec import UniSRecEncoder
from fmrl_dist.model.item_encoders.vqrec import VQRecEncoder
from fmrl_dist.model.mixers.lru import LRU
from fmrl_dist.model.nested import LAYER_NORM_EPS, NestedLayerNorm, chunks, nested_mask
from fmrl_dist.model.stored_tensors import SCALE

OPSET, IR_VERSION = 17, 8  # the first with layer-norms; every onnxruntime since 1.12 reads them
TOLERANCE = 1e-5  # of what onnxruntime computes, relative to the largest number
CHECKED_EVENTS, CHECKED_BATCHES = 4, (1, 7)


def check_installed() -> None:
    """Refuse to begin where the packages are missing.

    Raises:
        UserError: one of them is.
    """
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    require(
        not missing, f"--format onnx needs {' and '.join(missing)}; install the extra: pip install 'fmrl-dist[onnx]'"
    )


def write_onnx_export(exported: ExportedModel, folder: Path, parts: ExportParts, overwrite: bool) -> None:
    """Write ``folder``.

    Args:
        exported: the model and its catalogue, with a rotation if vectors can be cut.
        folder: to write.
        parts: what else belongs into it; ``vectors`` is not written: the rotation and the embeddings give them.
        overwrite: replace an existing export.

    Raises:
        UserError: as :func:`~fmrl_dist.checkpoint.export.files.check_output`; onnxruntime computes something else than
            the model; or a package is missing.
    """
    check_installed()
    check_has_state(exported.model, "--format onnx needs")
    reference = as_stored(exported, parts.dtype)
    has_encoder = bool(exported.model.encoder.feature_dims)
    further = {"opset": OPSET, "start_array": START_ARRAY}
    with folder_of_export(exported, folder, parts, overwrite, "onnx", further) as aside:
        _write_graph(step_graph(exported.model, parts.dtype), aside / STEP_FILE)
        check_step(aside / STEP_FILE, reference)
        if has_encoder:
            _write_graph(encoder_graph(exported.model.encoder, parts.dtype), aside / ENCODER_FILE)
            check_encoder(aside / ENCODER_FILE, reference.model.encoder)
        arrays = stored_or_refused({ITEMS_TENSOR: exported.items}, parts.dtype)
        np.save(aside / ITEMS_ARRAY, arrays[ITEMS_TENSOR].numpy())
        if ITEMS_TENSOR + SCALE in arrays:
            np.save(aside / SCALES_ARRAY, arrays[ITEMS_TENSOR + SCALE].numpy())
        np.save(aside / START_ARRAY, exported.model.encoder.bias.detach().numpy())
        if exported.rotation is not None:
            np.save(aside / ROTATION_ARRAY, exported.rotation.numpy())


# Graphs


class GraphBuilder:
    """Nodes and constants of a graph; each method adds an operation and returns its result's name."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype  # of matrices
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, values: Tensor | np.ndarray, name: str) -> str:
        from onnx import numpy_helper

        array = values.detach().numpy() if isinstance(values, Tensor) else values
        self.constants.append(numpy_helper.from_array(array.copy(order="C"), name))
        return name

    def add(self, operation: str, *inputs: str, name: str = "", outputs: int = 1, **attributes: Any) -> Any:
        from onnx import helper

        name = name or f"{operation.lower()}_{len(self.nodes)}"
        names = [name] if outputs == 1 else [f"{name}_{number}" for number in range(outputs)]
        self.nodes.append(helper.make_node(operation, list(inputs), names, **attributes))
        return name if outputs == 1 else names

    def matrix(self, values: Tensor, name: str) -> str:
        """A weight [out, in], stored in the graph's dtype, as float32."""
        from onnx import TensorProto

        parts = stored_or_refused({f"{name}.weight": values}, self.dtype)
        kept = parts[f"{name}.weight"]
        if self.dtype == "float32":
            return self.constant(kept, name)
        if self.dtype == "float16":
            return str(self.add("Cast", self.constant(kept, f"{name}.half"), name=name, to=TensorProto.FLOAT))
        quantized = self.constant(kept, f"{name}.int8")
        scales = self.constant(parts[f"{name}.weight{SCALE}"], f"{name}{SCALE}")
        return str(self.add("DequantizeLinear", quantized, scales, name=name, axis=0))

    def product(self, x: str, weight: str, added: str, sign: float = 1.0) -> str:
        """x · weightᵀ, times ``sign``, plus ``added``."""
        return str(self.add("Gemm", x, weight, added, transB=1, alpha=sign))

    def layer_norm(self, x: str, norm: torch.nn.Module, name: str) -> str:
        """Of each chunk by itself; an identity stays one."""
        if not isinstance(norm, NestedLayerNorm):
            return x
        ranges = chunks(norm.sizes)
        pieces = [x]
        if len(ranges) > 1:
            lengths = self.constant(np.array([last - first for first, last in ranges], np.int64), f"{name}.lengths")
            pieces = self.add("Split", x, lengths, axis=1, outputs=len(ranges))
        normed = []
        for piece, (first, last) in zip(pieces, ranges, strict=True):
            weight = self.constant(norm.weight[first:last], f"{name}.weight.{last}")
            bias = self.constant(norm.bias[first:last], f"{name}.bias.{last}")
            normed.append(self.add("LayerNormalization", piece, weight, bias, axis=-1, epsilon=LAYER_NORM_EPS))
        return str(self.add("Concat", *normed, axis=1)) if len(normed) > 1 else str(normed[0])

    def model(self, name: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
        from onnx import helper

        graph = helper.make_graph(self.nodes, name, list(inputs), list(outputs), self.constants)
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="fmrl-dist")


def step_graph(model: FMRLRec, dtype: str) -> Any:
    """One event of each of B histories, as :meth:`FMRLRec.step`: an ``onnx.ModelProto``."""
    from onnx import TensorProto, helper

    graph, width, depth = GraphBuilder(dtype), model.width, model.depth
    second = graph.constant(np.array([1], np.int64), "second")  # axis
    states = graph.add("Split", "state", graph.constant(np.ones(depth, np.int64), "ones"), axis=1, outputs=depth)
    x, new_states = graph.layer_norm("embeddings", model.input_norm, "input_norm"), []
    for k, (state, block) in enumerate(zip([states] if depth == 1 else states, model.blocks, strict=True)):
        assert isinstance(block, ResidualBlock) and isinstance(block.mixer, LRU), "checked before"
        normed = graph.layer_norm(x, block.mixer_norm, f"{k}.lru_norm")
        mixed, new_state = _lru_step(graph, block.mixer, state, normed, k)
        new_states.append(graph.add("Unsqueeze", new_state, second))
        x = graph.add("Add", x, mixed)
        x = graph.add(
            "Add", x, _feed_forward(graph, block.ffn, graph.layer_norm(x, block.ffn_norm, f"{k}.ffn_norm"), k)
        )
    graph.add("Concat", *new_states, axis=1, name="new_state")
    graph.add("Identity", graph.layer_norm(x, model.output_norm, "output_norm"), name="outputs")

    def value(name: str, *shape: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", *shape])

    inputs = [value("state", depth, 2, width), value("embeddings", width)]
    return graph.model("step", inputs, [value("new_state", depth, 2, width), value("outputs", width)])


def _lru_step(graph: GraphBuilder, lru: LRU, state: str, x: str, k: int) -> tuple[str, str]:
    """Re(C h + c) and the new state h [B, 2, M], from the old one [B, 1, 2, M]: h ← Λ h + γ⊙(B x + b)."""
    squeezed = graph.add("Squeeze", state, "second")
    places = [graph.constant(np.array(part, np.int64), f"{k}.place.{part}") for part in (0, 1)]
    before = [graph.add("Gather", squeezed, place, axis=1) for place in places]
    mask = nested_mask(lru.sizes)
    gamma = graph.constant(lru.gamma_log.exp(), f"{k}.gamma")
    decay = [graph.constant(part, f"{k}.decay.{number}") for number, part in enumerate(lru.decay())]
    turned = [
        graph.add("Sub", graph.add("Mul", decay[0], before[0]), graph.add("Mul", decay[1], before[1])),
        graph.add("Add", graph.add("Mul", decay[0], before[1]), graph.add("Mul", decay[1], before[0])),
    ]
    after = []
    for part in (0, 1):
        weight = graph.matrix(lru.B[part] * mask, f"{k}.B.{part}")
        driven = graph.product(x, weight, graph.constant(lru.b[part], f"{k}.b.{part}"))
        after.append(graph.add("Add", turned[part], graph.add("Mul", driven, gamma)))
    real = graph.product(after[0], graph.matrix(lru.C[0] * mask, f"{k}.C.0"), graph.constant(lru.c, f"{k}.c"))
    mixed = graph.product(after[1], graph.matrix(lru.C[1] * mask, f"{k}.C.1"), real, sign=-1.0)
    parts = [graph.add("Unsqueeze", part, "second") for part in after]
    return mixed, graph.add("Concat", *parts, axis=1)


def _feed_forward(graph: GraphBuilder, ffn: FeedForward, x: str, k: int) -> str:
    """(SiLU(x W_g + b_g) ⊙ (x W_1 + b_1)) W_2 + b_2."""

    def linear(name: str, inputs: str) -> str:
        layer = getattr(ffn, name)
        weight = graph.matrix(layer.weight * nested_mask(layer.sizes), f"{k}.{name}")
        return graph.product(inputs, weight, graph.constant(layer.bias, f"{k}.{name}.bias"))

    gate = linear("gate", x)
    opened = graph.add("Mul", gate, graph.add("Sigmoid", gate))
    return linear("w_2", graph.add("Mul", opened, linear("w_1", x)))


def encoder_graph(encoder: ItemEncoder, dtype: str) -> Any:
    """Embeddings of N new items from their raw features, without rows of the id table: an ``onnx.ModelProto``."""
    from onnx import TensorProto, helper

    graph, dims = GraphBuilder(dtype), list(encoder.feature_dims.values())
    feature_of = graph.constant(np.repeat(np.arange(len(dims)), dims), "feature_of")
    there = graph.add("Gather", "present", feature_of, axis=1)
    match encoder:
        case ProjectionEncoder():
            kept, weight = _scaled(graph, encoder, there), graph.matrix(encoder.weight, "weight")
            embedded = graph.product(kept, weight, graph.constant(encoder.bias, "bias"))
        case UniSRecEncoder():
            embedded = _of_experts(graph, encoder, _scaled(graph, encoder, there))
        case VQRecEncoder():
            embedded = _looked_up(graph, encoder, there)
    absent = graph.add("Cast", graph.add("Not", "present"), to=TensorProto.FLOAT)
    stand_ins = graph.add("MatMul", absent, graph.constant(encoder.stand_ins, "stand_ins"))
    graph.add("Add", embedded, stand_ins, name="embeddings")
    inputs = [
        helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", encoder.total]),
        helper.make_tensor_value_info("present", TensorProto.BOOL, ["N", len(dims)]),
    ]
    outputs = [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["N", encoder.width])]
    return graph.model("item_encoder", inputs, outputs)


def _scaled(graph: GraphBuilder, encoder: DenseItemEncoder, there: str) -> str:
    """Features as the encoder takes them, [N, F]."""
    shifted = graph.add("Sub", "features", graph.constant(encoder.feature_shift, "shift"))
    scaled = graph.add("Mul", shifted, graph.constant(encoder.feature_scale, "scale"))
    return str(graph.add("Where", there, scaled, graph.constant(np.zeros((), np.float32), "zero")))


def _of_experts(graph: GraphBuilder, encoder: UniSRecEncoder, kept: str) -> str:
    """Σ_g softmax(x·W_gate)_g · ((x - b_g)·W_g), [N, M], of G experts: one product of G·F columns."""
    experts, width, total = encoder.weight.shape
    middle, last = (graph.constant(np.array([axis], np.int64), f"axis.{axis}") for axis in (1, 2))
    scores = graph.add("Gemm", kept, graph.constant(encoder.gate, "gate"), transB=1)
    gates = graph.add("Unsqueeze", graph.add("Softmax", scores, axis=1), last)  # [N, G, 1]
    moved = graph.add("Sub", graph.add("Unsqueeze", kept, middle), graph.constant(encoder.offsets, "offsets"))
    shape = graph.constant(np.array([-1, experts * total], np.int64), "shape")
    weighted = graph.add("Reshape", graph.add("Mul", moved, gates), shape)
    matrices = [graph.matrix(weight, f"weight.{number}") for number, weight in enumerate(encoder.weight)]
    return graph.product(
        weighted, graph.add("Concat", *matrices, axis=1), graph.constant(np.zeros(width, np.float32), "no_bias")
    )


def _looked_up(graph: GraphBuilder, encoder: VQRecEncoder, there: str) -> str:
    """Mean of the rows of the codes that are there, [N, M], of P parts."""
    from onnx import TensorProto

    parts, codes, _ = encoder.code_table.shape
    middle, last = (graph.constant(np.array([axis], np.int64), f"axis.{axis}") for axis in (1, 2))
    first_rows = graph.constant(np.arange(parts) * codes - 1, "first_rows")  # codes count from 1
    rows = graph.add("Add", graph.add("Cast", "features", to=TensorProto.INT64), first_rows)
    kept = graph.add("Where", there, rows, graph.constant(np.zeros((), np.int64), "any_row"))
    table = graph.matrix(encoder.code_table.flatten(0, 1), "code_table")
    found = graph.add("Gather", table, kept, axis=0)  # [N, P, M]
    share = graph.constant(np.array(1 / parts, np.float32), "share")
    weights = graph.add("Mul", graph.add("Cast", there, to=TensorProto.FLOAT), share)
    weighted = graph.add("Mul", found, graph.add("Unsqueeze", weights, last))
    return str(graph.add("ReduceSum", weighted, middle, keepdims=0))


def _write_graph(model: Any, path: Path) -> None:
    import onnx

    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())


# Checks


@torch.no_grad()
def check_step(path: Path, exported: ExportedModel) -> None:
    """Compare a graph with the model after each of some events, the first of them the start position.

    Raises:
        UserError: they differ.
    """
    session, model = _session(path), exported.model
    items = exported.items if len(exported.items) else torch.zeros(1, model.width)
    generator = torch.Generator().manual_seed(0)
    for batch in CHECKED_BATCHES:
        state = model.initial_state(batch)
        found = state.numpy()
        embeddings = model.encoder.bias.expand(batch, -1)
        for _ in range(CHECKED_EVENTS):
            state, outputs = model.step(state, embeddings)
            found, z = session.run(None, {"state": found, "embeddings": embeddings.contiguous().numpy()})
            _check_equal(path, found, state)
            _check_equal(path, z, outputs)
            embeddings = items[torch.randint(len(items), (batch,), generator=generator)]


@torch.no_grad()
def check_encoder(path: Path, encoder: ItemEncoder) -> None:
    """Compare a graph with the encoder, on features that are around what each was scaled for, some of them missing.

    Raises:
        UserError: they differ.
    """
    session = _session(path)
    generator = torch.Generator().manual_seed(0)
    num_features = len(encoder.feature_dims)
    for batch in CHECKED_BATCHES:
        features = _some_features(encoder, batch, generator)
        present = torch.rand(batch, num_features, generator=generator) < 0.7
        (found,) = session.run(None, {"features": features.numpy(), "present": present.numpy()})
        _check_equal(path, found, encoder.without_ids(encoder.normalize(features, present), present))


def _some_features(encoder: ItemEncoder, batch: int, generator: torch.Generator) -> Tensor:
    """Raw features [batch, F] such as an item may have."""
    if isinstance(encoder, VQRecEncoder):
        codes = encoder.code_table.shape[1]
        return torch.randint(1, codes + 1, (batch, encoder.total), generator=generator).float()
    assert isinstance(encoder, DenseItemEncoder)
    noise = torch.randn(batch, encoder.total, generator=generator)
    return encoder.feature_shift + noise / encoder.feature_scale.where(encoder.feature_scale != 0, torch.ones(()))


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _check_equal(path: Path, found: np.ndarray, wanted: Tensor) -> None:
    import onnxruntime

    expected = wanted.numpy()
    apart = float(np.abs(found - expected).max(initial=0)) if found.shape == expected.shape else float("nan")
    if not apart <= TOLERANCE * max(1.0, float(np.abs(expected).max(initial=0))):
        raise UserError(
            f"{path.name} in onnxruntime {onnxruntime.__version__} is not the model (it differs by {apart:.3g}); "
            "nothing is written: try another version of onnxruntime, or --format safetensors"
        )
