import pytest
import torch
from pydantic import ValidationError

from evatok.models.generator import Generator, GeneratorConfig
from evatok.models.sequence import PackedSequences, pack


def config(**changes):
    network = {
        "size": {"width": 16, "layers": 2, "heads": 2},
        "position": changes.pop("position", "absolute"),
    }
    small = {"codes": 11, "choices": (1, 2, 4), "blocks": 3, "labels": ("a", "b"), "network": network}
    return GeneratorConfig(**(small | changes))


@pytest.mark.parametrize(("size", "millions"), [("B", 99), ("L", 327), ("L-plus", 633)])
def test_presets_have_the_papers_parameter_counts(size, millions):
    with torch.device("meta"):
        model = Generator(
            GeneratorConfig(
                codes=8192,
                choices=(32, 64, 128, 256, 512),
                blocks=4,
                labels=tuple(map(str, range(101))),
                network={"size": size},
            )
        )
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.01)


@pytest.mark.parametrize("position", ["absolute", "rope"])
def test_packed_logits_equal_those_of_each_sequence_alone(position):
    torch.manual_seed(0)
    model = Generator(config(position=position)).eval()
    lengths = torch.tensor([[1, 4, 2], [4, 4, 4], [1, 1, 1]])
    clips = torch.randint(11, (int(lengths.sum()),)).split(lengths.sum(1).tolist())
    labels = torch.tensor([0, 1, -1])
    together = model(pack(model.vocabulary, labels, torch.cat(clips), lengths))
    alone = [
        model(pack(model.vocabulary, labels[[row]], clip, lengths[[row]])) for row, clip in enumerate(clips)
    ]
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("position", ["absolute", "rope"])
def test_logits_do_not_see_later_tokens(position):
    torch.manual_seed(0)
    model = Generator(config(position=position)).eval()
    tokens = torch.randint(11, (9,))
    changed = tokens.clone()
    changed[5] = (changed[5] + 1) % 11
    places, lengths = torch.arange(9), torch.tensor([9])
    before = model(PackedSequences(tokens, tokens, places, lengths))
    after = model(PackedSequences(changed, changed, places, lengths))
    torch.testing.assert_close(before[:5], after[:5])
    assert not torch.allclose(before[5:], after[5:])


@pytest.mark.parametrize("position", ["absolute", "rope"])
def test_cached_steps_equal_one_pass_over_the_sequence(position):
    torch.manual_seed(0)
    model = Generator(config(position=position)).eval()
    tokens = torch.randint(11, (2, 9))
    places = torch.arange(9).expand(2, 9)
    whole = model(
        PackedSequences(tokens.flatten(), tokens.flatten(), places.flatten(), torch.tensor([9, 9]))
    ).view(2, 9, -1)
    cache = model.new_cache(2)
    prefilled = model.step(tokens[:, :4], places[:, :4], cache, keys=4)
    torch.testing.assert_close(prefilled, whole[:, 3])
    for place in range(4, 9):
        logits = model.step(tokens[:, [place]], places[:, [place]], cache, keys=12)
        torch.testing.assert_close(logits, whole[:, place])


def test_longest_sequence_fits_the_positions_exactly():
    plain = config()
    batch = pack(plain.vocabulary, torch.tensor([0]), torch.zeros(12).long(), torch.tensor([[4, 4, 4]]))
    assert len(batch.tokens) == plain.positions
    predictor = config(condition=(4, 2), labels=())
    batch = pack(
        predictor.vocabulary,
        torch.tensor([-1]),
        torch.zeros(10).long(),
        torch.tensor([[4, 2, 4]]),
        torch.zeros(1, 6).long(),
    )
    assert len(batch.tokens) == predictor.positions


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"choices": (4, 2)}, "ascending"),
        ({"condition": (4, 4, 4)}, "none is left"),
        ({"condition": (3,)}, "not among choices"),
        ({"network": {"size": {"width": 6, "layers": 1, "heads": 2}, "position": "rope"}}, "even head width"),
    ],
)
def test_config_refuses_what_cannot_work(changes, words):
    with pytest.raises(ValidationError, match=words):
        config(**changes)
