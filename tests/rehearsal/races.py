"""Steps with teachers beside the student under CUDA's sanitizer of torch, as they are and with one wait taken out.

Run by test_races.py as `TORCH_CUDA_SANITIZER=1 fake-gpu python -m tests.rehearsal.races WHAT FOLDER`; a race ends it.
"""

from __future__ import annotations

import sys
from pathlib import Path

STEPS = 6


class NoWait:
    """Stands where an event does, and orders nothing."""

    def wait(self, stream: object = None) -> None: ...


def take_steps(folder: Path) -> None:
    import timm
    from safetensors.torch import save_file

    from benchmarks.workload import write_images
    from std_fast.training.run import Run
    from std_fast.training.schedule import StepSettings
    from tests.rehearsal.steps import recipe_of

    write_images(folder / "images", 3, 16 * STEPS, 48)
    save_file(timm.create_model("test_resnet", num_classes=3).state_dict(), folder / "resnet.safetensors")
    run = Run(recipe_of("teachers beside", "off", folder), quiet=True)
    for step in range(1, STEPS + 1):
        run.trainer.step(next(run.stream), StepSettings(step, 1e-3, 1e-3, with_mine=True))
    run.close()


def prepare_what_was_just_written(waits: bool) -> None:
    """A preparation reads what the student's stream wrote a moment ago, as after loading weights into a teacher."""
    import torch

    from std_fast.teachers.overlap import Overlap

    class Deaf(torch.cuda.Stream):
        def wait_stream(self, stream: object) -> None: ...

    overlap = Overlap("on", torch.device("cuda", 0))
    if not waits:
        overlap.stream = Deaf(overlap.stream.device)
    table = torch.zeros(1000, device="cuda")
    table.add_(1)
    overlap.prepare(lambda: table * 2)


def main() -> int:
    what, folder = sys.argv[1], Path(sys.argv[2])
    from std_fast.teachers.overlap import Overlap

    receive = Overlap.receive
    if what == "without the event of the batch":
        Overlap.receive = lambda self, prepared: receive(self, prepared._replace(ready=NoWait()))
    if what.startswith("just written"):
        prepare_what_was_just_written(waits=what == "just written")
    else:
        take_steps(folder)
    print("no race")
    return 0


if __name__ == "__main__":
    sys.exit(main())
