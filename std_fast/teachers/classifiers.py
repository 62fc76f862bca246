"""Classifiers by name, of this project or timm's, and their weights from files and runs.

Shapes: B batch, K classes.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipelines.errors import UserError, did_you_mean
from std_fast.config.options import check_options
from std_fast.config.recipe import Recipe, loads
from std_fast.models import BACKBONES, build_backbone
from std_fast.runtime import checkpoint

log = logging.getLogger("std_fast")


def build_classifier(name: str, num_classes: int, image_size: int, drop_path: float = 0.0, **options: Any) -> nn.Module:
    """A backbone of this project or any timm classifier, with fresh weights.

    Args:
        options: the builder's own. timm's ResNets also take `small_stem: true`, see `use_small_stem`.

    Raises:
        UserError: an unknown name, or options that timm refuses.
    """
    check_options(options, name)
    if name in BACKBONES:
        return build_backbone(name, num_classes, image_size, drop_path, **options)
    if drop_path:
        options["drop_path_rate"] = drop_path
    return create_timm(name, image_size, num_classes=num_classes, **options)


def create_timm(name: str, image_size: int, small_stem: bool = False, **options: Any) -> nn.Module:
    """`timm.create_model` with the image size where the model wants to know it; see `build_classifier`."""
    import timm

    timm_config(name)
    refused: Exception | None = None
    # models with a fixed number of positions need to be told the image size; convolutional ones refuse it
    extra: dict[str, Any]
    for extra in ({"img_size": image_size}, {}):
        try:
            model = timm.create_model(name, **{**extra, **options})
        except TypeError as error:
            refused = error
        except Exception as error:  # each family has its own way of refusing
            if options.get("pretrained"):  # more likely because of the weights
                raise
            refused = error
            break
        else:
            return use_small_stem(model, name) if small_stem else model
    reason = " ".join(str(refused).split())
    fix = "it has no stochastic depth: set --student.drop_path 0" if "'drop_path_rate'" in reason else "fix its options"
    raise UserError(f"{name}: timm cannot build it with {options} at {image_size} px ({reason}); {fix}")


def create_pretrained(name: str, image_size: int, where: str, **options: Any) -> nn.Module:
    """timm's model with the weights that timm downloads, of all their classes.

    Args:
        where: the recipe's field that asks for them, such as `student.weights`.

    Raises:
        UserError: timm has none, or the download fails (`NotDownloaded`); names the file to fetch and its place.
    """
    import timm

    timm_config(name)  # the name is one of timm's
    if options.get("small_stem"):
        section = where.removesuffix(".weights")
        raise UserError(f"{section}.options: small_stem makes a layer that no pretrained weights fit; leave it out")
    if not timm.is_model_pretrained(name):
        raise UserError(f"{where}: timm has no pretrained weights for {name!r}; give a file")
    log.info("%s: timm's weights of %s, downloaded where they are not in its cache", where, name)
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # without a network it logs each of a dozen attempts, twice
    try:
        return create_timm(name, image_size, pretrained=True, **options)
    except UserError:
        raise
    except Exception as error:  # the hub's client raises many kinds of error for a failed download
        log.debug("download of %s failed", name, exc_info=True)
        raise NotDownloaded(
            f"{where}: {name} could not be downloaded ({type(error).__name__}); on a machine with a network fetch "
            f"{file_to_fetch(name, where)}"
        ) from None
    finally:
        hub.setLevel(level)


class NotDownloaded(UserError):
    """Pretrained weights that could not be had from the network."""


def file_to_fetch(name: str, where: str) -> str:
    """The address of timm's pretrained weights, and where to put the file: the end of a message."""
    config = timm_config(name)
    file = config.hf_hub_filename or "model.safetensors"
    source = f"https://huggingface.co/{config.hf_hub_id}/resolve/main/{file}" if config.hf_hub_id else config.url
    here = f"weights/{name}{Path(str(source)).suffix}"
    return f"{source}, put it here as {here}, and set {where} to {here}"


