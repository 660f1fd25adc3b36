"""The video tokenizer: clips to adaptive-length token sequences and back (evatok.md section 1)."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn

from evatok.config import Config
from evatok.models.blocks import (
    EncoderMemory,
    KvCache,
    Store,
    attend_memory,
    attend_stores,
    run_block,
)
from evatok.models.layers import QFormer, TransformerSize
from evatok.models.packing import Packing
from evatok.models.patches import Patch, centred, depatchify, patchify
from evatok.models.pretrained import PretrainedModel
from evatok.models.quantizers import QuantizerConfig, VqConfig, build_quantizer
from evatok.models.queries import mean_over_cover, pool_levels
from evatok.models.tokens import Tokens


def _by_name(size: object) -> object:
    return TransformerSize.preset(size) if isinstance(size, str) else size


Size = Annotated[TransformerSize, BeforeValidator(_by_name)]


class TokenizerConfig(Config):
    """A tokenizer's architecture. The defaults are the paper's S-B at 16 x 128 x 128."""

    frames: int = Field(16, gt=0, description="frames of a clip")
    size: int = Field(128, gt=0, description="height and width of a clip, pixels")
    patch: Patch = Field((4, 8, 8), description="frames, rows and columns of a patch")
    choices: tuple[int, ...] = Field((32, 64, 128, 256, 512), description="token choices of a block (4.1)")
    encoder: Size = Field(TransformerSize.preset("S"), description="preset name, or width, layers, heads")
    decoder: Size = Field(TransformerSize.preset("B"), description="preset name, or width, layers, heads")
    latent: int = Field(256, gt=0, description="channels between width and code space (GigaTok z_channels)")
    quantizer: QuantizerConfig = VqConfig()
    encoder_queries: Literal["pooled", "learned"] = Field(
        "pooled",
        description="a block's queries start from its pooled patches (paper 3.1), or are the same for every"
        " clip (LARP, AdapTok)",
    )
    decoder_queries: Literal["first", "cover", "learned"] = Field(
        "first",
        description="a patch's decoder query starts from the block's first token (paper 3.1), from the mean"
        " of the coarse-to-fine tokens that cover the patch, or is the same for every clip (LARP)",
    )
    drop_tail: bool = Field(
        False,
        description="encode every block with the most tokens there are, then keep the first so many"
        " (ElasticTok, AdapTok, One-D-Piece); the paper creates only the tokens it keeps",
    )
    causal: bool = Field(True, description="block-causal attention; off: every block sees all (LARP)")
    align_layer: int = Field(3, gt=0, description="decoder layer whose output is aligned (GigaTok)")

    @model_validator(mode="after")
    def _consistent(self) -> TokenizerConfig:
        depth, rows, columns = self.patch
        if min(self.patch) < 1 or self.frames % depth or self.size % rows or self.size % columns:
            raise ValueError(
                f"patch {self.patch} does not divide a clip of {self.frames} x {self.size} x {self.size}"
            )
        for cells in self.grid:
            if cells & (cells - 1):
                raise ValueError(
                    f"a block must be a power of two of patches high and wide, not {self.grid[0]} x"
                    f" {self.grid[1]}; change size or patch"
                )
        if not self.choices or list(self.choices) != sorted(set(self.choices)) or self.choices[0] < 1:
            raise ValueError(f"choices {list(self.choices)} must be positive, ascending and distinct")
        if self.choices[-1] > 2 * self.patches:
            raise ValueError(
                f"choices: {self.choices[-1]} tokens for a block of {self.patches} patches; at most"
                f" {2 * self.patches} (twice the patches) are there to choose from"
            )
        if self.encoder_queries == "learned" and self.decoder_queries == "cover":
            raise ValueError(
                "learned encoder queries cover no patches: decoder_queries must be first or learned"
            )
        if self.align_layer > self.decoder.layers:
            raise ValueError(f"align_layer {self.align_layer} of a decoder with {self.decoder.layers} layers")
        return self

    @property
    def blocks(self) -> int:
        """Temporal blocks T of a clip."""
        return self.frames // self.patch[0]

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of a block, rows and columns."""
        return self.size // self.patch[1], self.size // self.patch[2]

    @property
    def patches(self) -> int:
        """Patches of a block."""
        return self.grid[0] * self.grid[1]

    @property
    def voxels(self) -> int:
        """Values in a patch, all channels."""
        return 3 * self.patch[0] * self.patch[1] * self.patch[2]


