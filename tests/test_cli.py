"""The command's surface, exit codes and messages are a contract."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import typer
from tiny_llama import all_tensors, edited_copy, save_tiny_llama

import prism_nemo.cli as cli
from prism_nemo.commands.convert import _size
from prism_nemo.errors import InputError, PrismError, StoppedEarly

# Verb: its arguments, then its options. Changing a line here is changing the contract with users and their scripts.
SURFACE = {
    "quickstart": "--out --family --json",
    "data build": "MIXTURE --tokenizer --out --workers --shard --keep-parts --model --json",
    "data show": "FOLDER --tokens --seq-length --packing --json",
    "import": "HF_DIR --out --tp --pp --strict --dt-floor --vocab-size",
    "export": "CHECKPOINT --out --format --dtype --tokenizer --max-shard-size --push-to --results",
    "card": "CHECKPOINT --out --results --overwrite-card",
    "models": "[NAME] --json",
    "plan": "RECIPE [OVERRIDES] --model --gpus --gpu --assume --rehearse --json",
    "verify": "HF_DIR CHECKPOINT --tp --pp --card --json",
    "midtrain": "RECIPE [OVERRIDES]",
    "rl": "RECIPE [OVERRIDES]",
    "eval": "MODEL --suite --out --split --task --data --questions --format --elicit --choose-on-test --samples "
    "--temperature --top-p --max-new-tokens --length --held-out --held-out-rows --seq-length --text --task-folder "
    "--reward --bos --engine --tokenizer --batch --cache --seed --tp --pp --dp --json",
    "regrade": "EVALUATION --reward --json",
    "select": "[EVALUATIONS] --by --on-test --out --json",
    "retention": "BASE [MODELS] --suite --out --margin --loss-margin --may-differ --task --data --questions --samples "
    "--max-new-tokens --held-out --held-out-rows --seq-length --task-folder --engine --tokenizer --seed --tp --pp "
    "--json",
    "merge": "[MODELS] --out --weight --method --density --carry-from --json",
    "prompts filter": "[PROMPTS] --checkpoint --tokenizer --out --samples --keep --balance --max-new-tokens --batch "
    "--gate --reward --template --tp --dp --seed --json",
    "rollouts show": "RUN --step --task --sort --limit --json",
    "analyze weights": "[CHECKPOINTS] --transition --run --spectrum --out --json",
    "analyze cka": "[MODELS] --data --source --texts --tokenizer --rows --seq-length --null-draws --seed --out --json",
    "analyze path": "[MODELS] --out --data --source --tasks --tokenizer --first --second --grid --rows --seq-length "
    "--questions --samples --max-new-tokens --gate --seed --tp --pp --json",
    "analyze entropy": "[MODELS] --data --source --tasks --tokenizer --rows --seq-length --questions --samples "
    "--max-new-tokens --gate --seed --out --json",
    "status": "[RUNS] --json",
    "watch": "RUN --port --host --tui --once --json",
    "doctor": "--json",
    "report": "[RUN] --out",
    "study": "--out --seeds --families --budget --processes --slice-minutes --data --page --json",
}


def surface(command: Any, path: str = "") -> dict[str, str]:
    if isinstance(command, click.Group) or hasattr(command, "commands"):
        found: dict[str, str] = {}
        for name, sub in command.commands.items():
            found.update(surface(sub, f"{path} {name}".strip()))
        return found
    words = []
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            name = parameter.name.upper()
            words.append(f"[{name}]" if parameter.nargs == -1 or not parameter.required else name)
        else:
            words.extend(parameter.opts)
    return {path: " ".join(words)}


def test_surface_is_frozen() -> None:
    assert surface(typer.main.get_command(cli.app)) == SURFACE


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Hugging Face folder and the checkpoint that the command imported from it, in a process of its own."""
    root = tmp_path_factory.mktemp("cli")
    hf = save_tiny_llama(root / "hf")
    command = [sys.executable, "-m", "prism_nemo", "import", str(hf), "--out", str(root / "checkpoint")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root)
    assert result.returncode == 0, result.stderr
    assert f"imported from {hf}; check it with: prism-nemo verify" in result.stdout
    assert "Traceback" not in result.stderr
    return hf, root / "checkpoint"


