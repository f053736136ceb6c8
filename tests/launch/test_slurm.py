"""The shipped scripts on a real Slurm: accepted as they are, and run at pocket size."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, running_cluster
from tiny_training import build_data, column, midtrain_config, write_llama

from prism_nemo.checkpoint.convert import import_hf
from prism_nemo.config import CheckpointConfig, GRPOConfig, ParallelConfig, RLConfig, RolloutConfig, to_yaml
from prism_nemo.runtime.launch import launch
from prism_nemo.training.midtrain import midtrain
from recipes.stages import Stage

pytestmark = pytest.mark.slurm
REPOSITORY = Path(__file__).parents[2]
SLURM = REPOSITORY / "slurm"
SCRIPTS = ["mid_3b", "mid_8b", "mid_24b", "rl_8b", "rl_24b", "prism_24b", "eval", "grid", "report", "stage"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with running_cluster() as found:
        yield found


def job_environment(root: Path, **more: str) -> dict[str, str]:
    return {
        "PRISM_NEMO_HOME": str(REPOSITORY),
        "PRISM_NEMO_ROOT": str(root),
        "PRISM_NEMO_DISK_GB": "0",
        "PRISM_NEMO_INTERFACE": "lo",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        **more,
    }


SMALL = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0", "--time=00:10:00")


@pytest.mark.parametrize("name", SCRIPTS)
def test_sbatch_accepts_every_script(cluster: SlurmCluster, name: str) -> None:
    cluster.wait_for_nodes()
    done = subprocess.run(
        ["sbatch", "--test-only", str(SLURM / f"{name}.sh")],
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stderr


def test_sbatch_says_what_it_refuses(cluster: SlurmCluster) -> None:
    """That the test above can fail: more nodes than there are, and a partition that there is none of."""
    for options, message in (
        (["--nodes=9"], "node configuration is not available"),
        (["--partition=gpus"], "invalid partition"),
    ):
        done = subprocess.run(
            ["sbatch", "--test-only", *options, str(SLURM / "mid_24b.sh")],
            env=cluster.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode != 0
        assert message in done.stderr


def stage(cluster: SlurmCluster, run_dir: Path, script: str, *options: str, **more: str) -> str:
    """A job of stage.sh whose command is a piece of bash."""
    environment = job_environment(run_dir.parent, PRISM_NEMO_HEALTH="off", **more)
    command = ("bash", "-c", script, "bash", f"run_dir={run_dir}")
    return cluster.submit(*SMALL, *options, str(SLURM / "stage.sh"), *command, **environment)


def test_a_chain_without_progress_stops(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = stage(cluster, tmp_path / "run", "exit 75")
    found = cluster.wait(job, "FAILED", "COMPLETED")
    assert (found["JobState"], found["Restarts"]) == ("FAILED", "0")
    assert "stopped at step 0, where it started" in cluster.log(job)


def test_a_failure_is_tried_once_more_without_the_bad_node(cluster: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "run/chain").mkdir(parents=True)
    (tmp_path / "run/chain/bad_nodes").write_text("node1\n")
    job = stage(cluster, tmp_path / "run", f"echo $SLURMD_NODENAME >>{tmp_path}/nodes; exit 1")
    found = cluster.wait(job, "FAILED", "COMPLETED")
    assert (found["JobState"], found["Restarts"]) == ("FAILED", "1")
    first, second = (tmp_path / "nodes").read_text().split()
    assert (first, second != "node1") == ("node1", True)
    assert "once more, in case it was the node" in cluster.log(job)
    assert "without node1" in cluster.log(job)


def test_a_chain_goes_on_while_there_is_progress_and_its_dependent_waits(cluster: SlurmCluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    script = f"""
        n=$(ls {run}/checkpoints 2>/dev/null | wc -l); n=$((n + 1))
        mkdir -p {run}/checkpoints/step_0000000$n; touch {run}/checkpoints/step_0000000$n/manifest.json
        [ $n -ge 3 ] || exit 75
    """
    first = stage(cluster, run, script)
    second = stage(
        cluster, tmp_path / "next", f"ls {run}/checkpoints >{tmp_path}/seen", f"--dependency=afterok:{first}"
    )
    assert cluster.wait(second, "COMPLETED", "FAILED", "CANCELLED")["JobState"] == "COMPLETED"
    assert cluster.job(first)["Restarts"] == "2"
    assert (tmp_path / "seen").read_text().split()[-1] == "step_00000003"


def test_wrong_input_ends_the_chain_and_what_waits_for_it(cluster: SlurmCluster, tmp_path: Path) -> None:
    first = stage(cluster, tmp_path / "run", "exit 2")
    second = stage(cluster, tmp_path / "next", "true", f"--dependency=afterok:{first}", "--kill-on-invalid-dep=yes")
    found = cluster.wait(first, "FAILED", "COMPLETED")
    assert (found["Restarts"], found["ExitCode"]) == ("0", "2:0")
    assert cluster.wait(second, "CANCELLED", "COMPLETED")["JobState"] == "CANCELLED"


def test_a_preempted_job_saves_makes_room_and_goes_on(cluster: SlurmCluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    script = f"""
        [ ! -d {run}/checkpoints ] || exit 0
        cd {run}; trap 'mkdir -p checkpoints/step_00000001; touch checkpoints/step_00000001/manifest.json; exit 75' TERM
        touch {tmp_path}/started; while true; do sleep 0.1; done
    """
    low = stage(cluster, run, script, "--nodes=8", "--ntasks=8", "--exclusive")
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    high = stage(cluster, tmp_path / "high", f"sleep 1; ls {run}/checkpoints", "--partition=high", "--nodelist=node3")
    assert cluster.wait(high, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", cluster.log(high)
    assert "step_00000001" in cluster.log(high)  # saved before the other one began
    found = cluster.wait(low, "COMPLETED", "FAILED")
    assert found["JobState"] == "COMPLETED", cluster.log(low)
    assert int(found["Restarts"]) >= 1


def test_a_job_whose_node_dies_is_queued_again_elsewhere_and_says_so(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Slurm queues it again by itself; the next slice notices that the one before had no end."""
    script = f"""
        echo $SLURMD_NODENAME >>{tmp_path}/nodes.$SLURM_RESTART_COUNT
        [ -n "$SLURM_RESTART_COUNT" ] || sleep 120
    """
    job = stage(cluster, tmp_path / "run", script, "--nodes=2", "--ntasks=2")
    first = tmp_path / "nodes."
    deadline = time.monotonic() + 60
    while (not first.exists() or len(first.read_text().split()) < 2) and time.monotonic() < deadline:
        time.sleep(0.1)
    lost = sorted(first.read_text().split())[1]  # the second one: the batch script runs on the first
    cluster.kill_node(int(lost.removeprefix("node")))
    try:
        found = cluster.wait(job, "COMPLETED", "FAILED", seconds=150)
    finally:
        cluster.start_node(int(lost.removeprefix("node")))
    log = cluster.log(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), log
    assert lost not in (tmp_path / "nodes.1").read_text()
    assert "the slice before this one was ended from outside and left no new checkpoint (1 in a row)" in log


