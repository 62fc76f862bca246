"""`train`: a run with its process group, signals, and error messages."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from std_fast.config.recipe import Recipe, parse_seconds
from std_fast.runtime.distributed import World, init_distributed
from std_fast.runtime.memory import out_of_memory_line, ran_out
from std_fast.runtime.process import say, stop_on_signal
from std_fast.training.build import resolved, uses_gpu
from std_fast.training.existing import complete_line
from std_fast.training.not_finite import NotFinite
from std_fast.training.run import Run, Stopped
from std_fast.training.run_folder import Complete


def train(
    recipe: Recipe,
    resume: bool = False,
    quiet: bool = False,
    on_step: Callable[[Run], None] | None = None,
    already: float = 0.0,
) -> dict[str, Any]:
    """Trains a recipe to its end; returns the summary that is also written to the run's folder.

    Args:
        resume: continue from the newest complete checkpoint of the run's folder, if it has one.
        quiet: no progress on standard error.
        on_step: called after each step; it may set `run.stop_wanted`.
        already: seconds that count as held before the call. The command line passes those since its process started;
            a process that trains many runs leaves it at 0.

    Raises:
        UserError: something that the user can fix, a batch too large for the memory too.
        Stopped: one of STOP_SIGNALS, as of Ctrl-C, or `stop_wanted`; the run is saved.
        NotFinite: a loss or gradient was not finite, and the recipe says to stop; the state before it is saved.
        PeerLost: started by torchrun, and another process has died or hangs.
    """
    limit, out = parse_seconds(recipe.run.timeout, "run.timeout"), resolved(recipe).run.out
    with init_distributed(uses_gpu(recipe.run.device), limit) as world:
        try:
            return _train(recipe, resume, quiet, world, on_step, already)
        except Complete as end:
            if world.main and not quiet:
                say(complete_line(Path(out)))
            return end.summary
        except OSError as error:  # those of data and target cache are UserErrors already
            what = f"{os.fsdecode(error.filename or out)}: {error.strerror or error}"
            raise UserError(f"{out}: the run cannot be written ({what}); fix that and resume") from error
        except Exception as error:
            if not ran_out(error):
                raise
            line = out_of_memory_line(error, recipe.run.batch, recipe.run.micro_batch)
        raise UserError(line)  # outside of `except`: the error is forgotten, and with it the memory its frames hold


def _train(
    recipe: Recipe, resume: bool, quiet: bool, world: World, on_step: Callable[[Run], None] | None, already: float
) -> dict[str, Any]:
    # signals to the end: a second one must not cut the save short
    with stop_on_signal() as signals, Run(recipe, resume, quiet, world, signals, already) as run:
        try:
            run.loop(on_step)
            with run.ledger.during("checkpoint"):
                run.folder.writer.wait()
            return run.log.summary(run.step, run.evaluator.result, run.evaluator.best, run.monitor.steps)
        except (Stopped, NotFinite):  # all ranks alike: they stay until rank 0 has saved, or torchrun would end it
            run.folder.writer.wait()
            world.wait_for_all()
            raise
        finally:
            run.folder.writer.wait()
