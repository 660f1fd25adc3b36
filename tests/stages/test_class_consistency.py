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
from evatok.training.schedules import learning_rate
from evatok.video.synthetic import KINDS, render

SIZE, CLIPS, HELD_OUT = 32, 2000, 300


def synthetic(count, seed):
    clips = np.empty((count, 3, 16, SIZE, SIZE), np.uint8)
    for number in range(count):
        draw = np.random.default_rng((seed, number))
        paces = draw.choice(["still", "fast"], size=4, p=[0.3, 0.7])
        clips[number] = render(KINDS[number % len(KINDS)], paces, SIZE, draw).transpose(3, 0, 1, 2)
    return torch.from_numpy(clips), torch.arange(count) % len(KINDS)


def optimise(parameters, steps, peak, loss_of_step):
    optimizer = torch.optim.AdamW(list(parameters), lr=peak, betas=(0.9, 0.95), weight_decay=1e-4)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step, steps=steps, peak=peak, final=0, warmup=30, shape="wsd", decay=0.2
            )
        loss = loss_of_step(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(step, f"{loss.item():.4f}", flush=True)


def batch_rows(step, size):
    return torch.from_numpy(np.random.default_rng((7, step)).integers(0, CLIPS, size))


def train_classifier(clips, labels):
    channels = (3, 16, 32, 64)
    layers = []
    for before, after in itertools.pairwise(channels):
        layers += [nn.Conv3d(before, after, 3, 2, 1), nn.BatchNorm3d(after), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(64, len(KINDS)))

    def loss(step):
        rows = batch_rows(step, 32)
        return functional.cross_entropy(network(clips[rows].float() / 255), labels[rows])

    optimise(network.parameters(), 300, 3e-3, loss)
    return network.eval()


def train_tokenizer(clips):
    tokenizer = VideoTokenizer(
        TokenizerConfig(
            size=SIZE,
            choices=(4, 8, 16, 32),
            encoder={"width": 96, "layers": 2, "heads": 4},
            decoder={"width": 96, "layers": 3, "heads": 4},
            latent=32,
            quantizer={"kind": "fsq", "levels": (8, 5, 5, 5)},
            align_layer=1,
        )
    )
    space = AssignmentSpace(tokenizer.choices, tokenizer.blocks)

    def loss(step):
        rows = batch_rows(step, 16)
        assignment = space.sample(16 * step + torch.arange(16), 0)
        output = tokenizer(clips[rows], assignment)
        return functional.l1_loss(output.reconstruction, clips[rows] / 255) + sum(output.losses.values())

    optimise(tokenizer.parameters(), 800, 2e-3, loss)
    return tokenizer.eval(), space


@torch.no_grad()
def encode(tokenizer, space, clips):
    assign = DifferencePolicy(rate=0.3).bind(Sources(space))
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

    optimise(model.parameters(), 800, 2e-3, loss)
    return model


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="trained for two minutes the tokenizer loses the class: of encoded clips 0.16 are recognised",
)
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
    print(f"recognised, chance {1 / len(KINDS):.3f}: {shares}", flush=True)
    assert shares[3.0] >= 3 / len(KINDS)
    assert shares[3.0] > shares[1.0]
