"""TensorBoard's files, through PyTorch's own writer: the numbers of metrics.jsonl, sorted into sections.

A file that was written cannot be taken back, but a new one can say from which step on the older ones no longer count
(`purge_step`). So going back is: close, and open another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.tensorboard.writer import SummaryWriter

from titan.metrics.sinks import section_of


class TensorBoard:
    """The event files of one run.

    Args:
        folder: Where they are; made if it is not there.
        resumed_step: The step that the run goes on from; what older files have beyond it is no longer shown.
    """

    def __init__(self, folder: Path, resumed_step: int) -> None:
        self.folder = folder
        self._writer: SummaryWriter | None = None
        self.rewind(resumed_step)

    def write(self, row: dict[str, Any]) -> None:
        """Write each number of a row at its step, so that it is seen at once."""
        assert self._writer is not None
        for name, value in row.items():
            if name not in ("step", "time") and isinstance(value, int | float):
                self._writer.add_scalar(f"{section_of(name)}/{name}", value, row["step"])
        self._writer.flush()

    def step(self) -> None:
        """Take note of a step; of no use to a file."""

    def rewind(self, step: int) -> None:
        """Begin another file, before which nothing beyond this step counts."""
        is_new = self._writer is None and not any(self.folder.glob("events.out.tfevents.*"))
        self.close()
        self._writer = SummaryWriter(str(self.folder), purge_step=None if is_new else step + 1)

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None
