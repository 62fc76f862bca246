"""DALI decodes: on a GPU with its JPEG engine and its cores (`mixed`), on a CPU by the same pipeline without a device.

DALI gets whole batches of encoded bytes with our boxes and decodes just the boxes. On a GPU it resizes them too; on a
CPU its resizing takes two thirds of its time, five times what ours takes (`native.resample`), so threads of ours do it.
What DALI is not asked to decode, because betons and folders hold it but a JPEG decoder reads it otherwise or not at all
(raw samples, EXIF rotations, CMYK, PNG, ...), is decoded on the host and laid into the batch.

An epoch ends exactly with its last step: our plan decides what is fed, so nothing is padded, dropped or repeated, and
leaving one early drains what was fed. Decoded and under way are at most `ahead` batches and three more: the one in use
and two in DALI's hands; of as many again the encoded bytes are at hand.

Pixels: on a CPU those of the other backends. On a GPU nvJPEG's DCT rounds differently, and DALI's filter rounds once
where PIL's does after each pass and repeats the border's pixels where PIL's is cut off (the filter alone, measured on a
CPU: mean 0.16, at the border up to 12 of 255). Defaults that changed between DALI's releases are set in `_pipeline`.

Shapes: B batch (of this shard), S image size, H, W a crop's height and width.
"""

from __future__ import annotations

import gc
import importlib.util
import io
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch

from pipelines.errors import CorruptImage, DataError, UserError
from pipelines.loaders.prefetch import available_cores
from pipelines.loaders.torch import MODES, crop_and_resize
from pipelines.read.batch import Batch, LoaderSpec
from pipelines.read.corrupt import CorruptTracker
from pipelines.read.crops import Boxes
from pipelines.read.decode import decode_rgb, is_plain_jpeg
from pipelines.read.order import indices_at
from pipelines.read.source import Bytes, Integers, Source

log = logging.getLogger("std_fast")

INSTALL = "pip install --extra-index-url https://pypi.nvidia.com nvidia-dali-cuda120"
LOADS = (0.0, 0.35, 0.65, 0.9, 0.99)
"""shares of the images for the GPU's JPEG engine that `sweep` tries"""
_SWEPT_STEPS = 12
_UNKNOWN, _PLAIN, _ODD = range(3)
_PART = 8  # crops that a thread resizes at a time


@dataclass
class _Job:
    """One batch on its way through DALI."""

    epoch: int
    step: int
    positions: Integers
    indices: Integers
    heights: Integers
    widths: Integers
    boxes: Boxes
    """in the image that DALI decodes"""
    data: list[Bytes] = field(default_factory=list)
    """what DALI decodes for the first rows, kept alive until it has; never empty: DALI takes no empty batches"""
    odd: dict[int, npt.NDArray[np.uint8]] = field(default_factory=dict)
    """rows that were decoded here, [S, S, 3] each"""
    error: Exception | None = None


