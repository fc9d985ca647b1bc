"""Properties of the model in float64: slices, one event at a time, causality, isolation, start positions, dropout.

B histories, N packed items, P positions, V items, D width, M features.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fmrl_dist.model.block import FeedForward, ResidualBlock
from fmrl_dist.model.dropout import NestedDropout
from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.model.item_encoders.projection import ProjectionEncoder
from fmrl_dist.model.mixers.lru import LRU
from fmrl_dist.model.mixers.mixing import Mixing
from fmrl_dist.model.scan import packed_scan
from tests.fixtures.item_encoders import projection_of
from tests.fixtures.numerics import assert_relatively_close

NUM_ITEMS = 11
SIZES = (4, 9, 16)
FEATURES = {"text": 5, "image": 3}


@dataclass(frozen=True)
class Case:
    """A model with random weights, a catalogue with holes in it, and a pack of histories, in float64."""

    model: FMRLRec
    values: Tensor  # [V, F], raw
    present: Tensor  # bool [V, M]
    items: Tensor  # int64 [N]
    starts: Tensor  # int64 [B+1]
    from_start: Tensor  # bool [B]

    def catalogue(self, model: FMRLRec | None = None) -> Tensor:
        """Item embeddings [V, D] of ``model``, the case's own unless given."""
        encoder = (model or self.model).encoder
        return encoder(encoder.normalize(self.values, self.present), self.present)

    def outputs(self, embeddings: Tensor, model: FMRLRec | None = None) -> Tensor:
        """z [P, D] of the pack, from embeddings [N, D]."""
        return (model or self.model)(embeddings, self.starts, self.from_start)

    def rows(self) -> list[tuple[list[int], range]]:
        """For each history: its start position's row (or none), and its items' rows, counted one by one."""
        rows, position = [], 0
        for (low, high), flagged in zip(
            itertools.pairwise(self.starts.tolist()), self.from_start.tolist(), strict=True
        ):
            start_row = [position] if flagged else []
            position += len(start_row)
            rows.append((start_row, range(position, position + high - low)))
            position += high - low
        return rows


def make_case(
    sizes: tuple[int, ...] = SIZES,
    depth: int = 2,
    feature_dims: dict[str, int] = FEATURES,  # noqa: B006 - never mutated
    id_table: bool = False,
    lengths: tuple[int, ...] = (3, 0, 1, 7),
    flags: tuple[bool, ...] = (True, True, False, True),
    seed: int = 0,
    dropout: float = 0.0,
    lru_dropout: float = 0.0,
    norms: tuple[bool, bool] = (False, False),
    id_width: int = 0,
) -> Case:
    torch.manual_seed(seed)
    num_table_rows, (input_norm, output_norm) = NUM_ITEMS if id_table else 0, norms
    options: dict[str, Any] = {"input_norm": input_norm, "output_norm": output_norm, "id_width": id_width}
    model = FMRLRec(sizes, depth, feature_dims, num_table_rows, dropout, lru_dropout, **options).double()
    encoder = projection_of(model)
    with torch.no_grad():
        for values in itertools.chain(model.parameters(), [encoder.feature_shift, encoder.feature_scale]):
            values.normal_(0, 0.5)  # masked entries too: the mask, not their value, must keep them out
    return Case(
        model=model,
        values=torch.randn(NUM_ITEMS, sum(feature_dims.values()), dtype=torch.float64),
        present=torch.rand(NUM_ITEMS, len(feature_dims)) < 0.7,
        items=torch.randint(NUM_ITEMS, (sum(lengths),)),
        starts=torch.tensor([0, *itertools.accumulate(lengths)]),
        from_start=torch.tensor(flags[: len(lengths)], dtype=torch.bool),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = tuple(itertools.accumulate(draw(st.lists(st.integers(4, 12), min_size=1, max_size=4))))
    names = draw(st.sets(st.sampled_from(["text", "image", "price"])))
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    return make_case(
        sizes=sizes,
        depth=draw(st.integers(1, 3)),
        feature_dims={name: draw(st.integers(1, 6)) for name in sorted(names)},
        id_table=draw(st.booleans()) or not names,
        lengths=tuple(lengths),
        flags=tuple(draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))),
        seed=draw(st.integers(0, 2**16)),
        norms=draw(st.tuples(st.booleans(), st.booleans())),
        id_width=draw(st.sampled_from((0, *sizes))),
    )


