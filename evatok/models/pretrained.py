"""Model folders: ``model.safetensors`` and ``config.json``, on disk or on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, TypeVar

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from evatok.artifacts import Location
from evatok.config import Config
from evatok.errors import UserError

Model = TypeVar("Model", bound="PretrainedModel")


class PretrainedModel(nn.Module):
    """A module built from one config, that can be written to a folder and read back without pickles."""

    config_type: ClassVar[type[Config]]

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``model.safetensors`` and ``config.json``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(self.config.model_dump_json(indent=2) + "\n")

    def push_to_hub(self, name: str, *, private: bool = True) -> str:
        """Upload what ``save_pretrained`` writes to the Hugging Face repository ``name``; returns its URL.

        The token is the one of ``hf auth login`` or the environment.
        """
        from huggingface_hub import HfApi

        api = HfApi()
        url = api.create_repo(name, private=private, exist_ok=True)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.upload_folder(repo_id=name, folder_path=folder)
        return str(url)

    @classmethod
    def from_pretrained(cls: type[Model], source: str | Path) -> Model:
        """Load from a folder written by ``save_pretrained``, or from a Hugging Face id; in evaluation mode.

        Raises UserError when the folder holds no such model.
        """
        folder = Path(source)
        if not folder.is_dir():
            folder = _download(str(source))
        try:
            model = cls(cls.config_type.model_validate_json((folder / "config.json").read_text()))
            model.load_state_dict(load_file(folder / "model.safetensors"))
        except (OSError, ValidationError, SafetensorError, RuntimeError) as error:
            raise UserError(
                f"{source} is not a folder of a {cls.__name__} (model.safetensors and config.json): {error}"
            ) from error
        return model.eval()

    @classmethod
    def from_artifact(cls: type[Model], artifact: Location) -> Model:
        """Load the model of a training stage's artifact, wherever it is stored."""
        with TemporaryDirectory() as folder:
            return cls.from_pretrained(artifact.download("model", folder))


def _download(source: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=["model.safetensors", "config.json"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"{source} is neither a folder here nor a model that the Hugging Face hub gives us: {error}"
        ) from error
