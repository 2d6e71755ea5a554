"""A run says when the compiler had to start over, and why; one that never did says that too."""

from __future__ import annotations

import pytest
import torch._dynamo

from titan.log import logger
from titan.trainer.build import Trainer

from .conftest import Runs

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own: it looks at what is deprecated, too

COMPILED = ("compile=inductor", "compile.backend=aot_eager", "training.steps=4", "training.local_batch_size=4")


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Forget what other tests have compiled."""
    torch._dynamo.reset()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return titan's own lines."""
    return [record.getMessage() for record in caplog.records if record.name == logger.name]


def test_steps_of_one_shape_are_compiled_once(runs: Runs, caplog: pytest.LogCaptureFixture) -> None:
    """After the first step nothing is compiled, and the last line says so."""
    with caplog.at_level("INFO"):
        runs.train("run", *COMPILED)
    lines = said(caplog)
    assert not [line for line in lines if "anew" in line]
    assert lines[-1].endswith(", 0 graphs compiled after the first step")


def test_a_compiled_update_is_compiled_once(runs: Runs, caplog: pytest.LogCaptureFixture) -> None:
    """With the learning rate another at each step too; it is said at the start, and nothing is compiled anew."""
    with caplog.at_level("INFO"):
        runs.train("run", *COMPILED, "compile.optimizer=true", "lr_scheduler.warmup_steps=3")
    lines = said(caplog)
    assert "applied    optimizer's update compiled with aot_eager" in lines
    assert lines[-1].endswith(", 0 graphs compiled after the first step")


def test_another_shape_is_named_with_its_step_and_reason(runs: Runs, caplog: pytest.LogCaptureFixture) -> None:
    """A step whose micro-batches have fewer rows compiles again: the log says which step, how much, and the guard.

    The block that serves all blocks, the last norm and the loss.
    """

    def change(trainer: Trainer) -> None:
        whole = trainer.forward_backward

        def smaller(batches, valid_tokens):
            halves = [half for batch in batches for half in batch.chunk(2)]
            return whole(halves if trainer.state.step == 2 else batches, valid_tokens)

        trainer.forward_backward = smaller

    with caplog.at_level("INFO"):
        runs.train("run", *COMPILED, change=change)
    lines = said(caplog)
    (line,) = [line for line in lines if "anew" in line]
    assert line.startswith("step 3 compiled 3 graphs anew: ")
    assert "size" in line
    assert lines[-1].endswith(", 3 graphs compiled after the first step")
