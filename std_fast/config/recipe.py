"""The recipe: typed, validated on construction, written as YAML, overridden from the command line.

Defaults < recipe file < command line. Unknown keys are refused with the nearest known one. A recipe file may name
another one as its `base` (a path beside it, or the name of a built-in recipe) and then holds only what differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.augment.spec import AugmentSpec
from pipelines.errors import FieldError, UserError
from pipelines.read.crops import CropSpec
from pipelines.read.settings import Backend, ReadSettings, Resample
from std_fast.config.durations import Duration, parse_seconds, parse_steps, parse_warmup
from std_fast.config.files import OUT, read, read_text
from std_fast.config.foreign import explained
from std_fast.config.legacy import upgrade_recipe
from std_fast.config.options import OWN_PLACE, check_local, check_options
from std_fast.config.schema import UnknownKey, from_dict, opt, read_yaml, require, to_dict, write_yaml


@dataclass(frozen=True)
class Data(ReadSettings):
    train: str = opt("", "training data: a .beton, a glob of them, or an image folder SRC/CLASS/*")
    val: str = opt("", "validation data, likewise; empty: no evaluation")
    backend: Backend = opt(
        "auto",
        "loader that reads and decodes; auto: resident for small data, else ffcv where it is installed, else torch",
    )
    eval_crop: CropSpec = opt(CropSpec("center", fraction=0.875), "the crop of evaluation")
    eval_resample: Resample = opt("auto", "how evaluation crops are resized; timm evaluates most teachers with bicubic")


@dataclass(frozen=True)
class StudentSpec:
    name: str = opt("mixer_s16", "a backbone of this project, or any timm name when distill.mode is none")
    options: dict = opt(
        {}, "arguments of the model's builder, e.g. {patch_size: 4}; timm's ResNets take {small_stem: true} for 32 px"
    )
    drop_path: float = opt(
        0.0, "stochastic depth rate: the same for every block of Mixer and ResMLP; CycleMLP's rises linearly to it"
    )
    drop_path_mode: Literal["scale", "subset"] = opt(
        "scale", "`scale` computes what it drops; `subset` skips it, the same number of every 32 images in each step"
    )
    early_size: int = opt(
        0,
        "progressive resizing: side of the smaller images that the student sees early, the teachers full-size ones; "
        "for CycleMLP and timm's convolutional networks; 0: never",
    )
    early_share: float = opt(0.5, "share of the training that is early, with early_size")
    weights: str = opt(
        "", "start from these weights: a run folder, an export, .safetensors, a timm checkpoint, or timm's `pretrained`"
    )
    new_head: bool = opt(False, "with weights: keep fresh heads and load all else, for data of other classes")

    def __post_init__(self) -> None:
        require(0 <= self.drop_path < 1, "student.drop_path", f"{self.drop_path} must be in [0, 1)")
        require(bool(self.name), "student.name", "is empty; name a model, e.g. mixer_s16")
        check_options(self.options, "student", *OWN_PLACE, "in_chans", "img_size")
        check_local(self.weights, "student", "weights")
        require(
            self.drop_path_mode == "scale" or self.drop_path > 0,
            "student.drop_path_mode",
            "subset has no effect with student.drop_path 0; set that, or leave it out",
        )
        require(self.early_size == 0 or self.early_size >= 8, "student.early_size", "must be 8 or more, or 0 for never")
        require(0 < self.early_share < 1, "student.early_share", f"{self.early_share} must be more than 0, less than 1")


@dataclass(frozen=True)
class TeacherSpec:
    name: str = opt("", "timm name, or a backbone of this project; left out when weights is a folder, which knows it")
    weights: str = opt(
        "",
        "a run folder, a Hugging Face folder (config.json and weights), a .safetensors or timm checkpoint file, or "
        "`pretrained` (needs a network)",
    )
    options: dict = opt({}, "arguments of the model's builder, as in student.options")
    classes: str = opt(
        "",
        "its class names, matched with the data's: `imagenet-1k` or another list of timm's, or a file with one a line; "
        "default: its run's or folder's own, or ImageNet's where the data's names are WordNet ids",
    )
    image_size: int | None = opt(None, "input size; default: the student's, or the only one that the model takes")
    precision: Literal["auto", "float32", "bfloat16"] = opt(
        "auto", "auto: as run.precision; `std-fast bench teachers` measures what it costs and gains"
    )
    mean: tuple[float, float, float] | None = opt(None, "normalisation mean of its training; default: its own config")
    std: tuple[float, float, float] | None = opt(None, "normalisation deviation of its training; likewise")

    def __post_init__(self) -> None:
        check_options(self.options, "teacher", *OWN_PLACE)
        check_local(self.weights, "teacher", "weights")
        check_local(self.classes, "teacher", "classes")
        if self.std is not None and min(self.std) <= 0:
            raise FieldError("teacher", "std", "must be positive")
        object.__setattr__(self, "weights", self.weights.removeprefix("local-dir:"))  # as timm names a folder


@dataclass(frozen=True)
class MineSpec:
    weight: float = opt(0.01, "strength of the mutual information regulariser; 0: off")
    every: str = opt("1 epoch", "how often: `1 epoch`, in its first step, as in the paper's Algorithm 1, or `k steps`")
    lr: float = opt(1e-3, "peak learning rate of the statistics network (the paper states none)")
    width: int = opt(512, "hidden width of the statistics network")
    ema: float = opt(0.0, "rate of the moving average in the corrected gradient, e.g. 0.01; 0: uncorrected")

    def __post_init__(self) -> None:
        require(self.weight >= 0, "distill.mine.weight", "cannot be negative; 0 turns MINE off")
        require(self.lr >= 0, "distill.mine.lr", "cannot be negative")
        require(0 <= self.ema < 1, "distill.mine.ema", "must be in [0, 1)")
        require(self.width >= 1, "distill.mine.width", "must be 1 or more")
        every = Duration.parse(self.every, "distill.mine.every")
        require(
            every.unit in ("steps", "epochs") and every.amount >= 1 and every.amount == int(every.amount),
            "distill.mine.every",
            "must be an integer number of steps or epochs",
        )


@dataclass(frozen=True)
class Distill:
    mode: Literal["std", "none"] = opt("std", "`none` trains the student plainly, without teachers")
    teachers: tuple[TeacherSpec, ...] = opt((), "the teachers; with two, the small one first")
    tokens: Literal["both", "spatial", "channel", "none", "deit"] = opt(
        "both", "STD tokens; `none`: heads on pooled features; `deit`: one token through all blocks"
    )
    taps: tuple[int, ...] | None = opt(None, "blocks after which the STD modules read, from 1; default: 2/3 and last")
    assign: tuple[tuple[int, ...], ...] | None = opt(None, "for each module the teachers it serves; default: its own")
    alpha: float = opt(0.5, "weight of the distillation loss; the class loss has 1 - alpha")
    module_weights: tuple[float, ...] | None = opt(
        None, "a factor of each STD module's share of the distillation loss; default: 1 for all"
    )
    class_share: float = opt(0.0, "share of the distillation loss that the class head gets, from all teachers")
    token_mlp_ratio: tuple[float, float] = opt(
        (0.5, 4.0), "hidden widths of the modules' spatial and channel MLP over the channels C; default: the paper's"
    )
    labels: Literal["hard", "soft", "ground_truth"] = opt(
        "hard",
        "teacher targets: their argmax, or their distribution at `temperature`; `ground_truth`: no teachers, the "
        "distillation heads learn the data set's labels (of a mixed image that with the larger share)",
    )
    temperature: float = opt(1.0, "temperature of soft labels")
    top_k: int = opt(0, "soft labels keep this many of the largest probabilities, the rest is spread evenly; 0: all")
    reweight: bool = opt(True, "weigh the teachers by their confidence, per image")
    mine: MineSpec = opt(MineSpec(), "mutual information regularisation")
    predict: Literal["mean", "class", "distill"] = opt(
        "mean", "which heads predict in evaluation: their mean, the class head or the distillation heads"
    )
    target_cache: str = opt(
        "", "folder of stored teacher targets: epochs that it holds are read, others are added to it"
    )
    views: int = opt(0, "epoch e shows the images (order, crops, augmentation) of epoch e mod views; 0: always new")

    def __post_init__(self) -> None:
        require(0 <= self.alpha <= 1, "distill.alpha", f"{self.alpha} must be between 0 and 1")
        require(self.temperature > 0, "distill.temperature", "must be positive")
        if self.labels != "soft":
            for name, default in (("temperature", 1.0), ("top_k", 0)):
                fix = "has no effect without distill.labels: soft; leave it out"
                require(getattr(self, name) == default, f"distill.{name}", fix)
        require(0 <= self.class_share <= 1, "distill.class_share", f"{self.class_share} must be between 0 and 1")
        require(min(self.token_mlp_ratio) > 0, "distill.token_mlp_ratio", "must be positive")
        require(
            self.module_weights is None or (self.tokens != "deit" and min(self.module_weights, default=0.0) >= 0),
            "distill.module_weights",
            "must be a number of 0 or more for each module; DeiT's token has none",
        )
        check_local(self.target_cache, "distill", "target_cache")
        require(self.views >= 0, "distill.views", "cannot be negative; 0 shows new images in every epoch")
        require(self.top_k >= 0, "distill.top_k", "cannot be negative; 0 keeps all probabilities")
        require(
            not self.target_cache or self.labels != "soft" or self.top_k > 0,
            "distill.top_k",
            "all probabilities are too many to be stored; keep some, e.g. 10, or leave distill.target_cache out",
        )
        useful = not self.target_cache or self.mode == "std"
        require(useful, "distill.target_cache", "has no effect with distill.mode none; leave it out")
        if self.mode == "std":
            if self.labels == "ground_truth":
                fix = "has no effect with distill.labels: ground_truth; leave it out"
                require(not self.teachers, "distill.teachers", fix)
                require(not self.target_cache, "distill.target_cache", fix)
            else:
                fix = "is empty; name a teacher, or set distill.labels to ground_truth or distill.mode to none"
                require(len(self.teachers) > 0, "distill.teachers", fix)
            for i, teacher in enumerate(self.teachers):
                require(bool(teacher.name or teacher.weights), f"distill.teachers.{i}", "needs a name or weights")
            require(
                self.tokens != "deit" or (self.taps is None and self.assign is None),
                "distill.taps",
                "has no effect with tokens: deit; leave taps and assign out",
            )
        else:
            fix = "have no effect without distill.mode std; set it, or set them to []"
            require(not self.teachers, "distill.teachers", fix)

    @property
    def num_teachers(self) -> int:
        """Columns M of the teacher targets; of the ground truth one for each module, which takes a teacher's place."""
        if self.labels == "ground_truth":
            return 1 if self.tokens == "deit" else len(self.taps or (0, 0))
        return len(self.teachers)

    @property
    def uses_mine(self) -> bool:
        return self.mode == "std" and self.tokens == "both" and self.mine.weight > 0


