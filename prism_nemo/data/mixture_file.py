"""Reading a mixture file.

A mixture file (relative paths are relative to the file)::

    name: pocket
    retention: {share: 0.10, sources: [general]}    # or, said out loud: retention: none
    deduplicate: {exact: true, near: 0.8}           # leave out for none
    decontaminate: {against: [eval/*.jsonl], ngram: 13}
    sources:
      - {name: math, domain: math, paths: [math/*.jsonl], weight: 0.6, template: "{question}\\n{answer}"}
      - {name: web, domain: general, paths: [web/*.parquet], weight: 0.3, filter: "score >= 3", max_tokens: 5e9}
      - {name: chat, domain: chat, hub: {id: org/chat}, turns: messages, loss: [assistant], weight: 0.1, max_epochs: 4}
      - {name: heldout, domain: general, paths: [heldout.txt], weight: 0}

`weight` is a share of training *tokens*, normalised over the sources; it does not follow the size of the files.
A source of weight 0 is tokenised but never trained on: held-out text. A source whose files differ in form lists
`inputs`, each with its own paths or hub, text, filter and loss.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prism_nemo.data.mixture import (
    Decontaminate,
    Deduplicate,
    Hub,
    Input,
    Mixture,
    Retention,
    Source,
    check_mixture,
    nearest,
)
from prism_nemo.errors import InputError


def load_mixture(path: str | Path) -> Mixture:
    """Reads and checks a mixture; file patterns are expanded and sorted.

    Args:
        path: The YAML file.

    Raises:
        InputError: Anything is wrong with the file or with what it names; the message has the file and the key.
    """
    path = Path(path)
    raw = _read_yaml(path)
    where = str(path)
    _check_keys(raw, Mixture, where)
    if "retention" not in raw:
        raise InputError(
            f"{where}: retention: missing. Name the general sources that protect the base model's abilities, "
            "`retention: {share: 0.10, sources: [...]}`, or write `retention: none` if no retention is wanted."
        )
    entries = raw.get("sources")
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{where}: sources: must be a list with at least one source, found {entries!r}.")
    sources = [_source(entry, f"{where}: sources[{i}]", path.parent) for i, entry in enumerate(entries)]
    mixture = Mixture(
        _text(raw.get("name"), f"{where}: name"),
        sources,
        _retention(raw["retention"], f"{where}: retention"),
        _deduplicate(raw.get("deduplicate"), f"{where}: deduplicate"),
        _decontaminate(raw.get("decontaminate"), f"{where}: decontaminate", path.parent),
    )
    check_mixture(mixture, where)
    return mixture


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such mixture file; check the path.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as err:
        raise InputError(f"{path}: cannot be read as YAML: {err}") from err
    if not isinstance(raw, dict) or not raw:
        raise InputError(f"{path}: must be a mapping with the keys {', '.join(_names(Mixture))}.")
    return {str(key): value for key, value in raw.items()}


def _source(entry: Any, key: str, folder: Path) -> Source:
    if not isinstance(entry, dict):
        raise InputError(f"{key}: must be a mapping with the keys {', '.join(_names(Source))}, found {entry!r}.")
    _check_keys(entry, Source, key)
    limit = entry.get("max_epochs")
    # The defaults live in the dataclasses alone, so a key that is not there is not passed on.
    more: dict[str, Any] = {
        name: _whole(entry[name], f"{key}.{name}")
        for name in ("max_bad", "max_document_bytes", "max_tokens")
        if name in entry
    }
    if "inputs" in entry:
        listed = entry["inputs"]
        if not isinstance(listed, list) or not listed:
            raise InputError(f"{key}.inputs: must be a list of mappings, found {listed!r}.")
        more["inputs"] = [_input(item, f"{key}.inputs[{i}]", folder) for i, item in enumerate(listed)]
        for name in ("text_field", "template", "turns", "speakers", "filter", "loss"):
            if name in entry:
                raise InputError(f"{key}.{name}: stands beside `inputs`; write it into each of them.")
    return Source(
        name=_text(entry.get("name"), f"{key}.name"),
        domain=_text(entry.get("domain"), f"{key}.domain"),
        # A source without paths, hub and inputs is told that it lacks paths.
        paths=[]
        if {"hub", "inputs"} & set(entry) and "paths" not in entry
        else _files(entry.get("paths"), f"{key}.paths", folder),
        weight=_number(entry.get("weight"), f"{key}.weight"),
        max_epochs=None if limit is None else _number(limit, f"{key}.max_epochs"),
        **_form(entry, key),
        **more,
    )


def _input(entry: Any, key: str, folder: Path) -> Input:
    if not isinstance(entry, dict):
        raise InputError(f"{key}: must be a mapping with the keys {', '.join(_names(Input))}, found {entry!r}.")
    _check_keys(entry, Input, key)
    paths = _files(entry["paths"], f"{key}.paths", folder) if "paths" in entry else []
    return Input(paths, **_form(entry, key))


def _form(entry: dict[str, Any], key: str) -> dict[str, Any]:
    """What sources and inputs have in common."""
    found: dict[str, Any] = {
        name: _text(entry[name], f"{key}.{name}") for name in ("text_field", "template", "turns") if name in entry
    }
    if len(found) > 1:
        raise InputError(f"{key}: has {' and '.join(found)}; choose one.")
    if "speakers" in entry:
        if not isinstance(entry["speakers"], bool) or "turns" not in entry:
            raise InputError(f"{key}.speakers: must be true or false, and only says how `turns` are written.")
        found["speakers"] = entry["speakers"]
    if "filter" in entry:
        rules = entry["filter"] if isinstance(entry["filter"], list) else [entry["filter"]]
        found["filter"] = [_text(rule, f"{key}.filter") for rule in rules]
    if "loss" in entry:
        names = entry["loss"] if isinstance(entry["loss"], list) else [entry["loss"]]
        found["loss"] = [_text(name, f"{key}.loss") for name in names]
    if "hub" in entry:
        hub = {"id": entry["hub"]} if isinstance(entry["hub"], str) else entry["hub"]
        if not isinstance(hub, dict):
            raise InputError(f"{key}.hub: must be a dataset id or a mapping with {', '.join(_names(Hub))}.")
        _check_keys(hub, Hub, f"{key}.hub")
        if "id" not in hub:
            raise InputError(f"{key}.hub.id: missing; write the dataset as org/name.")
        found["hub"] = Hub(**{str(name): _text(value, f"{key}.hub.{name}") for name, value in hub.items()})
    return found


def _deduplicate(entry: Any, key: str) -> Deduplicate | None:
    if entry is None or entry == "none":
        return None
    if entry == "exact":
        return Deduplicate()
    if not isinstance(entry, dict):
        raise InputError(f"{key}: found {entry!r}; write `exact`, or `{{exact: true, near: 0.8}}`, or `none`.")
    _check_keys(entry, Deduplicate, key)
    exact, near = entry.get("exact", True), entry.get("near")
    if not isinstance(exact, bool):
        raise InputError(f"{key}.exact: must be true or false, found {exact!r}.")
    return Deduplicate(exact, None if near is None else _number(near, f"{key}.near"))


def _decontaminate(entry: Any, key: str, folder: Path) -> Decontaminate | None:
    if entry is None or entry == "none":
        return None
    if not isinstance(entry, dict):
        raise InputError(f"{key}: found {entry!r}; write `{{against: [eval/*.jsonl], ngram: 13}}`, or `none`.")
    _check_keys(entry, Decontaminate, key)
    more = {"ngram": _whole(entry["ngram"], f"{key}.ngram")} if "ngram" in entry else {}
    return Decontaminate(_files(entry.get("against"), f"{key}.against", folder), **more)


def _retention(entry: Any, key: str) -> Retention | None:
    if entry == "none":
        return None
    if not isinstance(entry, dict):
        raise InputError(f"{key}: found {entry!r}; write `{{share: 0.10, sources: [...]}}`, or the word `none`.")
    _check_keys(entry, Retention, key)
    sources = entry.get("sources")
    if not isinstance(sources, list) or not sources:
        raise InputError(f"{key}.sources: must list the names of the general sources, found {sources!r}.")
    return Retention(_number(entry.get("share"), f"{key}.share"), [str(name) for name in sources])


def _files(value: Any, key: str, folder: Path) -> list[str]:
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, list) or not all(isinstance(item, str) and item for item in patterns):
        raise InputError(f"{key}: must be a list of files or patterns, found {value!r}.")
    found: set[str] = set()  # two patterns that overlap must not read a file twice
    for pattern in patterns:
        full = (folder / Path(pattern).expanduser()).resolve()
        # A file whose real name has brackets or a star is taken as it stands.
        candidates = [str(full)] if full.exists() else glob.glob(str(full), recursive=True)
        matches = [match for match in candidates if full.exists() or Path(match).is_file()]
        if not matches:
            raise InputError(f"{key}: {pattern!r} matches no file (looked for {full}).")
        found.update(matches)
    return sorted(found)


def _check_keys(entry: Mapping[Any, Any], cls: type, where: str) -> None:
    known = _names(cls)
    for key in entry:
        if key not in known:
            raise InputError(f"{where}: unknown key {str(key)!r}{nearest(str(key), known)}")


def _names(cls: type) -> list[str]:
    return [item.name for item in fields(cls)]


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value:
        raise InputError(f"{key}: must be text and not empty, found {value!r}.")
    return value


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{key}: must be a number, found {value!r}.")
    return float(value)


def _whole(value: Any, key: str) -> int:
    # 2e9 is a float in YAML, and the way to write a number of tokens.
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole:
        raise InputError(f"{key}: must be a whole number, found {value!r}.")
    return int(value)
