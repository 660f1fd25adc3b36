"""The pretrained weights we use: where they come from, how they are checked, where they are found.

A name is a key of ``FILES``, or a model of ``transformers``: a Hub id (``OWNER/NAME``) or a local folder.
Nothing here downloads behind the user's back: ``find`` only looks, and a missing file is an error that says
how to get it. ``fetch`` is called by ``evatok weights NAME`` alone, never inside a worker.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from evatok.errors import UserError

FOLDER_VARIABLE = "EVATOK_WEIGHTS"
_CHUNK = 1 << 20
_TIMEOUT_S = 60


@dataclass(frozen=True)
class WeightFile:
    """One file under the weights folder.

    ``sha256`` may be a prefix of the digest; empty means that the publisher gives none. ``url``: where
    ``fetch`` gets it; empty means that it must be put there by hand, as ``note`` says.
    """

    path: str
    sha256: str
    url: str = ""
    limit: int = 0
    note: str = ""


# A name has one or more files that serve equally; the first one found is used.
_TRUNK = "convolutional trunk, torchvision's keys; made from the torchvision file"
FILES: Mapping[str, tuple[WeightFile, ...]] = {
    "lpips-alex": (
        WeightFile(
            "lpips/alexnet_features.safetensors",
            "9f97fd313f4da83dbe6bbfbe6effca1241de9edfcd7c53386261ed9697286dd9",
            note=_TRUNK,
        ),
        WeightFile(
            "alexnet-owt-7be5be79.pth",
            "7be5be79",
            "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
            300_000_000,
        ),
    ),
    "lpips-squeeze": (
        WeightFile(
            "lpips/squeezenet1_1_features.safetensors",
            "29dd9af42ad48cb39a767454d382a2232dbc1625a1de3f00fca4868ee65dfc4b",
            note=_TRUNK,
        ),
        WeightFile(
            "squeezenet1_1-b8a52dc0.pth",
            "b8a52dc0",
            "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
            10_000_000,
        ),
    ),
    "lpips-vgg": (
        WeightFile("lpips/vgg16_features.safetensors", "", note=_TRUNK),
        WeightFile(
            "vgg16-397923af.pth",
            "397923af",
            "https://download.pytorch.org/models/vgg16-397923af.pth",
            600_000_000,
        ),
    ),
    "i3d": (
        WeightFile(
            "i3d/i3d_torchscript.pt",
            "",
            note="Kinetics-400 I3D as TorchScript, the file that StyleGAN-V and LARP evaluate with",
        ),
    ),
}


MODELS = ("facebook/vjepa2-vitl-fpc64-256", "MCG-NJU/videomae-base")
"""Models that shipped experiments use; any other of the Hub serves as well."""

_MODEL_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


def folders() -> list[Path]:
    """Where files are looked for, in order.

    ``EVATOK_WEIGHTS`` (several folders as in PATH), the user's cache, and torch hub's checkpoints.
    """
    named = [Path(part) for part in os.environ.get(FOLDER_VARIABLE, "").split(os.pathsep) if part]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    hub = Path(os.environ.get("TORCH_HOME") or cache / "torch") / "hub" / "checkpoints"
    return [*named, cache / "evatok" / "weights", hub]


def locate(name: str) -> Path | None:
    """The first file of ``name`` that is there, or a model's folder, unchecked; None if there is none."""
    if _is_model(name):
        return _locate_model(name)
    return next((path for path, _ in _present(name)), None)


