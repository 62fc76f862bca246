"""Teachers as a CUDA graph: one launch instead of some hundreds, which pays where the host cannot keep up (small
batches, eager or aot_eager teachers, many decoding threads on few cores).

Hazards, and what is done about them:
- A replay reads and writes the same memory as the capture. The images are copied into the graph's own input; the
  targets, which are small, are copied out of it, so that nobody holds what the next replay overwrites.
- Graphs that share a memory pool must be replayed in the order of their capture. Each has a pool of its own, and the
  student's memory, captured or not, is never in it.
- Weights must stay where they are: after `.to()` or `load_state_dict(assign=True)` make a new one. In-place changes are
  seen by the next replay.
- Only what the device does is captured: no branch on a value, no random numbers, no host synchronisation.
- Loader threads, pinned memory and NCCL's watchdog call CUDA during the capture: it forbids such calls to its own
  thread only (`thread_local`).
- The capture is made at the first batch of each shape, after warm-up calls in which torch.compile compiles and
  libraries choose their kernels; it waits for the device.

The whole step is not captured: at the batch sizes of the recipes the kernels of a compiled step take far longer than
their launches, and the step number, which guard and moving average take from the host, would have to move there too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from std_fast.method.losses import TeacherTargets
from std_fast.teachers.teacher import Teachers

WARM_UP = 3  # calls before the capture


class ReplayedTeachers(Teachers):
    """`Teachers` (compiled or not) that capture themselves once for each shape of images, and then replay."""

    def __init__(self, inner: Teachers) -> None:
        nn.Module.__init__(self)
        self.inner, self.teachers = inner, inner.teachers
        self.temperature, self.top_k = inner.temperature, inner.top_k
        self._captured: dict[tuple, tuple[torch.cuda.CUDAGraph, Tensor, TeacherTargets]] = {}

    def forward(self, images: Tensor) -> TeacherTargets:
        """Images `[B, 3, H, W]` on a GPU; the work is done in the current stream."""
        key = (images.shape, images.stride(), images.dtype, images.device)
        if key not in self._captured:
            self._captured[key] = self._capture(images)
        graph, own_images, targets = self._captured[key]
        own_images.copy_(images)
        graph.replay()
        copies: Any = [None if value is None else value.clone() for value in targets]
        return TeacherTargets(*copies)

    @torch.no_grad()
    def _capture(self, images: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, TeacherTargets]:
        own_images = torch.empty_like(images)  # keeps the strides
        own_images.copy_(images)
        stream, current = torch.cuda.Stream(images.device), torch.cuda.current_stream(images.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.inner(own_images)
        graph = torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            targets = self.inner(own_images)
        current.wait_stream(stream)
        return graph, own_images, targets
