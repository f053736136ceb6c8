"""``io.json`` of a NeMo context, read as data.

NeMo dumps the objects of a run with Fiddle: a table of objects, each with its class, its items and references to other
objects. Fiddle loads such a file by importing and calling what it names. Here it is only looked at: classes stay names,
and what NeMo could not express (and pickled into a file beside it) stays a file name.

See fiddle/_src/experimental/serialization.py for the format, nemo/lightning/io/mixin.py for its use.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prism_nemo.errors import InputError

_DEPTH = 64  # objects within objects; a real context has 10


@dataclass(frozen=True)
class Symbol:
    """A class, function or constant by its name, such as ``torch.bfloat16``."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Call:
    """An object: what makes it, and with which arguments.

    Attributes:
        target: Dotted name of the class or function.
        arguments: By name; those that were not given are missing.
    """

    target: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Opaque:
    """An object that the file does not say in data.

    Attributes:
        kind: Dotted name of its class.
        file: The pickle that holds it, if there is one.
    """

    kind: str
    file: str = ""


class IoJson:
    """One ``io.json``.

    Args:
        path: The file.

    Raises:
        InputError: If it is not what Fiddle writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = json.loads(path.read_text())
            self._objects: dict[str, Any] = content["objects"]
            self._root = content["root"]
            if not isinstance(self._objects, dict):
                raise TypeError("objects is no mapping")
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InputError(f"{path}: not a context that NeMo wrote: {error!r}") from error

    def model(self) -> Any:
        """The model: the root, or the root's argument ``model`` where that is a trainer's context.

        Other arguments (trainer, data) are not looked at.

        Raises:
            InputError: If there is none.
        """
        try:
            target, items = self._call(self._target(self._root))
            if target.endswith(".TrainerContext"):
                if "model" not in items:
                    raise InputError(f"{self.path}: the context has no model")
                return self.value(items["model"])
            return self.value(self._root)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise InputError(f"{self.path}: not a context that NeMo wrote: {error!r}") from error

    def value(self, node: Any, depth: int = 0) -> Any:
        """A node as plain values, `Symbol`, `Call` and `Opaque`.

        Raises:
            InputError: If objects contain each other without end.
        """
        if depth > _DEPTH:
            raise InputError(f"{self.path}: objects within objects, more than {_DEPTH} deep")
        if not isinstance(node, dict):
            return node
        kind = node.get("type")
        if kind == "leaf":
            return node["value"]
        if kind == "pyref":
            return _symbol(node)
        node = self._target(node)
        name = _symbol(node["type"]).name
        items = node["items"]
        if self._is_call(node):
            target, arguments = self._call(node)
            return Call(target, {key: self.value(item, depth + 1) for key, item in arguments.items()})
        if name in ("builtins.list", "builtins.tuple", "builtins.set"):
            return [self.value(item, depth + 1) for _, item in items]
        if name == "builtins.dict":
            keys = self.value(node["metadata"], depth + 1)
            return dict(zip(keys, (self.value(item, depth + 1) for _, item in items), strict=True))
        # An object that Fiddle cannot say is pickled into a file of the context, and this is its name.
        single = self.value(items[0][1], depth + 1) if len(items) == 1 else None
        return Opaque(name, single if isinstance(single, str) else "")

    def _target(self, node: Any) -> Any:
        """The object that a reference stands for."""
        return self._objects[node["key"]] if node.get("type") == "ref" else node

    def _metadata(self, node: Any) -> Any:
        metadata = node.get("metadata")
        return self._target(metadata) if isinstance(metadata, dict) else None

    def _is_call(self, node: Any) -> bool:
        metadata = self._metadata(node)
        named = metadata is not None and isinstance(metadata.get("type"), dict)
        return named and metadata["type"].get("name") == "BuildableTraverserMetadata"

    def _call(self, node: Any) -> tuple[str, dict[str, Any]]:
        """Target and unread arguments of an object that is made by a call."""
        if not self._is_call(node):
            raise ValueError("an object is not made by a call")
        fields = {_attribute(name): item for name, item in self._metadata(node)["items"]}
        names = self.value(fields["argument_names"])
        return _symbol(fields["fn_or_cls"]).name, dict(zip(names, (i for _, i in node["items"]), strict=True))


def _attribute(element: str) -> str:
    """``x`` of ``Attr(name='x')``."""
    return element.removeprefix("Attr(name='").removesuffix("')")


def _symbol(node: Any) -> Symbol:
    return Symbol(f"{node['module']}.{node['name']}")
