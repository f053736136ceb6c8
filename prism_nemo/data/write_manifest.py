"""Writing `manifest.json`, by which a mixture counts as built."""

from __future__ import annotations

from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prism_nemo import __version__
from prism_nemo.checkpoint.atomic import write_text
from prism_nemo.data.contamination import Contamination
from prism_nemo.data.fingerprint import Plan
from prism_nemo.data.manifest import MANIFEST, BuiltTokenizer, InputFile, Manifest
from prism_nemo.data.mixture import Decontaminate, Mixture
from prism_nemo.data.tokenise import Tools
from prism_nemo.data.units import file_sha256


def write_manifest(
    folder: Path, mixture: Mixture, tools: Tools, plans: list[Plan], rebuilt: tuple[str, ...]
) -> Manifest:
    """Returns the manifest of a finished build, and writes it where it is new.

    Args:
        folder: Of the build.
        mixture: What was built.
        tools: What it was built with.
        plans: All sources, in the order of the mixture, finished.
        rebuilt: As in `Manifest`.
    """
    tokenizer = tools.tokenizer
    built = []
    for plan in plans:
        assert plan.finished is not None
        source = plan.source
        # Weight, limit and the place of the files may change without touching the tokens.
        built.append(
            replace(
                plan.finished,
                domain=source.domain,
                weight=source.weight,
                max_epochs=source.max_epochs,
                inputs=plan.inputs,
            )
        )
    manifest = Manifest(
        dir=folder,
        mixture=mixture.name,
        retention=None if mixture.retention is None else asdict(mixture.retention),
        tokenizer=BuiltTokenizer(
            str(tokenizer.path.resolve()),
            tokenizer.sha256,
            tokenizer.vocab_size,
            tokenizer.eos_id,
            tokenizer.pad_id,
        ),
        versions={"prism_nemo": __version__, **{name: version(name) for name in ("megatron-core", "tokenizers")}},
        sources=built,
        deduplicate=None if mixture.deduplicate is None else asdict(mixture.deduplicate),
        decontaminate=_decontaminated(mixture.decontaminate, tools.contamination),
        rebuilt=rebuilt,
    )
    file = folder / MANIFEST
    text = manifest.to_json()
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        write_text(file, text)
    return manifest


def _decontaminated(wanted: Decontaminate | None, found: Contamination | None) -> dict[str, Any] | None:
    if wanted is None or found is None:
        return None
    files = [asdict(InputFile(name, file_sha256(name), Path(name).stat().st_size)) for name in wanted.against]
    return {"ngram": wanted.ngram, "items": found.items, "too_short": found.too_short, "against": files}
