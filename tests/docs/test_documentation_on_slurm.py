"""The documentation's commands for a cluster: given to a real Slurm of virtual nodes, and to NeMo-Run where it is.

The job of a stage of any kind trains it. Jobs that need 64 GPUs are queued as they stand, with what they ask for looked
at, and held, so that they never start.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from execution import Place, Run, run_command
from pages import Block, blocks, commands_of, pages
from slurm_cluster import SlurmCluster, running_cluster
from stand_ins import has_nemo_run
from workspace import copy_for, make_workspace

pytestmark = pytest.mark.slurm
BLOCKS = [block for page in pages() for block in blocks(page) if "slurm" in block.clauses]
NEMO_RUN = [b for page in pages() for b in blocks(page) if any("recipes.launch" in c.words for c in commands_of(b))]
# The nodes that each script asks for; `eval.sh` is an array, `prism_24b.sh` queues four jobs.
NODES = {
    "mid_24b.sh": ["8"],
    "rl_24b.sh": ["8"],
    "eval.sh": ["1"],
    "prism_24b.sh": ["8", "8", "1", "1"],
    "stage.sh": ["1"],
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with running_cluster() as found:
        yield found


@pytest.fixture
def place(
    tmp_path: Path, run: Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Block], Place]:
    """Goes into a folder for one block, with a checkpoint and tokens."""

    def go(block: Block) -> Place:
        (tmp_path / "made").mkdir()
        made = make_workspace(tmp_path / "made")
        monkeypatch.chdir(made)
        assert run("import", "models/base", "--out", "checkpoints/base")[0] == 0
        build = ("--tokenizer", "models/base", "--out", "data/pocket", "--workers", "1")
        assert run("data", "build", "mixtures/pocket.yaml", *build)[0] == 0
        folder = copy_for(block, made, tmp_path / "reader")
        monkeypatch.chdir(folder)
        environment = {**os.environ, "NEMORUN_HOME": str(folder / "nemo-run")}
        return Place(folder, run, environment, lambda: "".join(capfd.readouterr()))

    return go


def test_there_is_a_page_about_slurm() -> None:
    assert [block.page for block in BLOCKS] == ["docs/slurm.md"]
    assert [block.page for block in NEMO_RUN] == ["docs/recipes.md"]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.page)
def test_jobs_are_queued_and_a_stage_trains(
    block: Block, place: Callable[[Block], Place], cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = place(block)
    there.environment |= {
        **cluster.environment,
        "PRISM_NEMO_HEALTH": "off",
        "PRISM_NEMO_INTERFACE": "lo",
        "PATH": f"{Path(sys.executable).parent}:{cluster.environment['PATH']}",
    }
    for name in ("SLURM_CONF", "PATH"):  # for `prism-nemo status`, which runs here
        monkeypatch.setenv(name, there.environment[name])
    queued: dict[str, list[str]] = {}
    for command in commands_of(block):
        said = run_command(command, there)
        script = next((word for word in command.words if word.endswith(".sh")), "")
        if not script:
            continue
        jobs = re.findall(r"\d+", said.rpartition(": squeue")[0] or said)
        queued[Path(script).name] = jobs
        held = Path(script).name != "stage.sh"
        fields = [cluster.job(job) for job in jobs]
        assert [found["NumNodes"].partition("-")[0] for found in fields] == NODES[Path(script).name], said
        for found in fields:
            assert (found["Account"], found["Partition"]) == ("my_project", "debug")
            assert not held or found["JobState"] == "PENDING", found
            # Held by its user, or waiting for one that is; Priority 0 is what holds.
            assert not held or found["Priority"] == "0", found
        if not held:
            ended = cluster.wait(jobs[0], "COMPLETED", "FAILED", "CANCELLED", seconds=300)
            assert ended["JobState"] == "COMPLETED", cluster.log(jobs[0])
            assert (there.folder / "study/runs/mine/checkpoints/step_00000002/manifest.json").is_file()
    assert set(queued) == set(NODES)
    assert all(queued.values())


@pytest.mark.skipif(not has_nemo_run(), reason="NeMo-Run is not installed: pip install 'prism-nemo[nemo]'")
@pytest.mark.parametrize("block", NEMO_RUN, ids=lambda b: b.page)
def test_nemo_run_would_start_the_stages(block: Block, place: Callable[[Block], Place]) -> None:
    there = place(block)
    there.environment["PATH"] = f"{Path(sys.executable).parent}:{there.environment['PATH']}"
    for command in commands_of(block):
        said = run_command(command, there)
        assert "prism-nemo eval" in said, command.text
        assert ("#SBATCH --account=A" in said) == ("slurm" in command.words), command.text