def test_norms_before_and_after_the_blocks() -> None:
    """With all else equal, the input norm acts on what enters the blocks, the output norm on what leaves them."""
    plain, normed = make_case(), make_case(norms=(True, True))
    normed.model.load_state_dict(plain.model.state_dict(), strict=False)
    rows = plain.catalogue()[plain.items]
    for norm in (normed.model.input_norm, normed.model.output_norm):
        norm.load_state_dict({"weight": torch.rand(SIZES[-1]) + 0.5, "bias": torch.randn(SIZES[-1])})
    start = plain.model.encoder.bias.detach().clone()
    with torch.no_grad():
        plain.model.encoder.bias.copy_(normed.model.input_norm(start[None])[0])  # the start position's row
    expected = normed.model.output_norm(plain.outputs(normed.model.input_norm(rows)))
    assert_relatively_close(normed.outputs(rows), expected, 1e-12)


def random_models(test: Any) -> Any:
    return settings(max_examples=30)(given(case=cases())(test))


# Slices


@random_models
def test_truncated_model_is_the_prefix_of_the_large_one(case: Case) -> None:
    catalogue = case.catalogue()
    z = case.outputs(catalogue[case.items])
    for size in case.model.sizes:
        small = case.model.truncate(size)
        small_catalogue = case.catalogue(small)
        small_z = case.outputs(small_catalogue[case.items], small)
        assert small.width == size and small.sizes[-1] == size
        assert_relatively_close(small_catalogue, catalogue[:, :size], 1e-10)
        assert_relatively_close(small_z, z[:, :size], 1e-10)
        assert_relatively_close(small_z @ small_catalogue.T, z[:, :size] @ catalogue[:, :size].T, 1e-10)


def test_truncated_model_shares_nothing_and_keeps_its_settings() -> None:
    case = make_case(dropout=0.3, lru_dropout=0.1)
    case.model.eval()
    small = case.model.truncate(9)
    before = {name: values.clone() for name, values in small.state_dict().items()}
    with torch.no_grad():
        for parameter in case.model.parameters():
            parameter.zero_()
    assert all(torch.equal(values, before[name]) for name, values in small.state_dict().items())
    assert not small.training
    assert small.rates == {"dropout": 0.3, "lru_dropout": 0.1}
    assert small.sizes == (4, 9) and small.encoder.feature_dims == FEATURES
    assert small.truncate(4).width == 4
    assert {name: values.shape for name, values in case.model.truncate(16).state_dict().items()} == {
        name: values.shape for name, values in case.model.state_dict().items()
    }


@pytest.mark.parametrize("size", [0, 8, 32])
def test_an_untrained_size_is_refused_with_the_list(size: int) -> None:
    with pytest.raises(ValueError, match=rf"size {size} was not trained; the trained sizes are \[4, 9, 16\]"):
        make_case().model.truncate(size)


# One event at a time, causality, isolation


@random_models
def test_one_event_at_a_time_gives_the_scans_outputs(case: Case) -> None:
    """All histories step together as long as they last; at the largest size and the smallest."""
    for size in {case.model.width, case.model.sizes[0]}:
        model = case.model.truncate(size)
        embeddings = case.catalogue(model)[case.items]
        z = case.outputs(embeddings, model)
        state = model.initial_state(len(case.from_start))
        assert state.shape == (len(case.from_start), model.depth, 2, size)
        rows = [item_rows for _, item_rows in case.rows()]
        for event in range(max(map(len, rows))):
            alive = torch.tensor([len(r) > event for r in rows])
            new_state, step_z = model.step(state[alive], embeddings[case.starts[:-1][alive] + event])
            state[alive] = new_state
            expected = z[[r[event] for r in rows if len(r) > event]]
            assert_relatively_close(step_z, expected, 1e-9)


@random_models
def test_events_change_no_output_before_them(case: Case) -> None:
    """Each history's events from a random one on are replaced: what is before stays, bit for bit."""
    embeddings = case.catalogue()[case.items]
    changed = embeddings.clone()
    before: list[int] = []
    after: list[int] = []
    for (low, high), (start_row, item_rows) in zip(itertools.pairwise(case.starts.tolist()), case.rows(), strict=True):
        kept = int(torch.randint(high - low + 1, ()))
        changed[low + kept : high] = torch.randn(high - low - kept, case.model.width, dtype=torch.float64)
        before += [*start_row, *item_rows[:kept]]
        after += item_rows[kept:]
    z, changed_z = case.outputs(embeddings), case.outputs(changed)
    assert torch.equal(changed_z[before], z[before])
    assert (changed_z[after] != z[after]).any(1).all()


