"""LPIPS, and quality metrics by name."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from evatok import weights
from evatok.metrics.pixels import Dssim, Mse, Psnr, QualityMetric, Reference, Ssim

Network = Literal["alex", "squeeze", "vgg"]
NETWORKS: dict[str, Network] = {"lpips": "alex", "lpips-vgg": "vgg", "lpips-squeeze": "squeeze"}
"""LPIPS under the names that it has as a quality metric; AlexNet is the package's own default."""
_PIXELS_AT_ONCE = 64 * 128 * 128


class Lpips(QualityMetric):
    """Learned perceptual distance (Zhang et al., 1801.03924, version 0.1) of the package ``lpips``.

    The trunk's ImageNet weights are found by ``evatok.weights``; the linear layers come with the package.
    """

    higher_is_better = False

    def __init__(self, network: Network, trunk: dict[str, Tensor] | None = None) -> None:
        """``trunk``: torchvision's ``features.N.*`` entries; None finds them by ``evatok.weights``.

        Raises UserError when the weights are not there.
        """
        import lpips  # its import takes seconds (torchvision)

        super().__init__()
        self.name = next(name for name, known in NETWORKS.items() if known == network)
        trunk = _load_trunk(network) if trunk is None else trunk
        with warnings.catch_warnings():  # the package calls torchvision the way of long ago
            warnings.simplefilter("ignore")
            model = lpips.LPIPS(net=network, pnet_rand=True, verbose=False)
        _fill(model.net, trunk)
        self.scaling: nn.Module = model.scaling_layer
        self.trunk: nn.Module = model.net
        self.linears: nn.ModuleList = model.lins
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Lpips:
        """Stays in evaluation mode: its dropout is for training the metric itself."""
        return super().train(False)

    def prepare(self, target: Tensor) -> Reference:
        with torch.no_grad():
            parts = [self._features(part) for part in _split(target)]
        return Reference([torch.cat(layer) for layer in zip(*parts)])

    def compare(self, reconstruction: Tensor, reference: Reference) -> Tensor:
        distances = []
        done = 0
        for part in _split(reconstruction):
            rows = slice(done, done + len(part))
            done += len(part)
            total = torch.zeros(len(part), device=part.device)
            for features, target, linear in zip(self._features(part), reference.parts, self.linears):
                difference = (features - target[rows]).square().flatten(0, 1)
                total = total + linear(difference).unflatten(0, (len(part), -1)).flatten(1).mean(1)
            distances.append(total)
        return torch.cat(distances)

    def _features(self, clips: Tensor) -> list[Tensor]:
        """Unit-length features per layer, ``[n, P, channels, h, w]``, of ``clips [n, C, P, H, W]``."""
        frames = clips.transpose(1, 2)
        layers = self.trunk(self.scaling(frames.flatten(0, 1) * 2 - 1))
        unit = [x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in layers]
        return [x.unflatten(0, frames.shape[:2]) for x in unit]


def load_quality(name: str) -> QualityMetric:
    """The quality metric ``name``: psnr, mse, ssim, dssim or one of NETWORKS.

    Raises UserError for LPIPS without weights, ValueError for another name.
    """
    if name in NETWORKS:
        return Lpips(NETWORKS[name])
    pixels: dict[str, type[QualityMetric]] = {"psnr": Psnr, "mse": Mse, "ssim": Ssim, "dssim": Dssim}
    if name not in pixels:
        known = ", ".join([*NETWORKS, *pixels])
        raise ValueError(f"no quality metric is called {name!r}; there are {known}")
    return pixels[name]()


def pretrained(names: Iterable[str]) -> list[str]:
    """The weights (``evatok.weights``) that these quality metrics load."""
    return [f"lpips-{NETWORKS[name]}" for name in names if name in NETWORKS]


def _split(clips: Tensor) -> tuple[Tensor, ...]:
    """Parts that bound the memory of the features."""
    pixels = clips[0, 0].numel()
    return torch.split(clips, max(1, _PIXELS_AT_ONCE // pixels))


def _load_trunk(network: Network) -> dict[str, Tensor]:
    path = weights.find(f"lpips-{network}")
    if path.suffix == ".safetensors":
        return load_file(path)  # type: ignore[no-any-return]
    trunk: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return trunk


def _fill(net: nn.Module, trunk: dict[str, Tensor]) -> None:
    """Load torchvision's ``features.N.*`` into the slices that the package cuts the trunk into.

    The package keeps N as the name of each layer inside its slice.
    """
    own = net.state_dict()
    filled = {key: trunk[f"features.{key.split('.', 1)[1]}"] for key in own}
    net.load_state_dict(filled)
