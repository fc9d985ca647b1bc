"""The text encoder against a plain loop over the same model; batching, truncation, absent items, refusals."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModel, AutoTokenizer

from fmrl_dist.base.errors import UserError
from fmrl_dist.config.features import TransformersFeature
from shards.encoders import compute, text_feature
from shards.encoders.compute import Compute
from shards.encoders.item_feature import ItemFeature
from shards.encoders.item_text import ItemTexts
from shards.encoders.text_encoder import CPU_TOKENS, load_encoder, pool, token_batches
from shards.encoders.text_feature import encode_texts
from tests.fixtures.text_model import DIM, MAX_POSITIONS, random_texts, write_text_model

Pooling = Literal["cls", "mean"]
# Float32 results that differ by rounding can become neighbouring float16 values, 2^-11 apart below 1.
FLOAT16_STEP = 2.0**-11 + 1e-6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_feature, "UNIT_TEXTS", 16)


def config(model: Path, pooling: Pooling = "cls", max_tokens: int = 32, batch_tokens: int = 256) -> TransformersFeature:
    return TransformersFeature(
        model=str(model), pooling=pooling, max_tokens=max_tokens, batch_tokens=batch_tokens, precision="fp32"
    )


def encode(feature: TransformersFeature, texts: list[str], folder: Path, has: np.ndarray | None = None) -> ItemFeature:
    present = np.ones(len(texts), bool) if has is None else has
    return encode_texts("text", feature, ItemTexts(texts, present), folder)


def plain_rows(model: Path, texts: list[str], pooling: Pooling, max_tokens: int) -> np.ndarray:
    """The specification: one text at a time, in order, nothing padded."""
    tokenizer, bert = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    rows = []
    for text in texts:
        tokens = tokenizer(text, truncation=True, max_length=max_tokens, return_tensors="pt")
        with torch.no_grad():
            hidden = bert(**tokens).last_hidden_state[0]
        vector = hidden[0] if pooling == "cls" else hidden.mean(0)
        rows.append((vector / vector.norm()).numpy())
    return np.stack(rows)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("max_tokens", [4, 32])
def test_equals_a_plain_loop(model: Path, small_units: None, tmp_path: Path, pooling: Pooling, max_tokens: int) -> None:
    texts = random_texts(70)
    encoded = encode(config(model, pooling, max_tokens), texts, tmp_path)
    expected = plain_rows(model, texts, pooling, max_tokens)
    assert encoded.rows.dtype == np.float16 and encoded.present.all()
    np.testing.assert_allclose(encoded.rows.astype(np.float32), expected, rtol=0, atol=FLOAT16_STEP)
    assert np.abs(expected - np.roll(expected, 1, axis=0)).max() > 0.1  # equal rows would prove nothing
    assert encoded.encoder == f"transformers:{model} {pooling} {max_tokens}"


def test_poolings_and_lengths_differ(model: Path, tmp_path: Path) -> None:
    texts = random_texts(8)
    kinds: list[tuple[Pooling, int]] = [("cls", 32), ("mean", 32), ("cls", 4), ("mean", 4)]
    rows = [encode(config(model, *kind), texts, tmp_path).rows for kind in kinds]
    for i in range(len(rows)):
        for j in range(i):
            assert np.abs(rows[i] - rows[j]).max() > 0.05


def test_batch_sizes_change_nothing_but_the_last_digit(model: Path, small_units: None, tmp_path: Path) -> None:
    texts = random_texts(50)
    first = encode(config(model, "mean"), texts, tmp_path / "first").rows
    second = encode(config(model, "mean", batch_tokens=32), texts, tmp_path / "second").rows
    np.testing.assert_allclose(second.astype(np.float32), first.astype(np.float32), rtol=0, atol=FLOAT16_STEP)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_row_depends_on_its_text_alone(model: Path, pooling: Pooling) -> None:
    """Bit for bit, on a CPU: alone, among others, in another order, beside longer ones."""
    encoder = load_encoder(config(model, pooling, batch_tokens=512))
    texts = random_texts(60) + ["red " * 40, "rose " * 40, "red"]
    rows = encoder.encode(texts).rows
    shuffled = np.random.default_rng(1).permutation(len(texts))
    np.testing.assert_array_equal(encoder.encode([texts[i] for i in shuffled]).rows, rows[shuffled])
    for i in range(0, len(texts), 5):
        np.testing.assert_array_equal(encoder.encode([texts[i]]).rows[0], rows[i])


def test_forward_passes_of_a_length_have_one_shape(model: Path) -> None:
    """On a CPU, however many texts there are: a product rounds by its shape."""
    encoder = load_encoder(config(model, batch_tokens=512))
    shapes: list[torch.Size] = []
    encoder.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    for count in (60, 3, 1):
        encoder.encode(random_texts(count))
    assert len(set(shapes)) == len({length for _, length in shapes}) > 2
    assert max(rows * length for rows, length in shapes) <= CPU_TOKENS


def test_pool_ignores_padding() -> None:
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [100.0, 100.0]]], dtype=torch.bfloat16)
    mask = torch.tensor([[1, 1, 0]])
    assert pool(hidden, mask, "mean").tolist() == [[2.0, 3.0]]
    assert pool(hidden, mask, "cls").tolist() == [[1.0, 2.0]]
    assert pool(hidden, mask, "mean").dtype == torch.float32


def test_the_models_own_limit_holds(model: Path, tmp_path: Path) -> None:
    texts = ["red " * 200, "mint"]
    encoded = encode(config(model, max_tokens=512, batch_tokens=512), texts, tmp_path)
    assert encoded.encoder.endswith(f" cls {MAX_POSITIONS}")
    expected = plain_rows(model, texts, "cls", MAX_POSITIONS)
    np.testing.assert_allclose(encoded.rows.astype(np.float32), expected, rtol=0, atol=FLOAT16_STEP)


def test_items_without_text_are_absent(model: Path, tmp_path: Path) -> None:
    texts, has = random_texts(6), np.array([True, False, True, True, False, True])
    encoded = encode(config(model), texts, tmp_path, has)
    np.testing.assert_array_equal(encoded.present, has)
    assert not encoded.rows[~has].any()
    np.testing.assert_allclose(np.linalg.norm(encoded.rows[has].astype(np.float32), axis=1), 1, atol=1e-3)
    assert encoded.rows.shape == (6, DIM)


def test_one_new_item_encodes_one_text(
    model: Path, small_units: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal texts are encoded once, whatever the items are called and in whatever order they come."""
    texts = random_texts(40)
    first = np.array(encode(config(model), [*texts, texts[0]], tmp_path).rows)
    assert "40 texts encoded, 0 were kept\n" in capsys.readouterr().out
    again = encode(config(model, batch_tokens=64), ["rose mint", *texts[::-1]], tmp_path).rows
    assert "1 texts encoded, 40 were kept\n" in capsys.readouterr().out
    np.testing.assert_array_equal(again[:0:-1], first[:-1])
    np.testing.assert_array_equal(first[-1], first[0])
    assert again[0].any()


