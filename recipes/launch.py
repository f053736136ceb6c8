r"""A chain of stages through NeMo-Run: the same stages that `recipes.grid` gives to sbatch itself.

    python -m recipes.launch granite-3.3-8b --hardware h100x64 --executor slurm --account A --partition P --dryrun
    python -m recipes.launch granite-3.3-8b --executor slurm --account A --host login.example.org --user me \
        --job-dir /scratch/me/nemo-run --repository /scratch/me/prism-nemo

Needs ``pip install 'prism-nemo[nemo]'``; everything can be done without (slurm/, `recipes.grid`). NeMo-Run queues a job
again after any failure, up to ``--retries`` times; a stage that got no further, or whose input is wrong, forbids it. It
has neither the node check nor the one more attempt of slurm/.
"""

from __future__ import annotations

import argparse
import base64
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_nemo.config import to_yaml
from prism_nemo.errors import InputError, PrismError
from prism_nemo.evaluation.settings import EvaluateConfig
from recipes.hardware import find_machine
from recipes.pipeline import SUITES, Route, stages_of
from recipes.stages import Stage

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Site:
    """Where and how stages run.

    Attributes:
        executor: local or slurm.
        account: Slurm's account.
        partition: Slurm's partition.
        time: Limit of a job.
        retries: How often a job is queued again.
        image: Container image for pyxis.
        mounts: ``from:to`` of the container.
        host: Login node, where Slurm is reached through SSH; empty for this machine.
        user: On it.
        identity: Its private key.
        job_dir: Folder on it for NeMo-Run's own files.
        repository: This repository where the jobs run.
        activate: Shell line that brings the software about, before the stage.
    """

    executor: str = "local"
    account: str = ""
    partition: str = ""
    time: str = "24:00:00"
    retries: int = 20
    image: str = ""
    mounts: tuple[str, ...] = ()
    host: str = ""
    user: str = ""
    identity: str = ""
    job_dir: str = ""
    repository: str = str(REPOSITORY)
    activate: str = ""

    def check(self) -> None:
        """Refuse what no executor can be made of.

        Raises:
            InputError: Naming the option.
        """
        if self.executor not in ("local", "slurm"):
            raise InputError(f"--executor '{self.executor}' is unknown; choose local or slurm")
        if self.executor == "slurm" and not self.account:
            raise InputError("--account: NeMo-Run asks for one; without accounts use python -m recipes.grid submit")
        if self.host and not (self.user and self.job_dir):
            raise InputError("--host needs --user and --job-dir, a folder on that machine")
        if self.mounts and not self.image:
            raise InputError("--mount: only a container has mounts; give --image")
        for mount in self.mounts:
            if ":" not in mount:
                raise InputError(f"--mount '{mount}': expected from:to")


def nemo_run() -> Any:
    """NeMo-Run.

    Raises:
        InputError: If it is not there, or what it needs is too new.
    """
    try:
        import nemo_run
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("leptonai"):
            # leptonai 0.47 dropped the module that nemo-run 0.11.1 imports; its own requirement allows it.
            raise InputError(
                "nemo_run does not import with leptonai 0.47 or newer: pip install 'leptonai<0.47'"
            ) from error
        raise InputError(
            f"NeMo-Run is not installed ({error}): pip install 'prism-nemo[nemo]', or start the same stages with "
            "python -m recipes.grid submit"
        ) from error
    return nemo_run


