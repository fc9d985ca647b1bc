"""UniSRec's and VQRec's item encoders against loops, in float64: values, gradients, slices, empty batches."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fmrl_dist.base.errors import UserError
from fmrl_dist.model.embed_catalogue import embed_catalogue
from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.model.item_encoders.item_encoder import DenseItemEncoder, ItemEncoder
from fmrl_dist.model.item_encoders.projection import ProjectionEncoder
from fmrl_dist.model.item_encoders.unisrec import UniSRecEncoder
from fmrl_dist.model.item_encoders.vqrec import VQRecEncoder
from fmrl_dist.training.id_table.item_draws import ItemNoise
from tests.fixtures.numerics import assert_relatively_close

NUM_ITEMS = 11
FEATURES = {"text": 5, "image": 3}
KINDS = ("unisrec", "vqrec")


@dataclass(frozen=True)
class Case:
    """A model with random weights and a catalogue with holes in it, in float64."""

    model: FMRLRec
    values: Tensor  # [V, F], raw
    present: Tensor  # bool [V, M]

    @property
    def features(self) -> Tensor:
        return self.model.encoder.normalize(self.values, self.present)

    def catalogue(self, model: FMRLRec | None = None) -> Tensor:
        """Embeddings [V, D] of all items."""
        encoder = (model or self.model).encoder
        return encoder(encoder.normalize(self.values, self.present), self.present)


def make_case(
    kind: str,
    sizes: tuple[int, ...] = (4, 9, 16),
    feature_dims: dict[str, int] = FEATURES,  # noqa: B006 - never mutated
    id_table: bool = True,
    id_width: int = 0,
    experts: int = 3,
    codes: int = 8,
    seed: int = 0,
) -> Case:
    torch.manual_seed(seed)
    kinds: dict[str, Any] = {"item_encoder": kind, "experts": experts, "codes": codes}
    model = FMRLRec(sizes, 1, feature_dims, NUM_ITEMS if id_table else 0, id_width=id_width, **kinds).double().eval()
    encoder, total = model.encoder, sum(feature_dims.values())
    buffers = [encoder.feature_shift, encoder.feature_scale] if isinstance(encoder, DenseItemEncoder) else []
    with torch.no_grad():
        for values in itertools.chain(model.parameters(), buffers):
            values.normal_(0, 0.5)
    values = torch.randn(NUM_ITEMS, total).half().double()
    if kind == "vqrec":
        values = torch.randint(1, codes + 1, (NUM_ITEMS, total)).double()
    present = torch.rand(NUM_ITEMS, len(feature_dims)) < 0.7
    return Case(model, values, present)


def plain(encoder: ItemEncoder, features: Tensor, present: Tensor, ids: Tensor, noise: Tensor | None = None) -> Tensor:
    """Embeddings, item by item; ``noise`` [n, G] of the gate in training."""
    embed = plain_unisrec if isinstance(encoder, UniSRecEncoder) else plain_vqrec
    rows = []
    for n, item in enumerate(ids.tolist()):
        row = embed(encoder, features[n], present[n].tolist(), None if noise is None else noise[n])  # type: ignore[arg-type]
        for m, is_there in enumerate(present[n].tolist()):
            row = row if is_there else row + encoder.stand_ins[m]
        if encoder.id_table is not None:
            own = encoder.id_table[item]
            row = torch.cat((row[: len(own)] + own, row[len(own) :]))
        rows.append(row)
    return torch.stack(rows)


def plain_unisrec(encoder: UniSRecEncoder, x: Tensor, present: list[bool], noise: Tensor | None) -> Tensor:
    """Equations 3 to 6 of UniSRec, expert by expert."""
    scores = []
    for g in range(len(encoder.gate)):
        score = sum(x[f] * encoder.gate[g, f] for f in range(len(x)))
        if noise is not None:
            spread = sum(x[f] * encoder.gate_noise[g, f] for f in range(len(x)))
            score = score + noise[g] * torch.log(1 + torch.exp(torch.as_tensor(spread)))
        scores.append(torch.exp(torch.as_tensor(score)))
    row = torch.zeros(encoder.width, dtype=x.dtype)
    for g, score in enumerate(scores):
        row = row + score / sum(scores) * torch.stack(
            [
                torch.as_tensor(sum((x[f] - encoder.offsets[g, f]) * encoder.weight[g, d, f] for f in range(len(x))))
                for d in range(encoder.width)
            ]
        )
    return row


def plain_vqrec(encoder: VQRecEncoder, codes: Tensor, present: list[bool], noise: None) -> Tensor:
    """Equations 3 and 4 of VQRec, part by part."""
    row, part = torch.zeros(encoder.width, dtype=encoder.code_table.dtype), 0
    for is_there, dim in zip(present, encoder.feature_dims.values(), strict=True):
        for _ in range(dim):
            if is_there:
                row = row + encoder.code_table[part, int(codes[part]) - 1]
            part += 1
    return row / part


def gradients(model: FMRLRec, embeddings: Tensor) -> dict[str, Tensor]:
    """Of every parameter of the item encoder but the start position's row, which no item has."""
    named = {name: p for name, p in model.encoder.named_parameters() if name != "bias"}
    weights = torch.linspace(-1, 2, embeddings.numel(), dtype=embeddings.dtype).view_as(embeddings)
    found = torch.autograd.grad((embeddings * weights).sum(), list(named.values()), allow_unused=True)
    return {name: torch.zeros(()) if grad is None else grad for name, grad in zip(named, found, strict=True)}