def test_another_recipe_starts_anew(model: Path, tmp_path: Path) -> None:
    texts = random_texts(5)
    other = shutil.copytree(model, tmp_path / "model")
    encode(config(other), texts, tmp_path / "done")
    encode(config(other, "mean"), texts, tmp_path / "done")
    encode(config(other, max_tokens=5), texts, tmp_path / "done")
    encode(config(other), [*texts[:4], "rose"], tmp_path / "done")  # the recipe is the same
    bert = AutoModel.from_pretrained(other)
    with torch.no_grad():
        bert.embeddings.word_embeddings.weight[7, 0] += 1e-3
    bert.save_pretrained(other)
    encode(config(other), texts, tmp_path / "done")
    assert len(list((tmp_path / "done").iterdir())) == 4


def test_bf16_is_near(model: Path, tmp_path: Path) -> None:
    texts = random_texts(12)
    exact = encode(config(model, "mean"), texts, tmp_path).rows.astype(np.float32)
    feature = TransformersFeature(model=str(model), pooling="mean", max_tokens=32, batch_tokens=256, precision="bf16")
    rows = encode(feature, texts, tmp_path).rows.astype(np.float32)
    assert np.abs(rows - exact).max() > 1e-4
    assert (rows * exact).sum(1).min() > 0.99


def test_what_auto_chose_is_recorded_and_never_mixed(
    model: Path, small_units: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build that goes on where ``auto`` chooses something else starts anew: no store has rows of two precisions."""
    texts = random_texts(40)
    exact = encode(config(model), texts, tmp_path / "exact")
    feature = dataclasses.replace(config(model), precision="auto")
    monkeypatch.setattr(compute, "_multiplies_bf16", lambda device: True)
    rough = encode(feature, texts, tmp_path / "kept")
    next((tmp_path / "kept").glob("*/*.safetensors")).unlink()  # as if it had been killed before its last unit
    monkeypatch.setattr(compute, "_multiplies_bf16", lambda device: False)
    again = encode(feature, texts, tmp_path / "kept")
    assert [one.recipe["precision"] for one in (exact, rough, again)] == ["fp32", "bf16", "fp32"]
    assert not np.array_equal(exact.rows, rough.rows)
    np.testing.assert_array_equal(again.rows, exact.rows)
    assert {one.device for one in (exact, rough, again)} == {"cpu"}


def test_float32_is_float32_on_a_gpu_too() -> None:
    """cuDNN would round what goes into a convolution to ten bits of mantissa."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.enabled
    with Compute(torch.device("cpu"), torch.float32).autocast():
        assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.enabled) == (False, before[1])
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.enabled) == before


