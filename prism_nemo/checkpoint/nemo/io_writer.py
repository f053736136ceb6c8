"""``io.json`` and ``model.yaml`` of a context, written as Fiddle and NeMo would, without either.

Objects are `Call` (made by a class or function with arguments) and `Symbol` (a class or function itself); the rest is
plain values and lists. See `prism_nemo.checkpoint.nemo.io_json` for the format of ``io.json``.
"""

from __future__ import annotations

from typing import Any

from prism_nemo.checkpoint.nemo.io_json import Call, Symbol

_VERSION = "0.0.1"  # of Fiddle's format, fiddle/_src/experimental/serialization.py
_METADATA = "fiddle._src.config.BuildableTraverserMetadata"
_CONFIG = "fiddle._src.config.Config"


class _Table:
    """The objects of one file, each under a name of its own."""

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}
        self.counts: dict[str, int] = {}

    def add(self, hint: str, value: dict[str, Any]) -> dict[str, Any]:
        number = 1
        while f"{hint}_{number}" in self.objects:
            number += 1
        key = f"{hint}_{number}"
        self.objects[key] = value
        self.counts[key] = 1
        return {"type": "ref", "key": key}

    def value(self, value: Any, path: str) -> Any:
        """A value at a path such as ``<root>.model.config``; NeMo loads parts of a context by these paths."""
        if isinstance(value, Symbol):
            return {**_pyref(value.name), "paths": [path]}
        if isinstance(value, Call):
            return self._call(value, path)
        if isinstance(value, (list, tuple)):
            items = [[f"Index(index={i})", self.value(item, f"{path}[{i}]")] for i, item in enumerate(value)]
            kind = "tuple" if isinstance(value, tuple) else "list"
            return self.add(
                kind, {"type": _pyref(f"builtins.{kind}"), "items": items, "metadata": None, "paths": [path]}
            )
        if isinstance(value, dict):
            if value:
                raise TypeError(f"{path}: only empty mappings are written, found {value!r}")
            return self.add("dict", {**self._no_items(), "paths": [path]})
        return {"type": "leaf", "value": value, "paths": [path]}

    def _no_items(self) -> dict[str, Any]:
        """An empty mapping; Fiddle keeps a mapping's keys as its metadata."""
        keys: dict[str, Any] = {"type": _pyref("builtins.tuple"), "items": [], "metadata": None}
        return {"type": _pyref("builtins.dict"), "items": [], "metadata": keys}

    def _call(self, value: Call, path: str) -> dict[str, Any]:
        items = [[_attribute(name), self.value(item, f"{path}.{name}")] for name, item in value.arguments.items()]
        names = [[f"Index(index={i})", name] for i, name in enumerate(value.arguments)]
        fields = [
            [_attribute("fn_or_cls"), _pyref(value.target)],
            [
                _attribute("argument_names"),
                self.add("tuple", {"type": _pyref("builtins.tuple"), "items": names, "metadata": None}),
            ],
            [_attribute("argument_tags"), self.add("dict", self._no_items())],
            [_attribute("argument_history"), self.add("dict", self._no_items())],
        ]
        metadata = self.add(
            "buildable_traverser_metadata",
            {"type": _pyref(_METADATA), "items": fields, "metadata": _pyref(_METADATA)},
        )
        hint = value.target.rsplit(".", 1)[-1].lower()
        return self.add(hint, {"type": _pyref(_CONFIG), "items": items, "metadata": metadata, "paths": [path]})


def io_json(root: Call) -> dict[str, Any]:
    """The contents of ``io.json``.

    Args:
        root: What the file describes; NeMo expects a ``TrainerContext``.

    Raises:
        TypeError: For a value that has no place in such a file.
    """
    table = _Table()
    return {
        "root": table.value(root, "<root>"),
        "objects": table.objects,
        "refcounts": table.counts,
        "version": _VERSION,
    }


def model_yaml(value: Any) -> Any:
    """The contents of ``model.yaml`` for a model, ready for a YAML dumper."""
    if isinstance(value, Call):
        arguments = {name: model_yaml(item) for name, item in value.arguments.items()}
        return {"_target_": value.target, **arguments}
    if isinstance(value, Symbol):
        return {"_target_": value.name, "_call_": False}
    if isinstance(value, (list, tuple)):
        return [model_yaml(item) for item in value]
    return value


def _attribute(name: str) -> str:
    return f"Attr(name={name!r})"


def _pyref(name: str) -> dict[str, Any]:
    module, _, symbol = name.rpartition(".")
    return {"type": "pyref", "module": module, "name": symbol}
