"""The site: builds without a warning or the network, its code runs, its messages are those of the source."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer
import yaml
from pages import DOCS, ROOT, Block, blocks, pages

from prism_nemo.cli import app
from prism_nemo.commands.reference import reference
from prism_nemo.models import family as families

PYTHON = [block for page in pages() for block in blocks(page) if "runs" in block.clauses]


class Addresses(HTMLParser):
    """Everything that a browser loads by itself for a page, and every link."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "a":
            self.links.append(values.get("href", ""))
        elif tag == "link" and values.get("rel") in ("canonical", "prev", "next"):
            return
        else:
            self.loaded += [values[name] for name in ("src", "href", "srcset", "data") if name in values]


def build(site: Path, docs: Path = DOCS) -> subprocess.CompletedProcess[str]:
    """Build the site as `make docs` does, without a network. (With `--quiet` MkDocs would count no warnings.)"""
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text()) | {"docs_dir": str(docs), "site_dir": str(site)}
    path = site.with_suffix(".yml")
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "https_proxy": "http://127.0.0.1:9"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "site"
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_built_and_in_the_navigation(site: Path) -> None:
    named = str(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    for page in DOCS.glob("*.md"):
        assert (site / f"{page.stem}.html").is_file()
        assert f"'{page.name}'" in named, f"{page.name} is not in the navigation of mkdocs.yml"


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages_found = sorted(path for path in site.glob("*.html") if path.name != "404.html")  # a server's, from its root
    assert len(pages_found) > 20
    outside = set()
    for page in pages_found:
        addresses = Addresses()
        addresses.feed(page.read_text())
        for address in addresses.loaded:
            assert not re.match(r"(https?:)?//", address), f"{page.name} loads {address}"
            if not address.startswith(("data:", "#")):
                assert (page.parent / address.split("?")[0].split("#")[0]).exists(), (
                    f"{page.name}: {address} is missing"
                )
        outside |= {link for link in addresses.links if link.startswith("http")}
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", sheet.read_text()), sheet.name
    print("links that leave the site, not fetched:", *sorted(outside), sep="\n")


@pytest.mark.parametrize("text", ["[x](nowhere.md)", "[x](index.md#nowhere)"])
def test_a_broken_link_fails_the_build(tmp_path: Path, text: str) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    for page in DOCS.glob("*.md"):
        (docs / page.name).write_text(f"# {page.stem}\n")
    (docs / "assets").mkdir()
    for name in ("site.css", "site.js"):
        (docs / "assets" / name).write_text("")
    assert build(tmp_path / "good", docs).returncode == 0
    (docs / "data.md").write_text(f"# data\n\n{text}\n")
    done = build(tmp_path / "bad", docs)
    assert done.returncode != 0
    assert "nowhere" in done.stderr


def test_the_command_reference_is_current() -> None:
    expected = reference(typer.main.get_command(app))
    assert (DOCS / "commands.md").read_text() == expected, "run `make docs`"
    assert "## data build" in expected
    assert "| `--tokenizer` | tokenizer.json or a Hugging Face folder. | required |" in expected


@pytest.mark.parametrize("block", PYTHON, ids=lambda b: b.mark.removeprefix("runs: "))
def test_worked_examples_run(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))  # the example does not stay
    namespace: dict[str, object] = {"__name__": "example"}
    exec(compile(block.text, f"{block.page}:{block.line}", "exec"), namespace)
    if block.mark == "runs: family":
        example = namespace["Example"]()  # type: ignore[operator]
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        config = {**sizes, "num_attention_heads": 4, "model_type": "example", "architectures": ["ExampleForCausalLM"]}
        architecture = example.from_hf(config, "config.json")
        assert architecture.hidden_size == 32
        assert len(example.weight_table(architecture, 2)) > 5
        with pytest.raises(Exception, match="final_logit_softcapping"):
            example.from_hf({**config, "final_logit_softcapping": 30.0}, "config.json")


def test_there_is_an_example_of_each_kind() -> None:
    assert {b.mark for b in PYTHON} == {"runs: family", "runs: reward"}
    files = {b.clauses["file"] for page in pages() for b in blocks(page) if "file" in b.clauses}
    assert files == {"mixture.yaml", "mixtures/pocket.yaml", "mixtures/answers.yaml", "my_recipe.py", "my_rewards.py"}


def messages_of_the_source() -> list[str]:
    """Every text of the package, with a mark where something is filled in."""
    found = []
    for path in (ROOT / "prism_nemo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def quoted_messages() -> list[str]:
    return re.findall(r"\*\*`(.+?)`\*\*", (DOCS / "troubleshooting.md").read_text())


def stands_in(quoted: str, source: list[str]) -> bool:
    """Whether a message is one of the source: `...` stands for what is filled in, or for nothing at either end."""
    words = quoted.split("...")
    parts, longest = [re.escape(part) for part in words], max(words, key=len)
    pattern = re.compile("\0?[^\0]*?\0?".join(parts) if len(parts) > 1 else parts[0], re.S)
    return any(longest in text and pattern.search(text) for text in source)  # the pattern alone takes seconds


def test_every_quoted_message_is_one_of_the_source() -> None:
    source, quoted = messages_of_the_source(), quoted_messages()
    assert len(quoted) >= 35
    assert [message for message in quoted if not stands_in(message, source)] == []


def test_a_message_that_is_nobodys_is_found() -> None:
    source = messages_of_the_source()
    assert not stands_in("...: already exists; delete it or choose another name", source)
    assert not stands_in("the moon is not full", source)


MOST_MET = (
    "unknown key",
    "already exists",
    "not a complete prism-nemo checkpoint",
    "retention: missing",
    "unknown architecture",
    "is not mapped by",
    "does not divide",
    "is running in it",
    "only pickled weights",
    "would repeat sources",
)


@pytest.mark.parametrize("message", MOST_MET)
def test_what_people_meet_most_is_covered(message: str) -> None:
    assert any(message in quoted for quoted in quoted_messages())
