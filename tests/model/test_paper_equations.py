"""An independent reading of the paper: scores and loss in float64 NumPy, loop by loop, without the package's code.

``paper_*`` functions see nothing but arrays, as a checkpoint names them, and sizes. They write out arXiv 2409.16627
section 3 with explicit loops over positions, chunks and channels and with NumPy's own complex numbers.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fmrl_dist.losses.nested_cross_entropy import nested_cross_entropy
from fmrl_dist.losses.settings import LossSettings
from fmrl_dist.model.fmrlrec import FMRLRec

Array = NDArray[np.float64]
Weights = dict[str, Array]


def paper_linear(x: NDArray, weight: NDArray, bias: NDArray, sizes: list[int]) -> NDArray:
    """Eq. 2-4: output channel o, of the chunk that ends at m, sums over the inputs before m."""
    y = np.zeros(len(bias), dtype=np.result_type(x, weight))
    for channel in range(len(bias)):
        reach = min(size for size in sizes if size > channel)
        for source in range(reach):
            y[channel] += weight[channel, source] * x[source]
        y[channel] += bias[channel]
    return y


def paper_layer_norm(x: Array, weight: Array, bias: Array, sizes: list[int]) -> Array:
    """Each chunk normalised separately, eps 1e-5."""
    y = np.zeros_like(x)
    low = 0
    for high in sizes:
        chunk = x[low:high]
        mean = sum(chunk) / len(chunk)
        variance = sum((value - mean) ** 2 for value in chunk) / len(chunk)
        for channel in range(low, high):
            y[channel] = (x[channel] - mean) / np.sqrt(variance + 1e-5) * weight[channel] + bias[channel]
        low = high
    return y


def paper_recurrence(rows: list[Array], w: Weights, prefix: str, sizes: list[int]) -> list[Array]:
    """Eq. 8-9: h_k = Λ h_{k-1} + γ⊙(B x_k + b), y_k = Re(C h_k + c), from h_0 = 0."""
    eigenvalues = np.exp(-np.exp(w[f"{prefix}.nu"]) + 1j * np.exp(w[f"{prefix}.theta"]))
    gamma = np.exp(w[f"{prefix}.gamma_log"])
    matrix_in, matrix_out, bias_in = (w[f"{prefix}.{n}"][0] + 1j * w[f"{prefix}.{n}"][1] for n in ("B", "C", "b"))
    state = np.zeros(len(gamma), dtype=np.complex128)
    outputs = []
    for row in rows:
        state = eigenvalues * state + gamma * paper_linear(row, matrix_in, bias_in, sizes)
        outputs.append(paper_linear(state, matrix_out, w[f"{prefix}.c"], sizes).real)
    return outputs


def paper_feed_forward(x: Array, w: Weights, prefix: str, sizes: list[int]) -> Array:
    """(SiLU(x W_g + b_g) ⊙ (x W_1 + b_1)) W_2 + b_2."""
    gate, hidden = (paper_linear(x, w[f"{prefix}.{n}.weight"], w[f"{prefix}.{n}.bias"], sizes) for n in ("gate", "w_1"))
    gated = np.array([g / (1 + np.exp(-g)) * h for g, h in zip(gate, hidden, strict=True)])
    return paper_linear(gated, w[f"{prefix}.w_2.weight"], w[f"{prefix}.w_2.bias"], sizes)


def paper_sequence(rows: list[Array], w: Weights, depth: int, sizes: list[int]) -> list[Array]:
    """One sequence through every block: x + LRU(LayerNorm(x)), then x + FFN(LayerNorm(x))."""
    for layer in range(depth):
        block = f"blocks.{layer}"
        normed = [paper_layer_norm(x, w[f"{block}.lru_norm.weight"], w[f"{block}.lru_norm.bias"], sizes) for x in rows]
        mixed = paper_recurrence(normed, w, f"{block}.lru", sizes)
        rows = [x + y for x, y in zip(rows, mixed, strict=True)]
        normed = [paper_layer_norm(x, w[f"{block}.ffn_norm.weight"], w[f"{block}.ffn_norm.bias"], sizes) for x in rows]
        rows = [x + paper_feed_forward(y, w, f"{block}.ffn", sizes) for x, y in zip(rows, normed, strict=True)]
    return rows


def paper_item_embedding(language: Array, image: Array | None, w: Weights) -> Array:
    """Eq. 7: concat(E_lang, E_img) W_proj + b_proj; a missing image is a zero row and a learned vector."""
    stand_in = 0.0
    if image is None:
        image = np.zeros(w["encoder.weight"].shape[1] - len(language))
        stand_in = w["encoder.stand_ins"][1]
    return w["encoder.weight"] @ np.concatenate([language, image]) + w["encoder.bias"] + stand_in


def paper_scores_and_loss(
    histories: list[list[int]], flags: list[bool], items: list[Array], w: Weights, depth: int, sizes: list[int]
) -> tuple[dict[int, list[Array]], float]:
    """Scores per size (eq. 13), and the loss summed over sizes and positions (eq. 14), each history from scratch.

    A flagged history has a start position before it (b_proj, no carried state), which predicts its first item.
    """
    scores: dict[int, list[Array]] = {size: [] for size in sizes}
    loss = 0.0
    for history, flagged in zip(histories, flags, strict=True):
        outputs = paper_sequence([w["encoder.bias"]], w, depth, sizes) if flagged else []
        outputs += paper_sequence([items[item] for item in history[:-1]], w, depth, sizes)
        for z, target in zip(outputs, history if flagged else history[1:], strict=True):
            for size in sizes:
                row = np.array([sum(z[c] * item[c] for c in range(size)) for item in items])
                scores[size].append(row)
                loss -= row[target] - row.max() - np.log(sum(np.exp(row - row.max())))
    return scores, loss


def random_model(sizes: list[int], depth: int, r_max: float) -> FMRLRec:
    """Every parameter away from its initial value, so that a forgotten one shows; float64."""
    model = FMRLRec(sizes, depth, {"language": 3, "image": 2}, r_min=0.0, r_max=r_max).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@pytest.mark.parametrize("flags", [(True, True, True), (False, False, False), (True, False, True)])
@pytest.mark.parametrize(
    ("seed", "sizes", "depth", "r_max"), [(0, [4, 9, 13], 2, 0.1), (1, [8], 1, 0.9), (2, [4, 8, 16], 3, 0.5)]
)
def test_scores_and_loss_are_the_papers(
    seed: int, sizes: list[int], depth: int, r_max: float, flags: tuple[bool, ...]
) -> None:
    torch.manual_seed(seed)
    model = random_model(sizes, depth, r_max)
    features = torch.randn(6, 5, dtype=torch.float64)
    present = torch.tensor([[True, item % 3 != 2] for item in range(6)])
    histories = [[4, 0, 2, 2, 5, 1, 3, 0, 4], [3], [1, 5]]

    w = {name: values.numpy() for name, values in model.state_dict().items()}
    items = [
        paper_item_embedding(row[:3], row[3:] if has_image else None, w)
        for row, has_image in zip(features.numpy(), present[:, 1].tolist(), strict=True)
    ]
    expected_scores, expected_loss = paper_scores_and_loss(histories, list(flags), items, w, depth, sizes)

    embeddings = model.encoder(model.encoder.normalize(features, present), present)
    inputs = [item for history in histories for item in history[:-1]]
    starts = torch.tensor([0, 8, 8, 9])
    z = model(embeddings[inputs], starts, torch.tensor(flags))
    targets = []
    for history, flagged in zip(histories, flags, strict=True):
        targets += history if flagged else history[1:]
    losses = nested_cross_entropy(z, embeddings, torch.tensor(targets), LossSettings(tuple(sizes)))

    np.testing.assert_allclose(embeddings.detach().numpy(), items, rtol=0, atol=1e-10)
    for size in sizes:
        scores = (z[:, :size] @ embeddings[:, :size].T).detach().numpy()
        expected = np.array(expected_scores[size])
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-10 * max(1.0, np.abs(expected).max()))
    assert losses.sum().item() == pytest.approx(expected_loss, rel=1e-10)
