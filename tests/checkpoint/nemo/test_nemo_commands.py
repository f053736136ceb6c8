"""The verbs `import` and `export`, given a NeMo folder or asked for one."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from tiny_models import save_tiny
from typer.testing import CliRunner

from prism_nemo.checkpoint.convert import import_hf
from prism_nemo.checkpoint.native import read_architecture
from prism_nemo.commands.convert import export, import_
from prism_nemo.commands.nemo import import_nemo
from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError

app = typer.Typer()
app.command("import")(import_)
app.command("export")(export)


def test_export_and_import_say_what_they_did(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "native", ParallelConfig())
    run = CliRunner().invoke
    done = run(app, ["export", str(tmp_path / "native"), "--out", str(tmp_path / "nemo"), "--format", "nemo"])
    assert done.exit_code == 0
    assert "no tokenizer files came along" in done.output
    assert f"{tmp_path / 'nemo'}: exported from" in done.output
    done = run(app, ["import", str(tmp_path / "nemo"), "--out", str(tmp_path / "back")])
    assert done.exit_code == 0
    assert "imported from" in done.output
    assert "(llama)" in done.output
    assert read_architecture(tmp_path / "back").family == "llama"


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["import", str(tmp_path), "--out", str(tmp_path / "ckpt")])
    assert isinstance(done.exception, InputError)
    with pytest.raises(InputError, match="holds no folder 'weights'"):
        import_nemo(tmp_path, tmp_path / "ckpt")
