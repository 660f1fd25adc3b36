"""The paper's S-B with everything around it, at its real size."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import VideoMAEConfig, VideoMAEModel, VJEPA2Config, VJEPA2Model

from evatok.losses import (
    LeCam,
    PerceptualLoss,
    alignment_loss,
    discriminator_loss,
    generator_loss,
)
from evatok.models.discriminators import (
    TransformerAdversaryConfig,
    VideoMaeAdversaryConfig,
    build_adversary,
)
from evatok.models.teachers import AlignmentHead, Teacher, TeacherConfig
from evatok.models.tokenizer import TokenizerConfig, VideoTokenizer


def without_gradient(modules: dict[str, nn.Module], *, trainable: bool) -> list[str]:
    return [
        f"{name}.{key}"
        for name, module in modules.items()
        for key, p in module.named_parameters()
        if p.requires_grad == trainable and (p.grad is None) == trainable
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_one_step_of_the_whole_recipe_is_finite_and_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    config = TokenizerConfig()
    model = VideoTokenizer(config).train()
    teacher = Teacher(TeacherConfig(), config, VJEPA2Model(VJEPA2Config()))
    head = AlignmentHead(config, teacher)
    adversaries = {
        "transformer": build_adversary(TransformerAdversaryConfig(), config),
        "videomae": build_adversary(VideoMaeAdversaryConfig(), config, VideoMAEModel(VideoMAEConfig())),
    }
    perceptual = PerceptualLoss("dssim")
    modules: dict[str, nn.Module] = {"model": model, "head": head, "teacher": teacher, **adversaries}
    clips = torch.rand(1, 3, 16, 128, 128)

    output = model(clips, torch.tensor([[512, 128, 64, 32]]))
    loss = (output.reconstruction - clips).abs().mean() + perceptual(output.reconstruction, clips)
    loss = loss + 0.7 * alignment_loss(head(output.features), teacher(clips))
    loss = loss + torch.stack(list(output.losses.values())).sum()
    loss = loss + 0.3 * sum(
        generator_loss(adversary(output.reconstruction)) for adversary in adversaries.values()
    )
    loss.backward()
    assert loss.isfinite()
    for adversary in adversaries.values():
        adversary.zero_grad()
        real, fake = adversary(clips), adversary(output.reconstruction.detach())
        judged = discriminator_loss(real, fake) + 0.001 * LeCam()(real, fake)
        judged.backward()
        assert judged.isfinite()

    assert without_gradient(modules, trainable=True) == []
    assert without_gradient(modules, trainable=False) == []
    assert all(p.grad is None or p.grad.isfinite().all() for m in modules.values() for p in m.parameters())
