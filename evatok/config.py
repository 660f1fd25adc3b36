"""Typed configs: YAML in and out, ``extends``, overrides and error messages. Knows no model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from evatok.errors import UserError

OPERATIONAL = "operational"
"""Mark of a field that changes how a stage works and not what it makes: ``Annotated[int, OPERATIONAL]``.

Such a field may differ between two runs of one stage; it is no part of the stage's fingerprint.
"""


class Config(BaseModel):
    """Base of every config: frozen, unknown keys refused, defaults checked too.

    Where a section has several forms, the field ``kind`` tells them apart (a Literal in each form).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


C = TypeVar("C", bound=Config)


def load(path: str | Path, kind: type[C], overrides: Sequence[str] = ()) -> C:
    """Read a YAML file into ``kind``.

    The file may say ``extends: other.yaml`` (relative to itself) and then holds only what differs.
    ``overrides``: ``"a.b=value"`` with the value written as in YAML; later ones win.
    Raises UserError that lists every problem at once.
    """
    data, origins = _read(Path(path), ())
    return _validated(data, kind, str(path), overrides, origins)


def parse(text: str | bytes, kind: type[C], source: str, overrides: Sequence[str] = ()) -> C:
    """``load`` from a text that extends nothing; ``source`` names it in messages."""
    return _validated(_yaml(text, source), kind, source, overrides, {})


def _validated(data: Any, kind: type[C], source: str, overrides: Sequence[str], origins: dict[str, str]) -> C:
    for override in overrides:
        data = _merge(data, _override(override), origins, f"--set {override}")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise UserError(_explain(error, data, kind, source, origins)) from None


