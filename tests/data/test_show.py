from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_text import words, write_jsonl
from typer.testing import CliRunner

from prism_nemo import cli
from prism_nemo.data.build import build_mixture, load_manifest
from prism_nemo.data.manifest import SourceShare
from prism_nemo.data.mixture import Mixture, Source
from prism_nemo.data.plan import DataPlan, Drawn, Segment, make_plan
from prism_nemo.data.samples import Samples
from prism_nemo.data.show import limits_broken, realised_tokens, show
from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.errors import InputError


def test_counts_lengths_and_shares(built: Path, tokenizer: Tokenizer, three_sources: Mixture) -> None:
    view = show(load_manifest(built), 20_000, 16)
    assert [s["name"] for s in view["sources"]] == ["abc", "xyz", "uvw", "held"]
    texts = [json.loads(line)["text"] for line in Path(three_sources.sources[0].paths[0]).read_text().splitlines()]
    lengths = [len(tokenizer.encode(text)) + 1 for text in texts]
    first = view["sources"][0]
    assert first["documents"] == len(texts)
    assert first["tokens"] == sum(lengths)
    assert first["median_document"] == np.median(lengths)
    assert first["longest_document"] == max(lengths)
    assert first["planned_share"] == pytest.approx(0.6)
    assert view["sources"][3]["held_out"]
    assert view["sources"][3]["epochs"] == view["sources"][3]["realised_share"] == 0
    assert sum(s["realised_share"] for s in view["sources"]) == pytest.approx(1)
    assert [d["name"] for d in view["domains"]] == ["abc", "xyz", "uvw", "held"]


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
def test_the_realised_share_is_what_training_draws(built: Path, packing: str, tmp_path: Path) -> None:
    """Over whole epochs, so that the tokens of the samples that were read can be counted exactly."""
    manifest, samples = load_manifest(built), 20_000
    plan = make_plan(manifest, seq_length=16, seed=1, packing=packing)
    reader = Samples(manifest, plan, tmp_path)
    reader.prepare(0, samples)
    drawn: Counter[str] = Counter()
    for first in range(0, samples, 100):
        batch = reader.rows(first, 100)
        for number, tokens in zip(batch["sources"].tolist(), batch["text_tokens"].tolist(), strict=True):
            drawn[reader.names[number]] += tokens
    total = sum(drawn.values())
    view = show(manifest, samples * 16, 16, packing)
    for source in view["sources"]:
        assert source["realised_share"] == pytest.approx(drawn[source["name"]] / total, abs=2e-4)
        assert source["train_tokens"] == pytest.approx(drawn[source["name"]], rel=1e-3)
    assert view["packing"] == packing


def test_realised_shares_meet_the_plan_at_one_percent_of_the_budget_of_the_study() -> None:
    shares = [0.05, 0.05, 0.1, 0.07, 0.2, 0.03, 0.1, 0.1375, 0.1375, 0.0775, 0.0475]
    samples = int(26.21e9 * 0.01 / 8192)
    fills = [0.9 + 0.01 * i for i in range(len(shares))]
    sources = tuple(
        Drawn(f"s{i}", f"s{i}-0", share, 10**6, fill) for i, (share, fill) in enumerate(zip(shares, fills, strict=True))
    )
    tokens = realised_tokens(DataPlan(0, 8192, "best_fit", (Segment(0, sources),)), samples)
    total = sum(tokens.values())
    assert max(abs(tokens[drawn.name] / total - drawn.share) for drawn in sources) < 0.001


def test_bad_numbers(built: Path) -> None:
    for tokens, seq_length in ((-1, 8), (float("nan"), 8), (1, 0)):
        with pytest.raises(InputError, match="--tokens"):
            show(load_manifest(built), tokens, seq_length)


def test_the_arithmetic_of_a_source_that_is_repeated_too_often() -> None:
    row = SourceShare("mot", "math", 0.1, 600_000_000, 2_621_000_000, 2_621_000_000 / 600_000_000, 4)
    text = limits_broken([row], 26_210_000_000)
    assert text is not None
    assert "mot: 10.00% of 26,210,000,000 tokens is 2,621,000,000; it has 600,000,000, so 4.37 epochs" in text
    assert "max_epochs is 4; at this share the run may have at most 24,000,000,000 tokens" in text
    assert limits_broken([SourceShare("a", "b", 1, 10, 40, 4.0, 4)], 40) is None