@dataclass(frozen=True)
class Optim:
    name: Literal["adamw", "sgd", "muon", "lamb", "apex_adam"] = opt(
        "adamw",
        "torch's fused AdamW or SGD; `muon`: for the matrices of blocks and STD modules, AdamW for the rest; `lamb`, "
        "`apex_adam`: apex's FusedLAMB and FusedAdam, on GPUs",
    )
    lr: float = opt(5e-4, "peak learning rate for a batch of `lr_batch`; scaled linearly with the batch")
    lr_batch: int = opt(512, "the batch for which `lr` is meant; 0: never scale")
    min_lr: float = opt(1e-5, "learning rate at the end, not scaled")
    warmup: str = opt("5 epochs", "linear warm-up: a duration, or a share of the training such as `5 %`")
    weight_decay: float = opt(
        0.05, "weight decay, SGD's as L2 penalty; never on tokens, biases, norms and affine scales"
    )
    betas: tuple[float, float] = opt((0.9, 0.999), "decay rates of the moments of Adam and LAMB")
    eps: float = opt(1e-8, "epsilon in the denominator of Adam and LAMB")
    momentum: float = opt(0.95, "momentum of Muon, and of SGD, where 0.9 is usual")
    nesterov: bool = opt(False, "Nesterov's momentum in SGD; Muon always has it")
    clip: float = opt(0.0, "largest gradient norm of the student; 0: no clipping")
    ema: float = opt(0.0, "decay per step of the weights' moving average at batch `ema_batch`; 0: none")
    ema_batch: int = opt(1024, "the batch for which `ema` is meant; the decay is raised to batch / ema_batch")
    smoothing: float = opt(0.1, "label smoothing of the class loss")

    def __post_init__(self) -> None:
        require(self.lr > 0, "optim.lr", "must be positive")
        require(self.min_lr >= 0 and self.lr_batch >= 0, "optim.min_lr", "min_lr and lr_batch cannot be negative")
        require(all(0 <= beta < 1 for beta in self.betas), "optim.betas", f"{self.betas} must be in [0, 1)")
        require(self.eps > 0 and self.ema_batch >= 1, "optim.eps", "eps and ema_batch must be positive")
        require(0 <= self.ema < 1, "optim.ema", "must be in [0, 1)")
        require(0 <= self.smoothing < 1, "optim.smoothing", "must be in [0, 1)")
        require(0 <= self.momentum < 1, "optim.momentum", "must be in [0, 1)")
        require(
            self.name in ("muon", "sgd") or self.momentum == 0.95,
            "optim.momentum",
            "is Muon's and SGD's; leave it out, or set betas",
        )
        require(
            not self.nesterov or (self.name == "sgd" and self.momentum > 0),
            "optim.nesterov",
            "is SGD's, with a momentum above 0; set optim.name to sgd, or leave it out",
        )
        require(
            self.name != "sgd" or (self.betas == (0.9, 0.999) and self.eps == 1e-8),
            "optim.betas",
            "betas and eps have no effect with optim.name sgd; leave them out",
        )
        require(self.clip >= 0 and self.weight_decay >= 0, "optim.clip", "clip and weight_decay cannot be negative")
        parse_warmup(self.warmup)


