"""Finding and fetching pretrained weights."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from urllib.error import URLError

import pytest

from evatok import weights
from evatok.errors import UserError
from evatok.weights import WeightFile, fetch, find, folders, locate

CONTENT = b"weights" * 1000


@pytest.fixture(autouse=True)
def nowhere_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("EVATOK_WEIGHTS", "XDG_CACHE_HOME", "TORCH_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> WeightFile:
    """A file ``net`` that a fake server holds."""
    file = WeightFile(
        "some/net.pth", hashlib.sha256(CONTENT).hexdigest()[:8], "https://host.invalid/net.pth", 10_000
    )
    monkeypatch.setitem(weights.FILES, "net", (file,))  # type: ignore[arg-type]
    monkeypatch.setattr(weights.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(CONTENT))
    return file


def put(folder: Path, content: bytes) -> Path:
    path = folder / "some/net.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


def test_folders_are_searched_in_order(
    published: WeightFile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EVATOK_WEIGHTS", f"{tmp_path / 'a'}:{tmp_path / 'b'}")
    second = put(tmp_path / "b", CONTENT)
    assert find("net") == second
    first = put(tmp_path / "a", CONTENT)
    assert find("net") == first == locate("net")


def test_missing_weights_say_where_and_how(published: WeightFile) -> None:
    assert locate("net") is None
    with pytest.raises(UserError) as error:
        find("net")
    for part in ("evatok weights net", "EVATOK_WEIGHTS", *map(str, folders())):
        assert part in str(error.value)


def test_weights_without_a_source_say_what_to_put_there() -> None:
    with pytest.raises(UserError, match="Put the file there"):
        find("i3d")
    with pytest.raises(UserError, match="Put the file there"):
        fetch("i3d")


def test_a_damaged_file_is_named(published: WeightFile) -> None:
    path = put(folders()[0], CONTENT[:-1])
    with pytest.raises(UserError, match="is damaged") as error:
        find("net")
    assert str(path) in str(error.value)


def test_fetching_puts_the_file_where_it_is_found(
    published: WeightFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch("net")
    assert path.read_bytes() == CONTENT
    assert find("net") == path
    monkeypatch.setattr(weights.urllib.request, "urlopen", lambda url, timeout: pytest.fail("fetched twice"))
    assert fetch("net") == path


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT * 10], ids=["damaged", "too large"])
def test_nothing_is_left_of_a_bad_transfer(
    content: bytes, published: WeightFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(content))
    with pytest.raises(UserError, match=r"arrived damaged|is larger than"):
        fetch("net")
    assert [p for p in folders()[0].rglob("*") if p.is_file()] == []


def test_no_network_is_a_user_error(published: WeightFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, timeout: int) -> io.BytesIO:
        raise URLError("no route")

    monkeypatch.setattr(weights.urllib.request, "urlopen", refuse)
    with pytest.raises(UserError, match="no route"):
        fetch("net")


def test_unknown_names_list_the_known() -> None:
    for call in (find, fetch, locate):
        with pytest.raises(UserError, match="lpips-alex"):
            call("resnet")


def test_every_file_with_a_source_has_a_checksum_and_a_limit() -> None:
    for name, files in weights.FILES.items():
        for file in files:
            assert not file.url or (file.sha256 and file.limit and file.url.startswith("https://")), name
            assert file.url or file.note, name


def test_the_shared_weights_are_whole(test_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVATOK_WEIGHTS", str(test_data / "weights"))
    for name in ("lpips-alex", "lpips-squeeze"):
        assert find(name).is_relative_to(test_data)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of the Hub, and a hub that holds owner/net."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))

    def download(name: str, allow_patterns: list[str]) -> None:
        if name != "owner/net":
            raise OSError("no such model")
        folder = cache / "models--owner--net" / "snapshots" / "1"
        folder.mkdir(parents=True, exist_ok=True)
        (cache / "models--owner--net" / "refs").mkdir(exist_ok=True)
        (cache / "models--owner--net" / "refs" / "main").write_text("1")
        for file in ("config.json", "pytorch_model.bin"):
            if file in allow_patterns:
                (folder / file).write_bytes(CONTENT)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return cache


def test_a_model_of_the_hub_is_found_once_it_was_fetched(hub: Path) -> None:
    with pytest.raises(UserError, match="evatok weights owner/net"):
        find("owner/net")
    assert locate("owner/net") is None
    folder = fetch("owner/net")
    assert folder.is_relative_to(hub)
    assert find("owner/net") == locate("owner/net") == folder


def test_a_model_that_the_hub_does_not_give_is_a_user_error(hub: Path) -> None:
    with pytest.raises(UserError, match="owner/other could not be fetched"):
        fetch("owner/other")


def test_a_folder_must_hold_a_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no model"):
        find(str(tmp_path))
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes(CONTENT)
    assert find(str(tmp_path)) == tmp_path