class DaliLoader:
    """A `batch.Loader` on NVIDIA DALI 2. Raises UserError when DALI is missing or lacks what the spec asks for.

    On a GPU without a given `hw_decoder_load`, it opens with a short `sweep`, which the log shows.

    Threads of the pool prepare what DALI is fed, one thread drives DALI and makes the batches. One epoch at a time.
    """

    def __init__(self, spec: LoaderSpec, source: Source) -> None:
        if spec.resample not in MODES:
            raise UserError(f"resample: {spec.resample!r} is not in the dali backend; choose one of {', '.join(MODES)}")
        _import_dali()
        self.spec = spec
        self.source = source
        self.plan = spec.plan(source.num_samples)
        self.num_classes = source.num_classes
        self.steps_per_epoch = self.plan.steps_per_epoch
        self.wait_seconds = 0.0
        self.threads = spec.threads or available_cores()
        self.device = torch.device(spec.device)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._resize = _host_resize(spec)
        self._kinds = np.zeros(source.num_samples, np.uint8)
        self.intact = CorruptTracker(spec, source)
        self.corrupt = self.intact.found
        stream = io.BytesIO()
        PIL.Image.new("RGB", (8, 8)).save(stream, "JPEG")
        self._placeholder = np.frombuffer(stream.getvalue(), np.uint8)
        self._next: Callable[[], _Job] | None = None  # what DALI is fed from; None ends the epoch
        self._fed: deque[_Job] = deque()
        self._pipe: Any = None
        self._pool: ThreadPoolExecutor | None = ThreadPoolExecutor(self.threads, thread_name_prefix="std_fast-loader")
        self._driver = ThreadPoolExecutor(1, thread_name_prefix="std_fast-dali")
        hw_decoder_load = spec.hw_decoder_load
        if hw_decoder_load is None and self.device.type == "cuda":
            hw_decoder_load, rows = sweep(spec, source)
            log.info("%s: DALI's hw_decoder_load %.2f, the best of %s", source.path, hw_decoder_load, rows)
        self.hw_decoder_load = hw_decoder_load or 0.0

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """See `batch.Loader`; an epoch that is under way is ended. Raises UserError when `start_step` lies outside the
        epoch or the loader is closed."""
        if self._pool is None:
            raise UserError("this loader is closed: open another one")
        if not 0 <= start_step <= self.steps_per_epoch:
            raise UserError(f"start_step {start_step} must lie in 0..{self.steps_per_epoch}")
        return self._run(self._pool, epoch, start_step)

    def _run(self, pool: ThreadPoolExecutor, epoch: int, start_step: int) -> Iterator[Batch]:
        order = self.plan.order(epoch)
        steps = iter(range(start_step, self.steps_per_epoch))
        prepared: deque[Future[_Job]] = deque()
        batches: deque[Future[tuple[Batch, Any]]] = deque()

        def next_job() -> _Job:
            """In the driver's thread."""
            while len(prepared) <= self.spec.ahead and (step := next(steps, None)) is not None:
                prepared.append(pool.submit(self._prepare, order, epoch, step))
            if not prepared:
                raise StopIteration
            return prepared.popleft().result()

        self._driver.submit(self._begin, next_job).result()
        try:
            for step in range(start_step, self.steps_per_epoch):
                if self._pool is None:
                    raise UserError("this loader was closed in the middle of an epoch: close it after the last batch")
                while len(batches) <= min(self.spec.ahead, self.steps_per_epoch - 1 - step):
                    batches.append(self._driver.submit(self._make, pool, epoch, next_job))
                started = time.perf_counter()
                wait([batches[0]])
                self.wait_seconds += time.perf_counter() - started
                yield self._deliver(*batches.popleft().result())
        finally:
            wait([future for future in batches if not future.cancel()])
            wait([future for future in prepared if not future.cancel()])
            if self._next is next_job and self._pool is not None:
                self._driver.submit(self._drain).result()

    # In the pool's threads

    def _prepare(self, order: Integers, epoch: int, step: int) -> _Job:
        """Reads a batch, decodes what DALI does not; an error is kept for its turn."""
        positions = self.plan.positions(step)
        indices = self.intact.settle(indices_at(order, positions))
        count = int((positions >= 0).sum())
        sides = np.empty(count, np.int64)
        job = _Job(epoch, step, positions, indices, sides, sides.copy(), np.empty((count, 4), np.int32))
        try:
            self.intact.measure(job, 0, count)
            for row in range(count):
                data = self._plain(int(indices[row]))
                if data is None:
                    job.odd[row] = self._on_host(job, row)
                    job.boxes[row] = (0, 0, 8, 8)
                job.data.append(self._placeholder if data is None else data)
        except Exception as error:  # whatever it is, it belongs to this step
            job.error = error
        if job.error or not job.data:
            job.data, job.boxes = [self._placeholder], np.array([[0, 0, 8, 8]], np.int32)
        return job

    def _on_host(self, job: _Job, row: int) -> npt.NDArray[np.uint8]:
        """A place's sample [S, S, 3], or the one that takes its place; black where there is none."""
        index = int(job.indices[row])
        try:
            if index >= 0:
                return crop_and_resize(decode_rgb(self.source, index), job.boxes[row], self.spec)
        except CorruptImage as error:
            self.intact.replace(job, row, error)
            return self._on_host(job, row)
        return np.zeros((self.spec.image_size, self.spec.image_size, 3), np.uint8)

    def _plain(self, index: int) -> Bytes | None:
        """The sample's bytes if they are a JPEG that DALI decodes as everyone does, else None."""
        if index < 0 or self._kinds[index] == _ODD:
            return None
        data = self.source.read(index) if self.source.is_jpeg(index) else None
        if self._kinds[index] == _UNKNOWN:
            plain = data is not None and is_plain_jpeg(self.source, index, data.tobytes(), whole=False)
            self._kinds[index] = _PLAIN if plain else _ODD
        return data if self._kinds[index] == _PLAIN else None

    # In the driver's thread

    def _begin(self, next_job: Callable[[], _Job]) -> None:
        self._drain()
        if self._pipe is None:
            largest = (0, 0)
            if self.source.kind == "beton":  # a folder's images would have to be opened for it
                heights, widths = self.source.sizes(np.arange(self.source.num_samples))
                largest = (int(heights.max()), int(widths.max()))
            self._pipe = _pipeline(
                self._feed, self.spec, self.plan.local_batch, self.threads, self.device, self.hw_decoder_load, largest
            )
            self._pipe.build()
        self._pipe.reset()
        self._next = next_job

    def _feed(self) -> tuple[list[Bytes], Boxes, Boxes]:
        """DALI's source: the next batch's bytes, box corners and box sizes. Raises StopIteration at the epoch's end."""
        if self._next is None:
            raise StopIteration
        job = self._next()
        self._fed.append(job)
        return job.data, np.ascontiguousarray(job.boxes[:, :2]), np.ascontiguousarray(job.boxes[:, 2:])

    def _make(self, pool: ThreadPoolExecutor, epoch: int, next_job: Callable[[], _Job]) -> tuple[Batch, Any]:
        """The next batch and, on a GPU, the event after which it is there."""
        if self._next is not next_job:
            raise UserError("this epoch was ended by a later one: with dali, run one at a time")
        try:
            (output,) = self._pipe.run()
        except RuntimeError as error:
            self._pipe = self._next = None  # DALI: "no longer valid"
            raise self._explained(error) from error
        job = self._fed.popleft()
        if job.error is not None:
            raise job.error
        size = self.spec.image_size
        there = job.indices >= 0
        count = int((job.positions >= 0).sum())
        labels = np.where(there, self.source.labels[np.maximum(job.indices, 0)], -1)
        keys = torch.from_numpy(np.stack([labels, np.where(there, job.positions, -1)]))
        shape = (len(there), size, size, 3)
        ready = None
        if self._stream is None:
            images = torch.from_numpy(np.empty(shape, np.uint8))  # numpy's: it asks for huge pages
            rows = [(np.asarray(output.at(row)), images[row].numpy()) for row in range(count) if row not in job.odd]
            parts = [rows[start : start + _PART] for start in range(0, len(rows), _PART)]
            for _ in pool.map(lambda part: [self._resize(*row) for row in part], parts):
                pass
            self._complete(images, job.odd, count)
        else:
            with torch.cuda.stream(self._stream):
                images = torch.empty(shape, dtype=torch.uint8, device=self.device)
                images[:count].copy_(torch.from_dlpack(output.as_tensor())[:count])
                self._complete(images, job.odd, count)
                keys = keys.pin_memory().to(self.device, non_blocking=True)
                ready = torch.cuda.Event()
                ready.record(self._stream)
            ready.synchronize()  # then DALI may have its output back; here that keeps nobody waiting
        return Batch(images.permute(0, 3, 1, 2), keys[0], keys[1], job.indices, epoch, job.step), ready

    @staticmethod
    def _complete(images: torch.Tensor, odd: dict[int, npt.NDArray[np.uint8]], count: int) -> None:
        """Adds to images [B, S, S, 3] what does not come from DALI."""
        images[count:] = 0
        for row, pixels in odd.items():
            images[row].copy_(torch.from_numpy(pixels))

    def _explained(self, error: RuntimeError) -> Exception:
        """The sample that made DALI fail, by decoding those that it had been given."""
        for job in self._fed:
            for index in job.indices[job.indices >= 0].tolist():
                try:
                    decode_rgb(self.source, index)
                except DataError as found:
                    return found
        lines = [line.strip() for line in str(error).splitlines() if "nvImageCodec" in line or "rror" in line]
        steps = ", ".join(str(job.step) for job in self._fed)
        return DataError(
            f"{self.source.path}: DALI failed in one of the steps {steps} ({lines[-1] if lines else error}), although "
            "every image there decodes on the host; choose backend ffcv or torch"
        )

    def _drain(self) -> None:
        """Ends the epoch that is under way: lets DALI finish what it was given, and drops it."""
        self._next = None
        while self._pipe is not None:
            try:
                self._pipe.run()
            except StopIteration:  # DALI learns of the end only when it asks for more
                break
            except RuntimeError:  # a faulty image among those that nobody wants any more
                self._pipe = None
        self._fed.clear()

    # In the consumer's thread

    def _deliver(self, batch: Batch, ready: Any) -> Batch:
        if ready is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(ready)
            for tensor in (batch.images, batch.labels):  # positions share the memory of labels
                tensor.record_stream(stream)
        return batch

    def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is None:
            return
        self._driver.submit(self._drain).result()
        self._driver.shutdown(wait=True)
        pool.shutdown(wait=True)
        self._pipe = None
        gc.collect()  # a DALI pipeline refers to itself: its memory would stay until some later collection

    def __enter__(self) -> DaliLoader:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()


