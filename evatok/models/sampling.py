"""Sampling valid token sequences from a generator, many clips at once, each with its own seed.

A fixed number of slots steps in lockstep; a clip that is done leaves its slot to the next one, so clips
of unequal length cost what they hold. Which slots share a step never shows in a sample: the noise of a
token depends on the clip's seed and the token's place alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from evatok.config import OPERATIONAL, Config
from evatok.errors import UserError
from evatok.models.generator import Generator, GeneratorConfig
from evatok.models.sequence import NO_CLASS, PackedSequences, read_sequence, write_sequences
from evatok.models.tokens import Tokens

KEY_STEP = 128
"""Attention reads the cache up to a multiple of this: few static shapes, little waste."""


class SamplingConfig(Config):
    """How tokens are drawn from the logits."""

    temperature: float = Field(1.0, ge=0, description="0: the likeliest token, always")
    top_k: int = Field(0, ge=0, description="keep the k likeliest tokens; 0: all")
    top_p: float = Field(1.0, gt=0, le=1, description="keep the smallest set with this probability")
    guidance: float = Field(
        1.0, ge=0, description="classifier-free guidance; 1: off. Paper: 2.5 for B, 1.75 for larger models"
    )
    slots: Annotated[int, OPERATIONAL] = Field(
        32, ge=1, description="clips sampled at once; each holds keys and values of a whole sequence"
    )


@dataclass(frozen=True)
class Requests:
    """The N clips to sample.

    labels: int64 ``[N]``, ``NO_CLASS`` for none. seeds: int64 ``[N]``.
    assignment: int64 ``[N, T]`` token counts that are forced, 0 where the model chooses; None: all free.
    budget: the most tokens a clip may have, None for no limit.
    condition: int64 ``[N, P]`` codes of the given frames (frame predictors only).
    given: the first blocks of each clip, taken as they are.
    """

    labels: Tensor
    seeds: Tensor
    assignment: Tensor | None = None
    budget: int | None = None
    condition: Tensor | None = None
    given: Tokens | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def predicting(
        cls,
        config: GeneratorConfig,
        condition: Tensor,
        seeds: Tensor,
        budget: int | None = None,
        *,
        assignment: Tensor | None = None,
        regenerate: bool = False,
    ) -> "Requests":
        """Clips that go on from given frames, codes ``[N, P]``.

        The blocks that the frames fill are copied: the tokenizer is causal, so their codes in the whole clip
        are those of the condition. ``regenerate`` samples them again like the others (paper 4.4).
        """
        known = () if regenerate else config.condition[: config.known_blocks]
        given = Tokens(condition[:, : sum(known)].flatten(), torch.tensor(known).repeat(len(condition), 1))
        return cls(
            torch.full_like(seeds, NO_CLASS),
            seeds,
            assignment=assignment,
            budget=budget,
            condition=condition,
            given=given if known else None,
        )


@dataclass
class Slots:
    """State of the clips being sampled, one per slot; every field has a leading ``[S]``."""

    token: Tensor  # int64: the token to feed next
    position: Tensor  # int64: its place
    block: Tensor  # int64: the block being sampled, T when done
    left: Tensor  # int64: codes left in the block, 0 when a length token is due
    used: Tensor  # int64: codes announced so far
    seed: Tensor  # int64
    allowed: Tensor  # bool [S, T, choices]: token counts each block may have
    reserve: Tensor  # int64 [S, T + 1]: the fewest codes that blocks >= t need
    budget: Tensor  # int64
    history: Tensor  # int64 [S, positions + 1]: the whole sequence so far

    def select(self, slots: Tensor) -> "Slots":
        return Slots(*(getattr(self, field.name)[slots] for field in fields(self)))

    def put(self, slots: Tensor, other: "Slots") -> None:
        for field in fields(self):
            getattr(self, field.name)[slots] = getattr(other, field.name)

    def horizon(self) -> Tensor:
        """int64 ``[S]``: steps before which a slot cannot be done."""
        blocks = self.allowed.shape[1]
        begun = (self.left > 0).long()
        nexts = self.block + begun
        reserve = self.reserve.gather(1, nexts.clamp(max=blocks)[:, None])[:, 0]
        return self.left + reserve + blocks - nexts


@torch.inference_mode()
def sample(
    generator: Generator, requests: Requests, config: SamplingConfig, *, cached: bool = True
) -> Tokens:
    """One valid token sequence per request, in their order, on the CPU.

    Every sample has T blocks and exactly the announced number of codes in each, whatever the weights; no
    budget is exceeded. ``cached=False`` runs the whole sequence again for every token: the reference.

    Raises UserError for requests the generator cannot serve.
    """
    check_requests(generator.config, requests, config)
    generator.eval()
    blocks, device = generator.config.blocks, generator.head.weight.device
    pending = list(range(len(requests)))
    active, pending = pending[: config.slots], pending[config.slots :]  # request of each slot, -1: idle
    slots = start_slots(generator.config, requests, active, device)
    stepper = Stepper(generator, config, len(active), cached)
    stepper.prefill(slots, range(len(active)))
    start = 1 + sum(generator.config.condition)
    done: dict[int, tuple[Tensor, Tensor]] = {}
    while len(done) < len(requests):
        busy = [slot for slot, request in enumerate(active) if request >= 0]
        if 2 * len(busy) <= len(active):
            kept = torch.tensor(busy, device=device)
            slots, active = slots.select(kept), [active[slot] for slot in busy]
            stepper.select(kept)
            busy = list(range(len(busy)))
        horizon, positions = torch.stack((slots.horizon(), slots.position))[:, busy].tolist()
        for step in range(min(horizon)):
            stepper.step(slots, keys=max(positions) + step + 1)
        finished = [slot for slot in busy if int(slots.block[slot]) == blocks]
        for slot in finished:
            tokens = slots.history[slot, start : int(slots.position[slot]) + 1].cpu()
            done[active[slot]] = read_sequence(generator.vocabulary, tokens)
            active[slot] = -1
        refilled = finished[: len(pending)]
        if refilled:
            incoming, pending = pending[: len(refilled)], pending[len(refilled) :]
            fresh = start_slots(generator.config, requests, incoming, device)
            slots.put(torch.tensor(refilled, device=device), fresh)
            for slot, request in zip(refilled, incoming):
                active[slot] = request
            stepper.prefill(slots, refilled)
    indices, lengths = zip(*(done[request] for request in range(len(requests))))
    return Tokens(torch.cat(indices), torch.stack(lengths))


class Stepper:
    """Feeds the slots' tokens to the generator and draws the next ones."""

    def __init__(self, generator: Generator, config: SamplingConfig, slots: int, cached: bool) -> None:
        self.generator = generator
        self.config = config
        self.guided = config.guidance != 1
        self.cache = generator.new_cache(2 * slots if self.guided else slots) if cached else None
        self.choices = torch.tensor(generator.config.choices, device=generator.head.weight.device)

    def select(self, slots: Tensor) -> None:
        """Keep some slots alone."""
        if self.cache is not None:
            half = self.cache.keys.shape[1] // 2
            self.cache = self.cache.select(torch.cat((slots, slots + half)) if self.guided else slots)

    def prefill(self, slots: Slots, fresh: Sequence[int]) -> None:
        """Write what stands before the next token of fresh slots into the cache."""
        if self.cache is None:
            return
        for slot in fresh:
            length = int(slots.position[slot])
            if not length:
                continue
            tokens = slots.history[slot : slot + 1, :length]
            positions = torch.arange(length, device=tokens.device)[None]
            self.generator.step(tokens, positions, self.cache.slot(slot), length)
            if self.guided:
                mirror = self.cache.slot(slot + len(slots.token))
                self.generator.step(self._without_class(tokens), positions, mirror, length)

    def step(self, slots: Slots, keys: int) -> None:
        """Sample one token per slot. keys: above every busy slot's position."""
        blocks, last = slots.allowed.shape[1], slots.history.shape[1] - 1
        logits = self._logits(slots, min(-(-keys // KEY_STEP) * KEY_STEP, last))
        codes = logits.shape[-1] - len(self.choices)
        drawn = draw(guard(logits, slots, self.choices), slots.seed, slots.position, self.config)
        due = slots.left == 0
        announced = self.choices[(drawn - codes).clamp(0, len(self.choices) - 1)]
        slots.token = drawn
        slots.left = torch.where(due, announced, slots.left - 1)
        slots.used = slots.used + torch.where(due, announced, 0)
        # Idle slots step on, so that shapes stay; the clamps keep them inside their own rows.
        slots.block = (slots.block + (slots.left == 0)).clamp(max=blocks)
        slots.position = (slots.position + 1).clamp(max=last)
        slots.history.scatter_(1, slots.position[:, None], drawn[:, None])

    def _logits(self, slots: Slots, keys: int) -> Tensor:
        places = slots.position.clamp(max=keys - 1)
        if self.cache is None:
            logits = self._uncached(slots.history[:, :keys], places)
            if self.guided:
                hidden = self._uncached(self._without_class(slots.history[:, :keys]), places)
                logits = torch.cat((logits, hidden))
        else:
            tokens, positions = slots.token[:, None], places[:, None]
            if self.guided:
                hidden = torch.where(positions == 0, self.generator.vocabulary.null, tokens)
                tokens, positions = torch.cat((tokens, hidden)), positions.repeat(2, 1)
            logits = self.generator.step(tokens, positions, self.cache, keys)
        if not self.guided:
            return logits.float()
        conditional, unconditional = logits.float().chunk(2)
        return unconditional + self.config.guidance * (conditional - unconditional)

    def _uncached(self, history: Tensor, places: Tensor) -> Tensor:
        positions = torch.arange(history.shape[1], device=history.device).expand_as(history)
        known = positions <= places[:, None]
        tokens, lengths = history[known], places + 1
        features = self.generator.features(PackedSequences(tokens, tokens, positions[known], lengths))
        head = self.generator.head
        logits: Tensor = head(features[lengths.cumsum(0) - 1].to(head.weight.dtype))
        return logits

    def _without_class(self, tokens: Tensor) -> Tensor:
        return torch.cat((torch.full_like(tokens[:, :1], self.generator.vocabulary.null), tokens[:, 1:]), 1)


def guard(logits: Tensor, slots: Slots, choices: Tensor) -> Tensor:
    """Logits ``[S, predicted]`` with minus infinity where a token would break the format or the budget.

    Where a length token is due only counts that leave enough of the budget to later blocks remain;
    elsewhere only codes do (evatok.md 6).
    """
    block = slots.block.clamp(max=slots.allowed.shape[1] - 1)
    rows = torch.arange(len(block), device=block.device)
    after = slots.used + slots.reserve[rows, block + 1]
    fits = slots.allowed[rows, block] & (after[:, None] + choices <= slots.budget[:, None])  # [S, choices]
    due = (slots.left == 0)[:, None]
    codes = logits.shape[-1] - len(choices)
    permitted = torch.cat((~due.expand(-1, codes), due & fits), -1)
    # A finite floor, so that weights that overflow cannot rank a permitted token with the forbidden.
    return logits.clamp(-1e30, 1e30).masked_fill(~permitted, -torch.inf)


def draw(logits: Tensor, seeds: Tensor, places: Tensor, config: SamplingConfig) -> Tensor:
    """One token int64 ``[S]`` per row of ``[S, V]``, by the Gumbel-max trick with noise of (seed, place)."""
    if config.temperature == 0:
        return logits.argmax(-1)
    logits = logits / config.temperature
    if config.top_k:
        least = logits.topk(min(config.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if config.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= config.top_p
        logits = logits.masked_fill(torch.empty_like(beyond).scatter_(-1, order, beyond), -torch.inf)
    noise = uniform(seeds, places, logits.shape[-1]).log_().neg_().log_()
    return (logits - noise).argmax(-1)


def uniform(seeds: Tensor, places: Tensor, count: int) -> Tensor:
    """float32 ``[S, count]`` in (0, 1): a pure function of int64 seed ``[S]`` and place ``[S]``.

    Counter-based, so that it needs no generator's state and is the same on every device. The products wrap
    as those of unsigned integers do.
    """
    keys = _mix(_mix(seeds) + places).to(torch.int32)
    # A 32-bit finaliser (the constants are from Wellons' search for low bias) halves the memory traffic.
    x = keys[:, None] + torch.arange(1, count + 1, dtype=torch.int32, device=seeds.device) * -0x61C88647
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= -0x7B935975
    x ^= (x >> 16) & 0xFFFF
    return ((x >> 9) & 0x7FFFFF).float().add_(0.5).mul_(2.0**-23)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al. 2014) on int64."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def start_slots(
    config: GeneratorConfig, requests: Requests, rows: Sequence[int], device: torch.device
) -> Slots:
    """The states from which some requests start."""
    choices = torch.tensor(config.choices)
    picked = torch.tensor(rows)
    indices, lengths = torch.empty(0, dtype=torch.int64), torch.empty(len(rows), 0, dtype=torch.int64)
    if requests.given is not None:
        pieces = torch.split(requests.given.indices, requests.given.lengths.sum(1).tolist())
        indices, lengths = torch.cat([pieces[row] for row in rows]), requests.given.lengths[picked]
    condition = None if requests.condition is None else requests.condition[picked]
    tokens, sizes = write_sequences(config.vocabulary, requests.labels[picked], indices, lengths, condition)
    history = torch.zeros(len(rows), config.positions + 1, dtype=torch.int64)
    history[torch.arange(config.positions + 1) < sizes[:, None]] = tokens
    allowed = allowed_counts(config, requests)[picked]
    fewest = torch.where(allowed, choices, choices[-1]).amin(-1)
    reserve = functional.pad(fewest.flip(1).cumsum(1).flip(1), (0, 1))
    zeros = torch.zeros_like(sizes)
    slots = Slots(
        token=history.gather(1, sizes[:, None] - 1)[:, 0],
        position=sizes - 1,
        block=zeros + lengths.shape[1],
        left=zeros,
        used=lengths.sum(1),
        seed=requests.seeds[picked],
        allowed=allowed,
        reserve=reserve,
        budget=zeros + (torch.iinfo(torch.int64).max if requests.budget is None else requests.budget),
        history=history,
    )
    return Slots(*(getattr(slots, field.name).to(device) for field in fields(slots)))


def allowed_counts(config: GeneratorConfig, requests: Requests) -> Tensor:
    """bool ``[N, T, choices]``: the token counts each block may have."""
    wanted = torch.zeros(len(requests), config.blocks, dtype=torch.int64)
    if requests.assignment is not None:
        wanted += requests.assignment
    wanted[:, : len(config.condition)] = torch.tensor(config.condition, dtype=torch.int64)
    if requests.given is not None:
        wanted[:, : requests.given.lengths.shape[1]] = requests.given.lengths
    return (wanted[..., None] == 0) | (wanted[..., None] == torch.tensor(config.choices))


def check_requests(config: GeneratorConfig, requests: Requests, sampling: SamplingConfig) -> None:
    """Raises UserError where a request and the generator do not fit."""
    labels, given, condition = requests.labels, requests.given, requests.condition
    wrong = labels[(labels != NO_CLASS) & ((labels < 0) | (labels >= len(config.labels)))]
    if len(wrong):
        raise UserError(f"class {int(wrong[0])}: this generator has classes 0 to {len(config.labels) - 1}")
    if sampling.guidance != 1 and not config.labels:
        raise UserError(f"guidance {sampling.guidance}: this generator has no classes; leave guidance at 1")
    if sampling.guidance != 1 and not config.network.class_dropout:
        raise UserError(
            f"guidance {sampling.guidance}: this generator was trained without class dropout and knows no"
            " unconditional clips; leave guidance at 1 or train with generator.network.class_dropout=0.1"
        )
    if requests.assignment is not None:
        check_counts(config, requests.assignment[requests.assignment != 0])
        if requests.assignment.shape != (len(requests), config.blocks):
            raise UserError(
                f"assignment of {requests.assignment.shape[-1]} blocks: this generator makes {config.blocks}"
            )
        first = requests.assignment[:, : len(config.condition)]
        if bool(((first != 0) & (first != torch.tensor(config.condition, dtype=torch.int64))).any()):
            raise UserError(
                f"assignment: the first blocks of this frame predictor have {config.condition} tokens; give"
                " those, or 0"
            )
    if given is not None:
        check_counts(config, given.lengths)
        check_codes(config, given.indices)
        fixed = torch.tensor(config.condition[: given.lengths.shape[1]])
        if bool((given.lengths[:, : len(fixed)] != fixed).any()):
            raise UserError(f"the given blocks of a frame predictor must have {config.condition} tokens")
        if given.lengths.shape[1] >= config.blocks:
            raise UserError(
                f"{given.lengths.shape[1]} blocks are given and the generator makes {config.blocks}:"
                " nothing is left to generate; give fewer frames"
            )
    if (condition is None) != (not config.condition):
        raise UserError(
            f"this generator needs given frames, encoded as {config.condition}"
            if condition is None
            else "this generator takes no given frames: it was trained without a condition"
        )
    if condition is not None:
        check_codes(config, condition)
        if condition.shape != (len(requests), sum(config.condition)):
            raise UserError(
                f"given frames of {condition.shape[-1]} tokens: this generator takes {config.condition}"
            )
    if requests.budget is not None:
        choices = torch.tensor(config.choices)
        least = torch.where(allowed_counts(config, requests), choices, choices[-1]).amin(-1).sum(1)
        if len(least) and requests.budget < int(least.max()):
            raise UserError(
                f"budget {requests.budget}: a clip of {config.blocks} blocks needs at least"
                f" {int(least.max())} tokens under this assignment"
            )


def check_counts(config: GeneratorConfig, counts: Tensor) -> None:
    """Raises UserError unless every token count is one of the choices."""
    wrong = counts[~torch.isin(counts, torch.tensor(config.choices))]
    if len(wrong):
        raise UserError(f"{int(wrong[0])} tokens in a block: allowed are {config.choices}")


def check_codes(config: GeneratorConfig, indices: Tensor) -> None:
    """Raises UserError unless every code is in the codebook."""
    if indices.dim() not in (1, 2) or (indices.numel() and int(indices.max()) >= config.codes):
        raise UserError(
            f"code {int(indices.max())} is outside the generator's codebook of {config.codes}:"
            " these tokens come from another tokenizer"
        )
