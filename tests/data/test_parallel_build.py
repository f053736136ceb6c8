"""The same bytes whatever the workers, shards, kills and restarts; and every token of every document exactly once."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset
from small_text import words, write_jsonl

from prism_nemo.data import tokenise, units
from prism_nemo.data.build import build_mixture, build_shard, load_manifest
from prism_nemo.data.mixture import Decontaminate, Deduplicate, Mixture, Source
from prism_nemo.data.mixture_file import load_mixture
from prism_nemo.data.part import Part
from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.errors import InputError, PrismError

EVALUATION = "the quick brown fox jumps over the lazy dog while seven wizards quietly brew a potion"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A mixture file over three kinds of files, with repeated, filtered, contaminated, empty and broken documents.

    One source has a loss mask.
    """
    rng = random.Random(1)
    rows = [{"text": words("abcdef", rng.randint(1, 60), i), "score": i % 5} for i in range(300)]
    rows[7]["text"] = words("abcdef", 60, 999)
    rows[41]["text"] = rows[3]["text"]
    rows[251]["text"] = rows[7]["text"] + " more"
    rows[121]["text"] = f"start {EVALUATION.upper()} end"
    lines = [json.dumps(row) for row in rows]
    lines[200] = lines[200][:10]
    lines[100] = ""
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for i in range(30):
        (tmp_path / f"t{i:02}.txt").write_text(words("xyz", 40, 5) if i == 20 else words("xyz", 40, i))
    write_jsonl(tmp_path / "held.jsonl", [rows[11]["text"], words("uvw", 30, 1)])
    turns = [{"q": words("abc", 9, i), "a": words("xyz", 30 - i % 30, i), "x": words("uv", 20, i)} for i in range(90)]
    turns[60] = turns[30]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, turns)))
    write_jsonl(tmp_path / "eval.jsonl", ["short", EVALUATION])
    path = tmp_path / "m.yaml"
    path.write_text(
        "name: m\nretention: none\ndeduplicate: {near: 0.8}\ndecontaminate: {against: [eval.jsonl]}\nsources:\n"
        '  - {name: a, domain: x, paths: [a.jsonl], weight: 2, filter: "score >= 1", max_bad: 1}\n'
        "  - {name: t, domain: y, paths: ['t*.txt'], weight: 1}\n"
        '  - {name: q, domain: z, weight: 1, inputs: [{paths: [q.jsonl], template: "{q}: {a}", loss: [a]}, '
        "{paths: [q.jsonl], text_field: x}]}\n"
        "  - {name: held, domain: y, paths: [held.jsonl], weight: 0}\n"
    )
    return path


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 3000)


def test_one_two_and_four_workers_write_the_same_bytes(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for workers in (1, 2, 4):
        manifest = build_mixture(load_mixture(corpus), tokenizer, tmp_path / str(workers), workers=workers)
    one = contents(tmp_path / "1")
    assert one == contents(tmp_path / "2") == contents(tmp_path / "4")
    report = manifest.source("a").report
    assert report["duplicates"] == {"exact": 2, "near": 1}
    places = [Path(entry["at"]).name for entry in report["duplicate_examples"]]
    assert places == ["a.jsonl:12", "a.jsonl:42", "a.jsonl:252"]
    assert report["duplicate_examples"][0]["source"] == "held"
    assert report["contaminated_by"] == {str(corpus.parent / "eval.jsonl"): 1}
    assert Path(report["contaminated"][0]["at"]).name == "a.jsonl:122"
    assert report["bad"]["not JSON"]["first"].startswith(f"{corpus.parent / 'a.jsonl'}:201: ")
    assert report["empty"] == 1
    assert manifest.source("t").report["duplicates"] == {"exact": 1}
    assert manifest.source("held").report["duplicates"] == {}
    q = manifest.source("q")
    assert q.report["duplicates"] == {"exact": 2}
    mask = np.frombuffer(one[f"{q.prefix}.loss"], np.uint8)
    assert (len(mask), int(mask.sum())) == (q.tokens, q.loss_tokens)
    assert 0 < int(mask.sum()) < q.tokens


def test_the_default_sources_are_cut_in_units_so_that_workers_have_something_to_share(corpus: Path) -> None:
    assert len(list(units.units_of(load_mixture(corpus).sources[0].all_inputs()[0]))) > 10


def test_shards_joined_give_the_bytes_of_one_build(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    mixture = load_mixture(corpus)
    build_mixture(mixture, tokenizer, tmp_path / "whole")
    done = [build_shard(mixture, tokenizer, tmp_path / "out", (i, 3)) for i in (2, 0)]
    with pytest.raises(InputError, match="no finished build"):
        load_manifest(tmp_path / "out")
    made: list[Path] = []
    finish = tokenise.PartWriter.finish

    def count(self: Any, report: dict[str, Any]) -> None:
        made.append(self.path)
        finish(self, report)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenise.PartWriter, "finish", count)
        build_mixture(mixture, tokenizer, tmp_path / "out")
    total = sum(len(list(units.units_of(item))) for s in mixture.sources for item in s.all_inputs())
    assert len(made) == total - sum(done)  # the missing shard alone
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    done = [build_shard(mixture, tokenizer, tmp_path / "all", (i, 3)) for i in range(3)]
    assert sum(done) == total
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenise, "PartWriter", None)  # the join tokenises nothing
        build_mixture(mixture, tokenizer, tmp_path / "all")
    assert contents(tmp_path / "all") == contents(tmp_path / "whole")
    with pytest.raises(InputError, match="--shard 3/3"):
        build_shard(mixture, tokenizer, tmp_path / "out", (3, 3))