@random_models
def test_a_history_is_untouched_by_its_neighbours_nan(case: Case) -> None:
    embeddings = case.catalogue()[case.items]
    z = case.outputs(embeddings)
    for (low, high), (_, item_rows) in zip(itertools.pairwise(case.starts.tolist()), case.rows(), strict=True):
        broken = embeddings.clone()
        broken[low:high] = torch.nan
        broken_z = case.outputs(broken)
        others = [row for row in range(len(z)) if row not in item_rows]  # a start position is stateless: untouched too
        assert torch.equal(broken_z[others], z[others])
        assert broken_z[list(item_rows)].isnan().all()


@random_models
def test_a_packed_history_gives_what_it_gives_alone(case: Case) -> None:
    embeddings = case.catalogue()[case.items]
    z = case.outputs(embeddings)
    for history, ((low, high), (start_row, item_rows)) in enumerate(
        zip(itertools.pairwise(case.starts.tolist()), case.rows(), strict=True)
    ):
        alone = case.model(embeddings[low:high], torch.tensor([0, high - low]), case.from_start[history : history + 1])
        assert_relatively_close(alone, z[[*start_row, *item_rows]], 1e-10)


# Start position


@random_models
def test_a_start_position_depends_on_nothing_but_the_model(case: Case) -> None:
    embeddings = case.catalogue()[case.items]
    z = case.outputs(embeddings)
    nothing = embeddings[:0]
    empty = case.model(nothing, torch.tensor([0, 0]), torch.tensor([True]))
    assert empty.shape == (1, case.model.width)
    by_step = case.model.step(case.model.initial_state(1), case.model.encoder.bias[None])[1]
    assert_relatively_close(by_step, empty, 1e-9)
    for start_row, _ in case.rows():
        assert_relatively_close(z[start_row], empty.expand(len(start_row), -1), 1e-10)


@random_models
def test_items_are_unaffected_by_a_start_position(case: Case) -> None:
    """Flagged, unflagged or mixed: the items' outputs are the same, and the flags add their rows and no others."""
    embeddings = case.catalogue()[case.items]
    item_rows = [row for _, rows in case.rows() for row in rows]
    without = case.model(embeddings, case.starts, torch.zeros_like(case.from_start))
    z = case.outputs(embeddings)
    assert without.shape == embeddings.shape
    assert len(z) == len(embeddings) + int(case.from_start.sum())
    assert_relatively_close(z[item_rows], without, 1e-10)


def test_a_pack_of_nothing_gives_nothing() -> None:
    model = make_case().model
    no_items = torch.zeros(0, 16, dtype=torch.float64)
    assert model(no_items, torch.tensor([0]), torch.zeros(0, dtype=torch.bool)).shape == (0, 16)
    assert model(no_items, torch.tensor([0, 0, 0]), torch.tensor([False, False])).shape == (0, 16)
    assert model(no_items, torch.tensor([0, 0, 0]), torch.tensor([True, False])).shape == (1, 16)


# Item encoder


