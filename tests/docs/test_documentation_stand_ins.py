"""Marks and stand-ins: what a command keeps at pocket size, and what is refused."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from execution import written_by
from pages import Block, Command, blocks, commands_of, pages, read_mark
from stand_ins import SIZES, STAND_INS, at_pocket_size, check_stand_ins, files_for
from workspace import copy_for

BLOCKS = [block for page in pages() for block in blocks(page)]
SMALL = [command for block in BLOCKS for command in commands_of(block) if block.stand_ins is not None]


def block_of(text: str, mark: str) -> Block:
    return Block("page.md", 1, "bash", text, mark, read_mark(mark))


def small(line: str, names: str) -> str:
    """A command at pocket size, without what is added."""
    block = block_of(line, f"at pocket size: {names}" if names else "at pocket size")
    command = commands_of(block)[0]
    return shlex.join(at_pocket_size(command).words[: len(command.words)])


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ("note: this is no mark", "no clause"),
        ("slow", "nothing behind it"),
        ("slow: ", "nothing behind it"),
        ("at pocket size: ", "nothing behind it"),
        ("slow: a; slow: b", "given twice"),
        ("slow: a; slurm: b", "only one of"),
        ("file: a; at pocket size", "only what is run has a size"),
    ],
)
def test_wrong_marks_are_refused(mark: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_mark(mark)


def test_clauses_of_a_mark() -> None:
    assert read_mark("") == {}
    found = block_of("", "slow: minutes; at pocket size: HF_DIR, --step 40")
    assert (found.clauses["slow"], found.stand_ins) == ("minutes", ("HF_DIR", "--step 40"))
    assert block_of("", "at pocket size").stand_ins == ()
    assert block_of("", "slow: minutes").stand_ins is None


@pytest.mark.parametrize(
    ("names", "message"), [("HFDIR", "no stand-in is called 'HFDIR'"), ("gpu", "'gpu' is in no command of the block")]
)
def test_names_that_say_nothing_are_refused(names: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_stand_ins(block_of("prism-nemo plan x --gpu h100 --gpus 8   # gpu", f"at pocket size: {names}"))


@pytest.mark.parametrize(
    ("line", "names", "expected"),
    [
        ("prism-nemo midtrain r.py hardware=h100x64", "h100x64", "prism-nemo midtrain r.py hardware=cpu"),
        ("prism-nemo eval a/step_00025000/b", "step_00025000", "prism-nemo eval a/step_00000004/b"),
        ("prism-nemo eval step_000250000", "step_00025000", "prism-nemo eval step_000250000"),
        ("prism-nemo rollouts show 40 --step 40", "--step 40", "prism-nemo rollouts show 40 --step 2"),
        ("prism-nemo rl r.py 's=[web]' web=1", "web", "prism-nemo rl r.py 's=[general-heldout]' web=1"),
        ("prism-nemo midtrain r.py hardware=h100x64", "", "prism-nemo midtrain r.py hardware=h100x64"),
    ],
)  # fmt: skip
def test_values_stand_for_values(line: str, names: str, expected: str) -> None:
    assert small(line, names) == expected


def test_sizes_are_added_where_the_command_does_not_say_it_itself() -> None:
    command = commands_of(block_of("prism-nemo rl r.py train_steps=7 --x 3", "at pocket size"))[0]
    words = at_pocket_size(command).words
    assert words[: len(command.words)] == command.words
    assert "train_steps=2" not in words
    assert "rollout.group_size=2" in words
    filtered = commands_of(block_of("prism-nemo prompts filter a --gate think", "at pocket size"))[0]
    assert at_pocket_size(filtered).words[len(filtered.words) :] == ("--max-new-tokens", "8")
    assert at_pocket_size(commands_of(block_of("prism-nemo rl r.py", ""))[0]).words == ("prism-nemo", "rl", "r.py")


@pytest.mark.parametrize("command", SMALL, ids=lambda c: f"{c.block.line}-{c.words[0]}-{c.words[1][:20]}")
def test_verbs_options_and_keys_of_a_command_stay(command: Command) -> None:
    """Whatever is in the tables: the words that name something are those that the reader sees, in the same order."""

    def names(words: tuple[str, ...]) -> list[str]:
        return [word.partition("=")[0] for word in words if "=" in word or word.startswith("-")]

    words = at_pocket_size(command).words
    if command.words[0] == "sbatch":
        added = len(words) - len(command.words)
        words = (words[0], *words[1 + added :])
    kept = words[: len(command.words)]
    assert names(kept) == names(command.words)
    assert kept[:2] == command.words[:2]
    added_names = names(words[len(command.words) :])
    assert not set(added_names) & set(names(command.words)), "would take the place of what the reader sees"
    assert len(added_names) == len(set(added_names))


def test_no_stand_in_or_size_is_left_over() -> None:
    named = {name for block in BLOCKS for name in block.stand_ins or ()}
    assert set(STAND_INS) == named
    for sizes in SIZES:
        used = [c for c in SMALL if shlex.join(c.words).startswith(sizes.beginning) and sizes.having in (*c.words, "")]
        assert used, sizes


def test_files_stand_for_files() -> None:
    block = block_of("prism-nemo midtrain r.py model=llama-3.1-8b", "at pocket size: model=llama-3.1-8b")
    assert files_for(block) == {
        "study/checkpoints/llama-3.1-8b": "checkpoints/base",
        "study/data/llama-3.1-8b/mcs": "data/pocket",
    }


def test_what_is_to_be_written_is_not_there_before(tmp_path: Path) -> None:
    """A run that is there would be continued, or found done: the command would end well and have done nothing."""
    for path in ("models/base/config.json", "runs/mid/config.yaml", "runs/rl/config.yaml", "hf/prism/config.json"):
        (tmp_path / "made" / path).parent.mkdir(parents=True)
        (tmp_path / "made" / path).touch()
    (tmp_path / "made/kept.jsonl").touch()
    text = (
        "prism-nemo rl r.py run_dir=runs/rl tokenizer=HF_DIR\nprism-nemo prompts filter a --out kept.jsonl\n"
        "prism-nemo export c --out hf/prism"
    )
    folder = copy_for(block_of(text, "at pocket size: HF_DIR"), tmp_path / "made", tmp_path / "copy")
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert left == {"models/base/config.json", "runs/mid/config.yaml", "HF_DIR/config.json"}


def test_what_a_command_writes() -> None:
    def written(line: str) -> list[str]:
        return written_by(tuple(shlex.split(line)))

    assert written("prism-nemo verify a b --card c.yaml") == ["c.yaml"]
    assert written("prism-nemo rl r.py run_dir=runs/a") == ["runs/a/checkpoints"]
    assert written("prism-nemo plan r.py run_dir=runs/a") == []
    assert written("python -m recipes.show rl run_dir=runs/a") == []
