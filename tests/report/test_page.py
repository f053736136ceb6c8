"""The page of a quickstart says what the run recorded, nothing else, and survives whatever it finds."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fake_run import STAGES, rl_lines, summary, write_metrics

from prism_nemo.errors import InputError
from prism_nemo.report.page import write_report
from prism_nemo.report.read import number

HOSTILE = """<script>alert(1)</script><img src=x onerror="alert(2)">'"&</style></title></svg>{{ 7*7 }}"""
VOID = {"meta", "br", "img", "input", "link", "hr"}


class Reader(HTMLParser):
    """Collects elements, attributes and text, and notes tags that do not close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.unbalanced: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)


def read(page: Path) -> tuple[Reader, str]:
    """Parses a page; returns the parser and the visible text with single spaces."""
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    assert not reader.unbalanced
    assert not reader.open
    return reader, " ".join("".join(reader.text).split())


def table(page: Path, caption: str) -> dict[str, list[str]]:
    """Returns the cells of one table by the name of their row."""
    content = page.read_text(encoding="utf-8")
    found = re.search(rf"<caption>{re.escape(caption)}</caption>(.*?)</table>", content, re.DOTALL)
    assert found, f"no table {caption}"
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', found[1], re.DOTALL)
    return {name: re.findall(r"<td>(.*?)</td>", cells, re.DOTALL) for name, cells in rows}


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Returns the path of every value inside a JSON value, the inner ones included."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from paths(inner, (*path, key))


def changed(content: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """Returns a copy with one value replaced."""
    copied = copy.deepcopy(content)
    place: Any = copied
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return copied


def without(content: dict[str, Any], *path: str) -> dict[str, Any]:
    """Returns a copy without one value."""
    copied = copy.deepcopy(content)
    place: Any = copied
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return copied


def gaps(page: Path) -> dict[str, str]:
    """Returns what was not measured: what, and the command that measures it."""
    content = page.read_text(encoding="utf-8")
    listed = content[content.index('id="gaps"') :]
    listed = listed[: listed.index("</ul>")] if "<ul" in listed else ""
    found = re.findall(r"<li>(.*?): <code>(.*?)</code></li>", listed)
    return {what: command for whats, command in found for what in whats.split("; ")}


def test_complete_run_is_one_small_file_and_what_is_missing_is_listed(make_run: Callable[..., Path]) -> None:
    directory = make_run()
    page = write_report(directory)
    assert page == directory / "report.html"
    assert page.stat().st_size < 2_000_000
    assert not list(directory.glob(".report*")), "the file beside it was left behind"
    labels = ("Base", "Mid-trained", "Longer mid-training", "RL on base", "RL on mid-trained")
    # What no quickstart measures, and nothing else.
    assert set(gaps(page)) == {
        *(f"{label}: MFU" for label in labels),
        "What was kept and what was lost, question by question (retention)",
        "The path between the models",
        "The commit of the code",
    }


def test_the_parts_are_in_the_order_in_which_people_ask(make_run: Callable[..., Path]) -> None:
    content = write_report(make_run()).read_text(encoding="utf-8")
    asked = re.findall(r"<h2>(.*?)</h2>", content[content.index("<main>") :])
    assert asked == [
        "What was done", "Did it work?", "What was lost?", "What it cost", "How it learned", "What changed inside",
        "Can it be trusted?",
    ]  # fmt: skip


def test_every_figure_of_a_quickstart_is_there(make_run: Callable[..., Path]) -> None:
    content = write_report(make_run()).read_text(encoding="utf-8")
    named = set(re.findall(r'role="img" aria-label="([^"]*)"', content))
    assert {
        "Where each model comes from", "Mixture: midtraining", "quickstart (test): plain mean of the tasks",
        *(f"quickstart (test), {task}" for task in ("arithmetic", "code_execution", "science_choice")),
        "Loss on general text", "Change of the loss by domain", "Parts of the quickstart", "Training loss", "Reward",
        "Response length", "Entropy", "Live groups", "Parity gap",
        *(f"Reward: {task}" for task in ("arithmetic", "code_execution", "science_choice")),
        "Base → Mid-trained: weights that moved by more than 1%", "Distance travelled, by component",
        "Similarity of representations (CKA) on general text",
    } <= named  # fmt: skip
    for found in ("Expected effects", "What they write", "To repeat the quickstart"):
        assert f">{found}</h3>" in content, found


def test_nothing_is_loaded_from_outside(make_run: Callable[..., Path]) -> None:
    reader, _ = read(write_report(make_run()))
    for tag, attributes in reader.elements:
        assert tag not in ("img", "link", "iframe", "object", "embed", "base")
        for name, value in attributes.items():
            assert name not in ("src", "srcset", "xlink:href")
            assert not name.startswith("on")
            if name == "href":
                assert value is not None
                assert value.startswith("#")
    policy = next(a["content"] for t, a in reader.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy


def test_links_inside_the_page_lead_somewhere(make_run: Callable[..., Path]) -> None:
    reader, _ = read(write_report(make_run()))
    names = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
    assert len(names) == len(set(names))
    assert {a["href"] for t, a in reader.elements if t == "a"} <= {f"#{name}" for name in names}


def test_every_picture_has_a_name_and_a_description(make_run: Callable[..., Path]) -> None:
    page = write_report(make_run())
    pictures = re.findall(r"<svg[^>]*>.{0,40}", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(pictures) > 10
    for picture in pictures:
        assert re.search(r'role="img" aria-label="[^"]+"', picture)
        assert "<desc>" in picture


def test_numbers_are_those_of_the_input(make_run: Callable[..., Path]) -> None:
    page = write_report(make_run())
    _, text = read(page)
    content = summary()
    accuracy = {
        (task, label): cells
        for task in content["stages"]["base"]["tasks"]
        for label, cells in table(page, f"quickstart (test), {task}").items()
    }
    assert len(accuracy) == 15
    for (task, label), cells in accuracy.items():
        key = {
            "Base": "base",
            "Mid-trained": "midtrained",
            "Longer mid-training": "midtrained_longer",
            "RL on base": "base_rl",
            "RL on mid-trained": "prism_rl",
        }[label]
        recorded = content["stages"][key]["tasks"][task]
        assert float(cells[0].rstrip("%")) == pytest.approx(100 * recorded["accuracy"], abs=0.0501)
        low, high = (float(end) for end in cells[1].rstrip("%").split(" to "))
        assert (low, high) == pytest.approx([100 * end for end in recorded["ci95"]], abs=0.0501)
        assert cells[2] == str(recorded["n"])
        assert float(cells[3].rstrip("%")) == pytest.approx(100 * recorded["greedy_accuracy"], abs=0.0501)
        greedy = [float(end) for end in cells[4].rstrip("%").split(" to ")]
        assert greedy == pytest.approx([100 * end for end in recorded["greedy_ci95"]], abs=0.0501)
        assert float(cells[5].rstrip("%")) == pytest.approx(100 * recorded["format_rate"], abs=0.0501)
        assert float(cells[6]) == pytest.approx(recorded["mean_response_tokens"], abs=0.0501)
    losses = table(page, "Loss on general text")
    assert losses["RL on mid-trained"] == ["3.262", "+0.061", "+6.3%"]
    assert losses["Base"] == ["3.201", "+0.000", "+0.0%"]
    parts = table(page, "Parts of the quickstart")
    assert parts["Base"][:5] == ["25.0 s", "1 min 41 s", "tp1 pp1 dp2", "1,024,000", "10,119"]
    moved = table(page, "Base → Mid-trained: weights that moved by more than 1%")
    assert moved["mlp: observed"] == ["86.5%", "0.1729"]
    assert moved["all weights: observed"] == ["91.0%", "0.1942"]
    assert table(page, "Distance travelled, by component")["Base → Mid-trained"][1] == "0.1729"
    cka = table(page, "Similarity of representations (CKA) on general text")["Mid-trained → RL on mid-trained"]
    assert (cka[2], cka[-1]) == ("0.9958", "0.9916")
    mean = table(page, "quickstart (test): plain mean of the tasks")
    assert mean["Mid-trained"][0] == "43.5%"
    assert table(page, "Change of the loss by domain")["Mid-trained"] == ["3.247", "3.200", "3.200"]
    assert table(page, "Mixture: midtraining")["short programs"] == ["code", "25.0%", "256,000", "1.2"]
    assert "8 min 32 s" in text
    assert "3.1 GB" in text


def test_headline_is_the_mean_over_the_task_families(make_run: Callable[..., Path]) -> None:
    _, text = read(write_report(make_run()))
    # (3.12 + 1.95 + 23.83) / 3, (47.27 + 38.67 + 44.53) / 3, (78.13 + 60.16 + 62.89) / 3
    assert "Mid-training raised mean accuracy over 3 task families from 9.6% to 43.5%" in text
    assert "RL on top of it raised mean accuracy over 3 task families from 43.5% to 67.1%" in text
    assert "The same RL straight on the base reached 11.6%." in text
    assert "a rise, so some of it was forgotten" in text


def test_headline_does_not_hide_a_loss_or_noise(make_run: Callable[..., Path]) -> None:
    content = summary()
    stages = content["stages"]
    stages["prism_rl"]["tasks"] = copy.deepcopy(stages["base"]["tasks"])
    stages["base_rl"]["tasks"] = copy.deepcopy(stages["base"]["tasks"])
    stages["midtrained"]["tasks"]["arithmetic"] = copy.deepcopy(stages["base"]["tasks"]["arithmetic"])
    stages["midtrained"]["tasks"]["science_choice"] = copy.deepcopy(stages["base"]["tasks"]["science_choice"])
    stages["midtrained"]["tasks"]["code_execution"] = {"accuracy": 0.0234, "ci95": [0.005, 0.05], "n": 256}
    stages["prism_rl"]["retention_loss"] = 3.1
    _, text = read(write_report(make_run(content)))
    assert "which is within the noise" in text
    assert "−0.101 nats" in text
    assert "a fall, so nothing was lost by this measure" in text
    stages["prism_rl"]["tasks"]["science_choice"] = {"accuracy": 0.02, "ci95": [0.01, 0.04], "n": 256}
    _, text = read(write_report(make_run(content)))
    assert "RL on top of it lowered mean accuracy" in text


@pytest.mark.parametrize("content", [{"stages": None}, {"stages": {"base": None}}, {"stages": [], "cka": 3}])
def test_empty_summary_gives_a_page_that_says_so(tmp_path: Path, content: dict[str, Any]) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(content), encoding="utf-8")
    page = write_report(tmp_path)
    _, text = read(page)
    assert text.count("not measured") > 15
    assert not re.search(r"\d\.\d%", text), "a share appeared out of nothing"
    assert re.search(r"Retention not measured", text)
    assert {"RL on base: the whole stage", "Expected effects", "Sample responses", "Total time"} <= set(gaps(page))


def test_each_missing_key_is_named(make_run: Callable[..., Path]) -> None:
    content = summary()
    cases = {
        ("stages", "base_rl"): "RL on base: scores",
        ("stages", "prism_rl", "retention_loss"): "RL on mid-trained: retention loss",
        ("stages", "base", "tasks", "arithmetic", "accuracy"): "Base: accuracy on arithmetic",
        ("stages", "base", "tasks", "arithmetic", "ci95"): "Base: interval of the accuracy on arithmetic",
        ("stages", "base", "tasks", "arithmetic", "greedy_accuracy"): "Base: greedy accuracy on arithmetic",
        ("weights", "base->base_rl"): "Weight change Base → RL on base",
        ("cka", "base/midtrained"): "CKA Base → Mid-trained",
        ("peak_rss_gb",): "Peak memory",
        ("seconds",): "Total time",
        ("conversion",): "Conversion checks",
        ("hf_export",): "The exported Hugging Face checkpoint",
        ("expected",): "Expected effects",
        ("mixtures",): "The mixtures of the training data",
        ("samples",): "Sample responses",
        ("versions",): "Versions of the software",
        ("timeline",): "The time line of the parts",
    }
    for path, name in cases.items():
        page = write_report(make_run(without(content, *path)))
        reader, text = read(page)
        assert name in gaps(page), path
        assert "not measured" in text.replace("What was not measured", ""), path
        assert reader.elements


def test_a_missing_value_is_not_shown_as_zero(make_run: Callable[..., Path]) -> None:
    content = without(summary(), "stages", "base", "tasks", "arithmetic", "accuracy")
    page = write_report(make_run(content))
    assert table(page, "quickstart (test), arithmetic")["Base"][0] == "not measured"
    _, text = read(page)
    assert "over 2 task families from 12.9% to 41.6%" in text, "the mean is over other families before and after"


@pytest.mark.parametrize("value", [None, "text", -1, 10**400, [1], {"a": 1}, HOSTILE], ids=lambda value: str(value)[:9])
def test_no_value_of_a_wrong_kind_breaks_the_page(tmp_path: Path, value: Any) -> None:
    content = summary()
    # One path of each kind is enough: stages, tasks and list entries differ in name only.
    picked = {(len(path), path[0], path[-1]): path for path in paths(content)}.values()
    assert len(picked) > 90
    for path in picked:
        (tmp_path / "summary.json").write_text(json.dumps(changed(content, path, value)), encoding="utf-8")
        page = write_report(tmp_path).read_text(encoding="utf-8")
        assert "<script>alert" not in page, path
        assert ">nan<" not in page, path


def test_a_number_that_is_no_share_is_refused_with_a_warning(make_run: Callable[..., Path]) -> None:
    content = changed(summary(), ("stages", "base", "tasks", "arithmetic", "accuracy"), 3.12)
    page = write_report(make_run(content))
    _, text = read(page)
    assert "Base: accuracy on arithmetic is 3.12, which is not a share between 0 and 1" in text
    assert "312.0%" not in text


def test_hostile_text_is_escaped_everywhere(make_run: Callable[..., Path]) -> None:
    content = summary()
    content["command"] = content["machine"] = content["seed"] = HOSTILE
    content["versions"] = {HOSTILE: HOSTILE}
    content["model"] = {"family": HOSTILE, HOSTILE: HOSTILE}
    content["stages"][HOSTILE] = {"tasks": {HOSTILE: {"accuracy": 0.5}}, "domain_losses": {HOSTILE: 1.0}}
    content["weights"][f"base->{HOSTILE}"] = {"relative_l2": 0.1, "by_component": {HOSTILE: {"relative_l2": 0.1}}}
    content["cka"][HOSTILE] = {"min": 0.5, "by_layer": [1, 0.5]}
    content["conversion"] = [{"check": HOSTILE, "max_abs_logit_diff": 1, "tolerance": 2, "passed": True}]
    content["hf_export"]["path"] = HOSTILE
    content["expected"] = [{"claim": HOSTILE, "holds": False, "detail": HOSTILE}]
    content["mixtures"] = {HOSTILE: [{"source": HOSTILE, "domain": HOSTILE, "weight": 1.0}]}
    content["timeline"] = [{"stage": HOSTILE, "start": 0, "seconds": 1, "layout": HOSTILE, "note": HOSTILE}]
    sample = {"task": HOSTILE, "prompt": HOSTILE, "response": HOSTILE, "answer": HOSTILE, "reward": 0.5}
    content["samples"] = {"base": [sample], HOSTILE: [sample]}
    directory = make_run(content)
    write_metrics(directory, "prism_rl", [{"step": 1, "reward_by_task": {HOSTILE: 0.5}}])
    page = write_report(directory)
    reader, text = read(page)
    tags = {tag for tag, _ in reader.elements}
    assert "img" not in tags
    assert sum(tag == "script" for tag, _ in reader.elements) == 1
    assert not [name for _, attributes in reader.elements for name in attributes if name.startswith("on")]
    assert "alert(1)" in text
    assert "{{ 7*7 }}" in text, "the text went through the template engine"


def test_control_characters_and_surrogates_do_not_reach_the_page(make_run: Callable[..., Path]) -> None:
    content = summary()
    content["samples"]["prism_rl"][0]["response"] = "a\x00b\x1b[31mc\u202ed\ud800e\ttab"
    content["command"] = "run\x00\u2066\ud800"
    page = write_report(make_run(content)).read_bytes().decode("utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page)
    assert "a\ufffdb\ufffd[31mc\ufffdd\ufffde\ttab" in page


def test_long_samples_are_cut_and_the_page_stays_small(make_run: Callable[..., Path]) -> None:
    content = summary()
    prompts = [f"question {place} " + "y" * 9000 for place in range(60)]
    content["samples"] = {
        stage: [
            {"task": "arithmetic", "prompt": prompt, "response": "x" * 20_000, "answer": "1", "reward": 0}
            for prompt in prompts
        ]
        for stage in STAGES
    }
    page = write_report(make_run(content))
    _, text = read(page)
    assert page.stat().st_size < 2_000_000
    assert "24 of 60 recorded prompts" in text
    assert "[…cut, 18,500 more characters]" in text


def test_samples_put_the_stages_side_by_side(make_run: Callable[..., Path]) -> None:
    _, text = read(write_report(make_run()))
    assert "9 of 9 recorded prompts" in text
    assert re.search(
        r"Expected answer: 68 Base reward 0 .*? Mid-trained reward 0 .*? RL on mid-trained reward 1 ", text
    )


def test_cut_off_last_line_is_skipped_and_reported(make_run: Callable[..., Path]) -> None:
    directory = make_run()
    path = directory / "prism_rl" / "metrics.jsonl"
    path.write_text(path.read_text(encoding="utf-8")[:-30], encoding="utf-8")
    page = write_report(directory)
    _, text = read(page)
    assert "prism_rl/metrics.jsonl: the last line is cut off" in text
    assert "base/metrics.jsonl: the last line" not in text
    row = table(page, "Reward")["RL on mid-trained"]
    assert row[:2] == ["1 to 119", "119"]
    assert row[-1] == "0"


def test_unreadable_lines_in_the_middle_are_counted(make_run: Callable[..., Path]) -> None:
    directory = make_run()
    path = directory / "base" / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[3], lines[5] = "{broken", "[1, 2]"
    path.write_bytes("\n".join(lines).encode() + b"\n\n")
    _, text = read(write_report(directory))
    assert "base/metrics.jsonl: 2 unreadable lines skipped." in text
    assert "the last line is cut off" not in text


def test_curves_show_what_was_recorded(make_run: Callable[..., Path]) -> None:
    directory = make_run()
    lines = rl_lines(0.2, 0.8, 100, 9)
    lines[0]["reward"], lines[99]["reward"], lines[50]["reward"] = 0.111, 0.999, float("nan")
    write_metrics(directory, "prism_rl", lines)
    row = table(write_report(directory), "Reward")["RL on mid-trained"]
    assert (row[2], row[6]) == ("0.111", "0.999")
    assert row[4] == "NaN", "a value that is NaN must not be passed over"
    assert row[-1] == "1"


def test_loss_counts_on_along_the_lineage(make_run: Callable[..., Path]) -> None:
    content = write_report(make_run()).read_text(encoding="utf-8")
    chart = content[content.index('aria-label="Training loss"') :]
    chart = chart[: chart.index("</svg>")]
    assert re.search(r"Mid-trained: [\d.]+ at step 800", chart)
    assert re.search(r"Longer mid-training: [\d.]+ at step 1,040", chart)


def test_resumed_run_counts_each_step_once(make_run: Callable[..., Path]) -> None:
    directory = make_run()
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 9.0}, {"step": 2, "loss": 2.0}, {"loss": 1.0}]
    write_metrics(directory, "base", lines)
    row = table(write_report(directory), "Training loss")["Base"]
    assert (row[1], row[6], row[8]) == ("2", "2.000", "3.000")


@pytest.mark.parametrize("value", [True, False, None, "1", math.inf, math.nan, 10**400, [1], {}])
def test_what_is_no_number_is_not_taken_for_one(value: object) -> None:
    assert number(value) is None
    assert number(0) == 0.0


def test_claims_and_checks_are_shown_as_they_came_out(make_run: Callable[..., Path]) -> None:
    content = summary()
    content["conversion"].append({"check": "no flag", "max_abs_logit_diff": 1e-7, "tolerance": 1e-4})
    content["conversion"].append({"check": "TP4", "max_abs_logit_diff": 0.5, "tolerance": 1e-4, "passed": False})
    content["expected"].append({"claim": "an open question", "holds": None})
    _, text = read(write_report(make_run(content)))
    assert "3 of 5 expected effects hold" in text
    assert "5 of 7 checks passed" in text, "two of conversion, that of the export, and one of each RL run"
    assert "✗ does not hold the longer control does not beat mid-training" in text
    assert "? not measured an open question" in text
    assert "? not measured no flag" in text
    assert "✗ failed TP4 largest logit difference 0.5, tolerance 0.0001" in text


def test_a_check_that_contradicts_its_own_numbers_is_failed(make_run: Callable[..., Path]) -> None:
    content = changed(summary(), ("conversion", 0, "max_abs_logit_diff"), 0.25)
    _, text = read(write_report(make_run(content)))
    assert "✗ failed HF -> Megatron TP2" in text
    assert "marked as passed, but its difference exceeds its tolerance" in text
    assert "4 of 5 checks passed" in text


@pytest.mark.parametrize("content", [None, "", "{", "{}", "[1]", '"text"', b"\xff\xfe{", "[" * 100_000])
def test_unusable_summary_is_an_input_error_that_names_the_file(tmp_path: Path, content: str | bytes | None) -> None:
    path = tmp_path / "summary.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as error:
        write_report(tmp_path)
    assert str(path) in str(error.value)
    assert "quickstart" in str(error.value)
    assert ("does not exist" in str(error.value)) == (content is None)
    assert not (tmp_path / "report.html").exists()


def test_a_stage_name_from_the_file_cannot_leave_the_directory(make_run: Callable[..., Path]) -> None:
    content = summary()
    content["stages"]["../outside"] = content["stages"]["base"]
    directory = make_run(content)
    write_metrics(directory.parent, "outside", [{"broken": 1}])
    (directory.parent / "outside" / "metrics.jsonl").write_text("{", encoding="utf-8")
    _, text = read(write_report(directory))
    assert "the last line is cut off" not in text, "a file outside the directory was read"
    assert "the stage ../outside is not shown" in text


def test_colours_of_the_stages_stand_out_from_the_card() -> None:
    css = (Path(__file__).parents[2] / "prism_nemo" / "report" / "page.css").read_text(encoding="utf-8")
    for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL):
        colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{3,6})", block))
        for name in ("base", "midtrained", "longer", "base-rl", "prism-rl", "other"):
            assert contrast(colours[name], colours["card"]) >= 3, name
        for name in ("ink", "quiet"):
            assert contrast(colours[name], colours["page"]) >= 4.5, name
        for name in ("yes", "no", "unknown"):
            assert contrast(colours[name], colours[f"{name}-back"]) >= 4.5, name


def contrast(one: str, other: str) -> float:
    """Returns the contrast ratio of WCAG 2 between two colours."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(digit * 2 for digit in colour[1:])
        parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)
