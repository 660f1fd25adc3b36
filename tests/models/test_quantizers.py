"""Quantizers: round trips, gradients, losses that do what they are for, codes that do not die."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor

from evatok.models import quantizers
from evatok.models.quantizers import Quantizer, QuantizerConfig, build_quantizer, entropy_penalty

CONFIGS: list[dict[str, Any]] = [
    {"kind": "vq", "size": 64, "dim": 4},
    {"kind": "residual_vq", "size": 32, "depth": 3, "dim": 4},
    {"kind": "fsq", "levels": [8, 5, 3, 2]},
    {"kind": "lfq", "bits": 10},
]


def build(config: dict[str, Any]) -> Quantizer:
    torch.manual_seed(0)
    return build_quantizer(TypeAdapter(QuantizerConfig).validate_python(config))


def learn(quantizer: Quantizer, *micro_batches: Tensor) -> dict[str, float]:
    """One optimizer step's worth of inputs; the metrics of the last."""
    for z in micro_batches:
        metrics = quantizer(z).metrics
    quantizer.end_step()
    return {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: str(c["kind"]))
def test_indices_stand_for_the_codes(config: dict[str, Any]) -> None:
    quantizer = build(config).eval()
    z = torch.randn(500, quantizer.dim)
    quantized = quantizer(z)
    torch.testing.assert_close(quantizer.lookup(quantized.indices), quantized.codes, atol=1e-6, rtol=0)
    assert torch.equal(quantizer.assign(z), quantized.indices)
    assert quantized.indices.dtype == torch.int64
    assert 0 <= quantized.indices.min() <= quantized.indices.max() < quantizer.codebook_size
    assert quantized.losses == {}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: str(c["kind"]))
def test_quantizing_a_code_gives_the_code(config: dict[str, Any]) -> None:
    quantizer = build(config).eval()
    if config["kind"] == "residual_vq":
        pytest.skip("a sum of codes may have a nearer first code")
    indices = torch.arange(quantizer.codebook_size)
    codes = quantizer.lookup(indices)
    if config["kind"] == "fsq":  # its inputs are unbounded: undo the bounding, away from the ends
        codes = (codes * 0.999).atanh()
    assert torch.equal(quantizer.assign(codes), indices)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: str(c["kind"]))
def test_gradients_pass_straight_through(config: dict[str, Any]) -> None:
    quantizer = build(config).train()
    z = torch.randn(50, quantizer.dim, requires_grad=True)
    quantizer(z).codes.square().sum().backward()
    assert z.grad is not None
    assert z.grad.abs().sum() > 0


@pytest.mark.parametrize("config", [c for c in CONFIGS if c["kind"] != "fsq"], ids=lambda c: str(c["kind"]))
def test_the_losses_pull_inputs_and_codes_together(config: dict[str, Any]) -> None:
    quantizer = build(config | {"entropy": 0.0} if config["kind"] != "residual_vq" else config).train()
    z = torch.nn.Parameter(torch.randn(300, quantizer.dim))
    optimizer = torch.optim.Adam([z, *quantizer.parameters()], lr=0.01)

    def gap() -> float:
        losses = quantizer(z).losses
        return float(losses.get("vq", losses["commitment"]).detach())

    learn(quantizer, z.detach())  # the codebook starts from data here
    before = gap()
    for _ in range(100):
        optimizer.zero_grad()
        torch.stack(list(quantizer(z).losses.values())).sum().backward()
        optimizer.step()
    assert gap() < 0.5 * before


