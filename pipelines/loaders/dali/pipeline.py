"""DALI's pipeline, with every setting in this one file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pipelines.errors import UserError
from pipelines.read.batch import LoaderSpec

INSTALL = "pip install --extra-index-url https://pypi.nvidia.com nvidia-dali-cuda120"


def import_dali() -> Any:
    """The package `nvidia.dali`. Raises UserError with the command that installs it."""
    try:
        import nvidia.dali
    except (ImportError, OSError) as error:
        raise UserError(f"data.backend: dali is not installed or does not load ({error}): {INSTALL}") from error
    return nvidia.dali


def make_pipeline(feed: Callable[[], Any], spec: LoaderSpec, batch: int, threads: int, largest: tuple[int, int]) -> Any:
    """The pipeline, not built yet. Its output is the boxes' pixels, [H, W, 3] each, on a CPU; resized, [S, S, 3], on a
    GPU.

    feed: gives a batch's encoded bytes, box corners and box sizes. batch: samples per step on this shard.
    largest: height and width to reserve memory for on a GPU.
    """
    dali = import_dali()
    device = torch.device(spec.device)
    on_gpu = device.type == "cuda"
    pipe = dali.Pipeline(
        batch_size=batch,
        num_threads=threads,
        device_id=(device.index if device.index is not None else torch.cuda.current_device()) if on_gpu else None,
        prefetch_queue_depth=2,  # one in the making while another is taken
        exec_pipelined=True,
        exec_async=True,
        exec_dynamic=True,
        set_affinity=False,  # several processes share a machine
    )
    with pipe:
        encoded, start, shape = dali.fn.external_source(
            source=feed,
            num_outputs=3,
            batch=True,
            no_copy=True,  # the loader keeps the bytes alive
            dtype=[dali.types.UINT8, dali.types.INT32, dali.types.INT32],
            ndim=[1, 1, 1],
        )
        images = dali.fn.decoders.image_slice(
            encoded,
            start=start,
            shape=shape,
            axes=[0, 1],
            device="mixed" if on_gpu else "cpu",
            output_type=dali.types.RGB,
            adjust_orientation=False,  # boxes are of the stored image; rotated ones are decoded on the host
            use_fast_idct=False,
            jpeg_fancy_upsampling=True,
            **(_mixed_options(spec, largest) if on_gpu else {}),
        )
        pipe.set_outputs(_resized(dali, images, spec) if on_gpu else images)
    return pipe


def _mixed_options(spec: LoaderSpec, largest: tuple[int, int]) -> dict[str, Any]:
    """Settings of the decoder that exist on a GPU only."""
    return {
        "hw_decoder_load": spec.hw_decoder_load or 0.0,
        "preallocate_height_hint": largest[0],
        "preallocate_width_hint": largest[1],
        "device_memory_padding": 16 << 20,
        "host_memory_padding": 8 << 20,
        "hybrid_huffman_threshold": 1_000_000,
        "affine": False,
    }


def _resized(dali: Any, images: Any, spec: LoaderSpec) -> Any:
    """Antialiased bilinear or bicubic resizing to [S, S, 3]."""
    kind = dali.types.INTERP_CUBIC if spec.resample == "bicubic" else dali.types.INTERP_LINEAR
    return dali.fn.resize(
        images,
        size=[spec.image_size, spec.image_size],
        interp_type=kind,
        min_filter=kind,
        mag_filter=kind,
        antialias=True,
        subpixel_scale=False,
    )
