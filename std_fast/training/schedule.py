"""What varies from step to step, in one table."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from std_fast.config.durations import Duration, parse_seconds, parse_warmup, unkept
from std_fast.config.recipe import Distill, Recipe
from std_fast.config.schema import difference
from std_fast.runtime.budget import Clock
from std_fast.runtime.distributed import SINGLE_PROCESS, World
from std_fast.training.optim import peak_learning_rate

WARMUP_OF_A_BUDGET = 0.05
log = logging.getLogger("std_fast")


@dataclass(frozen=True)
class StepSettings:
    """What one step does. The step counts from 1; what is due is done after it."""

    step: int
    lr: float
    psi_lr: float
    """of the statistics networks of MINE"""
    with_mine: bool
    image_size: int | None = None
    """side of the images that the student sees; None: as they are"""
    log: bool = False
    evaluate: bool = False
    snapshot: bool = False
    save: bool = False
    last: bool = False


@dataclass
class Schedule:
    """Settings by step.

        lr          linear warm-up, then a cosine from `peak_lr` to `min_lr`
        psi_lr      likewise, from `peak_psi_lr` to 0
        with_mine   in the first of every `mine_every` steps
        image_size  `early_size` for the first `early_share` of the training, then `image_size` (progressive resizing)
        log         every `log_every` steps, and after the last
        evaluate    every `eval_every` steps where a budget has the time, and after the last
        snapshot    every `snapshot_every` steps
        save        every `save_seconds` where a budget has the time (on rank 0), and after the last

    The clock measures progress: in steps, or in GPU-hours. A period of 0 means never.
    """

    clock: Clock
    peak_lr: float
    min_lr: float
    peak_psi_lr: float
    warmup: float
    """share of the training"""
    mine_every: int
    image_size: int
    early_size: int
    early_share: float
    log_every: int
    eval_every: int
    snapshot_every: int
    save_seconds: float
    world: World = SINGLE_PROCESS
    saved_at: float = -math.inf
    """when the last checkpoint was made, by `time.perf_counter`"""

    def saved(self) -> None:
        """A checkpoint is being made: the next one is due `save_seconds` from now."""
        self.saved_at = time.perf_counter()

    def at(self, step: int) -> StepSettings:
        """Settings of step number `step`; call it once, directly before the step. All ranks get the same but `save`."""
        progress = self.clock.progress(step)
        last = self.clock.done(step)
        return StepSettings(
            step=step,
            lr=warmup_cosine(progress, self.peak_lr, self.min_lr, self.warmup),
            psi_lr=warmup_cosine(progress, self.peak_psi_lr, 0.0, self.warmup),
            with_mine=self.mine_every > 0 and (step - 1) % self.mine_every == 0,
            image_size=self.early_size if progress < self.early_share else self.image_size,
            log=last or step % self.log_every == 0,
            evaluate=last or (is_due(step, self.eval_every) and self.world.broadcast(self.clock.fits("evaluate"))),
            snapshot=is_due(step, self.snapshot_every),
            save=last or (time.perf_counter() - self.saved_at > self.save_seconds and self.clock.fits("checkpoint")),
            last=last,
        )


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def warmup_cosine(progress: float, peak: float, floor: float, warmup: float) -> float:
    """Linear warm-up over the first `warmup` share of the training, then a cosine from `peak` to `floor`.

    `progress` is the share of the training that is done when this step is, in (0, 1]: the last step has `floor`.
    """
    if progress < warmup:
        return peak * progress / warmup
    share = (progress - warmup) / (1 - warmup) if warmup < 1 else 1.0
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def warmup_share(warmup: str, clock: Clock, steps_per_epoch: int, batch: int) -> float:
    """`optim.warmup` as a share of the training; of one in GPU-hours, whose steps are not known, always 5 %."""
    parsed = parse_warmup(warmup)
    if isinstance(parsed, float):
        return parsed
    if clock.steps is not None:
        return min(1.0, parsed.steps(steps_per_epoch, batch) / clock.steps)
    log.info("optim.warmup: %s of a training in gpu-hours: the first 5 %% of it are taken", parsed)
    return WARMUP_OF_A_BUDGET


ONE_TOKEN = "other distill.tokens than both"
WITHOUT_EFFECT: tuple[tuple[str, Callable[[Recipe], bool], str], ...] = (
    ("student.new_head", lambda r: not r.student.weights, "student.weights '': all of the student is new"),
    # a share that `kept_rows` rounds to no image of 32
    ("student.drop_path_mode", lambda r: r.student.drop_path <= 1 / 64, "student.drop_path of 1/64 or less"),
    ("student.early_share", lambda r: not r.student.early_size, "student.early_size 0"),
    ("data.crop.fraction", lambda r: r.data.crop.kind != "center", "another data.crop.kind than center"),
    (
        "data.crop.scale data.crop.ratio",
        lambda r: r.data.crop.kind != "random_resized",
        "another data.crop.kind than random_resized",
    ),
    ("data.eval_crop.fraction", lambda r: r.data.eval_crop.kind != "center", "another data.eval_crop.kind than center"),
    (
        "data.eval_crop.scale data.eval_crop.ratio",
        lambda r: r.data.eval_crop.kind != "random_resized",
        "another data.eval_crop.kind than random_resized",
    ),
    ("data.hw_decoder_load", lambda r: r.data.backend != "dali", "another data.backend than dali"),
    ("data.corrupt_limit", lambda r: r.data.on_corrupt == "stop", "data.on_corrupt stop"),
    (
        "augment.randaugment_m augment.randaugment_mstd",
        lambda r: not r.augment.randaugment_n,
        "augment.randaugment_n 0",
    ),
    ("augment.mixup augment.cutmix", lambda r: not r.augment.mix_prob, "augment.mix_prob 0"),
    ("augment.mix_prob", lambda r: not (r.augment.mixup or r.augment.cutmix), "augment.mixup 0 and augment.cutmix 0"),
    ("augment.switch", lambda r: not (r.augment.mixup and r.augment.cutmix), "augment.mixup 0 or augment.cutmix 0"),
    ("distill.reweight", lambda r: len(r.distill.teachers) < 2, "fewer than two teachers"),
    ("distill.token_mlp_ratio", lambda r: r.distill.tokens in ("none", "deit"), "distill.tokens none or deit"),
    ("distill.mine.weight", lambda r: r.distill.tokens != "both" and r.distill.mine.weight > 0, ONE_TOKEN),
    (
        "distill.mine.every distill.mine.lr distill.mine.width distill.mine.ema",
        lambda r: not r.distill.uses_mine,
        f"distill.mine.weight 0 or {ONE_TOKEN}",
    ),
    ("optim.smoothing", lambda r: r.distill.mode == "std" and r.distill.alpha == 1, "distill.alpha 1"),
    ("optim.ema_batch", lambda r: not r.optim.ema, "optim.ema 0"),
    ("run.not_finite_limit", lambda r: r.run.not_finite == "stop", "run.not_finite stop"),
    ("run.rollback_every", lambda r: r.run.not_finite != "rollback", "another run.not_finite than rollback"),
)
"""fields that another one switches off, whether it does, and why; those of `distill` with distill.mode std"""


def unkept_settings(recipe: Recipe, steps_per_epoch: int) -> list[str]:
    """A line for each duration that the run does not keep to, for fields that have no effect in it, and for others that
    do not go together."""
    run, optim, distill = recipe.run, recipe.optim, recipe.distill
    every = {"run.eval_every": run.eval_every}
    if distill.uses_mine:
        every["distill.mine.every"] = distill.mine.every
    if run.not_finite == "rollback":
        every["run.rollback_every"] = run.rollback_every
    lines = list(unkept(every, optim.warmup, run.length, steps_per_epoch, run.batch))
    changed = difference(Recipe(), recipe)
    if distill.mode == "none":
        idle = [name for name in changed if name.startswith("distill.") and name != "distill.views"]
        lines += [f"{', '.join(idle)}: no effect with distill.mode none"] * bool(idle)
        changed = [name for name in changed if name not in idle]
    for names, off, why in WITHOUT_EFFECT:
        if (idle := [name for name in changed if name in names.split()]) and off(recipe):
            lines.append(f"{', '.join(idle)}: no effect with {why}")
    if (peak := peak_learning_rate(optim, run.batch)) < optim.min_lr:
        lines.append(
            f"optim.min_lr: {optim.min_lr:g} is above the peak learning rate {peak:.3g} of a batch of {run.batch} "
            "(optim.lr, optim.lr_batch), which therefore rises to the end"
        )
    return lines + list(untrained_heads(distill))


def untrained_heads(distill: Distill) -> Iterator[str]:
    """A line for each kind of head that takes part in the prediction though no loss trains it."""
    if distill.mode == "none":
        return
    if distill.predict != "distill" and distill.alpha == 1 and not distill.class_share:
        yield f"distill.predict: {distill.predict} counts the class head, which learns nothing with distill.alpha 1"
    untrained = {
        "distill.alpha 0": distill.alpha == 0,
        "distill.class_share 1": distill.class_share == 1,
        "a 0 in distill.module_weights": 0 in (distill.module_weights or ()),
    }
    if distill.predict != "class" and (why := next((why for why, true in untrained.items() if true), "")):
        yield f"distill.predict: {distill.predict} counts distillation heads that learn nothing with {why}"


def build_schedule(recipe: Recipe, clock: Clock, steps_per_epoch: int, world: World = SINGLE_PROCESS) -> Schedule:
    """The table of a recipe, its durations converted to steps; what cannot be kept is logged."""
    r, run, mine = recipe, recipe.run, recipe.distill.mine
    for line in unkept_settings(recipe, steps_per_epoch) if world.main else ():
        log.warning(line)

    def steps(duration: str) -> int:
        return Duration.parse(duration).steps(steps_per_epoch, run.batch)

    # the first save of a budget is made early, so that the cost of the last one is known
    early_save = clock.hours is not None and "checkpoint" not in clock.costs
    return Schedule(
        clock=clock,
        peak_lr=peak_learning_rate(r.optim, run.batch),
        min_lr=r.optim.min_lr,
        peak_psi_lr=mine.lr,
        warmup=warmup_share(r.optim.warmup, clock, steps_per_epoch, run.batch),
        mine_every=max(1, steps(mine.every)) if r.distill.uses_mine else 0,
        image_size=r.data.image_size,
        early_size=r.student.early_size or r.data.image_size,
        early_share=r.student.early_share if r.student.early_size else 0.0,
        log_every=run.log_every,
        eval_every=steps(run.eval_every),
        snapshot_every=max(1, steps(run.rollback_every)) if run.not_finite == "rollback" else 0,
        save_seconds=parse_seconds(run.save_every, "run.save_every"),
        world=world,
        saved_at=-math.inf if early_save else time.perf_counter(),
    )
