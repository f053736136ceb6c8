"""What the server gives, to whom, and what no directory can make it do."""

from __future__ import annotations

import http.client
import json
import math
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from watched_runs import HOSTILE, make_run, more_steps

from prism_nemo.errors import InputError
from prism_nemo.watch.server import is_local, make_server
from prism_nemo.watch.state import LONGEST, MOST_ROLLOUTS, Watched

Ask = Callable[..., tuple[int, dict[str, str], bytes]]


@pytest.fixture
def ask(tmp_path: Path) -> Iterator[Ask]:
    """Asks a server that watches `tmp_path`/run, which the test makes."""
    (tmp_path / "run").mkdir()
    server = make_server(Watched(tmp_path / "run"), port=0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()

    def call(path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
        try:
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    yield call
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_page_and_its_parts_with_a_strict_policy(ask: Ask) -> None:
    for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")):
        code, headers, body = ask(path)
        assert code == 200
        assert headers["content-type"].startswith(kind)
        assert body
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert not any(name.startswith("access-control") for name in headers)
    code, headers, body = ask("/", "HEAD")
    assert (code, body) == (200, b"")


@pytest.mark.parametrize(
    "path",
    [
        "/config.yaml",
        "/../run/config.yaml",
        "/..%2f..%2fetc/passwd",
        "//etc/passwd",
        "/metrics.jsonl",
        "/state.py",
        "/page.html",
    ],
)
def test_no_file_of_the_run_or_the_machine_is_served(ask: Ask, path: str, tmp_path: Path) -> None:
    (tmp_path / "run/config.yaml").write_text("secret: 1\n")
    code, _, body = ask(path)
    assert code == 404
    assert b"secret" not in body
    assert b"root:" not in body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_it_only_reads(ask: Ask, method: str) -> None:
    assert ask("/", method)[0] == 501


@pytest.mark.parametrize(
    ("host", "code"),
    [("evil.example", 421), ("evil.example:80", 421), ("127.0.0.1.evil.example", 421), ("localhost:1", 200), ("", 421)],
)
def test_a_page_that_points_its_name_here_gets_nothing(ask: Ask, host: str, code: int) -> None:
    """DNS rebinding: the browser still says the other site's name."""
    assert ask("/state.json", Host=host)[0] == code


def test_numbers_curves_and_rollouts(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "run").rmdir()
    make_run(tmp_path / "run", steps=40)
    state = json.loads(ask("/state.json")[2])
    run = state["run"]
    assert (run["step"], run["steps"], run["stage"], run["seconds_left"]) == (40, 100, "rl", pytest.approx(30.0))
    reward = next(chart for chart in run["charts"] if chart["title"] == "Reward")
    assert [series["label"] for series in reward["series"]] == ["reward", "2+2=?"]
    assert reward["series"][0]["points"][-1] == [40.0, 0.4, 0.4]
    assert len(run["rollouts"]) == MOST_ROLLOUTS


def test_a_newest_run_is_chosen_and_another_can_be(ask: Ask, tmp_path: Path) -> None:
    for name, steps in (("old", 3), ("new", 5)):
        make_run(tmp_path / "run" / name, steps=steps)
    os.utime(tmp_path / "run/old/metrics.jsonl", (1, 1))
    state = json.loads(ask("/state.json")[2])
    assert state["run"]["name"] == "new"
    assert [one["name"] for one in state["runs"]] == ["new", "old"]
    assert json.loads(ask("/state.json?run=old")[2])["run"]["step"] == 3
    # A name is looked up among the runs, and never a path.
    assert json.loads(ask("/state.json?run=../../etc")[2])["run"]["name"] == "new"


def test_a_hostile_directory_gives_text_of_bounded_length(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "run").rmdir()
    run = make_run(tmp_path / "run", steps=4, text=HOSTILE + "x" * 200_000)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 5, "loss": NaN, "deep": ' + "[" * 5000 + "]" * 5000 + "}\n" + "not json\n" + '{"step": 6, "lo'
        )
    code, _, body = ask("/state.json")
    assert code == 200
    assert len(body) < 100 * LONGEST
    state = json.loads(body)
    assert "\u202e" not in json.dumps(state, ensure_ascii=False)
    assert "\x1b" not in state["run"]["rollouts"][0]["prompt"]
    assert any("cannot be read" in problem for problem in state["run"]["problems"])


def test_pipes_and_links_are_not_followed(ask: Ask, tmp_path: Path) -> None:
    """A named pipe would never end, a link could lead anywhere."""
    (tmp_path / "run").rmdir()
    run = make_run(tmp_path / "run", steps=2)
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    (run / "lineage.json").unlink()
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps({"events": [{"event": "secret"}]}))
    (run / "lineage.json").symlink_to(secret)
    code, _, body = ask("/state.json")
    assert code == 200
    assert b"secret" not in body
    assert any("no regular file" in problem for problem in json.loads(body)["run"]["problems"])


def append(run: Path, **values: Any) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 50, **values}) + "\n")


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, 10**400, "fast", True, [1], None],
    ids=["nan", "infinite", "huge", "text", "bool", "list", "none"],
)
@pytest.mark.parametrize("key", ["tokens_per_second", "seconds", "mfu", "loss", "reward_by_task"])
def test_no_number_breaks_the_page(tmp_path: Path, key: str, value: Any) -> None:
    run = make_run(tmp_path / "run", steps=4)
    append(run, **{key: value})
    state = Watched(run).look()
    json.dumps(state, allow_nan=False)
    assert state["problem"] is None
    assert state["run"]["step"] == 50
    assert state["run"]["tokens_per_second"] in (8000.0, None)


