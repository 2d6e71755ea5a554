"""titan.launch.torchrun: the ranks' exit code is the node's, and SIGTERM gives them the time they need."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from titan.launch.torchrun import exit_code, patient

from ..support.command import Finished, Started, clean_environment, finish, free_port, kill_all, start, wait_until

WRAPPER = ("-m", "titan.launch.torchrun")
PLAIN = ("-m", "torch.distributed.run")
RANK = """
import os, signal, sys, time
from pathlib import Path

def save(number, frame):
    signal.signal(number, signal.SIG_IGN)  # torchrun sends one more once the other rank has ended
    time.sleep(float(os.environ["SAVE_SECONDS"]))
    Path(os.environ["FOLDER"], "saved_" + os.environ["RANK"]).touch()
    os._exit(75)

signal.signal(signal.SIGTERM, save)
Path(os.environ["FOLDER"], "up_" + os.environ["RANK"]).touch()
code = int(sys.argv[1 + int(os.environ["RANK"])])
if code < 0:
    os.kill(os.getpid(), -code)
if code:
    sys.exit(code)
time.sleep(600)
"""


@pytest.fixture
def rank(tmp_path: Path) -> str:
    """A rank that exits with its argument, or, where that is 0, waits to be stopped and then saves."""
    path = tmp_path / "rank.py"
    path.write_text(RANK)
    return str(path)


def on_two_ranks(program: list[str], tmp_path: Path, save_seconds: float = 0.2) -> tuple[list[str], dict[str, str]]:
    """Return a command that starts a program twice on this node, and its environment."""
    flags = ["--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", free_port()]
    environment = clean_environment(tmp_path, FOLDER=str(tmp_path), SAVE_SECONDS=str(save_seconds))
    return [*flags, *program], environment


@pytest.mark.parametrize(("codes", "expected"), [(("2", "2"), 2), (("-9", "0"), 128 + 9)])
def test_the_ranks_exit_code_is_the_nodes(rank: str, tmp_path: Path, codes: tuple[str, str], expected: int) -> None:
    """What the first failed rank ends with comes through, though torchrun has then stopped the other."""
    command, environment = on_two_ranks([rank, *codes], tmp_path)
    assert finish(start([*WRAPPER, *command], tmp_path, environment)).code == expected


def two_nodes(launcher: tuple[str, ...], folder: Path) -> list[Finished]:
    """Run two nodes that meet on one of them, where the rank ends at once with 2; the other one's does so later."""
    program = folder / "late.py"
    program.write_text("import os, sys, time; time.sleep(5 * int(os.environ['RANK'])); sys.exit(2)")
    port = free_port()
    flags = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}"]

    def start_node() -> Started:
        return start([*launcher, *flags, str(program)], folder, clean_environment(folder))

    def is_met_on() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("localhost", int(port))) == 0

    nodes = [start_node()]
    try:
        wait_until(is_met_on, "the first node, which is rank 0's, has the store")
        nodes.append(start_node())
        return [finish(node) for node in nodes]
    finally:
        for node in nodes:
            kill_all(node)


def test_a_node_whose_rank_ends_later_has_its_exit_code(tmp_path: Path) -> None:
    """The node where the agents meet is gone by then, and the other's agent waits for its rank all the same."""
    assert [node.code for node in two_nodes(WRAPPER, tmp_path)] == [2, 2]


def test_a_node_that_stays_alone_gives_up() -> None:
    """Where there is no answer for longer, the agent fails as torchrun's does; an answer begins it anew."""
    answers: list[int | None] = [None, 0, None, None]

    def ask(handler: object) -> int:
        answer = answers.pop(0)
        if answer is None:
            raise RendezvousConnectionError
        return answer

    patiently = patient(ask, seconds=0.05)
    assert patiently(None) == 0
    time.sleep(0.1)
    assert [patiently(None), patiently(None)] == [0, 0]
    time.sleep(0.1)
    with pytest.raises(RendezvousConnectionError):
        patiently(None)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([75, 75], 75),
        ([75, -signal.SIGTERM], 75),  # it was on its way out when torchrun stopped it
        ([75, 1], 1),  # 75 is the answer to torchrun's own SIGTERM
        ([1, 65, 1], 65),  # the others only lost it
        ([-signal.SIGKILL, 75], 137),
        ([-signal.SIGSEGV, 71], 71),
    ],
)
def test_one_exit_code_of_several(codes: list[int], expected: int) -> None:
    """Of ranks that ended within a second, the one that says most counts; 75 counts if all agree."""
    failures = [ProcessFailure(number, 1, code, "<N/A>") for number, code in enumerate(codes)]
    assert exit_code(failures) == expected


def stopped(launcher: list[str], rank: str, tmp_path: Path, save_seconds: float) -> tuple[int, set[str]]:
    """Start two waiting ranks, stop the node by SIGTERM; returns its exit code and who has saved."""
    command, environment = on_two_ranks([rank, "0", "0"], tmp_path, save_seconds)
    process = start([*launcher, *command], tmp_path, environment)
    try:
        wait_until(lambda: len(list(tmp_path.glob("up_*"))) == 2, "two ranks")
        process.send_signal(signal.SIGTERM)
        code = finish(process, save_seconds + 60).code
    finally:
        kill_all(process)
    return code, {path.name for path in tmp_path.glob("saved_*")}


def test_sigterm_lets_the_ranks_save(rank: str, tmp_path: Path) -> None:
    """SIGTERM to the node reaches every rank, and "requeue me" comes back."""
    assert stopped([*WRAPPER], rank, tmp_path, 1) == (75, {"saved_0", "saved_1"})


@pytest.mark.slow
def test_ranks_that_have_saved_are_not_started_again(rank: str, tmp_path: Path) -> None:
    """With restarts allowed, torchrun would take 75 for a crash and train on, told by nobody."""
    assert stopped([*WRAPPER, "--max-restarts=3"], rank, tmp_path, 1) == (75, {"saved_0", "saved_1"})


@pytest.mark.slow
def test_sigterm_leaves_more_time_than_torchrun(rank: str, tmp_path: Path) -> None:
    """Ranks that need longer than torchrun's 30 seconds are not killed."""
    assert stopped([*WRAPPER], rank, tmp_path, 35) == (75, {"saved_0", "saved_1"})


@pytest.mark.slow
def test_torchrun_itself_still_needs_this(rank: str, tmp_path: Path) -> None:
    """The three faults are there in plain torchrun; the day this fails, titan.launch.torchrun can go."""
    command, environment = on_two_ranks([rank, "75", "75"], tmp_path)
    assert finish(start([*PLAIN, *command], tmp_path, environment)).code == 1
    for path in tmp_path.glob("up_*"):
        path.unlink()
    assert stopped([*PLAIN], rank, tmp_path, 35) == (1, set())
    assert any("raise RendezvousConnectionError" in node.err for node in two_nodes(PLAIN, tmp_path))


def test_sigterm_before_any_rank_ends_at_once(rank: str, tmp_path: Path) -> None:
    """A node that still waits for the others has nothing to save, and asks to be requeued."""
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()  # and never answers
        flags = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "127.0.0.1"]
        flags += ["--master-port", str(head.getsockname()[1])]
        process = start([*WRAPPER, *flags, rank, "0", "0"], tmp_path, clean_environment(tmp_path))
        try:
            head.settimeout(60)
            connection, _ = head.accept()
            process.send_signal(signal.SIGTERM)
            assert finish(process, 20).code == 75
            connection.close()
        finally:
            kill_all(process)
