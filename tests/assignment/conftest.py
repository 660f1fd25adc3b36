from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from evatok.models.blocks import KvCache, Store
from evatok.models.tokenizer import TokenizerConfig, VideoTokenizer


@pytest.fixture
def make_tokenizer() -> Callable[..., VideoTokenizer]:
    """Tokenizers of any number of blocks in float64, where no code tips between two ways to compute it.

    A sharp one has large weights: its assignments differ in quality as those of a trained one do.
    """

    def make(blocks: int, *, sharp: bool = True, choices: tuple[int, ...] = (1, 3, 8)) -> VideoTokenizer:
        torch.manual_seed(0)
        size = {"width": 16, "layers": 1, "heads": 2}
        config = TokenizerConfig(
            frames=2 * blocks,
            size=32,
            patch=(2, 8, 8),
            choices=choices,
            encoder=size,
            decoder=size,
            latent=8,
            align_layer=1,
            decoder_queries="cover",
        )
        tokenizer = VideoTokenizer(config).double().eval()
        with torch.no_grad():
            for parameter in tokenizer.parameters():
                parameter.mul_(4 if sharp else 1)
        return tokenizer

    return make


@pytest.fixture
def make_clips() -> Callable[..., Tensor]:
    """Clips for those tokenizers: a brightness of its own per clip and block, and noise."""

    def make(count: int, blocks: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        level = torch.randint(200, (count, 3, blocks, 1, 1), generator=generator)
        noise = torch.randint(56, (count, 3, 2 * blocks, 32, 32), generator=generator)
        return (level.repeat_interleave(2, 2) + noise).to(torch.uint8)

    return make


class TableTokenizer(VideoTokenizer):
    """Reconstructs every block of every prefix with a mean squared error laid down beforehand.

    ``losses[t]``: [R, m ** (t + 1)]. A clip's number is the value of its pixels. The losses fall with the
    tokens of the block and of the blocks before it, by amounts that differ from clip to clip and node to
    node, much as measured on a trained proxy (evatok.md 12).
    """

    def __init__(self, clips: int, blocks: int, choices: tuple[int, ...], seed: int) -> None:
        size = {"width": 2, "layers": 1, "heads": 1}
        super().__init__(
            TokenizerConfig(
                frames=blocks,
                size=32,
                patch=(1, 4, 4),
                choices=choices,
                encoder=size,
                decoder=size,
                align_layer=1,
            )
        )
        generator = torch.Generator().manual_seed(seed)
        m = len(choices)
        own = torch.linspace(1.0, 0.6, m, dtype=torch.float64)
        carried = torch.ones(clips, 1, dtype=torch.float64)
        hardness = 0.2 * (0.5 * torch.randn(clips, 1, generator=generator).double()).exp()
        self.losses = []
        for _ in range(blocks):
            nodes = carried.shape[1] * m
            noise = (0.05 * torch.randn(clips, nodes, generator=generator).double()).exp()
            help_from_past = (carried.repeat_interleave(m, 1) * own.repeat(carried.shape[1])).pow(0.7)
            novelty = torch.rand(clips, 1, generator=generator).double()
            effect = own.repeat(carried.shape[1]) * novelty + help_from_past * (1 - novelty)
            self.losses.append(hardness * effect * noise)
            carried = help_from_past

    def prepare(self, clips: Tensor) -> Tensor:
        return clips

    def encode_block(self, memory, t, count, cache, rows=None):
        parent = 0
        if cache is not None:
            last = cache.blocks[-1][0]
            parent = last.keys[0][list(last.starts), 0, 0]
        node = parent * len(self.choices) + self.choices.index(count) + torch.zeros_like(rows)
        store = Store(
            (node.view(-1, 1, 1),), (node.view(-1, 1, 1),), tuple(range(len(rows))), (1,) * len(rows)
        )
        blocks = cache.blocks if cache is not None else ()
        return torch.stack([memory[rows, 0, 0, 0, 0].long(), node], 1), KvCache((*blocks, (store,)))

    def decode_block(self, codes, t, cache):
        clip, node = codes.unbind(1)
        offset = self.losses[t][clip, node].sqrt()
        pixels = (clip / 255 + offset).view(-1, 1, 1, 1, 1).expand(-1, 3, 1, 1, 1)
        return pixels, None


@pytest.fixture
def make_table() -> Callable[..., tuple[VideoTokenizer, Tensor]]:
    """A table tokenizer and its clips."""

    def make(
        clips: int, blocks: int = 4, choices: tuple[int, ...] = (8, 16, 32, 64, 128), seed: int = 0
    ) -> tuple[VideoTokenizer, Tensor]:
        tokenizer = TableTokenizer(clips, blocks, choices, seed)
        pixels = torch.arange(clips, dtype=torch.uint8).view(-1, 1, 1, 1, 1).expand(-1, 3, blocks, 1, 1)
        return tokenizer, pixels.contiguous()

    return make
