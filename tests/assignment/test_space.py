import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evatok.assignment.space import AssignmentSpace
from evatok.errors import UserError

PAPER = AssignmentSpace((32, 64, 128, 256, 512), 4)

spaces = st.builds(
    AssignmentSpace,
    st.sets(st.integers(1, 2048), min_size=1, max_size=6).map(sorted),
    st.integers(1, 5),
)


@given(spaces)
def test_index_and_assignment_are_inverse_of_each_other(space: AssignmentSpace) -> None:
    everything = torch.arange(space.size)
    assert torch.equal(space.index(space.assignment(everything)), everything)
    assert space.all().unique(dim=0).shape == (space.size, space.blocks)


def test_order_is_lexicographic_with_the_first_block_most_significant() -> None:
    assert PAPER.size == 625
    rows = PAPER.all().tolist()
    assert rows == sorted(rows)
    assert rows[0] == [32] * 4
    assert rows[624] == [512] * 4
    assert PAPER.totals().tolist() == [sum(row) for row in rows]


@pytest.mark.parametrize("prefix", [(), (64,), (512, 32), (32, 64, 128, 256)])
def test_subtree_is_the_range_of_assignments_with_the_prefix(prefix: tuple[int, ...]) -> None:
    chosen = [i for i, row in enumerate(PAPER.all().tolist()) if tuple(row[: len(prefix)]) == prefix]
    assert list(PAPER.subtree(prefix)) == chosen


def test_samples_depend_on_seed_and_position_alone() -> None:
    positions = torch.tensor([7, 3, 2**40])
    together = PAPER.sample(positions, seed=5)
    alone = torch.cat([PAPER.sample(position[None], seed=5) for position in positions])
    assert torch.equal(together, alone)
    assert not torch.equal(together, PAPER.sample(positions, seed=6))


def test_samples_are_uniform_over_all_assignments() -> None:
    counts = torch.bincount(PAPER.index(PAPER.sample(torch.arange(62_500), seed=0)), minlength=625)
    chi_square = ((counts - 100.0) ** 2 / 100).sum()
    assert chi_square < 625 + 5 * (2 * 625) ** 0.5


@pytest.mark.parametrize(
    ("choices", "blocks"), [((), 4), ((64, 32), 4), ((32, 32), 4), ((0, 32), 4), ((32, 64), 0)]
)
def test_impossible_spaces_are_refused(choices: tuple[int, ...], blocks: int) -> None:
    with pytest.raises(UserError):
        AssignmentSpace(choices, blocks)


def test_counts_outside_the_choices_are_named() -> None:
    with pytest.raises(UserError, match="33"):
        PAPER.index(torch.tensor([[32, 64, 33, 32]]))
    with pytest.raises(UserError, match="3 blocks"):
        PAPER.index(torch.tensor([[32, 64, 32]]))
