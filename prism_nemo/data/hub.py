"""Reading datasets of the Hugging Face Hub as streams. Needs `datasets`, which is loaded only here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prism_nemo.data.mixture import Hub
from prism_nemo.data.units import Unit
from prism_nemo.errors import InputError

_ADVICE = "A machine without a network needs the files themselves: download them elsewhere and list them under `paths`."


def hub_commit(hub: Hub) -> str:
    """Returns the commit that a revision stands for now; it takes the place of a file's hash.

    Raises:
        InputError: The Hub cannot be reached, or has no such dataset.
    """
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(hub.id, revision=hub.revision).sha
    except Exception as err:  # offline, HTTP errors, bad ids: a dozen classes of three libraries
        raise InputError(f"hub {hub.id}: cannot be read ({_first_line(err)}). {_ADVICE}") from None
    if not commit:
        raise InputError(f"hub {hub.id}: the Hub names no commit for revision {hub.revision!r}.")
    return commit


def hub_units(hub: Hub) -> list[Unit]:
    """Returns one unit per file of the dataset on the Hub.

    Raises:
        InputError: `datasets` is missing, the Hub cannot be reached, or it has no such dataset, config or split.
    """
    commit = hub_commit(hub)
    key = (hub.id, hub.config or "", hub.split, commit)
    shards = _stream(*key).num_shards
    return [Unit("hub", key, i, i + 1, 0) for i in range(shards)]


def read_hub(unit: Unit) -> Iterator[tuple[int, Any]]:
    """Yields the rows of a unit, numbered from 1.

    Raises:
        InputError: As for `hub_units`.
    """
    stream = _stream(*unit.files)
    if stream.num_shards > 1:
        stream = stream.shard(stream.num_shards, unit.start)
    try:
        yield from enumerate(stream, start=1)
    except (OSError, ValueError) as err:
        raise InputError(f"hub {unit.files[0]}: reading stopped ({_first_line(err)}); run it again.") from err


def _stream(id: str, config: str, split: str, commit: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise InputError(f"hub {id}: needs `datasets`; run `pip install 'prism-nemo[data]'`.") from None
    try:
        return datasets.load_dataset(id, config or None, split=split, revision=commit, streaming=True)
    except Exception as err:
        raise InputError(f"hub {id}: cannot be opened ({_first_line(err)}). {_ADVICE}") from None


def _first_line(err: Exception) -> str:
    return f"{type(err).__name__}: {str(err).strip().splitlines()[0] if str(err).strip() else ''}"
