"""Parity with the authors' model (github.com/yueqirex/fMRLRec): the same weights and histories, losses and gradients.

Both sides get a row 0 whose features are zero, since the authors' training softmax counts their padding row, scored
``z·b_proj``, as a class. Histories are left-padded for their model and packed for ours; float32, dropout 0. Bounds: the
loss 1e-6 relative; every gradient 1e-4, of its norm and, at its worst element, of its largest element.

L maximum history length, B histories, V items besides row 0, D width, S sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import io
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import checkout_commit, describe_setting
from fmrl_dist.base.errors import require, run_command
from fmrl_dist.data.windows import WindowRule, target_windows
from fmrl_dist.losses.nested_cross_entropy import nested_cross_entropy
from fmrl_dist.losses.settings import LossSettings
from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.model.nested import chunks

LOSS_BOUND = 1e-6
GRADIENT_BOUND = 1e-4
MAX_LENGTH = 50  # L, as in the paper
EDGES = (1, 2, 50, 51, 80)  # events: start position alone, with one item, the longest with one, the first two without


@dataclass(frozen=True)
class Case:
    """One model and one batch of histories."""

    seed: int
    sizes: tuple[int, ...]
    depth: int
    lengths: tuple[int, ...]  # events of each history
    ring: tuple[float, float] = (0.0, 0.1)  # r_min, r_max
    moved: bool = True  # every parameter away from the authors' initialisation, whose imaginary parts are 0
    num_items: int = 300  # V
    feature_dim: int = 48  # of each of the two features


CASES = (
    Case(0, (8, 16, 32, 64), 2, EDGES, moved=False),
    Case(1, (8, 16, 32, 64), 2, EDGES),
    Case(2, (8, 16, 32, 64), 2, EDGES, ring=(0.8, 0.99)),
    Case(3, (8, 16, 32, 64, 128, 256), 1, tuple(range(1, 33)), moved=False),
    Case(4, (8, 16, 32, 64, 128, 256), 2, tuple(range(25, 89, 2)), ring=(0.1, 0.2)),
    Case(5, (5, 12, 31), 3, (1, 1, 1)),
)


@dataclass(frozen=True)
class Result:
    """Losses of both sides, and the gradients' relative errors by parameter: of the norm, and at the worst element."""

    num_targets: int
    their_loss: float
    our_loss: float
    gradient_errors: dict[str, tuple[float, float]]

    @property
    def loss_error(self) -> float:
        return abs(self.our_loss - self.their_loss) / abs(self.their_loss)

    def worst(self, kind: int) -> tuple[float, str]:
        """The largest error, 0 of the norm or 1 at an element, and the parameter that has it."""
        return max((errors[kind], name) for name, errors in self.gradient_errors.items())

    @property
    def within_bounds(self) -> bool:
        return (
            self.loss_error <= LOSS_BOUND and self.worst(0)[0] <= GRADIENT_BOUND and self.worst(1)[0] <= GRADIENT_BOUND
        )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.parity", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--reference", type=Path, required=True, help="a checkout of github.com/yueqirex/fMRLRec")
    reference_path = parser.parse_args(argv).reference
    module = load_reference(reference_path)
    for name, value in ({"reference": describe_reference(reference_path)} | describe_setting()).items():
        print(f"{name:<10} {value}")
    results = [compare(module, case) for case in CASES]
    print(format_table(CASES, results))
    if not all(result.within_bounds for result in results):
        print(f"NOT EQUAL: the bounds are loss {LOSS_BOUND:g}, gradients {GRADIENT_BOUND:g}", file=sys.stderr)
        sys.exit(1)
    print(f"equal: loss to {LOSS_BOUND:g}, every gradient to {GRADIENT_BOUND:g}")


