import pytest

from evatok.benchmarks.router import Settings, run
from evatok.errors import UserError


def test_a_run_without_curated_clips_is_refused_with_what_to_do(tmp_path) -> None:
    with pytest.raises(UserError, match="make quickstart"):
        run(Settings(run=str(tmp_path)))
