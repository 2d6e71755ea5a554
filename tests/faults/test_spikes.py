"""A loss that is no number on one rank: no weight moves, and what is left out is left out for good."""

from __future__ import annotations

import pytest
import torch

from tests.faults.conftest import INTERVAL, SHORT, MakeReference, MakeRun
from tests.support.command import json_lines
from titan.checkpoint.files import read_metadata, read_tensors, tensor_infos
from titan.checkpoint.manifest import step_folder

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


def test_a_run_that_stops_at_a_spike(make_run: MakeRun, undisturbed: MakeReference) -> None:
    """One rank's NaN ends all with 71. No weight has moved, the newest checkpoint is finite, and the run goes on."""
    run = make_run(undisturbed(SHORT), "checkpoint=async", lost_intervals=2)
    rank, step = run.draw.randrange(2), run.draw.randrange(INTERVAL + 1, SHORT)
    run.survive("NaN on one rank, on_spike=stop", f"nan:{rank}:step:{step}", (71,))
    assert run.last_row() == step - 1
    assert "planted nan: 0 weights moved" in run.directory.log(rank, 0).read_text()
    newest = step_folder(run.checkpoints, run.newest())
    infos = tensor_infos(read_metadata(newest))
    tensors = {name: torch.empty(info.shape, dtype=info.dtype) for name, info in infos.items()}
    read_tensors(tensors, newest)
    assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())
    run.complete()


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_a_run_that_gets_over_a_spike(make_run: MakeRun, undisturbed: MakeReference, action: str) -> None:
    """Killed as it writes the ledger, and again after it: it leaves out the same steps, and is the same run."""
    run = make_run(undisturbed(SHORT))
    rank, step = run.draw.randrange(2), run.draw.choice([8, 9, 11, 12, 14, 15])
    spike, how = f"nan:{rank}:step:{step}", f"fault_tolerance.on_spike={action}"
    run.before_spike, run.reference = run.reference, undisturbed(SHORT, "checkpoint=sync", how, faults=spike)
    run.arguments += ["checkpoint=sync", how]
    run.survive(f"NaN, on_spike={action}; SIGKILL before it is in the ledger", f"{spike};kill:0:ledger:1")
    assert run.directory.read_ledger() == []
    later = run.draw.randrange(step + 1, step + 4)
    run.survive(f"NaN, on_spike={action}; SIGKILL after it", f"{spike};kill:{1 - rank}:step:{later}")
    first = step if action == "skip" else (step - 1) // INTERVAL * INTERVAL + 1
    ledger = [(row["first_step"], row["last_step"]) for row in run.directory.read_ledger()]
    assert ledger == [(first, step)]
    run.complete(spike)
    left_out = set(range(1, SHORT + 1)) - {row["step"] for row in json_lines(run.directory.metrics)}
    assert left_out == set(range(first, step + 1))
    assert len(run.directory.read_ledger()) == 1
