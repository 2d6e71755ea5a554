"""Who hangs: judged by the Python stacks of all ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from titan.trainer import stacks
from titan.trainer.stacks import judge, main_thread, name_ranks

TORCH = "/venv/lib/python3.11/site-packages/torch"
TITAN = "/somewhere/src/titan"
BOTTOM = ((f"{TITAN}/worker.py", 200, "train"), ("<frozen runpy>", 88, "_run_code"))
FIT = ((f"{TITAN}/trainer/loop.py", 62, "fit"), *BOTTOM)
OTHER_THREAD = "Thread 0x00007f228d4bd6c0 (most recent call first):\n" + (
    '  File "/usr/lib/python3.11/threading.py", line 982 in run\n'
)


def stack(*frames: tuple[str, int, str], first_line: str = "") -> str:
    """Return what `faulthandler` writes of a process whose main thread has these frames, innermost first."""
    lines = [f'  File "{path}", line {line} in {function}' for path, line, function in frames]
    return "\n".join([first_line, OTHER_THREAD, "Thread 0x00007f22b23eab80 (most recent call first):", *lines, ""])


ALL_REDUCE = stack(
    (f"{TORCH}/distributed/distributed_c10d.py", 3252, "all_reduce"),
    (f"{TORCH}/distributed/c10d_logger.py", 83, "wrapper"),
    (f"{TITAN}/trainer/loss.py", 46, "count_valid_tokens"),
    *FIT,
)
BACKWARD = stack(
    (f"{TORCH}/autograd/graph.py", 865, "_engine_run_backward"),
    (f"{TORCH}/_tensor.py", 630, "backward"),
    (f"{TITAN}/trainer/step.py", 49, "run"),
    *FIT,
)
UNSHARD = stack(
    (f"{TORCH}/distributed/fsdp/_fully_shard/_fsdp_collectives.py", 160, "foreach_all_gather"),
    (f"{TORCH}/nn/modules/module.py", 1790, "_call_impl"),
    (f"{TITAN}/models/decoder.py", 80, "forward"),
    *FIT,
)
SLEEPS = stack(("/home/me/hooks.py", 7, "ask_a_server"), *FIT)
READS = stack(
    ("/usr/lib/python3.11/multiprocessing/connection.py", 379, "_recv"),
    ("/usr/lib/python3.11/multiprocessing/connection.py", 249, "recv"),
    (f"{TITAN}/data/workers.py", 75, "next"),
    (f"{TITAN}/data/loader.py", 160, "build_loader"),
    (f"{TITAN}/trainer/loop.py", 117, "steps_of_batches"),
    *FIT,
)
WRITES = stack(
    (f"{TORCH}/distributed/checkpoint/filesystem.py", 400, "_write_item"),
    (f"{TITAN}/checkpoint/store.py", 77, "save"),
    *FIT,
)
IN_A_LAYER = stack((f"{TORCH}/nn/functional.py", 100, "linear"), (f"{TITAN}/models/llama.py", 50, "forward"), *FIT)


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (SLEEPS, "hangs at /home/me/hooks.py:7 in ask_a_server"),
        (READS, "hangs at titan/trainer/loop.py:117 in steps_of_batches (waiting for its data)"),
        (WRITES, "hangs at titan/checkpoint/store.py:77 in save"),
        (IN_A_LAYER, "hangs at titan/models/llama.py:50 in forward"),
        ("", "does not answer"),
        ("Timeout (0:05:00)!\n", "does not answer"),
    ],
    ids=["a user's code", "its data", "a disk", "a layer", "nothing", "half a text"],
)
@pytest.mark.parametrize("others", [ALL_REDUCE, BACKWARD, UNSHARD], ids=["a collective", "backward", "FSDP"])
def test_the_rank_that_does_not_wait_is_to_blame(one: str, words: str, others: str) -> None:
    """One rank does something else, or nothing; three wait for it, and say where."""
    verdict = judge({0: others, 1: others, 2: one, 3: others})
    assert verdict.ranks == [2]
    assert verdict.text.startswith(f"rank 2 {words}")
    assert "; ranks 0, 1 and 3 wait at titan/" in verdict.text


def test_several_are_named_each_with_its_place() -> None:
    """A stopped rank and a slow one are both told."""
    verdict = judge({0: "", 1: SLEEPS, 2: ALL_REDUCE, 3: SLEEPS})
    assert verdict.ranks == [0, 1, 3]
    assert verdict.text == (
        "rank 0 does not answer (stopped, or the machine is gone); "
        "ranks 1 and 3 hang at /home/me/hooks.py:7 in ask_a_server; "
        "rank 2 waits at titan/trainer/loss.py:46 in count_valid_tokens"
    )


def test_where_all_wait_the_fewest_are_suspected() -> None:
    """Ranks that wait for different things will wait for ever: one of them has taken a wrong turn."""
    verdict = judge({0: ALL_REDUCE, 1: ALL_REDUCE, 2: UNSHARD})
    assert verdict.ranks == [2]
    assert verdict.text.startswith("all wait for each other; rank 2 waits at titan/models/decoder.py:80 in forward;")
    assert judge({0: ALL_REDUCE, 1: ALL_REDUCE}).ranks == [0, 1]


def test_a_single_rank_is_to_blame_for_itself() -> None:
    """A run of one rank hangs where it stands."""
    assert judge({0: SLEEPS}).text == "rank 0 hangs at /home/me/hooks.py:7 in ask_a_server"


def test_a_wait_inside_native_code_is_told_by_the_line_that_calls_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, ranks wait for each other where a number is read; no frame of Python's says so."""
    source = tmp_path / "titan" / "step.py"
    source.parent.mkdir()
    source.write_text("result = StepResult(*torch.stack((loss, norm)).tolist())\ntime.sleep(1)\n")
    reading, sleeping = (stack((str(source), line, "train_step"), *FIT) for line in (1, 2))
    assert judge({0: reading, 1: sleeping}).ranks == [1]


def test_the_main_thread_is_found_among_others() -> None:
    """Threads that torch or a user has started do not count, wherever the list has them."""
    frames = main_thread("Timeout!\n" + SLEEPS.partition("\n")[2] + "\n" + OTHER_THREAD)
    assert frames[0].function == "ask_a_server"
    assert main_thread("") == []


def test_many_ranks_are_not_all_listed() -> None:
    """A thousand ranks fit into a line."""
    assert name_ranks([3]) == "rank 3"
    assert name_ranks([3, 5]) == "ranks 3 and 5"
    assert name_ranks(range(1000)) == f"ranks {', '.join(map(str, range(stacks._SHOWN)))} and 992 more"
