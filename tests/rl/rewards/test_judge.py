"""The form, the penalties, and verifiers that hang, crash, eat memory, raise or give nonsense."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from verifiers_for_tests import InProcess, NeverReady, Obedient, Unloadable

from prism_nemo.config import RewardConfig
from prism_nemo.errors import InputError, PrismError
from prism_nemo.rl.rewards.judge import Answered, Judge, repeated_share
from prism_nemo.rl.rewards.pool import VerifierPool
from prism_nemo.rl.rewards.task import Problem, task_named

OBEDIENT = "verifiers_for_tests:Obedient"
IN_PROCESS = "verifiers_for_tests:InProcess"
PROBLEM = Problem("prompts:x", "q", "", "a", verifier="exact")


@pytest.fixture
def judge() -> Iterator[Judge]:
    with Judge(
        RewardConfig(gate="none", time_limit=1.0, verifiers={"ob": OBEDIENT, "in": IN_PROCESS}), {}, 40
    ) as judge:
        yield judge


def _asked(*answers: str, verifier: str = "ob") -> list[Answered]:
    problem = Problem("prompts:x", "q", "", "a", verifier=verifier)
    return [Answered(problem, answer, [1, 2], True) for answer in answers]


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        ("hang", "timeout"),
        ("hang-in-c", "timeout"),
        ("exit 0", "worker died"),
        ("exit 7", "worker died"),
        ("leave", "raised SystemExit"),
        ("mute", "raised Mute"),
        ("segfault", "worker died"),
        ("eat 6", "raised MemoryError"),  # 4 GB are allowed
        ("raise no", "raised ValueError"),
        ("nan", "not a number"),
        ("none", "not a number"),
        ("1.5", "outside 0 to 1"),
        ("-inf", "outside 0 to 1"),
    ],
)
def test_an_accident_costs_one_verdict(judge: Judge, answer: str, failure: str) -> None:
    """Those before and after it are judged, each in its place."""
    began = time.monotonic()
    scores = judge.score(_asked("1", "0.25", answer, "0", "1"))
    assert [s.reward for s in scores] == [1.0, 0.25, 0.0, 0.0, 1.0]
    assert [s.failure for s in scores] == [None, None, failure, None, None]
    assert judge.take_failures() == {failure: 1}
    assert judge.take_failures() == {}
    assert [s.reward for s in judge.score(_asked("1", "0"))] == [1.0, 0.0]
    assert time.monotonic() - began < 60
    assert not scores[2].right
    assert scores[0].right


@pytest.mark.parametrize("answer", ["raise no", "nan", "2", "leave", "mute"])
def test_accidents_in_process_are_named_too(judge: Judge, answer: str) -> None:
    scores = judge.score(_asked("1", answer, verifier="in"))
    assert scores[0].reward == 1.0
    assert scores[1].failure is not None
    assert sum(judge.take_failures().values()) == 1


def test_a_number_of_numpy_is_a_number(judge: Judge) -> None:
    assert [s.reward for s in judge.score(_asked("float32 0.5", verifier="in"))] == [0.5]


@pytest.mark.parametrize("size", [1, 1_000_000])
def test_a_worker_that_reads_no_more_does_not_stop_the_trainer(size: int) -> None:
    """Its pipe holds 64 KiB: a longer job would wait for ever to be written."""
    config = RewardConfig(gate="none", time_limit=1.0, workers=1, verifiers={"ob": OBEDIENT})
    with Judge(config, {}, 40) as judge:
        assert [s.failure for s in judge.score(_asked("stop"))] == [None]
        time.sleep(0.6)
        scores = judge.score(_asked("0 " * size, "1"))
        assert [s.failure for s in scores] == ["timeout", None]


def test_a_worker_that_died_between_batches_costs_nothing(judge: Judge) -> None:
    assert [s.failure for s in judge.score(_asked("die"))] == [None]
    time.sleep(0.6)
    assert [s.failure for s in judge.score(_asked("1", "0", "1"))] == [None] * 3


def test_a_verifier_that_no_worker_can_be_given_is_refused_at_once() -> None:
    class Prompts:
        name, verifiers = "prompts:x", {"v": 1}

    config = RewardConfig(verifiers={"v": "verifiers_for_tests:Unpicklable"})
    with pytest.raises(InputError, match=r"reward 'v': Unpicklable cannot be sent to a worker process: .*isolated"):
        Judge(config, {"prompts:x": Prompts()}, 40)  # type: ignore[dict-item]


def test_a_verifier_that_is_never_ready_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time is not the answer's, so it has more; but not for every answer anew."""
    monkeypatch.setattr("prism_nemo.rl.rewards.pool._START_SECONDS", 0.3)
    pool = VerifierPool(2, 60.0, 4.0)
    with pytest.raises(PrismError, match=r"reward workers cannot be started: 3 failed .*not ready after 0.3 seconds"):
        pool.run([(NeverReady(), PROBLEM, "a")] * 20)
    assert pool.pids == []


