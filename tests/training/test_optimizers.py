"""Which parameters which optimizer has, and that each does with its own what it would do alone."""

import torch
from torch import nn
from torch.optim import AdamW, Muon

from evatok.models.tokenizer import TokenizerConfig, VideoTokenizer
from evatok.training.optimizers import MuonWithAdamW


def test_muon_has_the_matrices_of_the_layers_and_adamw_the_rest() -> None:
    config = TokenizerConfig(size=32, choices=(2, 4), encoder="nano", decoder="nano", align_layer=1)
    parameters = dict(VideoTokenizer(config).named_parameters())
    muon, *others = MuonWithAdamW(parameters, (0.9, 0.95), 1e-4).param_groups
    assert "ns_steps" in muon
    names = {id(p): name for name, p in parameters.items()}
    chosen = {names[id(p)] for p in muon["params"]}
    assert chosen == {name for name, p in parameters.items() if "layers." in name and p.ndim == 2}
    assert {"encoder.layers.0.mlp.0.weight", "decoder.layers.1.cross_attention.kv.weight"} <= chosen
    rest = {names[id(p)] for group in others for p in group["params"]}
    assert chosen | rest == set(parameters)
    assert {"patch_embed.weight", "to_pixels.weight", "quantizer.codebook.weight"} <= rest


def test_each_steps_as_it_would_alone() -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"layers": nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))})

    def run(module: nn.Module, *optimizers: torch.optim.Optimizer) -> list[torch.Tensor]:
        inputs = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
        for _ in range(5):
            module.zero_grad()
            (module["layers"](inputs) - 1).square().mean().backward()
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = 0.01
                optimizer.step()
        return list(module.parameters())

    together, apart = network(), network()
    found = run(together, MuonWithAdamW(dict(together.named_parameters()), (0.9, 0.95), 0.1))
    matrices = [p for p in apart.parameters() if p.ndim == 2]
    biases = [p for p in apart.parameters() if p.ndim == 1]
    muon = Muon(matrices, lr=0, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    expected = run(apart, muon, AdamW(biases, lr=0, betas=(0.9, 0.95), weight_decay=0))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