def load_reference(path: Path) -> ModuleType:
    """The authors' model module, from a checkout.

    Raises:
        UserError: ``path`` is not a checkout.
    """
    source = path / "model" / "lru.py"
    require(
        source.is_file(),
        f"--reference {path} has no model/lru.py; expected a checkout: git clone https://github.com/yueqirex/fMRLRec",
    )
    spec = importlib.util.spec_from_file_location("reference_lru", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    require(hasattr(module, "LRU"), f"{source} defines no class LRU; expected the authors' model")
    return module


def compare(module: ModuleType, case: Case) -> Result:
    """Run both sides on one case."""
    torch.manual_seed(case.seed)
    features = F.normalize(torch.randn(2, case.num_items, case.feature_dim), dim=2)
    theirs = build_reference(module, case, features)
    ours = build_ours(case, theirs)
    histories = [torch.randint(1, case.num_items + 1, (length,)).tolist() for length in case.lengths]

    their_loss = reference_loss(theirs, histories, case.sizes)
    our_loss, num_targets = packed_loss(ours, histories, features)
    their_loss.backward()
    our_loss.backward()

    their_gradients = in_our_layout(theirs, case.sizes, gradient)
    errors = {}
    for name, parameter in ours.named_parameters():
        expected = their_gradients.get(
            name, torch.zeros_like(parameter)
        )  # stand-ins: their model has no such parameters, and no item lacks a feature
        errors[name] = relative_errors(gradient(parameter), expected)
    return Result(num_targets, their_loss.item(), our_loss.item(), errors)


def build_reference(module: ModuleType, case: Case, features: Tensor) -> nn.Module:
    """Their model over features [2, V, F] (language, image); it puts the zero row 0 before them."""
    with tempfile.TemporaryDirectory() as folder:
        language, image = (Path(folder) / name for name in ("language.npy", "image.npy"))
        np.save(language, features[0].numpy())
        np.save(image, features[1].numpy())
        dataset = SimpleNamespace(
            _get_preprocessed_embeddings_path=lambda: language, _get_preprocessed_img_embeddings_path=lambda: image
        )
        settings = SimpleNamespace(
            dataset=dataset,
            freeze_embed=True,
            mrl_hidden_sizes=list(case.sizes),
            lru_num_blocks=case.depth,
            lru_use_bias=True,
            lru_dropout=0.0,
            lru_attn_dropout=0.0,
            lru_r_min=case.ring[0],
            lru_r_max=case.ring[1],
        )
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():  # it says which files it read
            warnings.filterwarnings("ignore", message="Complex modules")
            model: nn.Module = module.LRU(settings)
    if case.moved:
        with torch.no_grad():
            for parameter in trained(model):
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def build_ours(case: Case, theirs: nn.Module) -> FMRLRec:
    """Our model with their weights."""
    ours = FMRLRec(case.sizes, case.depth, {"language": case.feature_dim, "image": case.feature_dim})
    weights = in_our_layout(theirs, case.sizes, lambda parameter: parameter.detach())
    ours.load_state_dict(ours.state_dict() | weights)
    return ours


def gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def in_our_layout(theirs: Any, sizes: Sequence[int], read: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
    """What ``read`` gives for each of their parameters (weights, or gradients), under our names and in our shapes.

    Their chunks' linear layers become blocks of one nested weight, their complex numbers pairs of real ones; the output
    bias's imaginary part, which only ever meets a real part taken, is left out.
    """
    values_read: set[int] = set()

    def take(parameter: nn.Parameter) -> Tensor:
        values_read.add(id(parameter))
        return read(parameter)

    def nested(layer: nn.Module) -> tuple[Tensor, Tensor]:
        linears = [getattr(layer, f"mrl_linear_{j}") for j in range(len(sizes))]
        biases = [take(linear.bias) for linear in linears]
        weight = biases[0].new_zeros(sizes[-1], sizes[-1])
        for (low, high), linear in zip(chunks(sizes), linears, strict=True):
            weight[low:high, :high] = take(linear.weight)
        return weight, torch.cat(biases)

    def norm(layer: nn.Module, name: str) -> Tensor:
        return torch.cat([take(getattr(getattr(layer, f"layernorm_{j}"), name)) for j in range(len(sizes))])

    values = {
        "encoder.weight": take(theirs.embedding.projector.weight),
        "encoder.bias": take(theirs.embedding.projector.bias),
    }
    for number, block in enumerate(theirs.model.lru_blocks):
        ours = f"blocks.{number}"
        for name, row in zip(("nu", "theta", "gamma_log"), take(block.lru_layer.params_log), strict=True):
            values[f"{ours}.lru.{name}"] = row
        for weight_name, bias_name, layer in (
            ("B", "b", block.lru_layer.in_proj),
            ("C", "c", block.lru_layer.out_proj),
        ):
            weight, bias = nested(layer)
            values[f"{ours}.lru.{weight_name}"] = torch.stack((weight.real, weight.imag))
            values[f"{ours}.lru.{bias_name}"] = torch.stack((bias.real, bias.imag)) if bias_name == "b" else bias.real
        for name in ("gate", "w_1", "w_2"):
            linear = f"{ours}.ffn.{name}"
            values[f"{linear}.weight"], values[f"{linear}.bias"] = nested(getattr(block.feed_forward, name))
        for name, layer in (("lru_norm", block.input_layernorm), ("ffn_norm", block.post_lru_layernorm)):
            values |= {f"{ours}.{name}.{which}": norm(layer, which) for which in ("weight", "bias")}
    assert values_read == {id(parameter) for parameter in trained(theirs)}
    return values


def reference_loss(theirs: nn.Module, histories: Sequence[list[int]], sizes: Sequence[int]) -> Tensor:
    """Their loss: cross-entropy over V + 1 classes, mean over sizes and non-padding positions."""
    tokens = [left_padded(history[:-1][-MAX_LENGTH:]) for history in histories]
    labels = [left_padded(history[-MAX_LENGTH:]) for history in histories]
    scores = theirs(torch.tensor(tokens))  # [S·B, L, V + 1]
    targets = torch.tensor(labels).repeat(len(sizes), 1)
    return F.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=0)


def left_padded(events: list[int]) -> list[int]:
    return [0] * (MAX_LENGTH - len(events)) + events


def packed_loss(ours: FMRLRec, histories: Sequence[list[int]], features: Tensor) -> tuple[Tensor, int]:
    """Our loss, on the windows that training takes, and its number of targets."""
    lengths = np.array([len(history) for history in histories])
    windows = zip(histories, *target_windows(lengths, WindowRule(MAX_LENGTH, "last", True))[1:], strict=True)
    items: list[int] = []
    targets: list[int] = []
    starts, from_start = [0], []
    for history, first, last in windows:
        from_start.append(bool(first == 0))
        items += history[max(first - 1, 0) : last - 1]
        targets += history[first:last]
        starts.append(len(items))

    catalogue = F.pad(torch.cat((features[0], features[1]), 1), (0, 0, 1, 0))  # row 0: zero
    embeddings = ours.encoder(catalogue, torch.ones(len(catalogue), 2, dtype=torch.bool))
    z = ours(embeddings[torch.tensor(items, dtype=torch.int64)], torch.tensor(starts), torch.tensor(from_start))
    losses = nested_cross_entropy(z, embeddings, torch.tensor(targets), LossSettings(ours.sizes))
    return losses.sum() / (len(ours.sizes) * len(targets)), len(targets)


def relative_errors(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Of the norm, and of the largest element; where nothing is expected or something not finite, 0 or infinity."""
    difference = found - expected
    if not difference.any():
        return 0.0, 0.0
    if not expected.any() or not difference.isfinite().all():
        return torch.inf, torch.inf
    return (
        (difference.norm() / expected.norm()).item(),
        (difference.abs().max() / expected.abs().max()).item(),
    )


def describe_reference(path: Path) -> str:
    """The commit of a checkout of theirs, and what names the model's file even without one."""
    digest = hashlib.sha256((path / "model" / "lru.py").read_bytes()).hexdigest()
    return f"{checkout_commit(path)}, sha256 of model/lru.py {digest[:12]}"


def format_table(cases: Sequence[Case], results: Sequence[Result]) -> str:
    """Markdown, one row a case."""
    head = ("sizes", "blocks", "ring", "weights", "histories", "targets", "loss, theirs", "loss, ours", "relative")
    rows = [(*head, "worst gradient, norm", "worst gradient, element"), ("---",) * (len(head) + 2)]
    for case, result in zip(cases, results, strict=True):
        rows.append(
            (
                f"{case.sizes[0]} … {case.sizes[-1]}",
                str(case.depth),
                f"{case.ring[0]:g} … {case.ring[1]:g}",
                "moved" if case.moved else "as initialised",
                f"{len(case.lengths)} of {min(case.lengths)} … {max(case.lengths)} events",
                str(result.num_targets),
                f"{result.their_loss:.7f}",
                f"{result.our_loss:.7f}",
                f"{result.loss_error:.1e}",
                *("{:.1e} ({})".format(*result.worst(kind)) for kind in (0, 1)),
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    run_command(main)