@given(lengths=st.lists(st.integers(1, 50), max_size=60), budget=st.integers(1, 300), fixed=st.booleans())
def test_batches_hold_every_text_once_under_the_budget(lengths: list[int], budget: int, fixed: bool) -> None:
    batches = list(token_batches(np.array(lengths, int), budget, fixed))
    assert sorted(i for batch in batches for i in batch.texts.tolist()) == list(range(len(lengths)))
    ordered = [lengths[i] for batch in batches for i in batch.texts]
    assert ordered == sorted(lengths, reverse=True)
    for i, batch in enumerate(batches):
        assert batch.num_tokens == max(lengths[i] for i in batch.texts)
        assert batch.num_rows == 1 or batch.num_rows * batch.num_tokens <= budget
        if fixed:
            assert batch.num_rows == max(1, budget // batch.num_tokens) >= len(batch.texts)
            assert len({lengths[i] for i in batch.texts}) == 1
        else:
            assert batch.num_rows == len(batch.texts)
            assert i == len(batches) - 1 or (batch.num_rows + 1) * batch.num_tokens > budget  # as full as it may be


def test_no_text_at_all_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no item has a text"):
        encode(config(model), ["Untitled Item"], tmp_path, np.array([False]))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "expected config.json, model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), "cannot be loaded"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "unheard-of"}'), "unheard-of"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot be loaded"),
    ],
)
def test_a_damaged_model_is_refused_on_one_line(model: Path, tmp_path: Path, damage: object, words: str) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    assert callable(damage)
    damage(folder)
    with pytest.raises(UserError, match=words) as refused:
        load_encoder(config(folder))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_attn_implementation", "someone/kernel"),
        ("attn_implementation", {"text": "sdpa", "vision": "someone/kernel:flash"}),
        ("text_config", {"_attn_implementation": "flash_attention_2"}),
        ("experts_implementation", "someone/kernel"),
    ],
)
def test_code_from_a_hub_is_refused(model: Path, tmp_path: Path, key: str, value: object) -> None:
    """transformers runs the kernel that a config names, even without ``trust_remote_code``."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    path = folder / "config.json"
    sound = json.loads(path.read_text())
    path.write_text(json.dumps(sound | {key: value}))
    with pytest.raises(UserError, match="implementation .*; expected one of .*; remove it") as refused:
        load_encoder(config(folder))
    assert "\n" not in str(refused.value)
    path.write_text(json.dumps(sound | {"_attn_implementation": "eager"}))
    load_encoder(config(folder))


@pytest.mark.parametrize("place", ["quantization_config", "text_config"])
def test_a_quantized_model_is_refused(model: Path, tmp_path: Path, place: str) -> None:
    """transformers fetches the kernels of some methods from a hub."""
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    path, method = folder / "config.json", {"quant_method": "mxfp4"}
    sound = json.loads(path.read_text())
    value = method if place == "quantization_config" else {"quantization_config": method}
    path.write_text(json.dumps(sound | {place: value}))
    with pytest.raises(
        UserError, match="has quantization_config .*mxfp4.*; expected a model of float weights"
    ) as refused:
        load_encoder(config(folder))
    assert "\n" not in str(refused.value)
    path.write_text(json.dumps(sound | {"quantization_config": None}))
    load_encoder(config(folder))


def test_weights_that_would_stay_random_are_refused(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    bert = AutoModel.from_pretrained(folder)
    lost = "encoder.layer.1.output.dense.weight"
    bert.save_pretrained(folder, state_dict={k: v for k, v in bert.state_dict().items() if k != lost})
    with pytest.raises(UserError, match=f"lacks 1 weights, such as {lost}"):
        load_encoder(config(folder))


def test_weights_as_pickles_are_not_read(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    bert = AutoModel.from_pretrained(folder)
    torch.save(bert.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="expected config.json, model.safetensors"):
        load_encoder(config(folder))
