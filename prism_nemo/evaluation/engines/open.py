"""From a path to a model that an evaluation can ask.

`find_model` looks at everything that can be wrong, before anything is loaded or started. `open_model` loads, in a
process that is one of the layout's; `with_model` brings such processes about, or uses those that torchrun or Slurm
started.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from prism_nemo.checkpoint.atomic import MANIFEST, read_manifest
from prism_nemo.checkpoint.convert import load_hf_weights, run
from prism_nemo.checkpoint.hf import HFReader
from prism_nemo.checkpoint.importing import CARRIED, fill_world, on_main
from prism_nemo.checkpoint.native import find_latest, load, read_architecture
from prism_nemo.config import ParallelConfig
from prism_nemo.data.tokenizer import Tokenizer, load_tokenizer
from prism_nemo.errors import InputError
from prism_nemo.evaluation.engines.contract import EvaluationModel
from prism_nemo.evaluation.engines.fingerprint import fingerprint
from prism_nemo.evaluation.engines.parallel import check_model
from prism_nemo.models.decoder import LanguageModel
from prism_nemo.models.family import Architecture, read_hf_config
from prism_nemo.run import checkpoint_name
from prism_nemo.runtime import Runtime, start, stop

ENGINES = ("megatron", "transformers", "vllm")
NATIVE, HUGGINGFACE = "native", "huggingface"


@dataclass(frozen=True)
class FoundModel:
    """A checkpoint that was looked at.

    Attributes:
        path: Of the checkpoint.
        kind: native or huggingface.
        architecture: What it is.
        tokenizer: That it is asked with.
        engine: megatron, transformers or vllm.
        parallel: Layout that it is loaded in.
        max_length: Most tokens that are read; None for the model's own maximum.
        options: Of the engine: `slots`, `cache_tokens` and `pass_tokens` of megatron, `batch_size` of transformers,
            `memory_share` of vllm.
    """

    path: Path
    kind: str
    architecture: Architecture
    tokenizer: Tokenizer
    engine: str
    parallel: ParallelConfig
    max_length: int | None
    options: dict[str, Any]


@dataclass(frozen=True)
class OpenedModel:
    """A model that is loaded.

    Attributes:
        model: To be asked.
        about: ``path``, ``kind``, ``name`` and ``hash`` of the checkpoint, for results; see
            `prism_nemo.evaluation.engines.fingerprint`.
    """

    model: EvaluationModel
    about: dict[str, str]


_OPTIONS = {
    "megatron": {"slots", "cache_tokens", "pass_tokens"},
    "transformers": {"batch_size"},
    "vllm": {"memory_share"},
}


def find_model(
    path: str | Path,
    engine: str = "megatron",
    tokenizer: str | Path | None = None,
    layout: ParallelConfig | None = None,
    max_length: int | None = None,
    **options: Any,
) -> FoundModel:
    """Look at a checkpoint and at what it is to be asked with; nothing is loaded.

    Args:
        path: Native checkpoint or Hugging Face folder.
        engine: What runs it: megatron (either kind, any layout), transformers (a Hugging Face folder, one process),
            vllm (either kind, on GPUs).
        tokenizer: Folder or ``tokenizer.json``. If not given: the folder's own, or the one that an import carried into
            the checkpoint.
        layout: Over processes; one of them if not given. Those that torchrun or Slurm started beyond it become
            data-parallel.
        max_length: Most tokens that are read; the model's own maximum if not given.
        options: Of the engine; see `FoundModel`.

    Raises:
        InputError: If the checkpoint is not whole, is no model's, has no tokenizer or another one's, or the engine
            cannot run it here.
    """
    path, parallel = Path(path), fill_world(layout or ParallelConfig())
    if engine not in ENGINES:
        raise InputError(f"engine: '{engine}' is unknown; known: {', '.join(ENGINES)}")
    if layout is not None and layout.context_parallel_size * layout.virtual_pipeline_model_parallel_size > 1:
        raise InputError(
            "parallel: an evaluation has no use for context_parallel_size and virtual_pipeline_model_parallel_size; "
            "leave them at 1"
        )
    unknown = sorted(options.keys() - _OPTIONS[engine])
    if unknown:
        raise InputError(f"{unknown[0]}: no option of engine {engine}, which has {', '.join(sorted(_OPTIONS[engine]))}")
    for name, value in options.items():
        if name != "memory_share" and value is not None and value < 1:
            raise InputError(f"{name}: {value} is less than 1")
    kind, architecture = kind_of(path), architecture_of(path)
    if engine == "transformers":
        if kind == NATIVE:
            raise InputError(
                f"engine: transformers reads Hugging Face folders, and {path} is a native checkpoint; write one with "
                f"`prism-nemo export {path} --out DIR`, or choose engine=megatron, which needs none"
            )
        if parallel.world_size > 1:
            raise InputError(
                f"engine: transformers runs in one process, not in {parallel.describe()}; choose engine=megatron"
            )
    else:
        architecture.check_layout(parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    if engine == "vllm":
        from prism_nemo.evaluation.engines.vllm import DEFAULT_SHARE, check_engine

        check_engine(architecture, parallel, options.get("memory_share", DEFAULT_SHARE), max_length)
    found = tokenizer_of(path, tokenizer)
    check_model(architecture, found, max_length)
    return FoundModel(path, kind, architecture, found, engine, parallel, max_length, dict(options))


def kind_of(path: Path) -> str:
    """Whether a path is a native checkpoint or a Hugging Face folder.

    Raises:
        InputError: If it is neither, or the checkpoint is not whole; with what to do.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; expected a prism-nemo checkpoint or a Hugging Face folder")
    if (path / MANIFEST).is_file():
        read_manifest(path)
        return NATIVE
    if (path / "config.json").is_file():
        return HUGGINGFACE
    if ".tmp-" in path.name or (path / ".metadata").exists() or any(path.glob("*.distcp")):
        raise InputError(
            f"{path}: a checkpoint that was not written to its end ({MANIFEST} is missing); use another one of the run"
        )
    latest = find_latest(path / "checkpoints") or find_latest(path)
    if latest is not None:
        raise InputError(f"{path}: holds checkpoints and is none itself; name one of them, such as {latest}")
    raise InputError(
        f"{path}: neither a prism-nemo checkpoint ({MANIFEST}) nor a Hugging Face folder (config.json and safetensors)"
    )


