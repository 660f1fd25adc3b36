"""Coarse-to-fine queries."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from evatok.models.queries import covering_tokens, levels, mean_over_cover, pool_levels


def test_groups_start_twice_with_the_whole_and_split_width_first() -> None:
    assert levels((4, 4)) == [(1, 1), (1, 1), (1, 2), (2, 2), (2, 4), (4, 4)]
    assert levels((2, 8)) == [(1, 1), (1, 1), (1, 2), (2, 2), (2, 4), (2, 8)]
    assert levels((4, 1)) == [(1, 1), (1, 1), (2, 1), (4, 1)]
    assert levels((1, 1)) == [(1, 1), (1, 1)]


@pytest.mark.parametrize("grid", [(16, 16), (4, 8), (8, 2), (1, 1)])
def test_a_block_has_twice_as_many_queries_as_patches(grid: tuple[int, int]) -> None:
    assert sum(rows * columns for rows, columns in levels(grid)) == 2 * grid[0] * grid[1]


@pytest.mark.parametrize("grid", [(8, 8), (4, 16), (8, 2)])
def test_every_group_is_the_average_pooling_of_the_patches(grid: tuple[int, int]) -> None:
    patches = torch.randn(2, 3, *grid, 5)
    pooled = pool_levels(patches, 2 * grid[0] * grid[1])
    images = patches.flatten(0, 1).permute(0, 3, 1, 2)
    groups = [F.adaptive_avg_pool2d(images, cells).flatten(2).mT for cells in levels(grid)]
    torch.testing.assert_close(pooled.flatten(0, 1), torch.cat(groups, 1))


def test_fewer_queries_are_the_first_of_more() -> None:
    patches = torch.randn(1, 2, 4, 4, 3)
    assert torch.equal(pool_levels(patches, 7), pool_levels(patches, 32)[:, :, :7])


def test_a_token_covers_the_patches_it_was_pooled_from() -> None:
    grid = (4, 8)
    cover = covering_tokens(grid)
    one_hot = torch.eye(32).view(1, 1, 4, 8, 32)
    pooled = pool_levels(one_hot, 64)[0, 0]  # [token, patch]: > 0 where the patch went into the token
    for patch in range(32):
        assert pooled[:, patch].nonzero().flatten().tolist() == cover[patch].tolist()


def test_the_mean_over_the_cover_uses_only_tokens_that_are_there() -> None:
    grid = (2, 2)
    tokens = torch.arange(1.0, 8.0)[:, None]  # block 0 has 3 tokens: 1, 2, 3; block 1 has 4: 4, 5, 6, 7
    starts, counts = torch.tensor([0, 3]), torch.tensor([3, 4])
    mean = mean_over_cover(tokens, starts, counts, grid).flatten().tolist()
    left, right = (1 + 2 + 3) / 3, (1 + 2) / 2  # the third token covers the left half only
    assert mean[:4] == [left, right, left, right]
    left, right = (4 + 5 + 6) / 3, (4 + 5 + 7) / 3
    assert mean[4:] == pytest.approx([left, right, left, right])


def test_both_ways_to_take_the_mean_agree() -> None:
    tokens = torch.randn(20, 6)
    starts, counts = torch.tensor([0, 8, 9]), torch.tensor([8, 1, 11])
    single = mean_over_cover(tokens, starts, counts, (4, 4))
    double = mean_over_cover(tokens.double(), starts, counts, (4, 4))
    torch.testing.assert_close(single, double.float())
