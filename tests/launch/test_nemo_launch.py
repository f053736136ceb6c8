from __future__ import annotations

import base64
import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_training import build_data, column, midtrain_config, write_llama

from prism_nemo.checkpoint.convert import import_hf
from prism_nemo.config import MidtrainConfig, ParallelConfig, resolve
from prism_nemo.errors import InputError
from recipes import launch
from recipes.launch import Site, script_of
from recipes.pipeline import Route, stages_of
from recipes.stages import Stage

NEEDS_NEMO_RUN = pytest.mark.skipif(
    importlib.util.find_spec("nemo_run") is None, reason="NeMo-Run is not installed: pip install 'prism-nemo[nemo]'"
)
SLURM_SITE = Site("slurm", account="acc", partition="gpu")


def midtrain_stage() -> Stage:
    return stages_of(Route("granite-3.3-8b", "mcs"), "h100x16", "/s", ())[1]


def test_the_configuration_travels_in_the_script() -> None:
    stage = midtrain_stage()
    for site in (Site(), SLURM_SITE):
        text = script_of(stage, site, Path("/s/stages"))
        encoded = re.search(r"echo (\S+) \| base64 -d", text)
        assert encoded is not None
        import yaml

        values = yaml.safe_load(base64.b64decode(encoded[1]))
        assert resolve(MidtrainConfig, values) == stage.config
        assert subprocess.run(["bash", "-n"], input=text, text=True, timeout=20).returncode == 0


def test_ranks_learn_who_they_are_from_slurm_only() -> None:
    assert "RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS" in script_of(midtrain_stage(), SLURM_SITE, Path("c"))
    assert "RANK" not in script_of(midtrain_stage(), Site(), Path("c"))
    imports = stages_of(Route("granite-3.3-8b", "mcs"), "h100x16", "/s", ())[0]
    assert "RANK" not in script_of(imports, SLURM_SITE, Path("c"))  # one process: it would wait for no one