def test_verify_and_export(imported: tuple[Path, Path], run: Run, tmp_path: Path) -> None:
    hf, checkpoint = imported
    code, out, _ = run("verify", hf, checkpoint, "--tp", 2)
    assert code == 0
    assert "equal within tolerance" in out
    code, out, _ = run("export", checkpoint, "--out", tmp_path / "out")
    assert code == 0
    assert "check it with: prism-nemo verify" in out
    before, after = all_tensors(hf), all_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_verify_of_another_model_fails_with_1(imported: tuple[Path, Path], run: Run, tmp_path: Path) -> None:
    hf, checkpoint = imported
    other = edited_copy(hf, tmp_path / "other", tensors=lambda t: t["lm_head.weight"][3].add_(1.0))
    code, out, err = run("verify", other, checkpoint, "--json")
    assert code == 1
    result = json.loads(out)
    assert result["passed"] is False
    assert result["max_abs_logit_diff"] > result["tolerance"]
    assert f"prism-nemo: {checkpoint} does not compute the same function as {other}" in err
    assert "Traceback" not in err


def test_json_is_the_only_thing_on_standard_output(imported: tuple[Path, Path], run: Run) -> None:
    code, out, _ = run("verify", *imported, "--json")
    assert code == 0
    assert json.loads(out)["passed"] is True


