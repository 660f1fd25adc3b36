"""Which device a training process takes."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from evatok.errors import UserError
from evatok.training.engine import join_world


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The second process on a machine with one GPU, whose group is still to be made: the backends asked."""
    asked: list[Any] = []

    def set_device(device: torch.device) -> None:
        if device.index:
            raise RuntimeError("invalid device ordinal")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **how: asked.append(backend))
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    return asked


def test_training_without_gpus_leaves_those_of_the_machine_alone(backends: list[Any]) -> None:
    assert join_world(use_gpu=False).device == torch.device("cpu")
    assert backends == ["gloo"]


@pytest.mark.parametrize("asked", [True, None])
def test_training_takes_the_gpu_of_its_local_rank(
    backends: list[Any], asked: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert join_world(asked).device == torch.device("cuda", 0)
    assert backends == ["nccl"]


def test_a_gpu_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="use_gpu"):
        join_world(use_gpu=True)