@pytest.mark.parametrize(
    ("code", "step", "rank", "forbids"),
    [
        (0, 5, 0, False),
        (75, 5, 0, False),
        (75, None, 0, True),
        (1, None, 0, True),
        (2, 5, 0, True),
        (1, None, 1, False),
    ],
)
def test_a_stage_that_gets_no_further_forbids_another_start(
    tmp_path: Path, code: int, step: int | None, rank: int, forbids: bool
) -> None:
    """NeMo-Run's own script queues a job again after every failure."""
    run_dir = tmp_path / "run dir"
    made = (
        f"mkdir -p '{run_dir}/checkpoints/step_00000005'; touch '{run_dir}/checkpoints/step_00000005/manifest.json'; "
    )
    for name, text in (
        ("prism-nemo", f"{made if step else ''}exit {code}"),
        ("scontrol", f"echo \"$*\" >> '{tmp_path}/asked'"),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    stage = midtrain_stage()
    assert isinstance(stage.config, MidtrainConfig)
    stage = replace(stage, config=replace(stage.config, run_dir=str(run_dir)))
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_PROCID": str(rank),
        "SLURM_NTASKS": "2",
        "SLURM_LOCALID": "0",
        "SLURM_JOB_ID": "9",
        "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
    }
    script = script_of(stage, replace(SLURM_SITE, repository=str(tmp_path)), tmp_path)
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    asked = (tmp_path / "asked").read_text().splitlines() if (tmp_path / "asked").exists() else []
    assert asked == (["update JobId=9 Requeue=0"] if forbids else [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama-9"], "unknown model 'llama-9'"),
        (["llama-3.1-8b", "--executor", "k8s"], "--executor 'k8s' is unknown"),
        (["llama-3.1-8b", "--executor", "slurm"], "--account: NeMo-Run asks for one"),
        (["llama-3.1-8b", "--executor", "slurm", "--account", "a", "--host", "h"], "--host needs --user and --job-dir"),
        (["llama-3.1-8b", "--mount", "/a:/b"], "only a container has mounts"),
        (["llama-3.1-8b", "--image", "i", "--mount", "/a"], "--mount '/a': expected from:to"),
        (["llama-3.1-8b", "--mixture", "all"], "mixture 'all' is unknown"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_without_nemo_run_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nemo_run", None)
    with pytest.raises(InputError, match=r"pip install 'prism-nemo\[nemo\]', or start the same stages with"):
        launch.nemo_run()


def test_a_leptonai_that_is_too_new_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nemo_run").mkdir()
    (tmp_path / "nemo_run/__init__.py").write_text("from leptonai.api.v1 import client\n")
    (tmp_path / "leptonai").mkdir()
    (tmp_path / "leptonai/__init__.py").touch()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("nemo_run", "leptonai")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match=r"pip install 'leptonai<0\.47'"):
        launch.nemo_run()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("nemo_run", "leptonai")]:
        del sys.modules[name]


def test_accounting_that_is_off_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for code, on in ((1, False), (0, True)):
        (tmp_path / "sacct").write_text(f"#!/bin/sh\necho Slurm accounting storage is disabled >&2; exit {code}\n")
        (tmp_path / "sacct").chmod(0o755)
        assert launch.accounting_is_on() is on
    monkeypatch.setenv("PATH", "/nowhere")
    assert not launch.accounting_is_on()


def test_jobs_that_nemo_run_would_cancel_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sbatch").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(launch, "nemo_run", lambda: None)
    with pytest.raises(InputError, match="would take that for failures and cancel the jobs"):
        launch.launch([midtrain_stage()], SLURM_SITE, tmp_path, "n", dry=False, detach=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match="there is no sbatch here"):
        launch.launch([midtrain_stage()], SLURM_SITE, tmp_path, "n", dry=False, detach=True)


def nemo_run_process(arguments: list[str], home: Path, timeout: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NEMORUN_HOME": str(home), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=launch.REPOSITORY,
    )


@NEEDS_NEMO_RUN
@pytest.mark.slow
def test_dry_run_prints_sbatch_text_unbroken(tmp_path: Path) -> None:
    arguments = ["-m", "recipes.launch", "granite-3.3-8b", "--executor", "slurm", "--account", "acc", "--dryrun"]
    arguments += ["--partition", "gpu", "--hardware", "h100x16", "--root", str(tmp_path / "s"), "--image", "img.sqsh"]
    done = nemo_run_process([*arguments, "--mount", "/data:/data"], tmp_path / "home", 300)
    assert done.returncode == 0, done.stderr
    for text in (
        "#SBATCH --account=acc",
        "#SBATCH --nodes=2",
        "#SBATCH --signal=USR1@1800",
        "--container-image img.sqsh",
        "--wait=600 --kill-on-bad-exit=0",
        f"prism-nemo eval {tmp_path}/s/runs/granite-3.3-8b-mcs-rl-mcs/checkpoints/step_00001000 --suite reasoning",
    ):
        assert text in done.stdout, text
    # The last of two options counts: NeMo-Run puts its own first.
    options = re.search(r"--kill-on-bad-exit=1.*--kill-on-bad-exit=0", done.stdout)
    assert options is not None
    assert "/data:/data" in done.stdout


LOCAL = """
import pickle, sys
from pathlib import Path
from recipes.launch import Site, launch
stages = pickle.loads(Path(sys.argv[1]).read_bytes())
launch(stages, Site(), Path(sys.argv[2]), "two_stages", dry=False, detach=False)
"""


@NEEDS_NEMO_RUN
@pytest.mark.slow
def test_two_stages_on_this_machine(tmp_path: Path) -> None:
    """The second starts from what the first ends with; they are no faster than one another's dependency allows."""
    import pickle

    data = build_data(tmp_path / "data")
    import_hf(write_llama(tmp_path / "hf"), tmp_path / "initial", ParallelConfig())
    first = midtrain_config(tmp_path / "first", data, tmp_path / "initial")
    second = midtrain_config(tmp_path / "second", data, Path(first.run_dir) / "checkpoints/step_00000010")
    stages: list[Any] = [
        Stage("first", "midtrain", "cpu", (), first),
        Stage("second", "midtrain", "cpu", ("first",), second),
    ]
    (tmp_path / "stages.pkl").write_bytes(pickle.dumps(stages))
    done = nemo_run_process(["-c", LOCAL, str(tmp_path / "stages.pkl"), str(tmp_path)], tmp_path / "home", 500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert column(tmp_path / "first", "loss")[-1] < column(tmp_path / "first", "loss")[0]
    assert (tmp_path / "second/checkpoints/step_00000010/manifest.json").is_file()
    assert column(tmp_path / "second", "loss")[0] < column(tmp_path / "first", "loss")[0]