def test_what_a_verifier_prints_does_not_disturb_the_pipe(judge: Judge) -> None:
    assert [s.reward for s in judge.score(_asked(*["say hello"] * 4, "0.5"))] == [1.0] * 4 + [0.5]


def test_many_verdicts_keep_their_order(judge: Judge) -> None:
    values = [i % 101 / 100 for i in range(400)]
    assert [s.reward for s in judge.score(_asked(*map(str, values)))] == values


def test_processes_of_a_killed_worker_end_with_it(judge: Judge, tmp_path: Path) -> None:
    (score,) = judge.score(_asked(f"child {tmp_path / 'pid'}"))
    assert score.failure == "timeout"
    assert _ends(int((tmp_path / "pid").read_text()))


def test_nothing_is_left_when_the_judge_closes(tmp_path: Path) -> None:
    with Judge(RewardConfig(gate="none", workers=3, verifiers={"ob": OBEDIENT}), {}, 40) as judge:
        judge.score(_asked(*[f"pid {tmp_path / 'pids'}"] * 30))
    pids = {int(line) for line in (tmp_path / "pids").read_text().split()}
    assert 1 <= len(pids) <= 3
    assert all(_ends(pid) for pid in pids)


def test_workers_end_when_the_trainer_is_killed(tmp_path: Path) -> None:
    """Also one that is computing and would not look at its pipe."""
    script = tmp_path / "trainer.py"
    script.write_text(
        "import sys, threading, os, time\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_judge import *\n"
        "from test_judge import _asked\n"
        "judge = Judge(RewardConfig(gate='none', time_limit=600, verifiers={'ob': OBEDIENT}), {}, 40)\n"
        f"judge.score(_asked(*['pid {tmp_path / 'pids'}'] * 8))\n"
        f"threading.Timer(1.0, lambda: os.kill(os.getpid(), 9)).start()\n"
        "judge.score(_asked('hang'))\n"
    )
    subprocess.run([sys.executable, str(script)], timeout=100, cwd=Path(__file__).parents[3])
    pids = {int(line) for line in (tmp_path / "pids").read_text().split()}
    assert pids
    assert all(_ends(pid) for pid in pids)


def _ends(pid: int) -> bool:
    for _ in range(200):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_workers_that_cannot_start_stop_the_run() -> None:
    """Otherwise every verdict of the run would be lost, a worker at a time."""
    pool = VerifierPool(2, 1.0, 4.0)
    with pytest.raises(PrismError, match=r"reward workers cannot be started: 3 failed in a row \(exit code 3\)"):
        pool.run([(Unloadable(), PROBLEM, "a")] * 5)
    assert pool.pids == []


def test_verifiers_of_the_same_name_are_told_apart() -> None:
    """A worker keeps the verifiers that it was given."""
    pool = VerifierPool(1, 1.0, 4.0)
    first, second = Obedient(), InProcess()
    try:
        assert [
            v.value for v in pool.run([(first, PROBLEM, "1"), (second, PROBLEM, "0"), (first, PROBLEM, "0.5")])
        ] == [
            1.0,
            0.0,
            0.5,
        ]
    finally:
        pool.close()


