"""Typed configuration: what it reads, and what it says when it cannot."""

from dataclasses import field
from pathlib import Path

import pytest
import yaml

from common.config import ConfigError, config, config_to_dict, config_to_yaml, load_config


@config
class Optimizer:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)


@config
class Run:
    name: str
    optimizer: Optimizer = field(default_factory=Optimizer)
    lengths: list[int] = field(default_factory=list)
    stages: list[Optimizer] = field(default_factory=list)
    init_from: Path | None = None
    extra: Optimizer | None = None


def test_overrides_win_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train: {name: a, optimizer: {lr: 2e-4}, lengths: [1]}\ndata_prep: {x: 1}\n")
    run = load_config(Run, "train", path, ["lengths=[1024, 8192]", "init_from=some/folder"])
    assert run.optimizer.lr == 2e-4
    assert run.optimizer.betas == (0.9, 0.98)
    assert run.lengths == [1024, 8192]
    assert run.init_from == Path("some/folder")


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("optimzer=3", "'optimizer'"),
        ("optimizer.lrr=3", "'optimizer.lr'"),
        ("extra.lrate=3", "'extra.lr'"),
        ("stages=[{bets: 1}]", "betas'"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest(word: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match="unknown key") as caught:
        load_config(Run, "train", None, ["name=a", word])
    assert nearest in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "lacks the key 'name'"),
        (["name=a", "optimizer.lr=fast"], "optimizer.lr"),
        (["name=a", "lengths"], "key=value"),
        (["name=a", "name.x=1"], "holds a value"),
    ],
)
def test_errors_name_the_key(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Run, "train", None, words)


def test_missing_file_and_bad_yaml_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_config(Run, "train", tmp_path / "absent.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [")
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(Run, "train", bad)


def test_yaml_round_trip(tmp_path: Path) -> None:
    run = load_config(Run, "train", None, ["name=a", "stages=[{lr: 3e-5}]", "init_from=x/y"])
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump({"train": config_to_dict(run)}))
    assert yaml.safe_load(config_to_yaml(run)) == config_to_dict(run)
    assert load_config(Run, "train", path) == run
    assert config_to_dict(run)["init_from"] == "x/y"


def test_sections_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("trian: {name: a}\n")
    with pytest.raises(ConfigError, match="did you mean 'train'"):
        load_config(Run, "train", path)
    path.write_text("data_prep: {x: 1}\n")
    with pytest.raises(ConfigError, match="no section `train:`"):
        load_config(Run, "train", path)
