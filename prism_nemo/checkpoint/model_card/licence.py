"""What is known of the base model: its name, licence and languages. Nothing is guessed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prism_nemo.checkpoint.model_card.lineage import Lineage

_HUB = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)@([0-9A-Za-z._-]+)")
_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")


@dataclass(frozen=True)
class Base:
    """The base model.

    Attributes:
        name: People's name for it; never a path, cards are read elsewhere.
        hub_id: ``org/name``, or None where the record does not say.
        revision: Commit on the hub, or None.
        folder: Where its files are, or None.
        licence: Identifier as its own card gives it, or None.
        licence_name: Of a licence that has no identifier, as its own card gives it.
        licence_link: The same.
        licence_from: Where that was read, or why it is not known.
        languages: As its own card gives them.
    """

    name: str
    hub_id: str | None = None
    revision: str | None = None
    folder: Path | None = None
    licence: str | None = None
    licence_name: str | None = None
    licence_link: str | None = None
    licence_from: str = ""
    languages: tuple[str, ...] = field(default=())


def describe_base(lineage: Lineage) -> Base | None:
    """The base model of a lineage, or None where the weights began from nothing or the beginning is not known."""
    origin = lineage.imported_from
    if origin is None:
        return None
    hub = _HUB.fullmatch(origin)
    if hub is not None and not Path(origin).exists():
        folder = _cached(hub[1], hub[2])
        return Base(hub[1], hub[1], hub[2], folder, **_licence(folder, hub[1]))
    folder = Path(origin)
    known = folder if folder.is_dir() else None
    return Base(folder.name, folder=known, **_licence(known, folder.name))


def _cached(hub_id: str, revision: str) -> Path | None:
    """The folder of a model that was downloaded before; the network is not asked."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _licence(folder: Path | None, name: str) -> dict[str, Any]:
    if folder is None:
        return {"licence_from": f"the files of {name} are no longer there to read its licence from"}
    found = _card_data(folder / "README.md")
    languages = found.get("language")
    known: dict[str, Any] = {
        "languages": tuple(str(x) for x in ([languages] if isinstance(languages, str) else languages or []))
    }
    if isinstance(found.get("license"), str):
        return known | {
            "licence": found["license"],
            "licence_name": _text(found.get("license_name")),
            "licence_link": _text(found.get("license_link")),
            "licence_from": f"the model card of {name}",
        }
    for file in _FILES:
        if (folder / file).is_file():
            lines = (folder / file).read_text(encoding="utf-8", errors="replace").splitlines()
            first = next((line.strip() for line in lines if line.strip()), "")
            reason = f"{name} has a file {file} that begins with: {first[:120]}"
            return known | {"licence_from": reason}
    return known | {"licence_from": f"{name} has neither a model card that names a licence nor a LICENSE file"}


def _card_data(path: Path) -> dict[str, Any]:
    import yaml
    from huggingface_hub import ModelCard

    if not path.is_file():
        return {}
    try:
        return dict(ModelCard.load(path, ignore_metadata_errors=True).data.to_dict())
    except (OSError, ValueError, TypeError, yaml.YAMLError):  # a card that nobody can read says nothing
        return {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