def _host_resize(spec: LoaderSpec) -> Callable[[npt.NDArray[np.uint8], npt.NDArray[np.uint8]], None]:
    """A function that resizes a crop [H, W, 3] into [S, S, 3]: compiled where numba is installed, else torch's."""
    if importlib.util.find_spec("numba") is not None:
        from pipelines.loaders import native

        cubic = spec.resample == "bicubic"

        def compiled(crop: npt.NDArray[np.uint8], out: npt.NDArray[np.uint8]) -> None:
            height, width, _ = crop.shape
            flat = out.reshape(out.shape[0], -1)
            native.resample(crop.reshape(-1), 3 * width, 0, 0, height, width, flat, cubic)

        return compiled

    def by_torch(crop: npt.NDArray[np.uint8], out: npt.NDArray[np.uint8]) -> None:
        out[:] = crop_and_resize(crop, np.array([0, 0, *crop.shape[:2]]), spec)

    return by_torch


def sweep(
    spec: LoaderSpec, source: Source, loads: tuple[float, ...] = LOADS, steps: int = _SWEPT_STEPS
) -> tuple[float, list[dict[str, float]]]:
    """The best hw_decoder_load for this machine, and what was measured: images per second for each load.

    The best value depends on the GPU, the number of CPU threads and the images, so it is measured with the spec's own.
    """
    rows = []
    for load in loads:
        with DaliLoader(replace(spec, hw_decoder_load=load), source) as loader:
            count = min(steps, loader.steps_per_epoch)
            epoch = loader.epoch(0)
            next(epoch)  # buffers grow with the first batches
            started = time.perf_counter()
            for _ in range(count - 1):
                next(epoch)
            if loader.device.type == "cuda":
                torch.cuda.synchronize(loader.device)
            seconds = time.perf_counter() - started
        rows.append({"hw_decoder_load": load, "images_per_second": (count - 1) * loader.plan.local_batch / seconds})
    return max(rows, key=lambda row: row["images_per_second"])["hw_decoder_load"], rows


