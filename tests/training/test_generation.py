import numpy as np
import pyarrow as pa
import pytest
import torch

from evatok.artifacts import Location
from evatok.errors import UserError
from evatok.models.generator import Generator, GeneratorConfig
from evatok.models.sequence import NO_CLASS
from evatok.models.tokens import Tokens
from evatok.training.generation import GenerationTask
from evatok.training.token_table import (
    ROWS,
    SCHEMA,
    count_rows,
    mean_tokens,
    ragged,
    read_rows,
    read_vocabulary,
    to_table,
)

LENGTHS = torch.tensor([[1, 4], [2, 2], [4, 4], [1, 1]])


def encoded(condition=None):
    torch.manual_seed(0)
    tokens = Tokens(torch.randint(9, (int(LENGTHS.sum()),)), LENGTHS)
    clips = [{"clip_id": f"c{k}", "row": k, "split": "test" if k == 3 else "train"} for k in range(4)]
    return to_table(clips, [0, 1, NO_CLASS, 1], tokens, condition, augmentation=0), tokens


def task(class_dropout=0.0, condition=()):
    network = {"size": {"width": 16, "layers": 1, "heads": 2}, "token_dropout": 0, "dropout": 0}
    config = GeneratorConfig(
        codes=9,
        choices=(1, 2, 4),
        blocks=2,
        labels=("a", "b"),
        condition=condition,
        network=network | {"class_dropout": class_dropout},
    )
    return GenerationTask(config, mean_tokens=5.0, seed=3)


def batch_of(table, rows, the_task):
    columns = ragged(table.take(pa.array(rows)))
    return the_task.collate({**columns, "position": np.array(rows)})


def losses(the_task, model, batch):
    [(name, loss, metrics)] = the_task.losses({"model": model}, batch, 0)
    assert name == "model"
    return loss, metrics


def test_rows_are_stored_and_collated_without_padding(tmp_path):
    table, tokens = encoded(torch.arange(8).view(4, 2))
    assert table.schema == SCHEMA
    location = Location.parse(tmp_path)
    location.write_table(f"{ROWS}/0.parquet", table.slice(0, 2))
    location.write_table(f"{ROWS}/2.parquet", table.slice(2))
    rows = read_rows(location, "train", table.column_names)
    assert rows["clip_id"].to_pylist() == ["c0", "c1", "c2"]
    assert count_rows(location, "test") == 1
    assert mean_tokens(location, "train") == pytest.approx((5 + 4 + 8) / 3)
    batch = batch_of(rows, [2, 0], task())
    pieces = torch.split(tokens.indices, LENGTHS.sum(1).tolist())
    assert torch.equal(batch["indices"], torch.cat((pieces[2], pieces[0])))
    assert torch.equal(batch["lengths"], LENGTHS[[2, 0]])
    assert torch.equal(batch["condition"], torch.tensor([[4, 5], [0, 1]]))
    assert batch["label"].tolist() == [NO_CLASS, 0]


def test_rows_have_room_for_more_codes_than_32_bits_count(tmp_path):
    location = Location.parse(tmp_path)
    location.write_table(f"{ROWS}/0.parquet", encoded()[0])
    rows = read_rows(location, "train", ["indices"])
    assert rows.schema.types == [pa.large_list(pa.int32())]


def test_missing_tokens_are_an_error_that_names_the_stage(tmp_path):
    with pytest.raises(UserError, match="run the tokens stage"):
        read_vocabulary(Location.parse(tmp_path))


@pytest.mark.parametrize("class_dropout", [0.0, 0.5])
def test_loss_of_a_batch_is_the_mean_over_its_halves_however_long_their_clips(class_dropout):
    table, _ = encoded()
    the_task = task(class_dropout)
    torch.manual_seed(0)
    model = the_task.build(torch.device("cpu"))["model"]
    whole, _ = losses(the_task, model, batch_of(table, [0, 1, 2, 3], the_task))
    halves = [losses(the_task, model, batch_of(table, rows, the_task))[0] for rows in ([0, 1], [2, 3])]
    torch.testing.assert_close(whole, sum(halves) / 2)


def test_classes_are_hidden_by_seed_and_position_in_the_configured_share():
    table, _ = encoded()
    the_task = task(class_dropout=0.3)
    batch = batch_of(table, [0], the_task)
    many = {"position": torch.arange(4000), "label": torch.ones(4000).long()}
    hidden = the_task._hide_classes(many) == NO_CLASS
    assert float(hidden.float().mean()) == pytest.approx(0.3, abs=0.03)
    later = {"position": many["position"][1000:], "label": many["label"][1000:]}
    assert torch.equal(the_task._hide_classes(later) == NO_CLASS, hidden[1000:])
    assert the_task.evaluate({"model": the_task.build(torch.device("cpu"))["model"]}, batch)["tokens"] == 5


def test_given_frames_are_an_input_and_not_a_target():
    table, _ = encoded(torch.arange(4).view(4, 1))
    the_task = task(condition=(1,))
    model = the_task.build(torch.device("cpu"))["model"].eval()
    batch = batch_of(table, [0], the_task)
    loss, metrics = losses(the_task, model, batch)
    predicted = metrics["code_loss"] * 5 + metrics["length_loss"] * 2
    torch.testing.assert_close(loss * 7, predicted, check_dtype=False)
    changed = batch | {"condition": batch["condition"] + 1}
    assert losses(the_task, model, changed)[0] != loss


def test_exported_generator_loads_with_its_vocabulary(tmp_path):
    the_task = task()
    model = the_task.build(torch.device("cpu"))["model"]
    the_task.export(model.state_dict(), tmp_path)
    loaded = Generator.from_pretrained(tmp_path)
    assert loaded.config == the_task.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters()))
