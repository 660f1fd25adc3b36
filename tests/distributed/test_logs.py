"""The log file of a rank."""

import logging
from pathlib import Path

import pytest

from evatok.artifacts import Location
from evatok.distributed.logs import rank_log


def attempt(location: Location, problem: str = "") -> None:
    with rank_log(location, 3) as publish:
        logging.getLogger("evatok.training").info("on the way")
        publish()
        assert "on the way" in location.read_bytes("logs/rank-0003.log").decode()
        if problem:
            raise RuntimeError(problem)


def test_a_rank_keeps_what_it_logged_and_what_ended_it_over_attempts(tmp_path: Path) -> None:
    location = Location.parse(tmp_path)
    with pytest.raises(RuntimeError):
        attempt(location, "no space left")
    attempt(location)
    text = location.read_bytes("logs/rank-0003.log").decode()
    assert text.count("on the way") == 2
    assert text.index("RuntimeError: no space left") < text.index("rank 3 is done")
    assert not logging.getLogger("evatok").handlers