def architecture_of(path: Path) -> Architecture:
    """What a checkpoint is; its files are checked, no weight is read.

    Raises:
        InputError: If there is no whole checkpoint.
    """
    if kind_of(path) == NATIVE:
        return read_architecture(path)
    architecture = read_hf_config(path)
    HFReader(path).check(architecture)
    return architecture


def tokenizer_of(path: Path, given: str | Path | None) -> Tokenizer:
    """The tokenizer that was given, else the checkpoint's own.

    Raises:
        InputError: If there is none.
    """
    if given is not None:
        return load_tokenizer(given)
    folder = path / CARRIED if kind_of(path) == NATIVE else path
    if not (folder / "tokenizer.json").is_file():
        old = (folder / "tokenizer.model").is_file()
        raise InputError(
            f"{path}: has no tokenizer ({folder / 'tokenizer.json'} is missing"
            f"{', and tokenizer.model is not read' if old else ''}); name the one that the model was trained with: "
            "--tokenizer DIR"
        )
    return load_tokenizer(folder)


def fill(model: LanguageModel, path: Path, architecture: Architecture) -> None:
    """Read a checkpoint's weights into this rank's part of a model.

    Args:
        model: Of the same function.
        path: Native checkpoint or Hugging Face folder.
        architecture: Of this checkpoint: the names of a folder's tensors are in it.
    """
    if kind_of(path) == NATIVE:
        load(path, model)
    else:
        load_hf_weights(model, architecture, HFReader(path), model.config.tensor_model_parallel_size)


def read_model(path: Path, runtime: Runtime, architecture: Architecture | None = None) -> LanguageModel:
    """This rank's part of a checkpoint's model, without gradients, each weight read straight into it.

    Args:
        path: Native checkpoint or Hugging Face folder.
        runtime: Of this process.
        architecture: Of the checkpoint, where it is known already.

    Raises:
        InputError: If it cannot be read.
    """
    from prism_nemo.models.build import build_model

    architecture = architecture or architecture_of(path)
    model = build_model(architecture, runtime)
    fill(model, path, architecture)
    model.eval()
    return model.requires_grad_(False)


def open_model(
    path: str | Path,
    engine: str = "megatron",
    tokenizer: str | Path | None = None,
    layout: ParallelConfig | None = None,
    max_length: int | None = None,
    **options: Any,
) -> OpenedModel:
    """Find and load a model in this process, which is the only one or one of torchrun's.

    Joins the process group (`prism_nemo.runtime.start`), but for transformers; `prism_nemo.runtime.stop` leaves it.
    Arguments and errors are those of `find_model`; with more than one process, every one of them calls this.
    """
    return load_model(find_model(path, engine, tokenizer, layout, max_length, **options))


def load_model(found: FoundModel) -> OpenedModel:
    """Load what `find_model` found; see `open_model`.

    Raises:
        InputError: If the weights cannot be read, or the number of processes is not the layout's.
    """
    if found.engine == "transformers":
        from prism_nemo.evaluation.engines.transformers import TransformersModel

        plain = TransformersModel(found.path, found.tokenizer, found.max_length, **found.options)
        return OpenedModel(plain, about(found.path))
    runtime = start(found.parallel, seed=0)
    facts = on_main(lambda: about(found.path))
    weights = read_model(found.path, runtime, found.architecture)
    model: EvaluationModel
    if found.engine == "vllm":
        from prism_nemo.evaluation.engines.vllm import VLLMModel

        # Read while the engine is made, and not afterwards.
        with tempfile.TemporaryDirectory(prefix="prism-nemo-") as own:
            folder = Path(on_main(lambda: own))
            model = VLLMModel(
                weights, found.tokenizer, folder, runtime.dtype, max_length=found.max_length, **found.options
            )
            dist.barrier()
    else:
        from prism_nemo.evaluation.engines.megatron import MegatronModel

        model = MegatronModel(weights, found.tokenizer, found.max_length, **found.options)
    return OpenedModel(model, facts)


def about(path: Path) -> dict[str, str]:
    """What results say of a checkpoint; see `OpenedModel`."""
    return {"path": str(path), "kind": kind_of(path), "name": checkpoint_name(path), "hash": fingerprint(path)}


def with_model(work: Callable[..., Any], found: FoundModel, *args: Any) -> Any:
    """Run ``work(opened, *args)`` in the processes of the model's layout.

    They are those that torchrun or Slurm started; else they are started here, also one, so that the caller's process is
    left as it was.

    Args:
        work: A module-level function; every process calls it.
        found: From `find_model`.
        args: Picklable, the same for every process.

    Returns:
        What rank 0 returned; under torchrun, each process's own.

    Raises:
        PrismError: What a process raised.
    """
    return run(_work, work, found, args, found.parallel)


def _work(work: Callable[..., Any], found: FoundModel, args: tuple[Any, ...], _: ParallelConfig) -> Any:
    opened = load_model(found)
    try:
        return work(opened, *args)
    finally:
        if dist.is_initialized():
            stop()