def test_a_missing_feature_is_a_zero_row_and_its_stand_in() -> None:
    case = make_case(id_table=True)
    encoder = projection_of(case.model)
    text, image = torch.randn(5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    rows = torch.stack([torch.cat((text, image)), torch.cat((text, 0 * image)), torch.cat((0 * text, 0 * image))])
    present = torch.tensor([[True, True], [True, False], [False, False]])
    assert encoder.id_table is not None
    ids = torch.tensor([4, 4, 2])
    weight_text, weight_image = encoder.weight[:, :5], encoder.weight[:, 5:]
    expected = torch.stack(
        [
            weight_text @ text + weight_image @ image + encoder.bias + encoder.id_table[4],
            weight_text @ text + encoder.bias + encoder.stand_ins[1] + encoder.id_table[4],
            encoder.bias + encoder.stand_ins[0] + encoder.stand_ins[1] + encoder.id_table[2],
        ]
    )
    torch.testing.assert_close(encoder(rows, present, ids), expected, rtol=0, atol=1e-12)


def test_scaling_touches_present_rows_only() -> None:
    encoder = projection_of(make_case().model)
    with torch.no_grad():
        encoder.feature_shift.copy_(torch.arange(8.0))
        encoder.feature_scale.copy_(torch.arange(1.0, 9.0))
    values = torch.randn(3, 8, dtype=torch.float16)
    values[1, 5:] = torch.nan  # what an absent row holds is nobody's business
    present = torch.tensor([[True, True], [True, False], [False, True]])
    scaled = encoder.normalize(values, present)
    assert scaled.dtype == torch.float64
    for item, feature in itertools.product(range(3), range(2)):
        columns = slice(0, 5) if feature == 0 else slice(5, 8)
        affine = (values[item, columns].double() - torch.arange(8.0)[columns]) * torch.arange(1.0, 9.0)[columns]
        expected = affine if present[item, feature] else torch.zeros_like(affine)
        torch.testing.assert_close(scaled[item, columns], expected, rtol=0, atol=1e-12)


def test_some_items_embeddings_are_rows_of_the_catalogues() -> None:
    case = make_case(id_table=True)
    features = case.model.encoder.normalize(case.values, case.present)
    some = torch.tensor([7, 0, 7, 3])
    found = case.model.encoder(features[some], case.present[some], some)
    torch.testing.assert_close(found, case.catalogue()[some], rtol=0, atol=1e-12)


# Dropout


def silence_blocks(model: FMRLRec) -> None:
    """Make every block the identity."""
    with torch.no_grad():
        for block in model.blocks:
            assert isinstance(block, ResidualBlock)
            assert isinstance(block.mixer, LRU)
            for parameter in (block.mixer.C, block.mixer.c, block.ffn.w_2.weight, block.ffn.w_2.bias):
                parameter.zero_()


def assert_dropped(found: Tensor, kept: Tensor, rate: float) -> None:
    """Every entry is 0 or what is kept, at about ``rate``."""
    dropped = found == 0
    # A rate is a multiple of 2^-16, and the scale is exactly its own.
    torch.testing.assert_close(found[~dropped], kept[~dropped], rtol=1e-4, atol=1e-12)
    assert dropped.double().mean().item() == pytest.approx(rate, abs=0.05)


def test_scoring_embeddings_are_never_dropped() -> None:
    case = make_case(dropout=0.9, lru_dropout=0.9)
    in_training = case.catalogue()
    case.model.eval()
    torch.testing.assert_close(in_training, case.catalogue(), rtol=1e-12, atol=1e-12)


def test_input_embeddings_and_start_rows_are_dropped() -> None:
    case = make_case(lengths=(200, 200), flags=(True, True), dropout=0.4)
    silence_blocks(case.model)
    embeddings = case.catalogue()[case.items]
    bias = case.model.encoder.bias[None]
    rows = torch.cat((bias, embeddings[:200], bias, embeddings[200:]))
    assert_dropped(case.outputs(embeddings), rows / 0.6, 0.4)
    starts_alone = case.model(embeddings[:0], torch.zeros(501, dtype=torch.int64), torch.ones(500, dtype=torch.bool))
    assert_dropped(starts_alone, bias.expand(500, -1) / 0.6, 0.4)


def test_the_lrus_output_is_dropped_at_its_own_rate() -> None:
    block = ResidualBlock(SIZES, Mixing(), dropout=0.0, mixer_dropout=0.3).double()
    with torch.no_grad():
        block.ffn.w_2.weight.zero_()
        block.ffn.w_2.bias.zero_()
    x, starts = torch.randn(400, 16, dtype=torch.float64), torch.tensor([0, 150, 400])
    mixed = block.mixer(block.mixer_norm(x), starts)
    assert_dropped(block(x, starts) - x, mixed / 0.7, 0.3)


def test_the_ffn_drops_twice_and_its_gate_never() -> None:
    """W_2 the identity: an entry survives both dropouts or is zero."""
    rate = 0.3
    ffn = FeedForward(SIZES, rate, None).double()
    with torch.no_grad():
        ffn.w_2.weight.copy_(torch.eye(16))
        ffn.w_2.bias.zero_()
    x = torch.randn(500, 16, dtype=torch.float64)
    kept = nn.functional.silu(ffn.gate(x)) * ffn.w_1(x) / (1 - rate) ** 2
    assert_dropped(ffn(x), kept, 1 - (1 - rate) ** 2)


def test_nothing_is_dropped_in_evaluation_or_anywhere_else() -> None:
    case = make_case(dropout=0.4, lru_dropout=0.3)
    rates = {name: module.rates for name, module in case.model.named_modules() if isinstance(module, NestedDropout)}
    assert rates == {"input_dropout": (0.4,) * len(SIZES)} | {
        f"blocks.{layer}.{name}": (rate,) * len(SIZES)
        for layer in range(2)
        for name, rate in (("mixer_dropout", 0.3), ("ffn.dropout", 0.4))
    }
    embeddings = case.catalogue()[case.items]
    case.model.eval()
    without = make_case()
    without.model.load_state_dict(case.model.state_dict())
    assert torch.equal(case.outputs(embeddings), without.outputs(embeddings))


# Numbers: initialisation, bfloat16


@pytest.mark.parametrize("id_init", [0.02, None])
def test_ids_alone_tell_items_apart_from_the_start(id_init: float | None) -> None:
    """What all embeddings share, the start position's row, is no larger than what they do not."""
    torch.manual_seed(0)
    encoder = FMRLRec((8, 128), 1, {}, 300, id_init=id_init).encoder
    nothing, present = torch.empty(300, 0), torch.empty(300, 0, dtype=torch.bool)
    embeddings = encoder(encoder.normalize(nothing, present), present)
    rows = nn.functional.normalize(embeddings, dim=1)
    cosines = (rows @ rows.T)[~torch.eye(300, dtype=torch.bool)]
    assert 0.3 < cosines.mean() < 0.7


@pytest.mark.parametrize(("r_min", "r_max"), [(0.0, 0.1), (0.1, 0.2), (0.9, 1.0)])
def test_the_ring_is_where_it_should_be(r_min: float, r_max: float) -> None:
    torch.manual_seed(0)
    lru = LRU((512,), r_min, r_max, None)
    modulus = lru.decay().square().sum(0).sqrt()
    assert r_min < modulus.min() and modulus.max() < r_max
    squares = (modulus.square() - r_min**2) / (r_max**2 - r_min**2)
    assert squares.mean().item() == pytest.approx(0.5, abs=0.05)  # uniform in area
    torch.testing.assert_close(torch.exp(lru.gamma_log), (1 - modulus.square()).sqrt(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("r_min", "r_max"), [(0.0, 0.1), (0.9, 1.0)])
def test_every_parameter_is_real_and_starts_with_a_finite_gradient(r_min: float, r_max: float) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        model = FMRLRec((8, 64), 1, FEATURES, NUM_ITEMS, r_min=r_min, r_max=r_max)
        features, present = torch.randn(NUM_ITEMS, 8), torch.rand(NUM_ITEMS, 2) < 0.7
        model(
            model.encoder(features, present), torch.tensor([0, 4, 11]), torch.tensor([True, False])
        ).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.dtype == torch.float32, name
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.ne(0).any(), name


def test_a_bfloat16_model_stays_close_to_its_float32_self() -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"sizes": (8, 64), "depth": 2, "feature_dims": {"text": 96}, "r_min": 0.8, "r_max": 0.99}
    exact, rounded = FMRLRec(**options), FMRLRec(**options, matmul_dtype=torch.bfloat16)
    rounded.load_state_dict(exact.state_dict())
    features, present = torch.randn(300, 96), torch.ones(300, 1, dtype=torch.bool)
    results = []
    for model in (exact, rounded):
        embeddings = model.encoder(features, present)
        z = model(embeddings, torch.tensor([0, 250, 300]), torch.tensor([True, False]))
        z.square().mean().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([embeddings.detach(), z.detach(), *gradients])
    names = ["embeddings", "z", *dict(exact.named_parameters())]
    for name, right, found in zip(names, *results, strict=True):
        assert found.dtype == torch.float32, name
        assert (found - right).norm() <= 2e-2 * right.norm(), name
        assert not torch.equal(found, right) or name == "encoder.stand_ins", name  # it did round
    for block, rounded_block in zip(exact.blocks, rounded.blocks, strict=True):
        assert isinstance(block, ResidualBlock) and isinstance(rounded_block, ResidualBlock)
        assert isinstance(rounded_block.mixer, LRU) and isinstance(block.mixer, LRU)
        assert torch.equal(rounded_block.mixer.decay(), block.mixer.decay())  # float32 at any dtype of the products
    dtypes = [module.matmul_dtype for module in rounded.truncate(8).modules() if hasattr(module, "matmul_dtype")]
    assert set(dtypes) == {torch.bfloat16}


def test_evaluation_is_float32_at_any_precision_of_the_training() -> None:
    """Encoder, whole histories and single events; training mode rounds again."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"sizes": (8, 64), "depth": 2, "feature_dims": {"text": 96}}
    exact, rounded = FMRLRec(**options), FMRLRec(**options, matmul_dtype=torch.bfloat16)
    rounded.load_state_dict(exact.state_dict())
    features, present = torch.randn(30, 96), torch.ones(30, 1, dtype=torch.bool)

    def results(model: FMRLRec) -> list[Tensor]:
        embeddings = model.encoder(features, present)
        z = model(embeddings, torch.tensor([0, 25, 30]), torch.tensor([True, False]))
        state, z_next = model.step(model.initial_state(30), embeddings)
        return [embeddings, z, state, z_next]

    expected = results(exact.eval())
    assert all(map(torch.equal, results(rounded.eval()), expected))
    assert all(map(torch.equal, results(rounded.truncate(64)), expected))
    assert not any(map(torch.equal, results(rounded.train()), expected))


def test_the_scan_does_not_define_the_model() -> None:
    """It is chosen where the model runs; the model of each size keeps it."""
    model = FMRLRec((8, 16), 2, FEATURES, scan="plain")
    assert "scan" not in model.arguments and "matmul_dtype" not in model.arguments
    for copied, scan in ((model.truncate(8), "plain"), (FMRLRec(**model.arguments), "auto")):
        assert copied.scan == scan
        assert {module.scan for module in copied.modules() if isinstance(module, LRU)} == {scan}


@pytest.mark.parametrize("impl", ["plain", "doubling"])
def test_the_model_passes_its_scan_on(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def note(decay: Tensor, x: Tensor, starts: Tensor, impl: str) -> Tensor:
        called.append(impl)
        return packed_scan(decay, x, starts, impl)

    monkeypatch.setattr("fmrl_dist.model.mixers.lru.packed_scan", note)
    FMRLRec((8, 16), 2, FEATURES, scan=impl)(torch.randn(5, 16), torch.tensor([0, 5]), torch.tensor([True]))
    assert called == [impl, impl]


def test_ids_are_added_to_the_first_channels() -> None:
    wide, narrow = make_case(id_table=True), make_case(id_table=True, id_width=4)
    table = narrow.model.encoder.id_table
    assert table is not None and table.shape == (NUM_ITEMS, 4)
    without = narrow.catalogue().detach().clone()
    without[:, :4] -= table
    with torch.no_grad():
        table.zero_()
    torch.testing.assert_close(narrow.catalogue(), without)
    for size, kept in ((4, 4), (9, 4), (16, 4)):
        assert narrow.model.truncate(size).encoder.id_table.shape == (NUM_ITEMS, kept)  # type: ignore[union-attr]
        assert wide.model.truncate(size).encoder.id_table.shape == (NUM_ITEMS, size)  # type: ignore[union-attr]


def test_ids_start_at_the_given_deviation() -> None:
    for deviation, expected in ((None, 1 / 4), (0.02, 0.02), (0.0, 0.0)):
        table = FMRLRec((8, 16), 1, {}, 5000, id_width=8, id_init=deviation).encoder.id_table
        assert table is not None and table.std().item() == pytest.approx(expected, rel=0.02)


def test_an_encoder_without_features_is_its_id_table() -> None:
    """The paper's ablation without language and image."""
    torch.manual_seed(0)
    encoder = ProjectionEncoder(16, {}, NUM_ITEMS)
    no_features, none_present = torch.zeros(NUM_ITEMS, 0), torch.zeros(NUM_ITEMS, 0, dtype=torch.bool)
    assert encoder.id_table is not None
    found = encoder(encoder.normalize(no_features, none_present), none_present)
    torch.testing.assert_close(found, encoder.id_table + encoder.bias)