def _import_dali() -> Any:
    try:
        import nvidia.dali
    except (ImportError, OSError) as error:
        raise UserError(f"backend: dali is not installed or does not load ({error}): {INSTALL}") from error
    return nvidia.dali


def _pipeline(
    feed: Callable[[], Any],
    spec: LoaderSpec,
    batch: int,
    threads: int,
    device: torch.device,
    hw_decoder_load: float,
    largest: tuple[int, int],
) -> Any:
    """DALI's pipeline, with every setting in this one place. largest: height and width to reserve memory for on a GPU.

    Its output are the boxes' pixels, [H, W, 3] each, on a CPU; resized, [S, S, 3], on a GPU.
    """
    dali = _import_dali()
    fn, types = dali.fn, dali.types
    on_gpu = device.type == "cuda"
    pipe = dali.Pipeline(
        batch_size=batch,
        num_threads=threads,
        device_id=(device.index if device.index is not None else torch.cuda.current_device()) if on_gpu else None,
        prefetch_queue_depth=2,  # at work on one while another is taken
        exec_pipelined=True,
        exec_async=True,
        exec_dynamic=True,
        set_affinity=False,  # several processes share a machine
    )
    only_mixed = {
        "hw_decoder_load": hw_decoder_load,
        "preallocate_height_hint": largest[0],
        "preallocate_width_hint": largest[1],
        "device_memory_padding": 16 << 20,
        "host_memory_padding": 8 << 20,
        "hybrid_huffman_threshold": 1_000_000,
        "affine": False,
    }
    with pipe:
        encoded, start, shape = fn.external_source(
            source=feed,
            num_outputs=3,
            batch=True,
            no_copy=True,  # the loader keeps the bytes alive
            dtype=[types.UINT8, types.INT32, types.INT32],
            ndim=[1, 1, 1],
        )
        images = fn.decoders.image_slice(
            encoded,
            start=start,
            shape=shape,
            axes=[0, 1],
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,  # boxes are of the stored image; rotated ones do not come here
            use_fast_idct=False,
            jpeg_fancy_upsampling=True,
            **(only_mixed if on_gpu else {}),
        )
        if on_gpu:
            filter_type = types.INTERP_CUBIC if spec.resample == "bicubic" else types.INTERP_LINEAR
            images = fn.resize(
                images,
                size=[spec.image_size, spec.image_size],
                interp_type=filter_type,
                min_filter=filter_type,
                mag_filter=filter_type,
                antialias=True,
                subpixel_scale=False,
            )
        pipe.set_outputs(images)
    return pipe
