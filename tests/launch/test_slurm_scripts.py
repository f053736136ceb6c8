"""The shipped scripts as text: what shellcheck finds, what sbatch reads, and that their recipes are for their size."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from recipes.hardware import HARDWARE, layout_of

SLURM = Path(__file__).parents[2] / "slurm"
JOBS = sorted(path for path in SLURM.glob("*.sh") if "#SBATCH" in path.read_text())


def options(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", path.read_text(), re.MULTILINE))


def test_the_scripts_that_the_documentation_names_are_there() -> None:
    names = {path.stem for path in JOBS}
    assert names == {"eval", "grid", "mid_24b", "mid_3b", "mid_8b", "prism_24b", "report", "rl_24b", "rl_8b", "stage"}


@pytest.mark.parametrize("path", sorted(SLURM.glob("*.sh")), ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (apt-get install shellcheck)")
    done = subprocess.run(
        ["shellcheck", "-x", str(path)], cwd=SLURM.parent, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", sorted(SLURM.glob("*.sh")), ids=lambda path: path.name)
def test_bash_reads_them(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=60)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_directives_stand_before_the_first_command(path: Path) -> None:
    """sbatch stops reading them there, without a word."""
    lines = path.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(not line.startswith("#SBATCH") for line in lines[first:])
    found = options(path)
    assert "time" in found
    # A folder that is not there would end the job before it says anything.
    assert "/" not in found["output"]
    if path.stem != "prism_24b":
        assert {"requeue", "open-mode"} <= set(found)


@pytest.mark.parametrize("name", ["mid_3b", "mid_8b", "mid_24b", "rl_8b", "rl_24b"])
def test_a_script_asks_for_as_many_ranks_as_its_recipe_has(name: str) -> None:
    path = SLURM / f"{name}.sh"
    text, found = path.read_text(), options(path)
    hardware = re.search(r"hardware=(\w+)", text)[1]  # type: ignore[index]
    model = re.search(r"model=([\w.-]+)", text)[1]  # type: ignore[index]
    machine = HARDWARE[hardware]
    assert (int(found["nodes"]), int(found["gpus-per-node"])) == (machine.nodes, machine.per_node)
    use = "8k" if name.startswith("mid") else "rl"
    assert layout_of(hardware, model, use).world_size == machine.nodes * int(found["ntasks-per-node"])
    signal, seconds = found["signal"].split("@")
    assert signal == "USR1"  # to the ranks: B: would reach the batch shell only
    assert int(seconds) >= (600 if name.startswith("mid") else 1800)


def test_only_site_sh_knows_of_a_site() -> None:
    for path in SLURM.glob("*.sh"):
        assert not re.search(
            r"^#SBATCH --(account|partition|qos|mail-user|reservation)", path.read_text(), re.MULTILINE
        )