FORMS = [
    ("Q: q\n<think>", "work</think>7<eos>", True, "7"),
    ("Q: q\n<think>", "work</think>7", False, None),  # cut off
    ("Q: q\n<think>", "work 7<eos>", False, None),
    ("Q: q\n<think>", "a</think>b</think>7<eos>", False, None),
    ("Q: q\n<think>", "<think>work</think>7<eos>", False, None),
    ("Q: q\n<think>", "work</think>  <eos>", True, None),
    ("Q: q\n", "<think>work</think>7<eos>", True, "7"),
    ("Q: q\n", " <think>work</think>7<eos>", True, "7"),
    ("Q: q\n", "work</think>7<eos>", False, None),
    ("Q: q\n", "Well, <think>work</think>7<eos>", False, None),
    ("Q: q\n", "<think><think>work</think>7<eos>", False, None),
    ("Q: q\n", "7<eos>", False, None),
]


@pytest.mark.parametrize(("prompt", "response", "formed", "answer"), FORMS)
def test_the_gate(prompt: str, response: str, formed: bool, answer: str | None) -> None:
    """A prompt may have opened the thinking; otherwise the response has to."""
    problem = Problem("prompts:x", "q", "", "7", verifier="exact", text=prompt)
    with Judge(RewardConfig(), {}, 40) as judge:
        (score,) = judge.score([Answered(problem, response, [1], response.endswith("<eos>"))])
    assert (score.well_formed, score.answer) == (formed, answer)
    assert score.reward == float(answer == "7")


@pytest.mark.parametrize("response", ["7<eos>", "7", "work</think>7<eos>"])
def test_without_a_gate_the_answer_is_what_follows_the_thinking(response: str) -> None:
    problem = Problem("prompts:x", "q", "", "7", verifier="exact")
    with Judge(RewardConfig(gate="none"), {}, 40) as judge:
        (score,) = judge.score([Answered(problem, response, [1], "<eos>" in response)])
    assert (score.reward, score.answer) == (1.0, "7")


def test_another_end_token() -> None:
    problem = Problem("prompts:x", "q", "", "7", verifier="exact", text="q<think>")
    with Judge(RewardConfig(), {}, 40, end="</s>") as judge:
        assert judge.score([Answered(problem, "w</think>7</s>", [1], True)])[0].reward == 1.0


@pytest.mark.parametrize("end", ["<eos>", "</s>", "<|eot_id|>", "<|end_of_text|>", ""])
def test_tasks_score_for_themselves(end: str) -> None:
    """Whatever the end token is called: models have many names for it, tasks one."""
    task = task_named("arithmetic")
    problem = Problem("arithmetic", "1+1=?", "", "2")
    with Judge(RewardConfig(), {task.name: task}, 40, end) as judge:
        texts = [("</think>2", True), ("</think>3", True), ("2", True), ("</think>2", False)]
        scores = judge.score([Answered(problem, text + end * ended, [1], ended) for text, ended in texts])
    assert scores == [task.score(problem, text + "<eos>" * ended) for text, ended in texts]
    assert [(s.reward, s.well_formed) for s in scores] == [(1.0, True), (0.0, True), (0.0, False), (0.0, False)]


@pytest.mark.parametrize("end", ["<eos>", "</s>"])
@pytest.mark.parametrize("text", ["</think>2<eos> blah", "</think>2<eos>", "</think>2<e<eos>os> blah"])
def test_an_end_token_in_letters_ends_nothing(text: str, end: str) -> None:
    """Cut off, it is not finished; and after a real end token, what stands before that is the answer."""
    task = task_named("arithmetic")
    problem = Problem("arithmetic", "1+1=?", "", "2")
    with Judge(RewardConfig(), {task.name: task}, 40, end) as judge:
        cut, ended = judge.score([Answered(problem, text, [1], False), Answered(problem, text + end, [1], True)])
    assert (cut.reward, cut.well_formed) == (0.0, False)
    assert (ended.reward, ended.well_formed) == (0.0, True)