def test_weights_that_are_not_numbers_are_named(
    imported: tuple[Path, Path], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    edited_copy(imported[0], tmp_path / "nan", tensors=lambda t: t["lm_head.weight"][3].fill_(float("nan")))
    code, _, err = run("import", "nan", "--out", "checkpoint")
    assert code == 0
    assert err.splitlines() == ["prism-nemo: warning: tensor 'lm_head.weight' holds NaN or infinity"]


def test_export_pushes_what_it_wrote(
    imported: tuple[Path, Path], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr("prism_nemo.checkpoint.hub.prepare_upload", lambda name: calls.append(("prepare", name)))

    def upload(folder: Path, name: str) -> None:
        calls.append(("upload", name, (folder / "config.json").is_file()))

    monkeypatch.setattr("prism_nemo.checkpoint.hub.upload", upload)
    code, _, err = run("export", imported[1], "--out", tmp_path / "out", "--push-to", "org/name")
    assert code == 0, err
    assert calls == [("prepare", "org/name"), ("upload", "org/name", True)]


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5kb", 1500), ("7", 7), (" 2 TB ", 2 * 10**12)]
)
def test_sizes(text: str, size: int) -> None:
    assert _size(text) == size


WRONG: list[tuple[list[str], str]] = [
    (["import", "{missing}", "--out", "{new}"], "{missing}/config.json: no such file"),
    (["import", "{hf}", "--out", "{hf}"], "{hf}: already exists"),
    (["import", "{hf}", "--out", "{new}", "--tp", "3"], "tensor_model_parallel_size 3"),
    (["import", "{hf}", "--out", "{new}", "--pp", "3"], "pipeline_model_parallel_size 3"),
    (["import", "{cut}", "--out", "{new}"], "{cut}/model.safetensors: truncated"),
    (["export", "{missing}", "--out", "{new}"], "{missing}: not a complete prism-nemo checkpoint"),
    (["export", "{checkpoint}", "--out", "{hf}"], "{hf}: already exists"),
    (["export", "{checkpoint}", "--out", "{new}", "--dtype", "int4"], "--dtype 'int4' is unknown"),
    (["export", "{checkpoint}", "--out", "{new}", "--tokenizer", "{missing}"], "--tokenizer {missing}: no such folder"),
    (
        ["export", "{checkpoint}", "--out", "{new}", "--max-shard-size", "big"],
        "--max-shard-size 'big': expected a size",
    ),
    (["export", "{checkpoint}", "--out", "{new}", "--max-shard-size", "0GB"], "--max-shard-size '0GB'"),
    (["export", "{checkpoint}", "--out", "{new}", "--push-to", "name"], "--push-to 'name': expected a name such as"),
    (
        ["import", "org/no-such-model", "--out", "{new}"],
        "org/no-such-model: no such folder, and as a Hugging Face model",
    ),
    (["import", "{hf}", "--out", "{new}", "--dt-floor", "0.1"], "--dt-floor is for the nemotron_h family"),
    (["import", "{nan}", "--out", "{new}", "--strict"], "tensor 'lm_head.weight' holds NaN or infinity"),
    (["verify", "{hf}", "{checkpoint}", "--card", "{list}"], "not a verification card"),
    (["verify", "{hf}", "{hf}"], "{hf}: not a complete prism-nemo checkpoint"),
    (["verify", "{missing}", "{checkpoint}"], "{missing}/config.json: no such file"),
    (["midtrain", "{missing}.py"], "{missing}.py: no such file"),
    (["midtrain", "{missing}.yaml"], "{missing}.yaml: no such file"),
    (["midtrain", "{recipes}/midtrain.py"], "midtrain() needs checkpoint=..., data=..., run_dir=..."),
    (["midtrain", "{recipes}/midtrain.py", "checkpoint={missing}", "data=d", "run_dir={new}"], "{missing}: not a comp"),
    (["midtrain", "{recipes}/midtrain.py", "checkpoint=c", "data=d", "run_dir=r", "lrr=3"], "unknown key 'lrr'"),
    (["midtrain", "{yaml}", "optimizer.lr=high"], "optimizer.lr"),
    (["midtrain", "{yaml}"], "no value for data.path"),
    (
        ["rl", "{recipes}/rl.py", "checkpoint={missing}", "tokenizer=t", "run_dir={new}", "tasks=[arithmetic]"],
        "{missing}",
    ),
    (["eval", "{missing}", "--tokenizer", "{missing}"], "{missing}: no such folder"),
    (["eval", "{checkpoint}"], "{checkpoint}: has no tokenizer"),
    (["eval", "{checkpoint}", "--reward", "sandbox"], "override 'sandbox' is not of the form key=value"),
    (["eval", "{cut}"], "{cut}"),
    (["regrade", "{missing}"], "{missing}"),
    (["select", "{missing}", "{new}"], "{missing}"),
    (["retention", "{missing}", "{new}", "--suite", "pocket"], "{missing}"),
    (["merge", "{hf}", "--out", "{new}"], "at least two models"),
    (["merge", "{hf}", "{missing}", "--out", "{new}"], "{missing}"),
    (["merge", "{hf}", "{hf}", "--out", "{new}", "--method", "mean"], "--method 'mean' is unknown"),
    (["merge", "{hf}", "{hf}", "--out", "{new}", "--weight", "nan"], "--weight"),
    (["analyze", "cka", "{hf}", "{missing}"], "no text to compare on"),
    (["analyze", "path", "{hf}", "{checkpoint}", "--out", "{new}"], "{hf}: has no tokenizer"),
    (["analyze", "entropy", "{hf}"], "nothing to measure"),
    (["analyze", "entropy", "{hf}", "--tasks", "algebra"], "algebra"),
    (["eval", "{checkpoint}", "--tokenizer", "{missing}"], "{missing}"),
    (["eval", "{checkpoint}", "--tokenizer", "t", "--suite", "all"], "--suite 'all' is unknown"),
    (["eval", "{checkpoint}", "--tokenizer", "t", "--split", "all"], "--split 'all' is unknown"),
    (["data", "build", "{missing}.yaml", "--tokenizer", "t", "--out", "{new}"], "{missing}.yaml"),
    (["data", "show", "{missing}"], "{missing}"),
    (["analyze", "weights", "{missing}", "{hf}"], "{missing}"),
    (["analyze", "weights", "{hf}"], "at least two checkpoints"),
    (["analyze", "weights", "{hf}", "{cut}"], "not a readable safetensors file"),
    (["analyze", "weights", "{hf}", "{nan}"], "{nan}: tensor lm_head.weight holds NaN"),
    (["analyze", "weights", "{hf}", "{hf}"], "the same checkpoint is given twice"),
    (["analyze", "weights", "{hf}", "{checkpoint}", "--run", "{missing}"], "{missing}: no config.yaml"),
    (["analyze", "weights", "{hf}", "{checkpoint}", "--transition", "{missing}"], "--transition"),
    (["report", "{missing}"], "{missing}"),
    (["status", "{missing}"], "{missing}"),
    (["quickstart", "--family", "gpt9", "--out", "{new}"], "unknown model family 'gpt9'"),
    (["import", "{hf}"], "--out"),
    (["import", "{hf}", "--out", "{new}", "--tp", "0"], "--tp"),
    (["import", "{hf}", "--out", "{new}", "--tp", "two"], "--tp"),
    (["verify", "{hf}"], "Missing argument 'checkpoint'"),
    (["no-such-verb"], "no-such-verb"),
    (["verify", "{hf}", "{checkpoint}", "--no-such-option"], "--no-such-option"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(a) for a, _ in WRONG])
def test_wrong_input_ends_with_2_and_one_message(
    imported: tuple[Path, Path], run: Run, tmp_path: Path, arguments: list[str], message: str
) -> None:
    """The message names the file, key or option; nothing is started and nothing is written."""
    hf, checkpoint = imported
    cut = edited_copy(hf, tmp_path / "cut")
    os.truncate(cut / "model.safetensors", 10_000)
    (tmp_path / "list.yaml").write_text("- not a card\n")
    nan = edited_copy(hf, tmp_path / "nan", tensors=lambda t: t["lm_head.weight"][3].fill_(float("nan")))
    (tmp_path / "recipe.yaml").write_text("run_dir: r\n")
    names = {
        "hf": hf,
        "checkpoint": checkpoint,
        "cut": cut,
        "nan": nan,
        "list": tmp_path / "list.yaml",
        "missing": tmp_path / "missing",
        "new": tmp_path / "new",
        "recipes": Path(__file__).parent.parent / "recipes",
        "yaml": tmp_path / "recipe.yaml",
    }
    code, out, err = run(*(a.format(**names) for a in arguments))
    assert code == 2, err
    assert out == ""
    assert err.startswith("prism-nemo: ")
    assert message.format(**names) in err
    assert "Traceback" not in err
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize(
    ("error", "code"), [(InputError("m"), 2), (PrismError("m"), 1), (StoppedEarly("m"), 75)], ids=["2", "1", "75"]
)
def test_errors_have_their_exit_codes(
    imported: tuple[Path, Path], run: Run, monkeypatch: pytest.MonkeyPatch, error: PrismError, code: int
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("prism_nemo.checkpoint.convert.import_hf", fail)
    assert run("import", "a", "--out", "b") == (code, "", "prism-nemo: m\n")


@pytest.mark.parametrize("arguments", [["--help"], ["import", "--help"], ["data", "--help"]], ids=" ".join)
def test_help_ends_with_0(run: Run, arguments: list[str]) -> None:
    code, out, _ = run(*arguments)
    assert code == 0
    assert "Usage" in out


@pytest.mark.parametrize("script", ["hf_to_megatron", "megatron_to_hf", "verify"])
def test_conversion_scripts_are_the_command(script: str, tmp_path: Path) -> None:
    path = Path(__file__).parent.parent / "conversion" / f"{script}.py"
    arguments = (
        [str(tmp_path / "missing"), str(tmp_path / "also")] if script == "verify" else [str(tmp_path / "missing")]
    )
    if script != "verify":
        arguments += ["--out", str(tmp_path / "new")]
    result = subprocess.run([sys.executable, path, *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.startswith(f"prism-nemo: {tmp_path / 'missing'}")
    assert result.stdout == ""
