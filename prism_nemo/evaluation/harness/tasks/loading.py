"""Finding the tasks of a benchmark and their questions: on the Hub, in a folder of files, or in the user's own YAML.

`DATA/TASK/SPLIT.jsonl` holds what the Hub has in that split, one JSON object a line, with the Hub's column names. A
folder of YAML files (``--tasks``) goes before lm-eval's own files of the same task names, and may add others.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import lm_eval.tasks
from lm_eval.api.task import ConfigurableTask
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind
from lm_eval.tasks._yaml_loader import load_yaml

from prism_nemo.errors import InputError
from prism_nemo.evaluation.harness.tasks.table import RETENTION, Benchmark

_LM_EVAL_TASKS = Path(lm_eval.tasks.__file__).parent
# Keys of a task's file that name splits, in the order in which lm-eval prefers them.
_ASKED = ("test_split", "validation_split")
_EXAMPLES = ("training_split", "validation_split")
_ALL_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass
class Leaf:
    """One lm-eval task with its questions.

    Attributes:
        name: lm-eval's.
        task: With `docs` in the place of what it would read again and again.
        docs: All questions that are asked, in order.
        digest: Of the questions, of the examples that may stand before them, and of how they are asked.
    """

    name: str
    task: ConfigurableTask
    docs: list[dict[str, Any]]
    digest: str


def choose_benchmarks(names: tuple[str, ...], folder: Path | None) -> list[Benchmark]:
    """The benchmarks of these names; the whole suite if there are none.

    Args:
        names: Of the suite, or of tasks in the user's folder, whose first metric then counts.
        folder: The user's YAML files.

    Raises:
        InputError: A name is unknown or comes twice; the folder has a file that is no task.
    """
    own = _own_tasks(folder) if folder is not None else {}
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(f"--tasks: '{repeated[0]}' is named twice")
    chosen = []
    for name in names or tuple(RETENTION):
        if name in RETENTION:
            chosen.append(RETENTION[name])
        elif name in own:
            chosen.append(_own_benchmark(name, *own[name]))
        else:
            known = ", ".join([*RETENTION, *sorted(own)])
            raise InputError(f"benchmark '{name}' is unknown; known: {known}")
    return chosen


def _own_tasks(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """File and content of each task of the user's folder."""
    if not folder.is_dir():
        raise InputError(f"{folder}: is not a folder of task files (*.yaml)")
    found = {}
    for file in sorted(folder.glob("**/*.yaml")):
        try:
            config = load_yaml(file, resolve_func=True)
        except Exception as error:  # lm-eval itself would leave the file out without a word
            raise InputError(f"{file}: cannot be read as a task: {error}") from error
        if isinstance(config.get("task"), str):  # else a group, a tag, or what other files include
            found[config["task"]] = (file, config)
    return found


def _own_benchmark(name: str, file: Path, config: dict[str, Any]) -> Benchmark:
    """A task of the user's as a benchmark; its first metric and filter count.

    Raises:
        InputError: It has no right and wrong answers.
    """
    kind, metrics = config.get("output_type"), config.get("metric_list") or []
    if kind not in ("multiple_choice", "generate_until"):
        raise InputError(f"{file}: output_type '{kind}' has no right and wrong; run it with lm_eval --model prism_nemo")
    if not metrics:
        raise InputError(f"{file}: metric_list is missing; its first metric is the score")
    filters = config.get("filter_list") or [{"name": "none"}]
    domain = (config.get("metadata") or {}).get("domain", "general")
    chance: Literal["options"] | None = "options" if kind == "multiple_choice" else None
    return Benchmark(name, 0, domain, (name,), "", None, metrics[0]["metric"], filters[0]["name"], chance=chance)


def task_manager(benchmarks: list[Benchmark], folder: Path | None) -> TaskManager:
    """lm-eval's list of the tasks that these benchmarks need (all of its 15,000 files would take many seconds)."""
    places = [_LM_EVAL_TASKS / folder for folder in dict.fromkeys(b.folder for b in benchmarks if b.folder)]
    return TaskManager(include_path=[*places, *([folder] if folder else [])], include_defaults=False)


def leaf_names(manager: TaskManager, name: str) -> list[str]:
    """Names of the single tasks behind a task, tag or group.

    Raises:
        InputError: This version of lm-eval has no such task.
    """
    entry = manager.task_index.get(name)
    if entry is None:
        raise InputError(f"lm-eval has no task '{name}'; lm-eval==0.4.13 is needed")
    if entry.kind is Kind.GROUP:
        config = load_yaml(entry.yaml_path, resolve_func=False)
        members = [member["task"] if isinstance(member, dict) else member for member in config["task"]]
    elif entry.kind is Kind.TAG:
        members = sorted(entry.tags)
    else:
        return [name]
    return [leaf for member in members for leaf in leaf_names(manager, member)]