@pytest.mark.parametrize("end", ["<eos>", "</s>"])
def test_tasks_without_the_form_do_not_see_the_end_token(end: str) -> None:
    task = task_named("arithmetic")
    problem = Problem("arithmetic", "1+1=?", "", "2")
    with Judge(RewardConfig(gate="none"), {task.name: task}, 40, end) as judge:
        texts = [("w</think>2", True), ("2", True), ("2", False), ("3", True)]
        scores = judge.score([Answered(problem, text + end * ended, [1], ended) for text, ended in texts])
    assert [s.reward for s in scores] == [1.0, 1.0, 1.0, 0.0]


def test_a_task_that_raises_costs_one_verdict() -> None:
    task = task_named("arithmetic")

    class Broken(type(task)):  # type: ignore[misc]
        def score(self, problem: Problem, response: str) -> Any:
            raise KeyError(response)

    broken = Broken()
    with Judge(RewardConfig(), {"arithmetic": broken}, 40) as judge:
        (score,) = judge.score([Answered(Problem("arithmetic", "1+1=?", "", "2"), "2<eos>", [1], True)])
        assert (score.reward, score.failure) == (0.0, "raised KeyError")
        assert judge.take_failures() == {"raised KeyError": 1}


@pytest.mark.parametrize(
    ("tokens", "n", "share"),
    [([1, 2, 3], 2, 0.0), ([1, 2, 1, 2, 1], 2, 0.5), ([7] * 10, 1, 0.9), ([1, 2], 3, 0.0), ([], 1, 0.0)],
)
def test_repeated_share(tokens: list[int], n: int, share: float) -> None:
    """1 2 1 2 1 has the pairs 12 21 12 21, of which two are new."""
    assert repeated_share(tokens, n) == pytest.approx(share)


def test_penalties_are_subtracted_and_named() -> None:
    task = task_named("arithmetic")
    config = RewardConfig(stop_penalty=0.25, repetition_penalty=0.5, repetition_ngram=1)
    problem = Problem("arithmetic", "1+1=?", "", "2")
    with Judge(config, {task.name: task}, 40) as judge:
        good, cut = judge.score(
            [Answered(problem, "</think>2<eos>", [5, 5, 6, 7], True), Answered(problem, "</think>2", [5, 6], False)]
        )
    assert good.reward == pytest.approx(1 - 0.5 * 0.25)
    assert good.right
    assert (good.correct, good.penalties) == (1.0, {"repetition": -0.125})
    assert cut.reward == -0.25
    assert cut.penalties == {"stop": -0.25}
    assert not cut.right


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": "thinking"}, "rewards.gate: 'thinking' is unknown; choose one of think, none"),
        ({"workers": 0}, "rewards.workers"),
        ({"time_limit": 0.0}, "rewards.time_limit"),
        ({"code_seconds": 0.0}, "rewards.code_seconds"),
        ({"memory_gb": float("nan")}, "rewards.memory_gb"),
        ({"stop_penalty": -1.0}, "rewards.stop_penalty.*subtracted"),
        ({"repetition_penalty": -0.1}, "rewards.repetition_penalty"),
        ({"repetition_ngram": 0}, "rewards.repetition_ngram"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Judge(RewardConfig(**changes), {}, 40)


def test_the_trainer_is_not_forked() -> None:
    """Its threads and process groups must not be in a worker."""
    pool = VerifierPool(1, 5.0, 4.0)
    try:
        pool.run([(Obedient(), PROBLEM, "1")])
        (pid,) = pool.pids
        assert psutil.Process(pid).ppid() == os.getpid()
        assert "prism_nemo.rl.rewards.worker" in psutil.Process(pid).cmdline()
        assert psutil.Process(pid).num_threads() == 1
    finally:
        pool.close()
