"""Configs from YAML: merging, overrides, and messages that help."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from evatok.config import OPERATIONAL, Config, dump, flatten, identity, load, parse
from evatok.errors import UserError


class Folder(Config):
    kind: Literal["folder"] = "folder"
    path: str = Field(description="where the videos are")


class Synthetic(Config):
    kind: Literal["synthetic"] = "synthetic"
    count: int = 8


class Train(Config):
    batch: int = Field(default=8, ge=1)
    lr: float = 1e-3
    log_every: Annotated[int, OPERATIONAL] = 10


class Sample(Config):
    name: str
    source: Annotated[Folder | Synthetic, Field(discriminator="kind")] = Synthetic()
    train: Train = Train()
    size: Literal["S", "B"] | Train = "S"
    choices: tuple[int, ...] = (1, 2)


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load(path, Sample, overrides)
    return str(error.value)


def test_file_that_extends_another_holds_only_what_differs(write):
    write("base.yaml", "name: base\ntrain: {batch: 4, lr: 0.1}\nchoices: [3, 4]\n")
    config = load(write("mine.yaml", "extends: base.yaml\nname: mine\ntrain: {lr: 0.2}\n"), Sample)
    assert (config.name, config.train.batch, config.train.lr, config.choices) == ("mine", 4, 0.2, (3, 4))


def test_overrides_win_and_are_typed_as_yaml(write):
    config = load(
        write("a.yaml", "name: a\n"), Sample, ["train.lr=1e-4", "choices=[5]", "name='7'", "size={batch: 2}"]
    )
    assert (config.train.lr, config.choices, config.name) == (1e-4, (5,), "7")
    assert config.size == Train(batch=2)


def test_number_with_exponent_alone_is_a_number(write):
    assert (
        parse("value: 1e-4", type("Any_", (Config,), {"__annotations__": {"value": object}}), "t").value
        == 1e-4
    )


def test_changing_the_kind_of_a_section_drops_the_other_kinds_keys(write):
    path = write("a.yaml", "name: a\nsource: {kind: synthetic, count: 3}\n")
    assert load(path, Sample, ["source.kind=folder", "source.path=x"]).source == Folder(path="x")


def test_anchors_and_merge_keys_work_as_in_yaml(write):
    text = "name: a\ntrain: &t {batch: 2, lr: 0.5}\nsize:\n  <<: *t\n  lr: 0.25\n"
    assert load(write("a.yaml", text), Sample).size == Train(batch=2, lr=0.25)


def test_dump_reads_back_equal(write):
    config = load(write("a.yaml", "name: a\nsource: {kind: folder, path: p}\n"), Sample, ["train.lr=1e-7"])
    assert load(write("b.yaml", dump(config)), Sample) == config


def test_every_problem_is_named_at_once_with_place_and_remedy(write):
    write("base.yaml", "name: base\ntrain: {batch: 0}\n")
    text = complaint(
        write("mine.yaml", "extends: base.yaml\ntrain: {lrr: 1}\nsource: {kind: folder}\nchoices: [1, x]\n"),
        "size=C",
    )
    lines = text.splitlines()
    assert "mine.yaml: 5 problems" in lines[0]
    by_key = {line.strip().split(" ")[0].rstrip(":"): line for line in lines[1:]}
    assert "Did you mean 'lr'?" in by_key["train.lrr"]
    assert "batch, log_every, lr" in by_key["train.lrr"]
    assert "base.yaml" in by_key["train.batch"]
    assert "found 0" in by_key["train.batch"]
    assert "where the videos are" in by_key["source.path"]
    assert "found 'x'" in by_key["choices.1"]
    assert "--set size=C" in by_key["size"]
    assert "'S' or 'B'" in by_key["size"]


def test_unknown_kind_names_the_nearest(write):
    text = complaint(write("a.yaml", "name: a\nsource: {kind: foldr}\n"))
    assert "Did you mean 'folder'?" in text


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("name: a\nname: b\n", "'name' is here already"),
        ("name: [", "not valid YAML"),
        ("- a\n", "must be a mapping"),
        ("extends: a.yaml\n", "leads back"),
        ("extends: missing.yaml\n", "missing.yaml: no such file"),
        ("extends: [a]\n", "must be the path"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_file_that_is_no_config_is_refused(write, text, part):
    assert part in complaint(write("a.yaml", text))


def test_missing_file_names_the_nearest_one(write):
    path = write("quickstart.yaml", "name: a\n")
    assert "Did you mean" in complaint(path.with_name("quikstart.yaml"))


@pytest.mark.parametrize("override", ["name", "=3", "a..b=3", "name=[1"])
def test_override_that_is_no_assignment_is_refused(write, override):
    assert "--set" in complaint(write("a.yaml", "name: a\n"), override)


def test_identity_leaves_operational_fields_out():
    one, other = Sample(name="a", train=Train(log_every=1)), Sample(name="a", train=Train(log_every=2))
    assert identity(one) == identity(other)
    assert identity(one)["train"] == {"batch": 8, "lr": 1e-3}
    assert identity(Sample(name="a", train=Train(lr=1))) != identity(one)


def test_flatten_gives_dotted_keys():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}
