"""What neighbours call the recipe's fields: timm's train.py, DeiT's main.py, ffcv-imagenet. For `did you mean`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pipelines.errors import UserError, did_you_mean
from std_fast.config.legacy import FIELDS
from std_fast.config.schema import UnknownKey, describe

FOREIGN_NAMES = {
    "run.length": "epochs num_epochs max_epochs max_steps num_steps max_duration train_epochs budget",
    "run.batch": "batch_size train_batch_size global_batch_size per_device_train_batch_size b",
    "run.micro_batch": "grad_accum_steps gradient_accumulation_steps accumulate accum_iter accumulate_grad_batches "
    "device_train_microbatch_size",
    "run.profile": "profiler trace torch_profiler",
    "run.eval_batch": "validation_batch_size eval_batch_size val_batch_size",
    "run.out": "output output_dir folder logdir log_dir save_dir run_dir experiment",
    "run.precision": "amp amp_dtype fp16 bf16 use_amp dtype half mixed_precision",
    "run.compile": "torchcompile torch_compile compiled",
    "run.eval_every": "val_interval eval_interval eval_freq val_every validate_every",
    "run.save_every": "recovery_interval checkpoint_interval save_freq save_interval save_steps",
    "run.keep_checkpoints": "checkpoint_hist save_total_limit num_checkpoints_to_keep",
    "run.log_every": "log_interval print_freq log_freq logging_steps",
    "run.trackers": "log_wandb wandb report_to logger",
    "optim.name": "opt optimizer",
    "optim.lr": "lr learning_rate lr_base base_lr blr",
    "optim.lr_batch": "lr_base_size unscale_lr",
    "optim.warmup": "warmup_epochs warmup_steps warmup_lr warmup_t warmup_ratio",
    "optim.weight_decay": "wd",
    "optim.betas": "opt_betas",
    "optim.eps": "opt_eps",
    "optim.clip": "clip_grad grad_clip max_grad_norm gradient_clip_val",
    "optim.ema": "model_ema model_ema_decay ema_decay",
    "optim.smoothing": "label_smoothing",
    "data.train": "data_dir data_path data_set dataset train_dataset train_data train_dir",
    "data.val": "val_dataset val_data val_dir val_split valid",
    "data.threads": "workers num_workers j",
    "data.ahead": "prefetch prefetch_factor batches_ahead",
    "data.backend": "loader dataloader in_memory",
    "data.image_size": "img_size input_size resolution crop_size max_res",
    "data.crop.scale": "scale rrc_scale",
    "data.crop.ratio": "ratio rrc_ratio",
    "data.eval_crop.fraction": "crop_pct eval_crop_ratio",
    "data.resample": "train_interpolation",
    "data.eval_resample": "interpolation",
    "data.aug_repeats": "repeated_aug no_repeated_aug ra_sampler ra_reps",
    "augment.policy": "threeaugment three_augment trivialaugment trivial_augment ta_wide",
    "augment.flip": "hflip random_flip",
    "augment.mix_prob": "mixup_prob",
    "augment.switch": "mixup_switch_prob",
    "augment.mixup": "mixup_alpha",
    "augment.cutmix": "cutmix_alpha",
    "augment.erase": "reprob random_erase",
    "augment.randaugment_n": "aa auto_augment autoaugment randaugment rand_augment",
    "student.name": "model arch model_name",
    "student.options": "model_kwargs",
    "student.early_size": "min_res",
    "student.drop_path": "drop_path_rate stochastic_depth",
    "student.weights": "initial_checkpoint finetune pretrained pretrained_path checkpoint",
    "distill.teachers": "teacher teacher_model teacher_name kd_model_name",
    "distill.teachers.N.weights": "teacher_path",
    "distill.labels": "distillation_type",
    "distill.alpha": "distillation_alpha distill_loss_weight kd_loss_weight",
    "distill.temperature": "distillation_tau kd_temperature tau",
}
"""our field: the names that others have for it, with underscores"""
FIELD_OF = {name: field for field, names in FOREIGN_NAMES.items() for name in names.split()}


def meant_by(wanted: str, fields: Collection[str]) -> list[str]:
    """Our fields for a dotted name that is none: a neighbour's, else those of any section with its last part."""
    section, key = wanted.partition(".")[0].lower(), wanted.rpartition(".")[2].lower()
    if key in FIELD_OF:
        return [FIELD_OF[key]]
    named = [name for name in fields if name.rpartition(".")[2] == key]
    return named or ([FIELD_OF[section]] if section in FIELD_OF else [])  # such as budget.foo


def explained(error: UnknownKey, recipe: type[Any]) -> UserError:
    """The error with our name of what was meant: one of another section, or a neighbour's."""
    fields = {name: text for name, _, text in describe(recipe)}
    meant = meant_by(error.wanted, fields)
    if not meant:
        return error
    if len(meant) > 1:
        return UserError(f"{error.wanted}: unknown key; did you mean {', '.join(meant[:-1])} or {meant[-1]}?")
    return UserError(f"{error.wanted}: unknown key; here it is {meant[0]} ({fields[meant[0]]})")


def check_flags(flags: Collection[str], options: Collection[str], recipe: type[Any]) -> None:
    """UserError that names all flags of a neighbour's, and others that set no field, with our name of each.

    Args:
        flags: as they were typed, without values: `-b`, `--batch-size`, `--optim.lr`.
        options: of the verb, for those that are misspelt.
    """
    fields = {name: text for name, _, text in describe(recipe)}
    sections = {"budget", *(name.partition(".")[0] for name in fields)}
    inner = tuple(f"{name}." for name in fields)
    said = []
    for flag in dict.fromkeys(flags):
        key = flag.lstrip("-").replace("-", "_")
        foreign = key.rpartition(".")[2].lower() in FIELD_OF and key not in {*fields, *FIELDS}
        if key.partition(".")[0] in sections and (not foreign or key.startswith(inner)):
            continue
        meant = [name for name in meant_by(key, fields) if ".N." not in name] or meant_by(key, fields)
        if meant:
            text = f" ({fields[meant[0]].partition(';')[0]})" if len(meant) == 1 else ""
            said.append(f"{flag} is --{' or --'.join(meant)}{text}")
        else:
            said.append(f"{flag} is unknown{did_you_mean(flag, options)}")
    if said:
        raise UserError(f"{', '.join(said)} (`std-fast train --help` lists all fields)")