def dump(config: Config) -> str:
    """The config as YAML with every key written out; ``load`` reads it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=100)


def identity(config: Config) -> dict[str, Any]:
    """The config as plain data, without the fields marked ``OPERATIONAL``."""
    plain = _identity(config, config.model_dump(mode="json"))
    assert isinstance(plain, dict)
    return plain


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def problems(found: Iterable[tuple[str, str]], source: str) -> UserError:
    """One error out of (dotted key, what is wrong) pairs."""
    lines = [f"  {key}: {text}" if key else f"  {text}" for key, text in found]
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    return UserError("\n".join([f"{source}: {count}", *lines]))


def _identity(value: Any, plain: Any) -> Any:
    if isinstance(value, BaseModel):
        return {
            name: _identity(getattr(value, name), plain[name])
            for name, field in type(value).model_fields.items()
            if OPERATIONAL not in field.metadata
        }
    if isinstance(value, (list, tuple)):
        return [_identity(v, p) for v, p in zip(value, plain, strict=True)]
    if isinstance(value, dict):
        return {key: _identity(v, p) for (_, v), (key, p) in zip(value.items(), plain.items(), strict=True)}
    return plain


class _Loader(yaml.SafeLoader):
    """safe_load, with duplicate keys refused and ``1e-4`` read as a number."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, yaml.Mark] = {}
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # `<<`: construct_mapping lets own keys win
            continue
        key = loader.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
        if key in seen:
            raise yaml.MarkedYAMLError(
                f"the key {key!r} is here already", seen[key], "and here again", key_node.start_mark
            )
        seen[key] = key_node.start_mark
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _yaml(text: str | bytes, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {error}") from None


def _read(path: Path, above: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """The merged data of a file and what it extends, and for each dotted key where it was written."""
    if path.resolve() in above:
        raise UserError(f"{above[-1]}: `extends` leads back to {path}.")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.{_similar_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    data = _yaml(text, str(path))
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: must be a mapping of keys to values, found {_shown(data)}.")
    base = data.pop("extends", None)
    if base is None:
        return data, dict.fromkeys(flatten(data), str(path))
    if not isinstance(base, str):
        raise UserError(f"{path}: extends: must be the path of a YAML file, found {_shown(base)}.")
    merged, origins = _read(path.parent / base, (*above, path.resolve()))
    return _merge(merged, data, origins, str(path)), origins


def _similar_file(path: Path) -> str:
    others = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, others, n=1)
    return f" Did you mean {path.parent / near[0]}?" if near else ""


def _merge(
    below: Mapping[str, Any], above: Mapping[str, Any], origins: dict[str, str], source: str
) -> dict[str, Any]:
    origins.update(dict.fromkeys(flatten(above), source))
    return _merged(below, above)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    if "kind" in above and above["kind"] != below.get("kind"):
        return dict(above)  # another form of the section: nothing of the earlier form applies
    result = dict(below)
    for key, value in above.items():
        mine = result.get(key)
        result[key] = _merged(mine, value) if isinstance(mine, dict) and isinstance(value, dict) else value
    return result


def _override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"--set {text}: must look like key.subkey=value.")
    nested = _yaml(value, f"--set {text}")
    for part in reversed(key.split(".")):
        nested = {part: nested}
    assert isinstance(nested, dict)
    return nested


def _explain(
    error: ValidationError, data: Any, kind: type[BaseModel], source: str, origins: Mapping[str, str]
) -> str:
    texts: dict[str, list[str]] = {}
    for detail in error.errors():
        path = _data_path(detail["loc"], data, missing=detail["type"] == "missing")
        key = ".".join(str(part) for part in path)
        text = _problem(detail, path, data, kind)
        if text not in texts.setdefault(key, []):
            texts[key].append(text)
    found = []
    for key, alternatives in texts.items():
        origin = next((o for k, o in origins.items() if k == key or k.startswith(f"{key}.")), source)
        where = "" if origin == source else f" ({origin})"
        found.append((f"{key}{where}", "; or: ".join(text.rstrip(".") for text in alternatives) + "."))
    return str(problems(found, source))


def _data_path(loc: Sequence[int | str], data: Any, *, missing: bool) -> list[int | str]:
    """Pydantic's location without the names of union members, which are no keys of the file."""
    path: list[int | str] = []
    for position, part in enumerate(loc):
        in_list = isinstance(data, (list, tuple)) and isinstance(part, int) and part < len(data)
        if in_list or (isinstance(data, Mapping) and part in data):
            data = data[part]
            path.append(part)
        elif missing and position == len(loc) - 1:
            path.append(part)
    return path


def _problem(detail: Any, path: Sequence[int | str], data: Any, kind: type[BaseModel]) -> str:
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if detail["type"] == "extra_forbidden":
        known = sorted({name for model in _models_at(path[:-1], data, kind) for name in model.model_fields})
        return f"unknown key.{_nearest(str(path[-1]), known)} Known keys: {', '.join(known)}."
    if detail["type"] == "missing":
        fields = [m.model_fields.get(str(path[-1])) for m in _models_at(path[:-1], data, kind)]
        about = next((f.description for f in fields if f is not None and f.description), None)
        return "is missing" + (f" ({about})." if about else ".")
    near = ""
    if detail["type"] in ("literal_error", "union_tag_invalid"):
        context = detail.get("ctx", {})
        allowed = re.findall(r"'([^']*)'", context.get("expected", "") or context.get("expected_tags", ""))
        near = _nearest(str(context.get("tag", detail["input"])), allowed)
    message = message[0].lower() + message[1:]
    return f"found {_shown(detail['input'])}; {message}.{near}"


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _models_at(path: Sequence[int | str], data: Any, kind: type[BaseModel]) -> list[type[BaseModel]]:
    """The models that may stand at ``path``, narrowed by the ``kind`` that the data names there."""
    models = [kind]
    for part in path:
        data = data[part]
        annotations = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        # An element of a list or dict has no field of its own: the models inside stay the same.
        models = [model for annotation in annotations for model in _models_in(annotation)] or models
        tag = data.get("kind") if isinstance(data, Mapping) else None
        models = [m for m in models if _is_kind(m, tag)] or models
    return models


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for inner in get_args(annotation) for model in _models_in(inner)]


def _is_kind(model: type[BaseModel], tag: Any) -> bool:
    field = model.model_fields.get("kind")
    if field is None or get_origin(field.annotation) is not Literal:
        return tag is None
    return tag in get_args(field.annotation)