@pytest.mark.parametrize("how", ["USR1", "KILL"])
def test_two_nodes_end_with_the_losses_of_a_run_that_nobody_stopped(
    cluster: SlurmCluster, tmp_path: Path, how: str
) -> None:
    """USR1 is what --signal sends: saved where it stands. KILL: back to the checkpoint of step 20."""
    data = build_data(tmp_path / "data")
    import_hf(write_llama(tmp_path / "hf"), tmp_path / "initial", ParallelConfig())
    changes = {
        "parallel": ParallelConfig(data_parallel_size=2),
        "train_steps": 200,
        "checkpoint": CheckpointConfig(save_interval=1000 if how == "USR1" else 20, keep=30, async_save=False),
        "eval_interval": 1000,
    }
    undisturbed = midtrain_config(tmp_path / "undisturbed", data, tmp_path / "initial", **changes)
    launch(midtrain, undisturbed, "undisturbed", processes=2)
    config = midtrain_config(tmp_path / "run", data, tmp_path / "initial", **changes)
    (tmp_path / "mid.yaml").write_text(to_yaml(config))
    job = cluster.submit(
        # Longer than the 600 s before the limit at which stage.sh asks for the signal.
        *("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--time=00:30:00"),
        *(str(SLURM / "stage.sh"), "prism-nemo", "midtrain", str(tmp_path / "mid.yaml")),
        **job_environment(tmp_path, PRISM_NEMO_HEALTH="on" if how == "USR1" else "off"),
    )
    deadline = time.monotonic() + 200
    while not column(tmp_path / "run", "loss")[25:] and time.monotonic() < deadline:
        time.sleep(0.02)
    # Without the health check the stage is the job's first step; KILL for the whole job would cancel it.
    cluster.ask("scancel", f"--signal={how}", job if how == "USR1" else f"{job}.0")
    found = cluster.wait(job, "COMPLETED", "FAILED", seconds=200)
    log = cluster.log(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), log
    assert "queued again as job" in log
    if how == "USR1":
        assert "prism-nemo health: ok node1" in log
        assert "stopped at step" in log
    else:
        assert "exit code 137 at step" in log
    assert column(tmp_path / "run", "loss") == column(tmp_path / "undisturbed", "loss")