def load_leaf(manager: TaskManager, name: str, shots: int | None, data: Path | None, seed: int) -> Leaf:
    """Load a task and its questions.

    Args:
        manager: From `task_manager`.
        name: Of a single task.
        shots: Examples before each question; None for what the file says.
        data: Folder of files, or None.
        seed: Added to lm-eval's own seed of few-shot examples.

    Raises:
        InputError: Its questions cannot be had; the message says which file to put where.
    """
    config = load_yaml(manager.task_index[name].yaml_path, resolve_func=False)
    change: dict[str, Any] = {"num_fewshot": (config.get("num_fewshot") or 0) if shots is None else shots}
    wanted = _wanted_files(config, shots, data / name if data is not None else Path("DATA") / name)
    if data is not None and (data / name).is_dir():
        missing = [str(file) for file in wanted.values() if not file.is_file()]
        if missing:
            raise InputError(f"{name}: {' and '.join(missing)}: no such file")
        files = {split: str(data / name / f"{split}.jsonl") for split in _splits(config).values()}
        files = {split: file for split, file in files.items() if Path(file).is_file()}
        change |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        change |= {key: None for key, split in _splits(config).items() if split not in files}
    try:
        with _no_cache():
            random.seed(DEFAULT_RANDOM_SEED)
            loaded = manager.load([{"group": f"only_{name}", "task": [{"task": name, **change}]}])
            task = loaded["tasks"][name]
            # lm-eval reads and shuffles the questions (GPQA its options) anew each time, and relies on a cache on disk
            # for them to be the same when they are asked and when they are judged. Read once, they are, everywhere.
            random.seed(DEFAULT_RANDOM_SEED)
            docs = task.eval_docs
    except ImportError as error:
        raise InputError(f"{name}: needs a package that is not installed: {error}") from error
    except Exception as error:
        raise InputError(_unavailable(name, config, wanted, error)) from error
    frozen = list(docs)
    if not frozen:
        raise InputError(f"{name}: has no questions")
    setattr(task, "test_docs" if task.has_test_docs() else "validation_docs", lambda: docs)
    task.set_fewshot_seed(DEFAULT_OTHER_SEED + seed)
    return Leaf(name, task, frozen, _digest(task, frozen))


@contextmanager
def _no_cache() -> Iterator[None]:
    """Without the cache on disk of mapped datasets: what another run shuffled must not come back."""
    before = datasets.is_caching_enabled()
    datasets.disable_caching()
    try:
        yield
    finally:
        if before:
            datasets.enable_caching()


def _splits(config: dict[str, Any]) -> dict[str, str]:
    """Names of the splits that a task's file speaks of, by its keys."""
    return {key: config[key] for key in _ALL_SPLITS if config.get(key)}


def _wanted_files(config: dict[str, Any], shots: int | None, folder: Path) -> dict[str, Path]:
    """What files a task cannot do without: the questions, and examples where it has none of its own."""
    splits = _splits(config)
    asked = next((splits[key] for key in _ASKED if key in splits), "test")
    names = {"questions": asked}
    count = config.get("num_fewshot") if shots is None else shots
    samples = (config.get("fewshot_config") or {}).get("samples")
    if count and not samples:
        first = splits.get("fewshot_split") or next((splits[key] for key in _EXAMPLES if key in splits), asked)
        names["examples"] = first
    return {what: folder / f"{split}.jsonl" for what, split in names.items()}


def _unavailable(name: str, config: dict[str, Any], wanted: dict[str, Path], error: Exception) -> str:
    source = f"{config.get('dataset_path')} {config.get('dataset_name') or ''}".strip()
    # Errors of the Hub go on for lines; the first one says what happened.
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    files = " and ".join(f"the {what} into {file}" for what, file in wanted.items())
    return (
        f"{name}: its questions ({source}) cannot be had: {type(error).__name__}: {reason}. Put {files}, one JSON "
        "object a line with the columns of that dataset, and name the folder with --data; or write a task file with "
        "`dataset_path: json`"
    )


def _digest(task: ConfigurableTask, docs: list[dict[str, Any]]) -> str:
    """SHA-256 of all that decides what is asked, apart from the model's tokenizer and chat template."""
    digest = hashlib.sha256()
    config = {key: value for key, value in task.dump_config().items() if key != "metadata"}
    # Functions and paths differ from machine to machine; the questions that come out of them are hashed themselves.
    for key in ("dataset_path", "dataset_kwargs"):
        config.pop(key, None)
    digest.update(json.dumps(config, sort_keys=True, default=lambda value: type(value).__name__).encode())
    for rows in (docs, getattr(getattr(task, "sampler", None), "df", [])):
        for row in rows:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        digest.update(b"\0")
    return digest.hexdigest()