@pytest.mark.parametrize(("kind", "noisy"), [("unisrec", False), ("unisrec", True), ("vqrec", False)])
@pytest.mark.parametrize("id_width", [0, 4])
def test_as_item_by_item(kind: str, noisy: bool, id_width: int) -> None:
    """Values and every gradient, with the gate's noise and without."""
    case = make_case(kind, id_width=id_width)
    encoder, ids = case.model.encoder, torch.tensor([3, 0, 3, 10, 7])
    features, present = case.features[ids], case.present[ids]
    noise = torch.randn(len(ids), encoder.num_noises, dtype=torch.float64) if noisy else None
    found = encoder(features, present, ids, noise)
    expected = plain(encoder, features, present, ids, noise)
    assert_relatively_close(found, expected, 1e-12)
    expected_grads = gradients(case.model, expected)
    for name, grad in gradients(case.model, found).items():
        assert_relatively_close(grad, expected_grads[name].expand_as(grad), 1e-12)
        assert grad.abs().max() > 0 or (name == "gate_noise" and not noisy), name


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = tuple(itertools.accumulate(draw(st.lists(st.integers(4, 12), min_size=1, max_size=4))))
    names = draw(st.sets(st.sampled_from(["text", "image", "price"]), min_size=1))
    return make_case(
        draw(st.sampled_from(KINDS)),
        sizes,
        {name: draw(st.integers(1, 6)) for name in sorted(names)},
        id_table=draw(st.booleans()),
        id_width=draw(st.sampled_from((0, *sizes))),
        experts=draw(st.integers(1, 5)),
        codes=draw(st.sampled_from((2, 8))),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=30)
@given(case=cases())
def test_truncated_model_is_the_prefix_of_the_large_one(case: Case) -> None:
    catalogue = case.catalogue()
    arguments = (torch.tensor([0, 4, NUM_ITEMS]), torch.tensor([True, False]))
    z = case.model(catalogue, *arguments)
    for size in case.model.sizes:
        small = case.model.truncate(size)
        assert type(small.encoder) is type(case.model.encoder)
        assert small.encoder.arguments == case.model.encoder.arguments
        assert_relatively_close(case.catalogue(small), catalogue[:, :size], 1e-10)
        assert_relatively_close(small(case.catalogue(small), *arguments), z[:, :size], 1e-10)
    with pytest.raises(UserError, match="was not trained"):
        case.model.truncate(3)


