import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evatok.errors import UserError
from evatok.models import sampling
from evatok.models.generator import Generator, GeneratorConfig
from evatok.models.sampling import (
    Requests,
    SamplingConfig,
    Slots,
    Stepper,
    draw,
    sample,
    start_slots,
    uniform,
)
from evatok.models.sequence import NO_CLASS, pack
from evatok.models.tokens import Tokens

CHOICES = (1, 2, 4, 8)


def build(seed=0, scale=1.0, network=None, **changes):
    """A generator with random weights large enough for logits that differ."""
    network = {"size": {"width": 16, "layers": 2, "heads": 2}} | (network or {})
    small = {"codes": 11, "choices": CHOICES, "blocks": 3, "labels": ("a", "b"), "network": network}
    torch.manual_seed(seed)
    model = Generator(GeneratorConfig(**(small | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=scale)
    return model.eval()


def requests(count, **changes):
    return Requests(torch.arange(count) % 2, torch.arange(count) + 100, **changes)


def assert_valid(tokens, model, count):
    assert tokens.lengths.shape == (count, model.config.blocks)
    assert torch.isin(tokens.lengths, torch.tensor(model.config.choices)).all()
    assert len(tokens.indices) == int(tokens.lengths.sum())
    assert 0 <= int(tokens.indices.min()) <= int(tokens.indices.max()) < model.config.codes


@pytest.fixture(autouse=True)
def _small_key_step(monkeypatch):
    monkeypatch.setattr(sampling, "KEY_STEP", 8)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.0, 0.1, 1.0, 30.0, 1e18]),
    count=st.integers(1, 7),
    config=st.builds(
        SamplingConfig,
        temperature=st.sampled_from([0, 0.3, 1.0, 10.0]),
        top_k=st.sampled_from([0, 1, 5]),
        top_p=st.sampled_from([0.01, 0.9, 1.0]),
        guidance=st.sampled_from([1.0, 3.0]),
        slots=st.integers(1, 5),
    ),
    budget=st.none() | st.integers(3, 24),
)
def test_every_sample_is_a_valid_sequence_within_its_budget(seed, scale, count, config, budget):
    model = build(seed, scale)
    tokens = sample(model, requests(count, budget=budget), config)
    assert_valid(tokens, model, count)
    assert budget is None or int(tokens.lengths.sum(1).max()) <= budget


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("position", ["absolute", "rope"])
def test_cached_sampling_equals_uncached_for_ragged_clips(position, guidance):
    model = build(network={"position": position}, scale=0.3)
    config = SamplingConfig(slots=4, guidance=guidance)
    cached = sample(model, requests(9), config)
    uncached = sample(model, requests(9), config, cached=False)
    assert len(set(cached.lengths.sum(1).tolist())) > 3
    assert torch.equal(cached.lengths, uncached.lengths)
    assert torch.equal(cached.indices, uncached.indices)


@pytest.mark.parametrize("position", ["absolute", "rope"])
def test_samples_in_bf16_are_valid_and_their_logits_fp32(position, monkeypatch):
    model = build(network={"position": position}, scale=0.3).to_bf16()
    seen = []
    monkeypatch.setattr(sampling, "draw", lambda logits, *rest: seen.append(logits) or draw(logits, *rest))
    for cached in (True, False):
        tokens = sample(model, requests(9, budget=12), SamplingConfig(slots=4, guidance=2), cached=cached)
        assert_valid(tokens, model, 9)
    assert model.new_cache(1).keys.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.layers.parameters()} == {torch.bfloat16}
    # More digits than bfloat16 has.
    logits = torch.cat([row.flatten() for row in seen])
    assert (logits != logits.bfloat16().float())[logits.isfinite()].any()


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_a_seed_gives_the_same_clip_alone_and_in_any_batch(slots):
    model = build()
    together = sample(model, requests(7), SamplingConfig(slots=slots))
    for row in range(7):
        alone = sample(
            model, Requests(torch.tensor([row % 2]), torch.tensor([100 + row])), SamplingConfig(slots=slots)
        )
        assert torch.equal(alone.lengths[0], together.lengths[row])
        assert torch.equal(alone.indices, torch.cat(together.to_sequences()[row]))


def test_other_seeds_give_other_clips():
    tokens = sample(build(scale=0.1), requests(8), SamplingConfig())
    assert len({tuple(torch.cat(clip).tolist()) for clip in tokens.to_sequences()}) == 8