def test_kept_parts_let_only_the_changed_stretch_be_done_again(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture, out = load_mixture(corpus), tmp_path / "out"
    build_mixture(mixture, tokenizer, out, keep_parts=True)
    with open(corpus.parent / "a.jsonl", "a") as stream:
        stream.write('\n{"text": "added at the end", "score": 3}\n')
    before = {file: file.stat().st_mtime_ns for file in (out / "parts").iterdir()}
    build_mixture(mixture, tokenizer, out, keep_parts=True)
    after = {file: file.stat().st_mtime_ns for file in (out / "parts").iterdir()}
    assert len(set(after.items()) - set(before.items())) == 1
    build_mixture(mixture, tokenizer, tmp_path / "fresh")
    parts = {name for name in contents(out) if name.startswith("parts")}
    assert parts
    assert {name: data for name, data in contents(out).items() if name not in parts} == contents(tmp_path / "fresh")


@pytest.mark.parametrize("change", ["evaluation", "filter", "template", "loss", "tokenizer", "max_document_bytes"])
def test_a_kept_part_is_not_taken_when_what_decided_its_content_has_changed(
    change: str, corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    mixture, out = load_mixture(corpus), tmp_path / "out"
    build_mixture(mixture, tokenizer, out, keep_parts=True)
    source = mixture.sources[0]
    if change == "evaluation":
        rows = (corpus.parent / "a.jsonl").read_text().split("\n")
        write_jsonl(corpus.parent / "eval.jsonl", [json.loads(rows[7])["text"]])
    elif change == "filter":
        source.filter = ["score >= 3"]
    elif change == "template":
        source.template = "{text}!"
    elif change == "loss":
        mixture.sources[2].inputs[0].loss = ["q"]
    elif change == "tokenizer":
        changed = Tokenizer(tokenizer._inner, tokenizer.path, "0" * 64, tokenizer.token_id("<pad>") or 0, 0)
        tokenizer = changed
    else:
        source.max_document_bytes, source.max_bad = 150, 1000
    build_mixture(mixture, tokenizer, out, keep_parts=True)
    build_mixture(mixture, tokenizer, tmp_path / "fresh")
    found = {name: data for name, data in contents(out).items() if not name.startswith("parts")}
    assert found == contents(tmp_path / "fresh")


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_9_at_any_time_leaves_nothing_that_opens_and_the_next_run_ends_with_the_same_bytes(
    workers: int, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 20_000)
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", [words("abcdef", 100, i) for i in range(400)])
    path = tmp_path / "m.yaml"
    path.write_text(
        "name: m\nretention: none\ndeduplicate: exact\nsources:\n"
        "  - {name: a, domain: x, paths: [a.jsonl], weight: 1}\n"
        '  - {name: b, domain: x, paths: [b.jsonl], weight: 1, template: "{text} and more", loss: [text]}\n'
    )
    (tmp_path / "b.jsonl").write_text(
        words("x", 3, 1).join(['{"text": "', '"}\n']) + (tmp_path / "a.jsonl").read_text()
    )
    build_mixture(load_mixture(path), tokenizer, tmp_path / "whole")
    out = tmp_path / "out"
    command = [sys.executable, str(Path(__file__).with_name("build_process.py")), str(path), str(tokenizer.path)]
    kills = 0
    for line_to_die_at in (1, 2, 4, 7, 9):
        process = subprocess.Popen([*command, str(out), str(workers)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(line_to_die_at):
            if not process.stdout.readline():
                break
        process.send_signal(signal.SIGKILL)
        kills += process.wait(60) == -signal.SIGKILL
        for file in (file for file in out.rglob("*.part") if not file.name.startswith(".tmp-")):
            Part(file)  # whole
        if not (out / "manifest.json").exists():
            with pytest.raises(InputError, match="no finished build"):
                load_manifest(out)
        for item in out.glob("*.json"):
            if item.name != "manifest.json":
                record = json.loads(item.read_text())
                assert len(IndexedDataset(str(item.with_suffix("")))) == record["documents"]
                if record["name"] == "b":
                    assert item.with_suffix(".loss").stat().st_size == record["tokens"]
    assert kills >= 2
    build_mixture(load_mixture(path), tokenizer, out)
    assert contents(out) == contents(tmp_path / "whole")


def test_leftovers_that_their_writer_removes_meanwhile_are_no_error(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker of a build that was killed is still at work for a moment, and gives up or renames what it writes."""
    out = tmp_path / "out"
    (out / "parts").mkdir(parents=True)
    leftovers = [out / ".tmp-host-1-a.bin", out / "parts" / ".tmp-host-1-a.part"]
    for leftover in leftovers:
        leftover.write_bytes(b"half")
    remove, vanished = Path.unlink, []

    def just_before(path: Path, missing_ok: bool = False) -> None:
        if path in leftovers:
            vanished.append(path)
            remove(path)
        remove(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", just_before)
    build_mixture(load_mixture(corpus), tokenizer, out)
    assert sorted(vanished) == leftovers


def test_workers_end_when_their_parent_is_killed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [words("abcdef", 100, i) for i in range(3000)])
    path = tmp_path / "m.yaml"
    path.write_text("name: m\nretention: none\nsources:\n  - {name: a, domain: x, paths: [a.jsonl], weight: 1}\n")
    command = [sys.executable, str(Path(__file__).with_name("build_process.py")), str(path), str(tokenizer.path)]
    process = subprocess.Popen([*command, str(tmp_path / "out"), "2"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(children) >= 2
    process.kill()
    process.wait(60)
    deadline = time.monotonic() + 30
    while any(_runs(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_runs(pid) for pid in children)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_second_build_in_the_folder_is_refused_while_the_first_one_runs(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    mixture, out = load_mixture(corpus), tmp_path / "out"
    tried = []

    def second(_: Any) -> None:
        if not tried:
            tried.append(1)
            with pytest.raises(InputError, match=rf"another build is at work here \(process {os.getpid()} on "):
                build_mixture(mixture, tokenizer, out)
            with pytest.raises(InputError, match="another build"):
                build_shard(mixture, tokenizer, out, (0, 2))

    build_mixture(mixture, tokenizer, out, watch=second)
    assert tried
    assert not (out / ".lock").exists()
    build_mixture(mixture, tokenizer, out)


def test_shards_share_the_folder_and_keep_a_whole_build_out(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    mixture, out = load_mixture(corpus), tmp_path / "out"
    tried = []

    def other(_: Any) -> None:
        if not tried:
            tried.append(1)
            build_shard(mixture, tokenizer, out, (1, 2))
            with pytest.raises(InputError, match="another build"):
                build_mixture(mixture, tokenizer, out)

    build_shard(mixture, tokenizer, out, (0, 2), watch=other)
    assert tried
    build_mixture(mixture, tokenizer, out)


def test_the_lock_of_a_process_that_died_is_free(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.lock").write_text("process 1 on elsewhere\n")
    build_mixture(load_mixture(corpus), tokenizer, tmp_path / "out")
    with open(tmp_path / "out/.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another build"):
            build_mixture(load_mixture(corpus), tokenizer, tmp_path / "out")


def test_a_worker_that_is_killed_is_a_message(tokenizer: Tokenizer, tmp_path: Path) -> None:
    class Deadly(Tokenizer):
        def __reduce__(self) -> Any:
            return os._exit, (9,)

    deadly = Deadly(tokenizer._inner, tokenizer.path, tokenizer.sha256, tokenizer.eos_id, tokenizer.pad_id)
    file = write_jsonl(tmp_path / "a.jsonl", ["aa"])
    with pytest.raises(PrismError, match="worker process was killed"):
        build_mixture(Mixture("m", [Source("s", "d", [str(file)], 1.0)]), deadly, tmp_path / "out", workers=2)


def test_the_error_is_that_of_the_first_document_whichever_worker_was_first(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    lines = ['{"text": "aa bb cc"}'] * 2000
    for number in (400, 900, 1900):
        lines[number - 1] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    mixture = Mixture("m", [Source("s", "d", [str(tmp_path / "a.jsonl")], 1.0)])
    for workers in (1, 3):
        with pytest.raises(InputError, match=r"a\.jsonl:400: "):
            build_mixture(mixture, tokenizer, tmp_path / "out", workers=workers)


def test_a_changed_rule_or_evaluation_set_causes_a_rebuild(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    everything = ("a", "t", "q", "held")
    assert build_mixture(load_mixture(corpus), tokenizer, out).rebuilt == everything
    assert build_mixture(load_mixture(corpus), tokenizer, out).rebuilt == ()
    write_jsonl(corpus.parent / "eval.jsonl", [EVALUATION + " and more of it"])
    assert build_mixture(load_mixture(corpus), tokenizer, out).rebuilt == everything
    mixture = load_mixture(corpus)
    mixture.sources[0].filter = ["score >= 2"]
    # `a` comes before `t` and `q`, and what is left of these depends on what is in `a`.
    assert build_mixture(mixture, tokenizer, out).rebuilt == ("a", "t", "q")
    mixture.deduplicate = Deduplicate(True, None)
    assert build_mixture(mixture, tokenizer, out).rebuilt == everything
    mixture.deduplicate = None
    assert build_mixture(mixture, tokenizer, out).rebuilt == everything
    mixture.sources[0].filter = ["score >= 1"]
    assert build_mixture(mixture, tokenizer, out).rebuilt == ("a",)
    assert {file.name.split("-")[0] for file in out.iterdir()} == {"a", "t", "q", "held", "manifest.json"}


def test_an_unchanged_source_still_counts_as_seen(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    mixture, out = load_mixture(corpus), tmp_path / "out"
    build_mixture(mixture, tokenizer, out)
    (corpus.parent / "t05.txt").write_text(json.loads((corpus.parent / "a.jsonl").read_text().split("\n")[1])["text"])
    manifest = build_mixture(mixture, tokenizer, out)
    assert manifest.rebuilt == ("t", "q")
    assert manifest.source("t").report["duplicate_examples"][0]["source"] == "a"


TEXTS = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=60), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=TEXTS, unit=st.integers(1, 400), batch=st.integers(1, 200), shards=st.integers(1, 4), exact=st.booleans())
def test_every_token_of_every_document_exactly_once_and_in_order(
    texts: list[str],
    unit: int,
    batch: int,
    shards: int,
    exact: bool,
    tokenizer: Tokenizer,
) -> None:
    kept = [text for text in texts if text.strip()]
    if not kept:
        return
    expected = list(dict.fromkeys(kept)) if exact else kept
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "UNIT_BYTES", unit)
        patch.setattr("prism_nemo.data.build._BATCH_CHARACTERS", batch)
        file = Path(folder) / "a.jsonl"
        file.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), encoding="utf-8")
        mixture = Mixture("m", [Source("s", "d", [str(file)], 1.0)], deduplicate=Deduplicate() if exact else None)
        if shards > 1:
            for i in range(shards):
                build_shard(mixture, tokenizer, Path(folder) / "out", (i, shards))
        manifest = build_mixture(mixture, tokenizer, Path(folder) / "out")
        stored = IndexedDataset(manifest.prefix("s"))
        assert [stored[i].tolist() for i in range(len(stored))] == [
            [*tokenizer.encode(text), tokenizer.eos_id] for text in expected
        ]
        report = manifest.source("s").report
        assert report["read"] == len(texts)
        assert report["empty"] == len(texts) - len(kept)
        assert sum(report["duplicates"].values()) == len(kept) - len(expected)


def test_a_mixture_made_in_python_can_ask_for_everything(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ["aa bb", "aa bb", EVALUATION.title()])
    evaluation = write_jsonl(tmp_path / "e.jsonl", [EVALUATION])
    mixture = Mixture("m", [Source("s", "d", [str(file)], 1.0)], None, Deduplicate(), Decontaminate([str(evaluation)]))
    manifest = build_mixture(mixture, tokenizer, tmp_path / "out")
    assert manifest.source("s").documents == 1
    assert manifest.decontaminate is not None
    assert (manifest.decontaminate["items"], manifest.decontaminate["ngram"]) == (1, 13)
    assert load_manifest(tmp_path / "out") == manifest
    (removed,) = (tmp_path / "out").glob("*.removed.jsonl")
    assert json.loads(removed.read_text())["at"] == f"{file}:3"