def find(name: str) -> Path:
    """A file of ``name`` whose checksum is right, or a model's folder.

    Raises UserError when there is none, saying where it was looked for and how to get it, or when a file is
    damaged.
    """
    if _is_model(name):
        return _find_model(name)
    for path, file in _present(name):
        if file.sha256 and not _digest(path, path.stat().st_mtime_ns).startswith(file.sha256):
            raise UserError(
                f"{path} is damaged: its sha256 does not begin with {file.sha256[:16]}. Delete it and run"
                f" `evatok weights {name}`."
            )
        return path
    wanted = " or ".join(file.path for file in FILES[name])
    searched = "\n".join(f"  {folder}" for folder in folders())
    if any(file.url for file in FILES[name]):
        remedy = f"Run `evatok weights {name}` where there is a network"
    else:
        remedy = f"Put the file there ({FILES[name][0].note})"
    raise UserError(
        f"the weights {name} ({wanted}) are not here. Looked in\n{searched}\n{remedy}, or set"
        f" {FOLDER_VARIABLE} to a folder that has them."
    )


def fetch(name: str) -> Path:
    """Download ``name`` into the first of ``folders()``, check it and put it in place at once.

    Returns the file that is there already if there is one. Raises UserError on a wrong name, a file without
    a source, a failed transfer, one larger than it may be, or a wrong checksum; then nothing is left behind.
    """
    if locate(name):
        return find(name)
    if _is_model(name):
        return _fetch_model(name)
    file = next((file for file in FILES[name] if file.url), None)
    if file is None:
        return find(name)
    if urlsplit(file.url).scheme != "https":
        raise UserError(f"{file.url} is not an https address")
    target = folders()[0] / file.path
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".part", delete=False) as part:
        try:
            with urllib.request.urlopen(file.url, timeout=_TIMEOUT_S) as response:
                size = 0
                while chunk := response.read(_CHUNK):
                    size += len(chunk)
                    if size > file.limit:
                        raise UserError(f"{file.url} is larger than the {file.limit} bytes it may have")
                    digest.update(chunk)
                    part.write(chunk)
            if not digest.hexdigest().startswith(file.sha256):
                raise UserError(f"{file.url} arrived damaged: sha256 {digest.hexdigest()}")
            part.close()
            os.replace(part.name, target)
        except OSError as error:
            raise UserError(f"{file.url} could not be fetched: {error}") from error
        finally:
            Path(part.name).unlink(missing_ok=True)
    return target


def _is_model(name: str) -> bool:
    return name not in FILES and ("/" in name or Path(name).is_dir())


def _locate_model(name: str) -> Path | None:
    """The folder itself, or its snapshot in the Hub's cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(name).is_dir():
        found = [str(Path(name) / file) for file in ("config.json", *_MODEL_FILES)]
        found = [file for file in found if Path(file).is_file()]
    else:
        try:
            cached = [try_to_load_from_cache(name, file) for file in ("config.json", *_MODEL_FILES)]
        except HFValidationError:
            return None
        found = [file for file in cached if isinstance(file, str)]
    whole = len(found) > 1 and found[0].endswith("config.json")
    return Path(found[0]).parent if whole else None


def _find_model(name: str) -> Path:
    folder = _locate_model(name)
    if folder is not None:
        return folder
    files = f"config.json and {' or '.join(_MODEL_FILES)}"
    if Path(name).is_dir():
        raise UserError(f"the folder {name} holds no model ({files})")
    raise UserError(
        f"the model {name} is not here: it is no folder, and the Hugging Face cache does not hold its"
        f" {files}. Run `evatok weights {name}` where there is a network, or name a folder that holds it."
    )


def _fetch_model(name: str) -> Path:
    """Download a model of the Hub into its cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        snapshot_download(name, allow_patterns=["config.json", "model*.safetensors*"])
        if _locate_model(name) is None:
            snapshot_download(name, allow_patterns=["pytorch_model.bin"])
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"the model {name} could not be fetched from the Hugging Face hub: {error}"
        ) from error
    return _find_model(name)


def _present(name: str) -> Iterator[tuple[Path, WeightFile]]:
    if name not in FILES:
        raise UserError(f"no weights are called {name!r}; there are {', '.join(FILES)}")
    for folder in folders():
        for file in FILES[name]:
            if (folder / file.path).is_file():
                yield folder / file.path, file


@functools.lru_cache(maxsize=32)
def _digest(path: Path, modified_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