def test_the_entropy_term_spreads_and_sharpens_the_choice_of_codes() -> None:
    # With the unit vectors of eight axes as codes, the inputs are the logits.
    axes = torch.eye(8)
    z = torch.nn.Parameter(torch.randn(64, 8) * 0.1 + torch.tensor([0.5] + [0.0] * 7))
    optimizer = torch.optim.Adam([z], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        entropy_penalty(z, axes, 2.0).backward()
        optimizer.step()
    p = z.detach().softmax(-1)
    assert -(p * p.log()).sum(-1).mean() < 0.1
    assert -(p.mean(0) * p.mean(0).log()).sum() > 0.95 * math.log(8)


def test_the_entropy_term_lies_between_its_bounds() -> None:
    axes = torch.eye(32)
    assert entropy_penalty(torch.zeros(16, 32), axes, 1.0) == pytest.approx(0, abs=1e-5)
    assert entropy_penalty(100 * axes, axes, 1.0) == pytest.approx(-math.log(32), abs=1e-4)


def test_the_entropy_term_in_parts_equals_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    z, vectors = (F.normalize(torch.randn(n, 4), dim=-1).requires_grad_() for n in (100, 16))
    found = []
    for chunk in (1000, 7):
        monkeypatch.setattr(quantizers, "_CHUNK", chunk)
        penalty = entropy_penalty(z, vectors, 0.1)
        found.append((penalty.detach(), *torch.autograd.grad(penalty, (z, vectors))))
    log_p = (2 * z @ vectors.t() / 0.1).log_softmax(-1).detach()
    mean = log_p.exp().mean(0)
    expected = -(log_p.exp() * log_p).sum(-1).mean() + (mean * mean.log()).sum()
    torch.testing.assert_close(found[0][0], expected)
    torch.testing.assert_close(found[1], found[0])


def test_an_unused_codebook_starts_from_the_first_inputs() -> None:
    quantizer = build({"kind": "vq", "size": 256, "dim": 8}).train()
    centre = F.normalize(torch.ones(8), dim=0)
    z = centre + 0.05 * torch.randn(1000, 8)
    used = [learn(quantizer, z)["codebook_perplexity"] for _ in range(3)]
    assert used[0] < 10, "all inputs lie in a corner of the sphere that random codes miss"
    assert used[2] > 100


def test_codes_that_fall_out_of_use_come_back() -> None:
    quantizer = build({"kind": "vq", "size": 32, "dim": 2, "revive_after": 5}).train()
    here, there = (torch.tensor(v) + 0.1 * torch.randn(200, 2) for v in ([1.0, 0.0], [-1.0, 0.0]))
    for _ in range(10):
        learn(quantizer, here)
    assert learn(quantizer, there)["codebook_perplexity"] < 8
    for _ in range(10):
        learn(quantizer, there)
    assert learn(quantizer, there)["codebook_perplexity"] > 20


def test_a_collapsed_codebook_is_not_said_to_be_in_use() -> None:
    quantizer = build({"kind": "vq", "size": 32, "dim": 2, "revive_after": 5}).train()
    collapsed = torch.tensor([[1.0, 0.0]]).expand(200, 2)
    for _ in range(12):
        usage = learn(quantizer, collapsed)["codebook_usage"]
    assert usage <= 6 / 32, "codes moved four times, and every time all inputs chose one of them"


def test_usage_forgets_codes_that_nobody_chose_for_a_hundred_steps() -> None:
    quantizer = build({"kind": "vq", "size": 32, "dim": 2, "revive_after": 0}).train()
    spread = torch.randn(500, 2)
    assert learn(quantizer, spread)["codebook_usage"] > 0.8
    for _ in range(100):
        usage = learn(quantizer, spread[:1])["codebook_usage"]
    assert usage > 0.8
    assert learn(quantizer, spread[:1])["codebook_usage"] == 1 / 32


def test_codes_never_move_when_revival_is_off() -> None:
    quantizer = build({"kind": "vq", "size": 32, "dim": 2, "revive_after": 0}).train()
    before = quantizer.lookup(torch.arange(32))
    for _ in range(3):
        learn(quantizer, torch.randn(50, 2))
    assert torch.equal(quantizer.lookup(torch.arange(32)), before)


@pytest.mark.parametrize("config", CONFIGS[:2], ids=lambda c: str(c["kind"]))
def test_a_codebook_learns_the_same_however_a_step_is_cut_into_micro_batches(config: dict[str, Any]) -> None:
    torch.manual_seed(1)
    inputs = torch.randn(12, 120, 4)
    whole, cut = build(config | {"revive_after": 3}).train(), build(config | {"revive_after": 3}).train()
    for z in inputs:
        learn(whole, z)
        learn(cut, *z.split(30))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), cut.state_dict().values()))


def test_codes_in_use_do_not_move_by_themselves() -> None:
    quantizer = build({"kind": "vq", "size": 16, "dim": 4}).train()
    z = torch.randn(400, 4)
    learn(quantizer, z)
    learn(quantizer, z)
    indices = quantizer(z).indices
    learn(quantizer, z)
    assert torch.equal(quantizer(z).indices, indices)


def test_non_finite_inputs_move_no_code() -> None:
    quantizer = build({"kind": "vq", "size": 16, "dim": 4}).train()
    learn(quantizer, torch.full((10, 4), float("nan")))
    assert quantizer.lookup(torch.arange(16)).isfinite().all()


def test_evaluation_learns_nothing() -> None:
    quantizer = build({"kind": "vq", "size": 16, "dim": 4}).eval()
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    quantizer(torch.randn(50, 4))
    assert all(torch.equal(before[key], value) for key, value in quantizer.state_dict().items())


def test_a_resumed_codebook_goes_on_as_if_never_stopped() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(20, 100, 4)
    config = {"kind": "vq", "size": 64, "dim": 4, "revive_after": 3}
    straight, first, resumed = build(config).train(), build(config).train(), build(config).train()
    for z in inputs:
        learn(straight, z)
    for z in inputs[:10]:
        learn(first, z)
    resumed.load_state_dict(first.state_dict())
    for z in inputs[10:]:
        torch.randn(7)  # other random draws in between do not matter
        learn(resumed, z)
    assert all(
        torch.equal(a, b) for a, b in zip(straight.state_dict().values(), resumed.state_dict().values())
    )


def test_autocast_does_not_blur_the_choice_of_codes() -> None:
    quantizer = build({"kind": "vq", "size": 4096, "dim": 8}).eval()
    z = torch.randn(500, 8)
    exact = quantizer.assign(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.assign(z), exact)
        assert torch.equal(quantizer(z).indices, exact)


def test_fsq_gives_non_finite_inputs_codes_of_the_codebook() -> None:
    quantizer = build({"kind": "fsq", "levels": (5, 3)})
    found = quantizer(torch.tensor([[float("nan"), 0.0], [float("inf"), float("-inf")]]))
    assert found.indices.min() >= 0
    assert found.indices.max() < 15
    assert not found.codes.isfinite().all()