def test_forced_assignment_is_kept_and_zeros_are_left_to_the_model():
    assignment = torch.tensor([[8, 1, 4], [2, 0, 2], [0, 0, 1], [0, 0, 0]])
    tokens = sample(build(), requests(4, assignment=assignment), SamplingConfig())
    forced = assignment != 0
    assert torch.equal(tokens.lengths[forced], assignment[forced])


def test_tightest_budget_leaves_the_shortest_clip():
    tokens = sample(build(), requests(5, budget=3), SamplingConfig())
    assert torch.equal(tokens.lengths, torch.ones(5, 3).long())


def test_budget_counts_what_forced_blocks_will_need():
    assignment = torch.tensor([[0, 0, 8]]).repeat(16, 1)
    tokens = sample(build(scale=0.1), requests(16, assignment=assignment, budget=13), SamplingConfig())
    assert int(tokens.lengths.sum(1).max()) <= 13
    assert len(tokens.lengths.unique(dim=0)) > 1


def test_given_blocks_are_kept_and_continued_as_if_they_had_been_sampled():
    model = build()
    whole = sample(model, requests(6), SamplingConfig())
    first = Tokens.from_sequences([clip[:1] for clip in whole.to_sequences()])
    config = SamplingConfig(slots=4)
    for cached in (True, False):
        continued = sample(model, requests(6, given=first), config, cached=cached)
        assert torch.equal(continued.lengths, whole.lengths)
        assert torch.equal(continued.indices, whole.indices)


@pytest.mark.parametrize("cached", [True, False])
def test_frame_predictor_starts_with_the_given_assignment_and_depends_on_the_frames(cached):
    model = build(labels=(), condition=(8, 2), known_blocks=1)
    condition = torch.randint(11, (3, 10))
    requests = Requests.predicting(model.config, condition, torch.zeros(3).long())
    tokens = sample(model, requests, SamplingConfig(), cached=cached)
    assert_valid(tokens, model, 3)
    assert torch.equal(tokens.lengths[:, :2], torch.tensor([[8, 2]]).repeat(3, 1))
    assert torch.equal(torch.stack([clip[0] for clip in tokens.to_sequences()]), condition[:, :8])
    rests = [tuple(torch.cat(clip[1:]).tolist()) for clip in tokens.to_sequences()]
    assert len(set(rests)) == 3


def test_frame_predictor_samples_the_given_blocks_again_where_asked():
    model = build(labels=(), condition=(8, 2), known_blocks=1)
    condition = torch.randint(11, (3, 10))
    requests = Requests.predicting(model.config, condition, torch.zeros(3).long(), regenerate=True)
    tokens = sample(model, requests, SamplingConfig())
    assert_valid(tokens, model, 3)
    assert torch.equal(tokens.lengths[:, :2], torch.tensor([[8, 2]]).repeat(3, 1))
    assert not torch.equal(torch.stack([clip[0] for clip in tokens.to_sequences()]), condition[:, :8])


