"""The reference of config keys: complete, as new as the dataclasses, and shown by every config-driven command."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import pytest

from fmrl_dist.base.errors import UserError
from fmrl_dist.config.data_section import DataConfig, DemoConfig
from fmrl_dist.config.reference import FILE, field_comments, help_config, markdown, reference
from fmrl_dist.config.sections import Config
from fmrl_dist.config.tables import IdKinds
from tests.fixtures.processes import REPOSITORY
from tests.fixtures.training import run_module

COMMANDS = ("fmrl_dist.train", "fmrl_dist.plan", "shards.build", "launch.submit")


def test_the_page_is_as_new_as_the_dataclasses() -> None:
    written = (REPOSITORY / FILE).read_text(encoding="utf-8")
    assert written == markdown(), f"{FILE} is out of date; write it anew by `make docs`"


def test_every_key_has_a_meaning() -> None:
    lacking = [key.name for group in reference() for key in group.keys if not key.meaning]
    assert lacking == [], "write a comment beside these fields of fmrl_dist/config"


def keys_of(section: Any, where: str) -> set[str]:
    found = set()
    for name, value in vars(section).items():
        found |= keys_of(value, f"{where}.{name}") if is_dataclass(value) else {f"{where}.{name}"}
    return found


def test_every_key_is_there() -> None:
    config = Config(data=DataConfig(demo=DemoConfig(), ids=IdKinds()))
    expected = set().union(*(keys_of(section, name) for name, section in vars(config).items()))
    listed = [key.name for group in reference() for key in group.keys if not key.name.startswith("data.features.")]
    assert len(listed) == len(set(listed))
    assert set(listed) == expected | {"data.demo", "data.ids"}


def test_every_source_of_features_is_there() -> None:
    sources = {group.title: {key.name.rpartition(".")[2] for key in group.keys} for group in reference()}
    assert sources["data.features, source npy"] == {"source", "path", "dim"}
    assert sources["data.features, source tfidf"] == {"source", "dim", "text", "fit"}
    assert sources["data.features, source pq"] == {"source", "of", "parts", "codes", "fit"}
    assert sources["data.features, source pixels"] == {"source", "path", "id", "image"}
    assert {"model", "pooling", "batch_tokens"} < sources["data.features, source transformers"]
    assert {"model", "pretrained", "batch_images"} < sources["data.features, source open_clip"]


def test_values_and_defaults_are_shown() -> None:
    page = markdown().splitlines()
    for line in (
        "| `train.warmup_steps` | int (at least 0) | `100` | steps of linear warm-up |",
        "| `data.windows` | `last` or `all` | `last` | `last`: one window per user; `all`: windows that partition the "
        "user's targets |",
        '| `data.text_separator` | text | `"\\n"` | what joins the parts of an item\'s text |',
    ):
        assert line in page


@dataclass
class Commented:
    """Fields with comments in every place."""

    beside: int = 0  # at the end
    silent: int = 0
    # on the lines
    # above
    above: int = 0
    # above | and
    both: int = 0  # beside

    # of nothing

    long: list[int] = field(
        default_factory=list,  # not a meaning
    )  # of several lines
    text: str = "# not a comment"


def test_where_a_meaning_is_read() -> None:
    assert field_comments(Commented) == {
        "beside": "at the end",
        "silent": "",
        "above": "on the lines above",
        "both": "above | and beside",
        "long": "of several lines",
        "text": "",
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_tells_where_keys_are_described(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module(command).main
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code in (0, None)
    text = " ".join(capsys.readouterr().out.split())
    assert FILE in text and "--help-config SECTION prints it" in text
    with pytest.raises(SystemExit) as ended:
        main(["--help-config", "model"])
    assert ended.value.code in (0, None)
    assert "--model.depth  int (1 <= value <= 1000); default 2\n        number of blocks\n" in capsys.readouterr().out


def test_help_config() -> None:
    assert [line.split()[0] for line in help_config(None).splitlines()[1:]] == list(vars(Config()))
    assert help_config("train.lr").count("\n") == 3  # the section, the key and its meaning
    assert help_config("data.features").count("  --data.features.<name>.source") == 6
    assert "train.lr" not in help_config("model")
    for word, message in [("modle", "did you mean 'model'?"), ("zzz", "sections: data, store"), ("trai", "'train'")]:
        with pytest.raises(UserError, match=message):
            help_config(word)


def test_the_command_itself() -> None:
    shown = run_module("shards.build", "--help-config", "store")
    assert (shown.returncode, shown.stderr, shown.stdout) == (0, "", help_config("store"))
    refused = run_module("shards.build", "--help-config", "stroe")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "error: --help-config: the config has no section or key 'stroe'; did you mean 'store'?\n"
