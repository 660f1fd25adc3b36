"""The whole path small: clips -> adaptive tokens -> generator -> clips that a classifier recognises."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from evatok.assignment.policies import DifferencePolicy, Sources
from evatok.assignment.space import AssignmentSpace
from evatok.models.generator import GeneratorConfig
from evatok.models.sampling import Requests, SamplingConfig, sample
from evatok.models.tokenizer import TokenizerConfig, VideoTokenizer
from evatok.models.tokens import Tokens
from evatok.training.generation import GenerationTask
from evatok.training.optimizers import MuonWithAdamW, adamw
from evatok.training.schedules import learning_rate
from evatok.video.synthetic import KINDS, render

SIZE, CLIPS, HELD_OUT = 16, 12000, 300
BLUR = [(t, n, n) for n in (2, 4) for t in (1, 2, 4)]  # frames, rows and columns that are averaged
CHANCE = 1 / len(KINDS)


def synthetic(count, seed):
    clips = np.empty((count, 3, 16, SIZE, SIZE), np.uint8)
    for number in range(count):
        draw = np.random.default_rng((seed, number))
        paces = draw.choice(["still", "fast"], size=4, p=[0.3, 0.7])
        frames = render(KINDS[number % len(KINDS)], paces, 2 * SIZE, draw, texture=False)
        clips[number] = frames.reshape(16, SIZE, 2, SIZE, 2, 3).mean((2, 4)).transpose(3, 0, 1, 2)
    return torch.from_numpy(clips), torch.arange(count) % len(KINDS)


def optimise(name, module, kind, steps, peak, shape, loss_of_step):
    optimizer = kind(dict(module.named_parameters()), (0.9, 0.95), 1e-2)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step, steps=steps, peak=peak, final=0, warmup=30, shape=shape, decay=0.2
            )
        loss = loss_of_step(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(name, step, f"{loss.item():.4f}", flush=True)
    return module.eval()


def batch_rows(step, size):
    return torch.from_numpy(np.random.default_rng((7, step)).integers(0, CLIPS, size))


def train_classifier(clips, labels):
    """On real clips, most of them blurred and noisy: it must know a class by more than its sharp edges."""
    layers = []
    strides = [(2, 1, 1), (2, 2, 2), (1, 2, 2)]
    for (before, after), stride in zip(itertools.pairwise((3, 48, 96, 128)), strides, strict=True):
        layers += [nn.Conv3d(before, after, 3, stride, 1), nn.BatchNorm3d(after), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(128, len(KINDS)))

    def loss(step):
        draw = np.random.default_rng((8, step))
        rows = batch_rows(step, 32)
        parts = list(torch.split(clips[rows].float() / 255, [12, 10, 10]))
        for place in (1, 2):
            means = functional.avg_pool3d(parts[place], BLUR[draw.integers(len(BLUR))])
            mode = str(draw.choice(["nearest", "trilinear"]))
            parts[place] = functional.interpolate(means, size=clips.shape[2:], mode=mode)
        seen = torch.cat(parts)
        seen = seen + 0.03 * draw.random() * torch.randn_like(seen)
        return functional.cross_entropy(network(seen), labels[rows])

    return optimise("classifier", network, adamw, 1500, 3e-3, "cosine", loss)


def train_tokenizer(clips):
    tokenizer = VideoTokenizer(
        TokenizerConfig(
            size=SIZE,
            patch=(4, 4, 4),
            choices=(4, 8, 16, 32),
            encoder={"width": 96, "layers": 2, "heads": 4},
            decoder={"width": 96, "layers": 3, "heads": 4},
            latent=64,
            quantizer={"kind": "fsq", "levels": (6, 6, 6, 6)},
            decoder_queries="cover",
            align_layer=1,
        )
    )
    space = AssignmentSpace.of(tokenizer)

    def loss(step):
        rows = batch_rows(step, 16)
        assignment = space.sample(16 * step + torch.arange(16), 0)
        output = tokenizer(clips[rows], assignment)
        return 10 * functional.mse_loss(output.reconstruction, clips[rows] / 255)

    return optimise("tokenizer", tokenizer, MuonWithAdamW, 1200, 1.5e-3, "cosine", loss), space


@torch.no_grad()
def encode(tokenizer, space, clips):
    assign = DifferencePolicy(rate=0.6).bind(Sources(space))
    return Tokens.cat([tokenizer.encode(part, assign(part)) for part in clips.split(100)])


def train_generator(tokenizer, tokens, labels):
    task = GenerationTask(
        GeneratorConfig(
            network={"size": {"width": 128, "layers": 4, "heads": 4}, "token_dropout": 0, "dropout": 0},
            codes=tokenizer.codes,
            choices=tokenizer.choices,
            blocks=tokenizer.blocks,
            labels=KINDS,
        ),
        mean_tokens=len(tokens.indices) / len(tokens),
        seed=0,
    )
    model = task.build(torch.device("cpu"))["model"]
    pieces = tokens.indices.split(tokens.lengths.sum(1).tolist())

    def loss(step):
        rows = batch_rows(step, 32)
        batch = {
            "indices": torch.cat([pieces[row] for row in rows]),
            "lengths": tokens.lengths[rows],
            "label": labels[rows],
            "position": 32 * step + torch.arange(32),
        }
        [(_, value, _)] = task.losses({"model": model}, batch, step)
        return value

    return optimise("generator", model, MuonWithAdamW, 1200, 1.5e-3, "wsd", loss)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_generated_classes_are_recognised_and_guidance_raises_the_share():
    torch.manual_seed(0)
    clips, labels = synthetic(CLIPS, seed=0)
    real, truth = synthetic(HELD_OUT, seed=1)
    classifier = train_classifier(clips, labels)
    tokenizer, space = train_tokenizer(clips)
    generator = train_generator(tokenizer, encode(tokenizer, space, clips), labels)

    @torch.no_grad()
    def share(pixels):
        return float((classifier(pixels).argmax(1) == truth).float().mean())

    shares = {"real": share(real / 255), "encoded": share(tokenizer.decode(encode(tokenizer, space, real)))}
    for guidance in (1.0, 3.0):
        tokens = sample(
            generator, Requests(truth, torch.arange(HELD_OUT)), SamplingConfig(guidance=guidance, slots=100)
        )
        shares[guidance] = share(tokenizer.decode(tokens))
        print(f"guidance {guidance}: {float(tokens.lengths.sum(1).float().mean()):.1f} tokens", flush=True)
    print(f"recognised, chance {CHANCE:.3f}: {shares}", flush=True)
    assert shares["real"] > 0.9
    assert shares[3.0] >= 3 * CHANCE
    assert shares[3.0] > shares[1.0]