def accounting_is_on() -> bool:
    """Whether Slurm's accounting answers on this machine; NeMo-Run asks it how jobs are."""
    try:
        done = subprocess.run(["sacct", "--noheader", "--allocations"], capture_output=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def script_of(stage: Stage, site: Site, root: Path) -> str:
    """Bash that runs one process of a stage.

    The configuration travels in it, so that what was asked for stands in NeMo-Run's own record of the job. With a
    scheduler every process runs this; each keeps a file of its own, for another rank's would be half written.
    """
    lines = ["set -euo pipefail", f"cd {shlex.quote(site.repository)}"]
    lines += [site.activate] if site.activate else []
    if site.executor == "slurm" and stage.processes > 1:
        lines += [
            # The batch host, which is the first node; scontrol is not at hand in a container.
            "export MASTER_ADDR=$SLURM_LAUNCH_NODE_IPADDR MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))",
            "export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID",
            "trap '' USR1",  # see slurm/rank.sh
        ]
    if stage.config is None or isinstance(stage.config, EvaluateConfig):
        return "\n".join([*lines, f"exec {shlex.join(stage.command(root))}", ""])
    text = base64.b64encode(to_yaml(stage.config).encode()).decode()
    lines += ["config=$(mktemp --suffix=.yaml); trap 'rm -f \"$config\"' EXIT", f"echo {text} | base64 -d >$config"]
    command = f"prism-nemo {stage.verb} $config"
    if site.executor == "local":
        return "\n".join([*lines, command, ""])
    manifests = f"{shlex.quote(stage.config.run_dir + '/checkpoints')} -path '*/step_*/manifest.json'"
    lines += [
        f"newest() {{ find {manifests} 2>/dev/null | sort | tail -n 1; }}",
        "before=$(newest || true) code=0",
        f"{command} || code=$?",
        # NeMo-Run queues a job again after every failure; Slurm refuses that where Requeue is 0.
        'if [ "$SLURM_PROCID" = 0 ] && [ $code != 0 ]; then',
        '    if [ $code = 2 ] || [ "$(newest || true)" = "$before" ]; then',
        '        echo "prism-nemo: exit code $code and no new checkpoint: not queued again" >&2',
        "        scontrol update JobId=$SLURM_JOB_ID Requeue=0 || true",
        "    fi",
        "fi",
        "exit $code",
    ]
    return "\n".join([*lines, ""])


def executor_of(run: Any, stage: Stage, site: Site) -> Any:
    """NeMo-Run's executor for a stage."""
    if site.executor == "local":
        return run.LocalExecutor(retries=0)
    machine = find_machine(stage.hardware)
    # A job directory, or a base directory of the experiment, of its own is only copied to through SSH: with a local
    # tunnel sbatch would not find the script. NEMORUN_HOME moves both.
    tunnel = run.LocalTunnel(job_dir="")
    if site.host:
        tunnel = run.SSHTunnel(host=site.host, user=site.user, job_dir=site.job_dir, identity=site.identity or None)
    more: dict[str, Any] = {}
    if machine.gpu is not None:
        more = {"gpus_per_node": machine.per_node, "exclusive": True}
    seconds = 1800 if stage.verb == "rl" else 600
    return run.SlurmExecutor(
        account=site.account,
        partition=site.partition or None,
        time=site.time,
        nodes=machine.nodes if stage.processes > 1 else 1,
        ntasks_per_node=max(1, stage.processes // machine.nodes),
        container_image=site.image or None,
        container_mounts=[f"{site.repository}:{site.repository}", *site.mounts] if site.image else [],
        signal=f"USR1@{seconds}",
        retries=site.retries,
        tunnel=tunnel,
        # The repository is there already; another copy of it would hide local changes that are not committed.
        packager=run.Packager(),
        # A rank that is gone ends the others after ten minutes (see slurm/stage.sh). NeMo-Run's own choice, at once,
        # would cut off the save of a rank that stops a little later; of an option given twice srun takes the last.
        srun_args=["--wait=600", "--kill-on-bad-exit=0"],
        **more,
    )


def experiment_of(run: Any, stages: list[Stage], site: Site, root: Path, name: str) -> Any:
    """A `run.Experiment` with one task for each stage, each after those that it needs; to be used as a context.

    Args:
        run: The module `nemo_run`.
        stages: In an order in which each comes after those that it needs.
        site: Where they run.
        root: Folder of configurations.
        name: Of the experiment.
    """
    experiment = run.Experiment(name)
    with experiment:
        ids: dict[str, str] = {}
        for stage in stages:
            ids[stage.name] = experiment.add(
                run.Script(inline=script_of(stage, site, root / "stages")),
                executor=executor_of(run, stage, site),
                # Parts of NeMo-Run read a dot as the end of a name.
                name=stage.name.replace(".", "_"),
                dependencies=[ids[needed] for needed in stage.after if needed in ids],
            )
    return experiment


def launch(stages: list[Stage], site: Site, root: Path, name: str, dry: bool, detach: bool) -> None:
    """Run, queue, or print the stages.

    Args:
        stages: What is done already is left out.
        site: Where.
        root: Folder of everything.
        name: Of the experiment.
        dry: Only print the scripts.
        detach: Return once they are queued.

    Raises:
        InputError: If NeMo-Run is not there, or would cancel the jobs.
    """
    site.check()
    run = nemo_run()
    if site.executor == "slurm" and not dry and not site.host:
        if shutil.which("sbatch") is None:
            raise InputError("--executor slurm: there is no sbatch here; give --host, or use --executor local")
        if not detach and not accounting_is_on():
            raise InputError(
                "Slurm's accounting is off here (sacct fails): NeMo-Run would take that for failures and cancel the "
                "jobs after 30 of them; queue them with --detach and look at them with prism-nemo status"
            )
    todo = [stage for stage in stages if not stage.done]
    experiment = experiment_of(run, todo, site, root, name)
    with experiment:
        if dry:
            # It prints through rich, which would break the script's lines where the terminal ends.
            os.environ["COLUMNS"] = "2000"
            experiment.dryrun()
            for stage in todo:
                print(f"# {stage.name}\n{script_of(stage, site, root / 'stages')}")
        else:
            experiment.run(detach=detach)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m recipes.launch", description="A chain of stages through NeMo-Run.")
    parser.add_argument("model")
    parser.add_argument("--mixture", default="mcs", help="math, mc or mcs; none for RL on the base")
    parser.add_argument("--rl-mixture", default="mcs", help="mc or mcs; none for no RL")
    parser.add_argument("--suite", action="append", help=f"of the evaluations; default {', '.join(SUITES)}")
    parser.add_argument("--hardware", default="h100x64")
    parser.add_argument("--root", type=Path, default=Path("study"))
    for name in ("account", "partition", "image", "host", "user", "identity", "job-dir", "activate"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--executor", default="local", help="local or slurm")
    parser.add_argument("--repository", default=str(REPOSITORY), help="this repository where the jobs run")
    parser.add_argument("--time", default="24:00:00")
    parser.add_argument("--retries", type=int, default=20)
    parser.add_argument("--mount", action="append", default=[], help="from:to, of the container")
    parser.add_argument("--dryrun", action="store_true", help="print what would be given to sbatch")
    parser.add_argument("--detach", action="store_true", help="return once the stages are queued")
    asked = parser.parse_args(arguments)
    site = Site(
        asked.executor, asked.account, asked.partition, asked.time, asked.retries, asked.image, tuple(asked.mount),
        asked.host, asked.user, asked.identity, asked.job_dir, asked.repository, asked.activate,
    )  # fmt: skip
    try:
        mixture, rl_mixture = (("" if text == "none" else text) for text in (asked.mixture, asked.rl_mixture))
        # Jobs run in a folder of NeMo-Run's: paths must not depend on it. On another machine they are as given.
        root = asked.root if asked.host else Path(os.path.abspath(asked.root))
        stages = stages_of(Route(asked.model, mixture, rl_mixture), asked.hardware, root, tuple(asked.suite or SUITES))
        launch(stages, site, root, asked.model.replace(".", "_"), asked.dryrun, asked.detach)
    except PrismError as error:
        print(f"recipes.launch: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