def test_overfitted_generator_returns_its_clips_greedily():
    torch.manual_seed(0)
    model = Generator(
        GeneratorConfig(
            codes=50,
            choices=CHOICES,
            blocks=4,
            labels=tuple("abcdefgh"),
            network={"size": {"width": 48, "layers": 2, "heads": 2}, "token_dropout": 0, "dropout": 0},
        )
    )
    lengths = torch.tensor(CHOICES)[torch.randint(4, (8, 4))]
    clips = Tokens(torch.randint(50, (int(lengths.sum()),)), lengths)
    batch = pack(model.vocabulary, torch.arange(8), clips.indices, clips.lengths)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = torch.nn.functional.cross_entropy(model(batch), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens = sample(model, Requests(torch.arange(8), torch.zeros(8).long()), SamplingConfig(temperature=0))
    assert torch.equal(tokens.lengths, clips.lengths)
    assert torch.equal(tokens.indices, clips.indices)


def test_guidance_moves_away_from_the_unconditional_logits():
    model = build()
    slots = start_slots(model.config, requests(2), [0, 1], torch.device("cpu"))
    hidden = start_slots(
        model.config, Requests(torch.full((2,), NO_CLASS), torch.zeros(2).long()), [0, 1], torch.device("cpu")
    )

    def logits(guidance, state):
        stepper = Stepper(model, SamplingConfig(guidance=guidance), 2, cached=True)
        with torch.inference_mode():
            return stepper._logits(state, keys=8)

    conditional, unconditional = logits(1, slots), logits(1, hidden)
    torch.testing.assert_close(logits(3, slots), unconditional + 3 * (conditional - unconditional))
    torch.testing.assert_close(logits(0, slots), unconditional)


def test_temperature_top_k_and_top_p_shape_the_distribution():
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    logits = probabilities.log().repeat(20_000, 1)
    seeds, places = torch.arange(20_000), torch.full((20_000,), 7)

    def shares(**config):
        drawn = draw(logits, seeds, places, SamplingConfig(**config))
        return torch.bincount(drawn, minlength=4) / len(drawn)

    near = {"atol": 0.012, "rtol": 0}
    torch.testing.assert_close(shares(), probabilities, **near)
    sharpened = probabilities**2 / (probabilities**2).sum()
    torch.testing.assert_close(shares(temperature=0.5), sharpened, **near)
    torch.testing.assert_close(shares(top_k=2), torch.tensor([4 / 7, 3 / 7, 0, 0]), **near)
    torch.testing.assert_close(shares(top_p=0.65), torch.tensor([4 / 7, 3 / 7, 0, 0]), **near)
    assert shares(temperature=0).tolist() == [1, 0, 0, 0]


def test_noise_is_uniform_and_differs_by_seed_place_and_token():
    seeds = torch.arange(-50, 50)
    noise = torch.stack([uniform(seeds, torch.full((100,), place), 200) for place in range(20)])
    assert 0 < float(noise.min()) < float(noise.max()) < 1
    assert float(noise.mean()) == pytest.approx(0.5, abs=2e-3)
    assert float(noise.var()) == pytest.approx(1 / 12, abs=1e-3)
    rows = noise.permute(1, 0, 2).reshape(2000, 200)
    assert rows.corrcoef().fill_diagonal_(0).abs().max() < 0.4


def test_one_step_is_a_single_graph_of_static_shapes():
    model = build()
    stepper = Stepper(model, SamplingConfig(guidance=2.0, top_k=3, top_p=0.9), 3, cached=True)
    eager, compiled = (
        start_slots(model.config, requests(3), range(3), torch.device("cpu")) for _ in range(2)
    )
    step = torch.compile(stepper.step, backend="eager", fullgraph=True)
    with torch.inference_mode():
        for place in range(4):
            stepper.step(eager, keys=place + 1)
        stepper.cache = model.new_cache(6)
        for place in range(4):
            step(compiled, keys=place + 1)
    assert isinstance(compiled, Slots)
    assert torch.equal(compiled.history, eager.history)


@pytest.mark.parametrize(
    ("model", "changes", "config", "words"),
    [
        ({}, {"labels": torch.tensor([2, 0])}, {}, "classes 0 to 1"),
        ({"labels": ()}, {"labels": torch.tensor([-1, -1])}, {"guidance": 2}, "no classes"),
        ({"network": {"class_dropout": 0}}, {}, {"guidance": 2}, "without class dropout"),
        ({}, {"assignment": torch.tensor([[1, 3, 1]] * 2)}, {}, "3 tokens in a block"),
        ({}, {"assignment": torch.tensor([[1, 1, 1, 1]] * 2)}, {}, "4 blocks"),
        ({}, {"budget": 2}, {}, "at least 3"),
        ({}, {"given": Tokens(torch.tensor([11, 0]), torch.tensor([[1], [1]]))}, {}, "another tokenizer"),
        ({}, {"given": Tokens(torch.zeros(6).long(), torch.ones(2, 3).long())}, {}, "fewer frames"),
        ({}, {"condition": torch.zeros(2, 3).long()}, {}, "takes no given frames"),
        ({"condition": (8,)}, {}, {}, "needs given frames"),
        ({"condition": (8,)}, {"condition": torch.zeros(2, 3).long()}, {}, "given frames of 3"),
    ],
)
def test_requests_that_do_not_fit_are_refused(model, changes, config, words):
    asked = {"labels": torch.tensor([0, 1]), "seeds": torch.tensor([0, 1])} | changes
    with pytest.raises(UserError, match=words):
        sample(build(**model), Requests(**asked), SamplingConfig(**config))
