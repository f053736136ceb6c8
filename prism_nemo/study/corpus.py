"""The data of one seed: general text, worked problems, a tokenizer, the study's mixtures and the questions for RL."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from prism_nemo.data.build import build_mixture
from prism_nemo.data.corpora import write_general_corpus
from prism_nemo.data.mixture import Mixture, Retention
from prism_nemo.quickstart.corpus import (
    BASE_DOMAIN_SHARE,
    document_shares,
    mixture_sources,
    train_tokenizer,
    write_documents,
)
from prism_nemo.quickstart.settings import PocketSettings
from prism_nemo.rl.rewards.task import task_named
from prism_nemo.run import write_json
from prism_nemo.study.plan import MIXTURES
from prism_nemo.study.settings import StudySettings


def prepare(folder: Path, settings: StudySettings, seed: int) -> None:
    """Write a seed's data into `folder`; what is complete is kept, what was cut short is made again."""
    done = folder / "done.json"
    if done.is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    raw = folder / "raw"
    raw.mkdir(parents=True)
    general, held_out = write_general_corpus(raw, settings.general_chars)
    pocket = PocketSettings(seed=seed, documents_per_task=settings.documents_per_task)
    documents = write_documents(raw, pocket)
    tokenizer = train_tokenizer(folder / "tokenizer", general, documents, settings.vocab_size)
    for name, tasks in {"base": MIXTURES["mcs"], **MIXTURES}.items():
        replay = {"base": 1 - BASE_DOMAIN_SHARE, "noret": 0.0}.get(name, settings.retention)
        own = {task: documents[task] for task in tasks}
        sources = mixture_sources(general, held_out, own, document_shares(own, tokenizer), replay)
        retention = Retention(replay, ["general"]) if replay else None
        build_mixture(Mixture(name, sources, retention), tokenizer, folder / "tokens" / name)
    for task in MIXTURES["mcs"]:
        rows = [
            {"id": f"{task}-{n}", "question": p.question, "answer": p.answer, "reward": "exact", "domain": task}
            for n, p in enumerate(task_named(task).distinct(settings.pool, "train", seed))
        ]
        path = folder / "questions" / f"{task}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(done, {"seed": seed, "vocab_size": tokenizer.vocab_size})