def test_a_reward_that_is_no_number_has_no_value(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=4)
    line = {"step": 4, "index": 0, "prompt_number": 0, "task": "t", "prompt": "p", "answer": "a", "response": "r"}
    packed = zstandard.ZstdCompressor().compress((json.dumps({**line, "reward": math.nan}) + "\n").encode())
    (run / "rollouts/step_00000004.dp0000.jsonl.zst").write_bytes(packed)
    state = Watched(run).look()
    json.dumps(state, allow_nan=False)
    assert state["run"]["rollouts"][0]["reward"] is None


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("lineage.json", '{"stage": "rl", "starts": [{"step": "x"}], "events": 3}'),
        ("lineage.json", "[" * 100_000),
        ("running.json", '{"processes": {"a": 1}}'),
        ("config.yaml", "train_steps: {a: [}"),
        ("metrics.jsonl", '{"step": 1, "seconds": "x"}\n' * 3),
    ],
)
def test_one_bad_run_does_not_hide_the_others(tmp_path: Path, file: str, content: str) -> None:
    make_run(tmp_path / "good", steps=7)
    bad = make_run(tmp_path / "bad", steps=3)
    (bad / file).write_text(content)
    os.utime(bad / "metrics.jsonl", (1, 1))
    state = Watched(tmp_path).look()
    assert (state["problem"], state["run"]["name"]) == (None, "good")
    assert {one["name"] for one in state["runs"]} == {"good", "bad"}


def test_a_small_file_that_unpacks_to_much_is_not_unpacked(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=4)
    bomb = zstandard.ZstdCompressor().compress(bytes(40 << 20))
    (run / "rollouts/step_00000004.dp0000.jsonl.zst").write_bytes(bomb)
    found = Watched(run).look()["run"]
    assert found["rollouts"] == []
    assert any("larger than" in problem for problem in found["problems"])


def test_links_lead_nowhere(tmp_path: Path) -> None:
    """Neither a link to a file of the machine, whose content would be shown, nor a run that is a link."""
    run = make_run(tmp_path / "runs/one", steps=4)
    (tmp_path / "secret").write_text("node-of-somebody-else")
    (run / "chain").mkdir()
    for name in ("bad_nodes", "stalled"):
        (run / "chain" / name).symlink_to(tmp_path / "secret")
    outside = make_run(tmp_path / "outside", steps=9)
    (tmp_path / "runs/two").symlink_to(outside)
    (tmp_path / "runs/three").mkdir()
    for name in ("metrics.jsonl", "lineage.json"):
        (tmp_path / "runs/three" / name).symlink_to(outside / name)
    state = Watched(tmp_path / "runs").look()
    assert "somebody" not in json.dumps(state)
    assert {one["name"] for one in state["runs"]} == {"one", "three"}
    assert Watched(tmp_path / "runs").look("three")["run"]["charts"] == []


def test_slurm_is_asked_once_in_half_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("prism_nemo.watch.state.queue", lambda: asked.append(1))
    watched = Watched(make_run(tmp_path / "run", steps=4))
    for _ in range(3):
        watched.look()
    assert len(asked) == 1


def test_an_address_of_version_6(tmp_path: Path) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"no ::1 here: {error}")
    server = make_server(Watched(tmp_path), "::1", 0)
    assert server.server_address[0] == "::1"
    server.server_close()


def test_a_directory_that_vanishes_is_said(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "run").rmdir()
    state = json.loads(ask("/state.json")[2])
    assert (state["run"], "no longer there" in state["problem"]) == (None, True)


def test_a_taken_port_is_passed_over_and_a_strange_host_refused(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = make_server(Watched(tmp_path), port=port)
        assert server.server_port != port
        server.server_close()
    with pytest.raises(InputError, match=r"--host 203\.0\.113\.9 --port 0: cannot listen there"):
        make_server(Watched(tmp_path), "203.0.113.9", 0)
    with pytest.raises(InputError, match="no such folder"):
        Watched(tmp_path / "none")
    assert [is_local(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "node1")] == [True] * 3 + [
        False
    ] * 2


def run_command(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "prism_nemo", "watch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command_prints_one_look(tmp_path: Path) -> None:
    run = make_run(tmp_path / "rl", steps=30, text="sum [bold]not markup[/bold]")
    more_steps(run, 31, 32)
    done = run_command(run, "--once")
    assert done.returncode == 0, done.stderr
    assert "step 32 of 100" in done.stdout
    assert "[bold]not markup[/bold]" in done.stdout
    assert any(bar in done.stdout for bar in "▂▅█")
    done = run_command(run, "--once", "--json")
    assert json.loads(done.stdout)["run"]["step"] == 32
    done = run_command(run, "--json")
    assert (done.returncode, "give --once as well" in done.stderr) == (2, True)
    done = run_command(tmp_path / "none")
    assert (done.returncode, "no such folder" in done.stderr) == (2, True)
