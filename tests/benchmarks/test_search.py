import pyarrow as pa
import pytest
import torch

from evatok.artifacts import Location
from evatok.assignment.space import AssignmentSpace
from evatok.benchmarks.search import Settings, assignment_operations, node_operations, run, spread
from evatok.errors import UserError
from evatok.models.tokenizer import TokenizerConfig
from evatok.video.index import REJECTED_SCHEMA, SCHEMA, ClipIndex, write_index


def test_the_operations_of_a_path_are_those_of_its_assignment() -> None:
    config = TokenizerConfig()
    space = AssignmentSpace.of(config)
    prepare, nodes = node_operations(config, space)
    for index in (0, 77, 624):
        path = sum(float(depth[index // 5 ** (3 - t)]) for t, depth in enumerate(nodes))
        assignment = space.assignment(torch.tensor(index)).tolist()
        assert prepare + path == pytest.approx(assignment_operations(config, [assignment]))


def test_the_paper_size_tree_costs_a_third_of_brute_force() -> None:
    config = TokenizerConfig()
    space = AssignmentSpace.of(config)
    prepare, nodes = node_operations(config, space)
    ratio = assignment_operations(config, space.all().tolist()) / (
        prepare + sum(float(d.sum()) for d in nodes)
    )
    assert 3.0 < ratio < 3.3


def test_the_benchmark_reports_every_key_it_promises() -> None:
    size = {"width": 16, "layers": 1, "heads": 2}
    tiny = TokenizerConfig(
        frames=8, size=16, choices=(1, 2, 8), encoder=size, decoder=size, latent=8, align_layer=1
    )
    figures = run(
        Settings(
            tokenizer=tiny,
            steps=2,
            clips=2,
            agreement_clips=4,
            calibration_clips=2,
            large=tiny,
            large_prefix=(2,),
            threads=1,
            metric="mse",
        )
    )
    for name in ("full", "best_proven", "best_calibrated"):
        keys = {"speedup", "counted_ratio", "nodes", "seconds", "agreement", "reward_percentile"}
        assert set(figures[name]) == keys
    assert figures["full"]["nodes"] == 3 + 9
    assert figures["full"]["agreement"] == figures["best_proven"]["agreement"] == 1
    assert figures["agreement"]["clips"] == 4
    assert figures["agreement"]["best_proven"] == 1
    assert figures["large_full"]["nodes"] == 1 + 3
    for name in ("large_full", "large_best_proven", "large_best_calibrated"):
        assert set(figures[name]) == {"speedup", "counted_ratio", "nodes", "seconds"}
        assert figures[name]["nodes"] <= 4


def test_clips_are_drawn_evenly_over_the_videos_and_too_few_are_the_users_to_mend(tmp_path) -> None:
    rows = [
        {"clip_id": f"c{i}", "uri": f"v{i // 10}.mp4", "start": 0.0, "fps": 0.0, "frames": 8, "width": 32}
        | {"height": 32, "split": "test"}
        for i in range(40)
    ]
    place = Location.parse(tmp_path)
    write_index(place, pa.Table.from_pylist(rows, SCHEMA), REJECTED_SCHEMA.empty_table())
    index = ClipIndex.open(place)
    assert {clip["uri"] for clip in spread(index, "test", 4)} == {f"v{i}.mp4" for i in range(4)}
    with pytest.raises(UserError, match="has 40"):
        spread(index, "test", 41)