def timm_config(name: str) -> Any:
    """timm's `PretrainedCfg` of a model. UserError with the nearest name unless timm has it."""
    import timm

    import std_fast.registry  # noqa: F401 - an exported student can be a teacher

    try:
        if timm.is_model(name):
            return timm.get_pretrained_cfg(name)
        known = [*BACKBONES, *timm.list_models()]
    except RuntimeError:  # the model is known, its tag is not
        known = timm.list_pretrained(f"{name.split('.')[0]}.*")
    hint = did_you_mean(name, known) or "; `timm.list_models()` lists them"
    raise UserError(f"{name}: no such model here or in timm {timm.__version__}{hint}")


def use_small_stem(model: nn.Module, name: str) -> nn.Module:
    """Adapts a timm ResNet, in place, to images of about 32 px: features leave its stem as large as the image came.

    The first convolution gets kernel 3 and stride 1, the pooling after it goes (as He et al. 2016, section 4.2, had it
    for CIFAR-10); the rest and its names stay. timm has no argument for it.

    Raises:
        UserError: the model is no timm ResNet.
    """
    from timm.models.resnet import ResNet

    if not isinstance(model, ResNet):
        raise UserError(f"{name}: the option small_stem is for timm's ResNets, and {name} is none; leave it out")
    deep = isinstance(model.conv1, nn.Sequential)
    first: Any = model.conv1[0] if deep else model.conv1
    conv = nn.Conv2d(first.in_channels, first.out_channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # as timm does
    model.set_submodule("conv1.0" if deep else "conv1", conv)
    model.set_submodule("maxpool", nn.Identity())
    info: Any
    for info in model.feature_info:  # strides of the feature maps: 2 4 8 16 32 become 1 1 2 4 8
        info["reduction"] = max(1, info["reduction"] // 4)
    return model


def last_layers(model: Any) -> list[nn.Module]:
    """The layer that gives the logits, or the layers: some models have several heads."""
    heads = model.get_classifier()
    return list(heads) if isinstance(heads, (tuple, list, nn.ModuleList)) else [heads]


def read_weights(path: Path) -> dict[str, Tensor]:
    """State dict of a .safetensors or timm checkpoint file, as tensors only: nothing in the file can run.

    A checkpoint's `state_dict_ema`, `model_ema`, `state_dict` or `model` entry is taken where there is one, in this
    order. A prefix that all names share is left out, as `model.` of Lightning's modules. The arguments that timm saves
    with it, an argparse.Namespace, are let through: plain attributes.

    Raises:
        UserError: the file is missing, damaged, or holds something else than tensors.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such weights file; put a .safetensors or timm .pth file there, or name another")
    data = _read_safetensors(path) if path.suffix == ".safetensors" else _read_checkpoint(path)
    if path.parent.name == "checkpoints" and all(name.startswith(("model.", "ema.", "optim.")) for name in data):
        raise UserError(f"{path}: is a checkpoint of a run; give the run's folder, {path.parent.parent}")
    # names as torch.compile, DistributedDataParallel and the modules of other trainers leave them
    data = {name.replace("_orig_mod.", "").removeprefix("module."): tensor for name, tensor in data.items()}
    while (prefix := _shared_prefix(data)) not in ("", "backbone"):  # the latter is an export's own
        log.info("%s: the names of its tensors begin with %s., which is left out", path, prefix)
        data = {name.partition(".")[2]: tensor for name, tensor in data.items()}
    return data


def _shared_prefix(names: Iterable[str]) -> str:
    """The first of the words between dots, where all names have the same; else ""."""
    first = {name.partition(".")[0] if "." in name else "" for name in names}
    return first.pop() if len(first) == 1 else ""


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # besides its own, safetensors raises torch's for types that torch lacks
        raise UserError(f"{path}: is no complete safetensors file ({error}); fetch it again") from None


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    try:
        with open(path, "rb") as file:
            is_torchs = file.read(1) in (b"P", b"\x80")  # of a zip, of a pickle
        with torch.serialization.safe_globals([argparse.Namespace]):
            data = torch.load(path, map_location="cpu", weights_only=True) if is_torchs else None
    except Exception as error:  # torch raises many kinds for a bad file, all of which mean this
        foreign = re.search(r"GLOBAL (\S+)", str(error))  # torch's own advice is to trust the file
        other = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
        said = other[1] if other else (str(error) or type(error).__name__).splitlines()[0]
        reason = f"it holds {foreign[1]}" if foreign else said
        raise UserError(
            f"{path}: cannot be read as tensors only ({reason}); save the model's state_dict() alone, as .safetensors"
        ) from None
    keys = ("state_dict_ema", "model_ema", "state_dict", "model")
    if isinstance(data, dict) and not data.keys() & {*keys}:
        data = data.get("state", data)  # Composer's, of a `model`
    for key in keys:
        if isinstance(data, dict) and isinstance(data.get(key), dict):
            data = data[key]
            break
    fits = isinstance(data, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in data.items())
    if not fits or not data:
        raise UserError(f"{path}: holds no state dict of tensors; give a checkpoint of the model's weights")
    return data


def head_names(model: nn.Module) -> list[str]:
    """Names of the parameters of `last_layers`."""
    heads = last_layers(model)
    modules = [(owner, module) for owner, module in model.named_modules() if any(module is head for head in heads)]
    return [name for owner, module in modules for name, _ in module.named_parameters(owner)]


def stored_classes(model: nn.Module, state: dict[str, Tensor], num_classes: int) -> int | None:
    """Rows in a state dict of the layer that gives the `num_classes` logits of the model; None where it is not found.

    A head of several layers, as some of timm's have, is searched for its last parameter of so many rows.
    """
    found = None
    for name in head_names(model):
        own = model.get_parameter(name)
        if name in state and state[name].ndim and own.ndim and len(own) == num_classes:
            found = len(state[name])
    return found


def load_weights(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Strictly; UserError names the first key or shape that does not fit."""
    own = model.state_dict()
    if other := other_shapes(model, state):
        name = other[0]
        raise UserError(
            f"{where}: {name} has shape {tuple(state[name].shape)}, this model needs {tuple(own[name].shape)}: "
            "another model than `name` says, or other classes, image size or options than those it was trained with"
        )
    lacks, others = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if lacks or others:
        what = [f"lacks {_some(lacks)}"] * bool(lacks) + [f"holds {_some(others)} besides"] * bool(others)
        raise UserError(f"{where}: does not fit the model: {' and '.join(what)}; name the model that it was trained as")
    model.load_state_dict(state)


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def other_shapes(model: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Names of the model's tensors that have another shape in `state`."""
    own = model.state_dict()
    return [name for name, tensor in state.items() if name in own and own[name].shape != tensor.shape]


class StoredRun(NamedTuple):
    """What a run's folder holds: enough to build its model again."""

    recipe: Recipe
    state: dict[str, Tensor]  # the moving average where the run has one
    num_classes: int
    class_names: list[str] | None
    step: int


def read_run(run: Path) -> StoredRun:
    """The newest complete checkpoint of a run's folder, or the one whose file is given.

    Raises:
        UserError: the folder holds no run, or no complete checkpoint.
    """
    named = checkpoint.is_checkpoint(run)
    if not named and not (run / "recipe.yaml").is_file():
        raise UserError(
            f"{run}: holds no run (no recipe.yaml); give the folder that `std-fast train` wrote, or a file in its "
            "checkpoints"
        )
    found = (run, *checkpoint.load(run)) if named else checkpoint.newest(run / "checkpoints")
    if found is None:
        raise UserError(f"{run}: holds no complete checkpoint; restore one, or train into another folder")
    path, tensors, meta = found
    state = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    state |= {name.removeprefix("ema."): t for name, t in tensors.items() if name.startswith("ema.")}
    return StoredRun(loads(meta["recipe"], str(path)), state, meta["num_classes"], meta["class_names"], meta["step"])