@dataclass(frozen=True)
class Run:
    out: str = opt(OUT, "folder of the run; `{name}` and `{seed}` are filled in")
    seed: int = opt(0, "seed of everything random")
    init_seed: int | None = opt(
        None, "seed of the student's first weights alone, for runs that share stored teacher targets; default: run.seed"
    )
    batch: int = opt(1024, "images per step over all GPUs")
    micro_batch: int | Literal["auto"] = opt(
        0,
        "images per process in one forward and backward pass, not the number of passes; their gradients add up to the "
        "batch's. A divisor of the process's share of run.batch and a multiple of 4; 0: all at once; auto: all, halved "
        "when memory runs out. Batch norms and timm's random draws see a micro-batch; MINE all, by a second forward "
        "pass",
    )
    length: str = opt("300 epochs", "length of the training in epochs, steps, samples or gpu-hours")
    device: Literal["auto", "cuda", "cpu"] = opt("auto", "where to train; auto: a GPU where there is one")
    precision: Literal["auto", "float32", "bfloat16"] = opt(
        "auto", "auto: bfloat16 autocast on a GPU, float32 on a CPU, where bfloat16 pays with AMX only"
    )
    timeout: str = opt("10 minutes", "how long one process may keep the others waiting before all stop")
    compile: Literal["auto", "off", "inductor", "max-autotune", "aot_eager", "eager"] = opt(
        "auto", "torch.compile's backend; auto: inductor on a GPU, off on a CPU; aot_eager needs neither Triton nor C++"
    )
    overlap: Literal["auto", "on", "off"] = opt(
        "auto",
        "run the teachers on the next batch while the student trains, on a GPU; auto: where a trial shows a gain",
    )
    eval_every: str = opt(
        "1 epoch",
        "epochs, steps or samples between evaluations; there is always one at the end, and with `0 steps` no other",
    )
    eval_batch: int = opt(0, "images per evaluation step; 0: as in training")
    save_every: str = opt("10 minutes", "time between checkpoints: seconds, minutes or hours")
    keep_checkpoints: int = opt(2, "how many of the newest checkpoints stay on disk")
    log_every: int = opt(50, "steps between lines of the log; metrics are read only then")
    profile: str = opt(
        "",
        "steps that torch.profiler traces into the run's folder, e.g. `steps 20-30`, on a GPU with its memory; '' none",
    )
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = opt(
        ("tensorboard",), "where metrics go beside metrics.jsonl; each package's environment variables hold"
    )
    not_finite: Literal["stop", "skip", "rollback"] = opt(
        "stop",
        "when a loss or gradient is not finite: `stop` and save what was before; `skip` that step, which then changes "
        "nothing; `rollback` to the last snapshot and continue after the bad batch",
    )
    not_finite_limit: int = opt(10, "so many such steps are skipped or rolled back over, at one more the run stops")
    rollback_every: str = opt("500 steps", "with rollback: how often a snapshot of the state is taken, on the device")

    def __post_init__(self) -> None:
        require(self.batch >= 4 and self.batch % 4 == 0, "run.batch", f"{self.batch} must be a positive multiple of 4")
        if self.micro_batch != "auto":
            require(
                self.micro_batch >= 0 and self.micro_batch % 4 == 0 and self.batch % (self.micro_batch or 1) == 0,
                "run.micro_batch",
                f"{self.micro_batch} must be a multiple of 4 that divides run.batch {self.batch}, 0 (off) or auto",
            )
        require(self.eval_batch >= 0, "run.eval_batch", "cannot be negative; 0: as in training")
        require(self.log_every >= 1, "run.log_every", "must be 1 or more")
        require(self.keep_checkpoints >= 1, "run.keep_checkpoints", "must be 1 or more")
        require(self.not_finite_limit >= 1, "run.not_finite_limit", "must be 1 or more; to stop at the first, stop")
        back = Duration.parse(self.rollback_every, "run.rollback_every")
        require(
            back.unit != "gpu-hours" and back.amount > 0,
            "run.rollback_every",
            "write epochs, steps or samples, more than nothing",
        )
        check_local(self.out, "run", "out")
        twice = next((name for name in self.trackers if self.trackers.count(name) > 1), "")
        require(not twice, "run.trackers", f"{twice} stands twice; keep one")
        for name, seed in (("run.seed", self.seed), ("run.init_seed", self.init_seed)):
            require(seed is None or 0 <= seed < 2**63, name, "must be from 0 to 2^63 - 1")
        require(Duration.parse(self.length, "run.length").amount > 0, "run.length", "must be more than nothing")
        every = Duration.parse(self.eval_every, "run.eval_every")
        require(
            every.unit != "gpu-hours", "run.eval_every", "write epochs, steps or samples; `0 steps`: only at the end"
        )
        parse_seconds(self.save_every, "run.save_every")
        parse_steps(self.profile)
        require(parse_seconds(self.timeout, "run.timeout") > 0, "run.timeout", "must be more than nothing")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run. See the sections for the fields."""

    summary: str = opt("", "one line that `std-fast recipes` shows")
    data: Data = opt(Data(), "")
    augment: AugmentSpec = opt(AugmentSpec(), "")
    student: StudentSpec = opt(StudentSpec(), "")
    distill: Distill = opt(Distill(mode="none"), "")
    optim: Optim = opt(Optim(), "")
    run: Run = opt(Run(), "")
    name: str = opt("", "filled in from the file's name")


def load(name: str, overrides: list[tuple[str, str]] | tuple = ()) -> Recipe:
    """A recipe by path or built-in name, with `(dotted key, text)` overrides, resolved and validated.

    Raises:
        UserError: the file is missing or no YAML, a key is unknown, or a value has the wrong type or range.
    """
    try:
        return from_dict(Recipe, read(name, overrides))
    except UnknownKey as error:
        raise explained(error, Recipe) from None


def loads(text: str, where: str = "recipe") -> Recipe:
    """A resolved recipe as it was saved with a run. UserError, which names `where` it was, for anything else."""
    data = read_yaml(text, where, words=True)
    try:
        return from_dict(Recipe, upgrade_recipe(data) if isinstance(data, dict) else data)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def read_saved(folder: Path) -> Recipe:
    """The resolved recipe in a run's folder. UserError when there is none, or none that can be read."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: holds no run (no recipe.yaml); give the folder that `std-fast train` wrote")
    return loads(read_text(path), str(path))


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `loads` reads it back to an equal recipe."""
    return write_yaml(to_dict(recipe))