def test_a_chain_trains_does_rl_evaluates_and_reports(cluster: SlurmCluster, tmp_path: Path) -> None:
    """As prism_24b.sh queues it, at pocket size: four jobs, each after the one before, and a page in the end."""
    data = build_data(tmp_path / "data")
    write_llama(tmp_path / "hf", max_position_embeddings=256)
    import_hf(tmp_path / "hf", tmp_path / "initial", ParallelConfig())
    mid = midtrain_config(tmp_path / "runs/mid", data, tmp_path / "initial")
    rl = RLConfig(
        run_dir=str(tmp_path / "runs/rl"),
        init_from=str(tmp_path / "runs/mid/checkpoints/step_00000010"),
        tokenizer=str(tmp_path / "data/tokenizer"),
        tasks=["arithmetic"],
        rollout=RolloutConfig(group_size=2, prompts_per_step=2, max_new_tokens=8),
        grpo=GRPOConfig(kl_beta=0.0),
        train_steps=2,
        micro_batch_size=2,
    )
    for name, config in (("mid", mid), ("rl", rl)):
        (tmp_path / f"{name}.yaml").write_text(to_yaml(config))
    rows = [{"question": f"Say {i}", "answer": "yes", "reward": "exact", "split": "test"} for i in range(8)]
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    last, results = tmp_path / "runs/rl/checkpoints/step_00000002", tmp_path / "evaluations/quiz"
    evaluation = ["prism-nemo", "eval", last, "--suite", tmp_path / "quiz.jsonl", "--out", results, "--format", "plain"]
    evaluation += ["--tokenizer", tmp_path / "data/tokenizer", "--max-new-tokens", "8"]
    page = tmp_path / "report.html"
    jobs = [
        [SLURM / "stage.sh", "prism-nemo", "midtrain", tmp_path / "mid.yaml"],
        [SLURM / "stage.sh", "prism-nemo", "rl", tmp_path / "rl.yaml"],
        [SLURM / "stage.sh", *evaluation],
        [SLURM / "report.sh", tmp_path / "runs/mid", tmp_path / "runs/rl", results, "--out", page],
    ]
    numbers: list[str] = []
    for job in jobs:
        after = [f"--dependency=afterok:{numbers[-1]}", "--kill-on-invalid-dep=yes"] if numbers else []
        size = ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0", "--time=00:30:00"]
        size = size if job[0] == SLURM / "stage.sh" else ["--time=00:30:00"]
        environment = job_environment(tmp_path, PRISM_NEMO_HEALTH="off")
        numbers.append(cluster.submit(*size, *after, *map(str, job), **environment))
    for number in numbers:
        found = cluster.wait(number, "COMPLETED", "FAILED", "CANCELLED", seconds=300)
        assert found["JobState"] == "COMPLETED", cluster.log(number)
    text = page.read_text()
    for said in ("runs/mid", "runs/rl", "quiz"):
        assert said in text, said


NEMO_RUN = """
import pickle, sys
from pathlib import Path
from recipes.launch import Site, launch
stages = pickle.loads(Path(sys.argv[1]).read_bytes())
site = Site("slurm", account="none", time="00:30:00", activate="export GLOO_SOCKET_IFNAME=lo")
launch(stages, site, Path(sys.argv[2]), "two_stages", dry=False, detach=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("nemo_run") is None, reason="NeMo-Run is not installed")
def test_nemo_run_queues_two_stages_the_second_of_which_forbids_another_start(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    """Two ranks train; then a stage whose input is wrong ends at once, although NeMo-Run would try it 20 times."""
    data = build_data(tmp_path / "data")
    import_hf(write_llama(tmp_path / "hf"), tmp_path / "initial", ParallelConfig())
    first = midtrain_config(
        tmp_path / "first", data, tmp_path / "initial", parallel=ParallelConfig(data_parallel_size=2)
    )
    wrong = midtrain_config(
        tmp_path / "second", tmp_path / "nothing", Path(first.run_dir) / "checkpoints/step_00000010"
    )
    stages = [
        Stage("first", "midtrain", "cpu2", (), first),
        Stage("second", "midtrain", "cpu", ("first",), wrong),
    ]
    (tmp_path / "stages.pkl").write_bytes(pickle.dumps(stages))
    environment = {**cluster.environment, **job_environment(tmp_path), "NEMORUN_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", NEMO_RUN, str(tmp_path / "stages.pkl"), str(tmp_path)],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    jobs = cluster.ask("squeue", "--noheader", "--sort=i", "--format=%A %j").splitlines()
    numbers = [line.split()[0] for line in jobs if line.endswith(("first", "second"))]
    assert len(numbers) == 2, jobs
    assert cluster.wait(numbers[0], "COMPLETED", "FAILED", seconds=200)["JobState"] == "COMPLETED"
    assert len(column(tmp_path / "first", "loss")) == 10
    found = cluster.wait(numbers[1], "COMPLETED", "FAILED", "CANCELLED", seconds=200)
    assert (found["JobState"], found["Restarts"], found["Requeue"]) == ("FAILED", "0", "0")