Run = Any


@pytest.fixture
def run() -> Run:
    return lambda *arguments: CliRunner().invoke(cli.app, [str(item) for item in arguments])


def write_mixture(folder: Path) -> Path:
    write_jsonl(folder / "a.jsonl", [words("abc", 20, i) for i in range(20)])
    write_jsonl(folder / "b.jsonl", [words("uvw", 20, i) for i in range(20)] + [""])
    path = folder / "m.yaml"
    path.write_text(
        "name: mine\nretention: {share: 0.2, sources: [b]}\nsources:\n"
        "  - {name: a, domain: maths, paths: [a.jsonl], weight: 0.75, max_epochs: 2}\n"
        "  - {name: b, domain: general, paths: [b.jsonl], weight: 0.25}\n"
    )
    return path


def test_the_command_builds_shards_joins_and_shows(run: Run, tokenizer: Tokenizer, tmp_path: Path) -> None:
    mixture, out = write_mixture(tmp_path), tmp_path / "out"
    build = ["data", "build", mixture, "--tokenizer", tokenizer.path, "--out", out, "--workers", 1]
    for shard in ("0/2", "1/2"):
        done = run(*build, "--shard", shard)
        assert done.exit_code == 0, done.output
        assert f"shard {shard}: " in done.output
    done = run(*build)
    assert done.exit_code == 0, done.output
    again = json.loads(run(*build, "--json").stdout)
    assert (again["mixture"], again["rebuilt"], again["sources"][1]["documents"]) == ("mine", [], 20)
    assert "b: 20 documents" in done.output
    assert "21 read, left out: 1 empty" in done.output
    done = run("data", "show", out, "--seq-length", 8)
    assert done.exit_code == 0, done.output
    for word in ("maths", "general", "75.00%", "25.00%", "of 2", "1 empty", "median", "longest"):
        assert word in done.output
    as_json = json.loads(run("data", "show", out, "--seq-length", 8, "--json").stdout)
    assert as_json["mixture"] == "mine"
    assert as_json["refused"] is None


def test_a_run_above_the_limit_is_refused(run: Run, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("data", "build", write_mixture(tmp_path), "--tokenizer", tokenizer.path, "--out", out, "--workers", 1)
    done = run("data", "show", out, "--tokens", 1e6)
    assert isinstance(done.exception, InputError)
    assert "a: 75.00% of 1,000,000 tokens is 750,000; it has " in str(done.exception)
    done = run("data", "show", out, "--tokens", 1e6, "--json")
    assert isinstance(done.exception, InputError)
    assert "max_epochs is 2" in json.loads(done.stdout)["refused"]


@pytest.mark.parametrize("shard", ["2/2", "a/b", "1", "-1/2"])
def test_a_bad_shard(shard: str, run: Run, tokenizer: Tokenizer, tmp_path: Path) -> None:
    done = run("data", "build", write_mixture(tmp_path), "--tokenizer", tokenizer.path, "--out", tmp_path / "o",
               f"--shard={shard}", "--workers", 1)  # fmt: skip
    assert isinstance(done.exception, InputError)
    assert "--shard" in str(done.exception)


def test_a_build_of_the_first_format_is_still_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ["aa", "bb cc"])
    manifest = build_mixture(Mixture("m", [Source("s", "d", [str(file)], 1.0)]), tokenizer, tmp_path / "out")
    path = tmp_path / "out/manifest.json"
    content = json.loads(path.read_text())
    for name in ("deduplicate", "decontaminate"):
        del content[name]
    del content["sources"][0]["report"]
    content["format"] = 1
    path.write_text(json.dumps(content))
    old = load_manifest(tmp_path / "out")
    assert old.source("s").tokens == manifest.source("s").tokens
    assert show(old, 0, 4)["sources"][0]["longest_document"] > 1