class TokenizerOutput(NamedTuple):
    """``reconstruction``: ``[B, C, F, H, W]`` around [0, 1], not clamped. ``losses``: the quantizer's terms,
    weighted. ``features``: decoder features ``[B, T*h*w, D]`` after ``align_layer``."""

    reconstruction: Tensor
    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]
    features: Tensor


class VideoTokenizer(PretrainedModel):
    """Block-causal Q-Former tokenizer with any number of tokens per block, sample by sample.

    Tokens of block t depend on frames of blocks <= t only, and the frames of block t on tokens of
    blocks <= t only. A batch is packed: linear layers and attention cost what its tokens cost.
    """

    config_type = TokenizerConfig
    config: TokenizerConfig

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__(config)
        width, most = config.encoder.width, config.choices[-1]
        self.patch_embed = nn.Linear(config.voxels, width)
        self.patch_position = nn.Parameter(torch.randn(config.blocks, config.patches, width) * width**-0.5)
        if config.encoder_queries == "pooled":
            self.query_projection = nn.Linear(width, width)
        self.query_position = nn.Parameter(torch.randn(config.blocks, most, width) * width**-0.5)
        self.encoder = QFormer(config.encoder)
        self.quantizer = build_quantizer(config.quantizer)
        self.to_code = nn.Sequential(
            nn.Linear(width, config.latent), nn.Linear(config.latent, self.quantizer.dim)
        )
        width = config.decoder.width
        self.from_code = nn.Sequential(
            nn.Linear(self.quantizer.dim, config.latent), nn.Linear(config.latent, width)
        )
        self.token_position = nn.Parameter(torch.randn(config.blocks, most, width) * width**-0.5)
        self.pixel_position = nn.Parameter(torch.randn(config.blocks, config.patches, width) * width**-0.5)
        self.decoder = QFormer(config.decoder)
        self.to_pixels = nn.Linear(width, config.voxels)
        nn.init.zeros_(self.to_pixels.bias)
        nn.init.normal_(self.to_pixels.weight, std=0.002)  # reconstructions start grey, not as noise

    @property
    def choices(self) -> tuple[int, ...]:
        return self.config.choices

    @property
    def blocks(self) -> int:
        return self.config.blocks

    @property
    def codes(self) -> int:
        """Distinct code indices."""
        return self.quantizer.codebook_size

    @property
    def codebook(self) -> str:
        """What an index means, as a short name: the number of codes and a checksum of the quantizer."""
        digest = hashlib.sha256(self.config.quantizer.model_dump_json().encode())
        for value in self.quantizer.state_dict().values():
            if value.is_floating_point():
                digest.update(value.float().cpu().contiguous().numpy().tobytes())
        return f"{self.codes}@{digest.hexdigest()[:8]}"

    @property
    def device(self) -> torch.device:
        return self.patch_position.device

    def forward(self, clips: Tensor, assignment: Tensor) -> TokenizerOutput:
        """Reconstruct ``clips [B, C, F, H, W]`` (uint8, or float in [0, 1]) under ``assignment [B, T]``.

        Clips may have fewer blocks than the config says (images are clips of one), all of a batch equally.
        """
        packing = self._packing(assignment)
        quantized = self.quantizer(self._encode(clips, packing))
        reconstruction, features = self._decode(quantized.codes, packing)
        return TokenizerOutput(reconstruction, quantized.losses, quantized.metrics, features)

    @torch.no_grad()
    def encode(self, clips: Tensor, assignment: Tensor) -> Tokens:
        """Tokens of ``clips [B, C, F, H, W]`` (uint8, or float in [0, 1]) under ``assignment [B, T]``."""
        indices = self.quantizer.assign(self._encode(clips, self._packing(assignment)))
        return Tokens(indices, assignment)

    @torch.no_grad()
    def decode(self, tokens: Tokens) -> Tensor:
        """Clips ``[B, C, F, H, W]`` in [0, 1] of tokens."""
        codes = self.quantizer.lookup(tokens.indices.to(self.device))
        return self._decode(codes, self._packing(tokens.lengths))[0].clamp(0, 1)

    def recompute_activations(self, on: bool = True) -> None:
        """Trade compute for memory: keep only each layer's input and run the layer again in backward."""
        self.encoder.recompute = self.decoder.recompute = on

    @torch.no_grad()
    def prepare(self, clips: Tensor) -> EncoderMemory:
        """What ``encode_block`` needs of ``clips [R, C, F, H, W]``, once for all their prefixes."""
        patches = self.embed_patches(clips)
        queries = self.query_position[: patches.shape[1]].expand(len(patches), -1, -1, -1)
        if self.config.encoder_queries == "pooled":
            queries = queries + self.query_projection(pool_levels(patches, self.choices[-1]))
        reference = self.encoder.reference_norm(self._reference(patches))
        projected = [layer.cross_attention.project_reference(reference) for layer in self.encoder.layers]
        return EncoderMemory(queries, *zip(*projected))

    @torch.no_grad()
    def encode_block(
        self, memory: EncoderMemory, t: int, count: int, cache: KvCache | None, rows: Tensor | None = None
    ) -> tuple[Tensor, KvCache | None]:
        """Block ``t`` of N prefixes with ``count`` tokens each: quantized codes ``[N, count, dim]``.

        ``cache``: the prefixes' blocks < t, None for t = 0. ``rows``: int64 ``[N]``, the clip of ``memory``
        that each prefix belongs to (None: one prefix per clip, in order); it is fastest with the prefixes of
        a clip next to each other. The cache returned includes block t; after the last block it is None.
        """
        made = self.choices[-1] if self.config.drop_tail else count
        queries = memory.queries[:, t, :made]
        order = list(range(len(memory))) if rows is None else rows.tolist()
        x = queries if rows is None else queries[rows]
        cross = attend_memory(memory, memory.ranges(order, made, t + 1))
        past = [block[0] for block in cache.blocks] if cache else []
        x, store = run_block(self.encoder, x, past, cross, keep=t + 1 < self.blocks)
        z = self.to_code(x[:, :count].flatten(0, 1))
        codes = self.quantizer.lookup(self.quantizer.assign(z))
        return torch.unflatten(codes, 0, (-1, count)), _extended(cache, store)

    @torch.no_grad()
    def decode_block(self, codes: Tensor, t: int, cache: KvCache | None) -> tuple[Tensor, KvCache | None]:
        """Frames of block ``t``, ``[N, C, P, H, W]`` in [0, 1], of ``codes [N, count, dim]``.

        ``cache``: the prefixes' blocks < t, None for t = 0; the one returned includes block t (None after the
        last block).
        """
        prefixes, count = codes.shape[:2]
        patches = self.config.patches
        tokens = self.embed_codes(codes.flatten(0, 1))
        starts = torch.arange(prefixes, device=codes.device) * count
        x = self.start_pixels(tokens, starts, torch.full_like(starts, count))
        x = torch.unflatten(x, 0, (prefixes, -1)) + self.pixel_position[t]
        tokens = tokens + self.token_position[t, :count].repeat(prefixes, 1)
        reference = self.decoder.reference_norm(tokens)
        projected = [layer.cross_attention.project_reference(reference) for layer in self.decoder.layers]
        keys, values = zip(*projected)
        own = Store(keys, values, tuple(range(0, prefixes * count, count)), (count,) * prefixes)
        past = cache.blocks if cache else ()
        cross = attend_stores([*(block[1] for block in past), own], patches)
        past_pixels = [block[0] for block in past]
        x, store = run_block(self.decoder, x, past_pixels, cross, keep=t + 1 < self.blocks)
        return self.to_frames(x.unsqueeze(1)).clamp(0, 1), _extended(cache, store, own)

    def embed_patches(self, clips: Tensor) -> Tensor:
        """Patch embeddings ``[B, T, h, w, D]``, without position."""
        pixels = patchify(centred(clips).to(self.patch_embed.weight.dtype), self.config.patch)
        return self.patch_embed(pixels)  # type: ignore[no-any-return]

    def to_frames(self, features: Tensor) -> Tensor:
        """Pixels ``[B, C, t*P, H, W]`` around [0, 1] of decoder features ``[B, t, h*w, D]``."""
        values = self.to_pixels(features).unflatten(2, self.config.grid)
        return depatchify(values, self.config.patch).float() + 0.5

    def _encode(self, clips: Tensor, packing: Packing) -> Tensor:
        """Inputs ``[N, dim]`` of the quantizer."""
        patches = self.embed_patches(clips)
        if self.config.drop_tail:
            kept = packing
            packing = self._packing(torch.full_like(packing.lengths, self.choices[-1]))
        queries = self.query_position[:, : packing.most].flatten(0, 1).index_select(0, packing.position)
        if self.config.encoder_queries == "pooled":
            pooled = pool_levels(patches, packing.most).flatten(0, 2).index_select(0, packing.source)
            queries = queries + self.query_projection(pooled)
        x, _ = self.encoder(
            queries, self._reference(patches), packing.tokens_to_tokens, packing.tokens_to_patches
        )
        if self.config.drop_tail:
            block, within = kept.source // kept.most, kept.source % kept.most
            x = x.index_select(0, packing.starts[block] + within)
        return self.to_code(x)  # type: ignore[no-any-return]

    def _reference(self, patches: Tensor) -> Tensor:
        """Patch embeddings with position, packed ``[B * T * h * w, D]``."""
        return (patches.flatten(2, 3) + self.patch_position[: patches.shape[1]]).flatten(0, 2)

    def _packing(self, lengths: Tensor) -> Packing:
        config = self.config
        blocks = lengths.shape[-1]
        if lengths.ndim != 2 or not 1 <= blocks <= config.blocks:
            raise ValueError(f"an assignment must be [B, 1..{config.blocks}], not {list(lengths.shape)}")
        if lengths.min() < 1 or lengths.max() > config.choices[-1]:
            raise ValueError(f"an assignment holds counts of 1 to {config.choices[-1]}")
        return Packing(lengths, config.patches, self.device, causal=config.causal)

    def _decode(self, codes: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        tokens = self.embed_codes(codes)  # [N, D]
        batch, blocks = packing.lengths.shape
        queries = self.start_pixels(tokens, packing.starts, packing.counts)
        queries = torch.unflatten(queries, 0, (batch, blocks, -1))
        positions = self.token_position[:, : packing.most].flatten(0, 1).index_select(0, packing.position)
        x, tapped = self.decoder(
            (queries + self.pixel_position[:blocks]).flatten(0, 2),
            tokens + positions,
            packing.patches_to_patches,
            packing.patches_to_tokens,
            tap=self.config.align_layer,
        )
        frames = self.to_frames(torch.unflatten(x, 0, (batch, blocks, -1)))
        assert tapped is not None
        return frames, torch.unflatten(tapped, 0, (batch, -1))

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Decoder embeddings ``[N, D]`` of codes ``[N, dim]``, without position."""
        return self.from_code(codes.to(self.pixel_position.dtype))  # type: ignore[no-any-return]

    def start_pixels(self, tokens: Tensor, starts: Tensor, counts: Tensor) -> Tensor:
        """What the decoder's 3D queries start from, ``[blocks * h * w, D]``, before position.

        ``tokens``: ``[N, D]`` packed; ``starts``, ``counts``: ``[blocks]``, where each block's tokens lie.
        """
        if self.config.decoder_queries == "learned":
            return tokens.new_zeros(len(starts) * self.config.patches, tokens.shape[1])
        if self.config.decoder_queries == "first":
            return tokens.index_select(0, starts).repeat_interleave(self.config.patches, 0)
        return mean_over_cover(tokens, starts, counts, self.config.grid)


def _extended(cache: KvCache | None, store: Store | None, *others: Store) -> KvCache | None:
    if store is None:
        return None
    return (cache or KvCache(())).extend((store, *others))
