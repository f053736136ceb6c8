"""Download from and upload to the Hugging Face hub, with the login of `huggingface_hub` itself.

Weights in safetensors, JSON and tokenizer files are fetched and nothing else: no pickles, no code.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from prism_nemo.checkpoint.hf import CARRIED_FILES
from prism_nemo.errors import InputError, PrismError

# Not `*.safetensors`: some repositories hold the whole model a second time under another name.
PATTERNS = [
    "model*.safetensors",
    "*.json",
    "README.md",
    "LICENSE*",
    *(name for name in CARRIED_FILES if not name.endswith(".json")),
]
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@contextlib.contextmanager
def _explained(what: str, kind: type[PrismError]) -> Iterator[None]:
    """Whatever goes wrong on the way to the hub, as one line that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise kind(
            f"{what}: {reason}. Check the name and the network, and for gated or private models log in with `hf auth "
            "login`"
        ) from error
    except Exception as error:
        # The HTTP library's own errors, which huggingface_hub passes on from release to release under another name.
        if type(error).__module__.split(".")[0] not in ("httpx", "requests", "urllib3", "httpcore"):
            raise
        raise kind(f"{what}: the hub cannot be reached ({type(error).__name__}); check the network") from error


def local_folder(name: str | Path) -> Path:
    """A folder as it stands; a hub id such as ``org/name``, where no such folder exists, downloaded.

    Raises:
        InputError: If the hub cannot be reached or refuses.
    """
    path = Path(name)
    if path.exists() or not _ID.fullmatch(str(name)):
        return path
    import huggingface_hub

    with _explained(f"{name}: no such folder, and as a Hugging Face model it could not be downloaded", InputError):
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=PATTERNS))


def source_name(name: str | Path, folder: Path) -> str:
    """What a manifest says about where a model came from: the folder, or the hub id and its commit."""
    return str(folder) if Path(name) == folder else f"{name}@{folder.name}"


def prepare_upload(repository: str) -> None:
    """Make the repository (private) if it does not exist, before anything else is done.

    Raises:
        InputError: If the name is no hub id, or the hub cannot be reached or refuses.
    """
    if not _ID.fullmatch(repository):
        raise InputError(f"--push-to '{repository}': expected a name such as org/name")
    import huggingface_hub

    with _explained(f"--push-to {repository}: the repository cannot be written", InputError):
        huggingface_hub.HfApi().create_repo(repository, private=True, exist_ok=True)


def upload(folder: Path, repository: str) -> None:
    """Upload a whole folder.

    Raises:
        PrismError: If it failed; the folder is there and complete.
    """
    import huggingface_hub

    with _explained(f"{folder} was written, but uploading it to {repository} failed", PrismError):
        huggingface_hub.HfApi().upload_folder(repo_id=repository, folder_path=str(folder))