@pytest.mark.parametrize("kind", [*KINDS, "projection"])
def test_columns_hold_all_that_is_embedded(kind: str) -> None:
    case = make_case(kind)
    encoder = case.model.encoder
    columns = encoder.columns(case.features, case.present)
    assert columns.shape == (NUM_ITEMS, encoder.num_columns)
    expected = encoder.without_ids(case.features, case.present)
    assert_relatively_close(encoder.of_columns(columns), expected, 1e-12)
    catalogue = case.catalogue().float()
    whole = embed_catalogue(case.model.float().encoder, case.values.half(), case.present)
    torch.testing.assert_close(whole, catalogue, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_gives_every_parameter_a_gradient(kind: str) -> None:
    """As data parallelism needs it; the start position's row is in the model's graph, whatever enters it."""
    case = make_case(kind)
    encoder = case.model.train().encoder
    none = torch.empty(0, dtype=torch.int64)
    noise = torch.empty(0, encoder.num_noises, dtype=torch.float64)
    embeddings = encoder.of_columns(encoder.columns(case.features, case.present)[none], noise)
    assert embeddings.shape == (0, 16)
    case.model(embeddings, torch.tensor([0]), torch.empty(0, dtype=torch.bool)).sum().backward()
    lacking = {name for name, parameter in encoder.named_parameters() if parameter.grad is None}
    assert lacking == {"id_table"}  # which the training module adds


@pytest.mark.parametrize("kind", KINDS)
def test_all_items_without_a_feature_are_their_stand_ins(kind: str) -> None:
    case = make_case(kind, id_table=False)
    encoder = case.model.encoder
    none_present = torch.zeros_like(case.present)
    found = encoder(encoder.normalize(case.values, none_present), none_present)
    assert_relatively_close(found, found[:1].expand_as(found), 1e-12)
    if kind == "vqrec":
        assert_relatively_close(found[0], encoder.stand_ins.sum(0), 1e-12)


def test_codes_are_exact_and_never_scaled() -> None:
    """Up to the largest, through float16 and the columns."""
    encoder = FMRLRec((4, 8), 1, {"codes": 2}, item_encoder="vqrec", codes=2048).encoder.eval()
    assert isinstance(encoder, VQRecEncoder) and encoder.has_whole_numbers
    values = torch.tensor([[1, 2048], [2047, 1025]], dtype=torch.float16)
    present = torch.ones(2, 1, dtype=torch.bool)
    rows = encoder.of_columns(encoder.columns(encoder.normalize(values, present), present))
    first, second = encoder.code_table
    torch.testing.assert_close(rows, torch.stack((first[0] + second[2047], first[2046] + second[1024])) / 2)
    assert not [name for name, _ in encoder.named_buffers()]


def test_the_default_is_what_it_was() -> None:
    """Same arguments, tensors, and weights of a seed."""
    torch.manual_seed(3)
    model = FMRLRec((4, 8), 1, FEATURES, NUM_ITEMS)
    assert not {"item_encoder", "experts", "codes"} & model.arguments.keys()
    own = [name for name in model.state_dict() if name.startswith("encoder.")]
    assert own == [
        f"encoder.{name}" for name in ("weight", "bias", "stand_ins", "id_table", "feature_shift", "feature_scale")
    ]
    torch.manual_seed(3)
    bound = 1 / 8**0.5
    weight, bias = torch.empty(8, 8).uniform_(-bound, bound), torch.empty(8).uniform_(-bound, bound)
    table = torch.randn(NUM_ITEMS, 8) * (1 / 8**0.5)
    assert isinstance(model.encoder, ProjectionEncoder) and model.encoder.id_table is not None
    assert torch.equal(model.encoder.weight, weight) and torch.equal(model.encoder.bias, bias)
    assert torch.equal(model.encoder.id_table, table)


def test_arguments_make_the_same_model() -> None:
    for kind in KINDS:
        model = make_case(kind).model
        again = FMRLRec(**model.arguments)
        assert again.encoder.arguments == model.encoder.arguments
        again.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="item_encoder is 'bert'; expected projection, unisrec or vqrec"):
        FMRLRec((4,), 1, FEATURES, item_encoder="bert")


def test_items_have_their_own_noise_in_each_step() -> None:
    """Wherever they occur: standard normal numbers, by seed, step and item."""
    noise, ids = ItemNoise(3, 1, 7), torch.arange(40_000) * 977
    noise.begin_step(5)
    found = noise(ids).double()
    assert torch.equal(noise(ids[100:200].flip(0)).double(), found[100:200].flip(0))
    assert abs(float(found.mean())) < 0.01 and abs(float(found.std()) - 1) < 0.01
    assert abs(float((found**4).mean()) - 3) < 0.1 and float(found.abs().max()) < 7
    noise.begin_step(6)
    other_seed = ItemNoise(3, 1, 8)
    other_seed.begin_step(5)
    columns = torch.cat((found, noise(ids).double(), other_seed(ids).double()), 1)
    correlations = torch.corrcoef(torch.cat((columns, columns.roll(1, 0)), 1).T) - torch.eye(18)
    assert float(correlations.abs().max()) < 0.02
