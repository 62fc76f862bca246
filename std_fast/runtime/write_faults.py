"""Logs, progress and trackers never end a training: what they fail to write is counted, and named once."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from pipelines.errors import one_line

log = logging.getLogger("std_fast")


class WriteFaults:
    """How many writes failed.

    Attributes:
        counts: by destination, such as `metrics.jsonl` or `wandb`.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    @contextlib.contextmanager
    def counted(self, destination: str) -> Iterator[None]:
        """An error in the block is counted, and goes no further."""
        try:
            yield
        except Exception as error:  # of a disk, a pipe, a network, or anything that a tracker's package raises
            self.add(destination, error)

    def add(self, destination: str, error: Exception | str) -> None:
        """Counts a write that failed; the first one of each destination is a warning in the log."""
        self.counts[destination] = self.counts.get(destination, 0) + 1
        if self.counts[destination] == 1:
            what = one_line(" ".join(str(error).split()) or type(error).__name__)
            log.warning("%s: cannot be written (%s); the run continues without what is lost there", destination, what)
