"""A real Slurm on this machine's loopback: munged, slurmctld and one slurmd per virtual node, without systemd.

From Debian's packages (``apt-get install slurm-wlm munge``, 22.05.8 when this was written). Everything lives in one
folder; daemons are ended by their process numbers. Nodes claim CPUs and GPUs that the machine does not have, so the
shipped scripts can be given to sbatch as they are; what runs is small.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
_PLUGINS = Path("/usr/lib/x86_64-linux-gnu/slurm-wlm")


def missing() -> str | None:
    """Why there can be no cluster here; None if there can."""
    absent = [name for name in DAEMONS if shutil.which(name) is None and not Path("/usr/sbin", name).exists()]
    if absent:
        return f"{', '.join(absent)} not found (apt-get install --no-install-recommends slurm-wlm munge)"
    if os.geteuid() != 0:
        return "slurmd starts jobs as their user, which only root may do"
    if not _PLUGINS.is_dir():
        return f"{_PLUGINS} is not there: another package of Slurm than Debian's"
    return None


def _free_ports(count: int) -> int:
    """First of so many neighbouring ports that nobody listens at."""
    for first in range(24_000 + os.getpid() % 4000, 32_000, count + 1):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for i, one in enumerate(sockets):
                one.bind(("127.0.0.1", first + i))
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
        return first
    raise RuntimeError("no free ports")


@contextlib.contextmanager
def running_cluster(nodes: int = 8) -> Iterator[SlurmCluster]:
    """A cluster for a test, which is skipped with the reason where there can be none."""
    reason = missing()
    if reason is not None:
        pytest.skip(f"no Slurm: {reason}")
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        found = SlurmCluster(Path(folder), nodes=nodes)
        try:
            yield found
        finally:
            found.stop()


class SlurmCluster:
    """Starts at construction.

    Args:
        folder: Of configuration, state and logs; short, since munge's socket is in it.
        nodes: Virtual nodes, node1 to nodeN.

    Attributes:
        environment: For processes that ask this cluster.
    """

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder, self.nodes = folder, nodes
        for name in ("state", "spool", "log", "munge"):
            (folder / name).mkdir(parents=True)
        for path in (folder, folder / "munge"):
            path.chmod(0o755)  # munge refuses a socket in a folder that others cannot look into
        key = folder / "munge/munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        (folder / "slurm.conf").write_text(self._configuration())
        # Slurm counts the files of GPUs, and does not look into them.
        for i in range(8):
            (folder / f"gpu{i}").touch()
        (folder / "gres.conf").write_text(f"NodeName=node[1-{nodes}] Name=gpu File={folder}/gpu[0-7]\n")
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/usr/bin",
        }
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _configuration(self) -> str:
        host, port, folder = socket.gethostname().split(".")[0], _free_ports(self.nodes + 1), self.folder
        lines = f"""
            ClusterName=sandbox
            SlurmctldHost={host}(127.0.0.1)
            SlurmUser=root
            SlurmdUser=root
            SlurmctldPort={port}
            AuthType=auth/munge
            AuthInfo=socket={folder}/munge/munge.sock,cred_expire=5
            CryptoType=crypto/munge
            StateSaveLocation={folder}/state
            SlurmdSpoolDir={folder}/spool/%n
            SlurmctldPidFile={folder}/slurmctld.pid
            SlurmdPidFile={folder}/slurmd-%n.pid
            SlurmctldLogFile={folder}/log/slurmctld.log
            SlurmdLogFile={folder}/log/slurmd-%n.log
            ProctrackType=proctrack/linuxproc
            TaskPlugin=task/none
            JobAcctGatherType=jobacct_gather/none
            AccountingStorageType=accounting_storage/none
            SelectType=select/cons_tres
            SelectTypeParameters=CR_Core
            GresTypes=gpu
            SchedulerType=sched/backfill
            SchedulerParameters=sched_interval=2,sched_min_interval=100000,batch_sched_delay=0,bf_interval=2
            SwitchType=switch/none
            MpiDefault=none
            ReturnToService=2
            SlurmdParameters=config_overrides
            SlurmctldTimeout=30
            SlurmdTimeout=15
            MessageTimeout=20
            KillWait=5
            MinJobAge=600
            JobRequeue=1
            PluginDir={_PLUGINS}
            PreemptType=preempt/partition_prio
            PreemptMode=REQUEUE
            PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=10
            PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
        """
        found = [line.strip() for line in lines.strip().splitlines()]
        for i in range(1, self.nodes + 1):
            found.append(
                f"NodeName=node{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port + i} CPUs=8 RealMemory=8000 "
                "Gres=gpu:8 State=UNKNOWN"
            )
        return "\n".join(found) + "\n"

    def _start(self) -> None:
        munge = self.folder / "munge"
        self._daemon(
            "munged",
            f"--socket={munge}/munge.sock",
            f"--key-file={munge}/munge.key",
            f"--pid-file={munge}/munged.pid",
            f"--log-file={self.folder}/log/munged.log",
            f"--seed-file={munge}/munged.seed",
        )
        self._daemon("slurmctld", "-f", str(self.folder / "slurm.conf"))
        for i in range(1, self.nodes + 1):
            (self.folder / f"spool/node{i}").mkdir()
            self.start_node(i)
        self.wait_for_nodes()

    def wait_for_nodes(self) -> None:
        """Wait until every node is up and idle: on a busy machine one may have missed a call.

        Raises:
            RuntimeError: If that takes longer than a minute.
        """
        deadline = time.monotonic() + 60
        # A node stands there once for each partition.
        while len(set(self.ask("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False).split())) < self.nodes:
            if time.monotonic() > deadline:
                raise RuntimeError(f"nodes do not come up: {self.ask('sinfo', check=False)}")
            time.sleep(0.2)

    def start_node(self, i: int) -> None:
        """Start a node's slurmd."""
        self._daemon("slurmd", "-f", str(self.folder / "slurm.conf"), "-N", f"node{i}")

    def kill_node(self, i: int) -> None:
        """End a node's slurmd without a word."""
        os.kill(int((self.folder / f"slurmd-node{i}.pid").read_text()), signal.SIGKILL)

    def _daemon(self, *command: str) -> None:
        subprocess.run(command, env=self.environment, check=True, timeout=60, capture_output=True)

    def ask(self, *command: str, check: bool = True, **more: str) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(
            command, env={**self.environment, **more}, capture_output=True, text=True, timeout=60, cwd=self.folder
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout

    def submit(self, *arguments: str, **environment: str) -> str:
        """Number of a new job."""
        return self.ask("sbatch", "--parsable", *arguments, **environment).strip()

    def job(self, number: str) -> dict[str, str]:
        """Fields of ``scontrol show job``."""
        text = self.ask("scontrol", "--oneliner", "show", "job", number)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait(self, number: str, *states: str, seconds: float = 120.0) -> dict[str, str]:
        """Wait until a job is in one of these states.

        Raises:
            RuntimeError: If it takes longer; with the job's log.
        """
        deadline = time.monotonic() + seconds
        while True:
            found = self.job(number)
            if found["JobState"] in states:
                return found
            if time.monotonic() > deadline:
                raise RuntimeError(f"job {number} is {found['JobState']}, not {states}:\n{self.log(number)}")
            time.sleep(0.2)

    def log(self, number: str) -> str:
        """What a job wrote."""
        path = Path(self.job(number).get("StdOut", "/nowhere"))
        return path.read_text() if path.is_file() else ""

    def stop(self) -> None:
        """End every daemon, by its number, and what is left of jobs, also of those whose node was killed."""
        for number in self.ask("squeue", "-h", "-o", "%A", check=False).split():
            self.ask("scancel", "--signal=KILL", "--full", number, check=False)
        files = [*self.folder.glob("slurmd-*.pid"), self.folder / "slurmctld.pid", self.folder / "munge/munged.pid"]
        numbers = [int(path.read_text()) for path in files if path.is_file()]
        for number in numbers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGTERM)
        deadline = time.monotonic() + 10
        for number in numbers:
            with contextlib.suppress(ProcessLookupError):
                while time.monotonic() < deadline:
                    os.kill(number, 0)
                    time.sleep(0.05)
                os.kill(number, signal.SIGKILL)
        for process in psutil.process_iter(["name"]):
            with contextlib.suppress(psutil.Error):
                if process.name() == "slurmstepd" and process.cwd().startswith(str(self.folder)):
                    for one in [*process.children(recursive=True), process]:
                        one.kill()
