"""DALI decodes: on a GPU with its JPEG engine and its cores (`mixed`), on a CPU by the same pipeline without a device.

DALI gets whole batches of encoded bytes with our boxes; it decodes just the box and resizes it. What it is not asked to
decode, because betons and folders hold it but a JPEG decoder reads it otherwise or not at all (raw samples, EXIF rotations,
CMYK, PNG, ...), is decoded on the host, in threads, and laid into the batch. An epoch ends exactly with its last step: our
plan decides what is fed, so nothing is padded, dropped or repeated, and leaving one early drains what had been fed. At most
`ahead` batches are in DALI's hands beyond the one in use, and the encoded bytes of as many again are at hand.

Pixels: on a CPU decoding is exact; DALI's filter rounds once, PIL's after each pass: mean difference 0.16 of 255. On a GPU
nvJPEG's own DCT rounds differently too. All defaults that changed between DALI's releases are set in `_pipeline`.

Shapes: B batch (of this shard), S image size.
"""

from __future__ import annotations

import io
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch

from pipelines.batch import Batch, LoaderSpec
from pipelines.crops import Boxes
from pipelines.decode import decode_rgb, is_turned
from pipelines.errors import DataError, UserError
from pipelines.image_prep import turbojpeg
from pipelines.order import indices_at
from pipelines.prefetch import available_cores
from pipelines.source import Bytes, Integers, Source
from pipelines.torch_backend import MODES, crop_and_resize

log = logging.getLogger("std_fast")

INSTALL = "pip install --extra-index-url https://pypi.nvidia.com nvidia-dali-cuda120"
LOADS = (0.0, 0.35, 0.65, 0.9, 0.99)
"""shares of the images for the GPU's JPEG engine that `sweep` tries"""
_SWEPT_STEPS = 12
_UNKNOWN, _PLAIN, _ODD = range(3)


@dataclass
class _Job:
    """One batch on its way through DALI."""

    step: int
    positions: Integers
    indices: Integers
    data: list[Bytes] = field(default_factory=list)
    """what DALI decodes for the first rows, kept alive until it has; never empty: DALI takes no empty batches"""
    boxes: Boxes = field(default_factory=lambda: np.empty((0, 4), np.int32))
    odd: dict[int, npt.NDArray[np.uint8]] = field(default_factory=dict)
    """rows that were decoded here, [S, S, 3] each"""
    error: Exception | None = None


class DaliLoader:
    """A `batch.Loader` on NVIDIA DALI 2. Raises UserError when DALI is missing or lacks what the spec asks for.

    hw_decoder_load: share of the images that the GPU's JPEG engine decodes, 0 to 1; None: the best of a short `sweep`
    (which the log shows), on a GPU.
    """

    def __init__(self, spec: LoaderSpec, source: Source, hw_decoder_load: float | None = None) -> None:
        if spec.resample not in MODES:
            raise UserError(f"resample: {spec.resample!r} is not in the dali backend; choose one of {', '.join(MODES)}")
        if hw_decoder_load is not None and not 0 <= hw_decoder_load <= 1:
            raise UserError(f"hw_decoder_load {hw_decoder_load} must lie in 0..1")
        _import_dali()
        self.spec = spec
        self.source = source
        self.plan = spec.plan(source.num_samples)
        self.num_classes = source.num_classes
        self.steps_per_epoch = self.plan.steps_per_epoch
        self.wait_seconds = 0.0
        self.threads = spec.threads or available_cores()
        self.device = torch.device(spec.device)
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._held: tuple[Any, Any] | None = None  # DALI's last output and the event after which it is no longer read
        self._kinds = np.zeros(source.num_samples, np.uint8)
        stream = io.BytesIO()
        PIL.Image.new("RGB", (8, 8)).save(stream, "JPEG")
        self._placeholder = np.frombuffer(stream.getvalue(), np.uint8)
        self._next: Callable[[], _Job] | None = None  # what DALI is fed from; None ends the epoch
        self._fed: deque[_Job] = deque()
        self._pipe: Any = None
        self._pool: ThreadPoolExecutor | None = ThreadPoolExecutor(self.threads, thread_name_prefix="std_fast-dali")
        if hw_decoder_load is None and self.device.type == "cuda":
            hw_decoder_load, rows = sweep(spec, source)
            log.info("%s: DALI's hw_decoder_load %.2f, the best of %s", source.path, hw_decoder_load, rows)
        self.hw_decoder_load = hw_decoder_load or 0.0

    # Feeding

    def _feed(self) -> tuple[list[Bytes], Boxes, Boxes]:
        """DALI's source: the next batch's bytes, box corners and box sizes. Raises StopIteration at the epoch's end."""
        if self._next is None:
            raise StopIteration
        job = self._next()
        self._fed.append(job)
        return job.data, np.ascontiguousarray(job.boxes[:, :2]), np.ascontiguousarray(job.boxes[:, 2:])

    def _prepare(self, order: Integers, epoch: int, step: int) -> _Job:
        """Reads a batch, decodes what DALI does not. Runs in a thread of the pool; an error is kept for its turn."""
        positions = self.plan.positions(step)
        job = _Job(step, positions, indices_at(order, positions))
        try:
            indices = job.indices[job.indices >= 0]
            boxes = self.spec.crop.boxes(*self.source.sizes(indices), self.spec.seed, epoch, positions[: len(indices)])
            for row, index in enumerate(indices.tolist()):
                data = self._plain(index)
                if data is None:
                    job.odd[row] = crop_and_resize(decode_rgb(self.source, index), boxes[row], self.spec)
                    boxes[row] = (0, 0, 8, 8)
                job.data.append(self._placeholder if data is None else data)
            job.boxes = boxes
        except Exception as error:  # noqa: BLE001 whatever it is, it belongs to this step
            job.error = error
        if job.error or not job.data:
            job.data, job.boxes = [self._placeholder], np.array([[0, 0, 8, 8]], np.int32)
        return job

    def _plain(self, index: int) -> Bytes | None:
        """The sample's bytes if they are a JPEG that DALI decodes as everyone does, else None."""
        if self._kinds[index] == _ODD:
            return None
        data = self.source.read(index) if self.source.is_jpeg(index) else None
        if self._kinds[index] == _UNKNOWN:
            self._kinds[index] = _PLAIN if data is not None and self._is_plain(index, data.tobytes()) else _ODD
        return data if self._kinds[index] == _PLAIN else None

    def _is_plain(self, index: int, encoded: bytes) -> bool:
        if self.source.kind == "folder" and is_turned(encoded):
            return False
        (height,), (width,) = self.source.sizes(np.array([index]))
        decoder = turbojpeg()
        if decoder is not None:
            known = decoder.header(encoded)
            return known is not None and not known.is_cmyk and (known.height, known.width) == (height, width)
        try:
            with PIL.Image.open(io.BytesIO(encoded)) as image:
                return image.mode in ("RGB", "L") and image.size == (width, height)
        except Exception:  # noqa: BLE001 PIL raises errors of every kind; `decode_rgb` will say which
            return False

    # Running

    def _build(self) -> Any:
        largest = (0, 0)
        if self.source.kind == "beton":  # a folder's images would have to be opened for it
            heights, widths = self.source.sizes(np.arange(self.source.num_samples))
            largest = (int(heights.max()), int(widths.max()))
        pipe = _pipeline(
            self._feed,
            self.spec,
            self.plan.local_batch,
            self.threads,
            self.device,
            self.hw_decoder_load,
            largest,
        )
        pipe.build()
        return pipe

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

        def next_job() -> _Job:
            while len(prepared) < self.spec.ahead and (step := next(steps, None)) is not None:
                prepared.append(pool.submit(self._prepare, order, epoch, step))
            if not prepared:
                raise StopIteration
            job = prepared.popleft().result()
            if (step := next(steps, None)) is not None:
                prepared.append(pool.submit(self._prepare, order, epoch, step))
            return job

        self._drain()
        if self._pipe is None:
            self._pipe = self._build()
        self._pipe.reset()
        self._next = next_job
        try:
            for _ in range(start_step, self.steps_per_epoch):
                if self._pool is None:
                    raise UserError("this loader was closed in the middle of an epoch: close it after the last batch")
                if self._next is not next_job:
                    raise UserError("this epoch was ended by a later one: with dali, run one at a time")
                started = time.perf_counter()
                batch = self._take(epoch)
                self.wait_seconds += time.perf_counter() - started
                yield batch
        finally:
            for future in prepared:
                future.cancel()
            if self._next is next_job:
                self._drain()

    def _take(self, epoch: int) -> Batch:
        try:
            (output,) = self._pipe.run()
        except RuntimeError as error:
            self._pipe = None  # DALI: "no longer valid"
            raise self._explained(error) from error
        job = self._fed.popleft()
        if job.error is not None:
            raise job.error
        return self._batch(output, job, epoch)

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

    def _batch(self, output: Any, job: _Job, epoch: int) -> Batch:
        size = self.spec.image_size
        there = job.indices >= 0
        count = int(there.sum())
        labels = np.where(there, self.source.labels[np.maximum(job.indices, 0)], -1)
        keys = torch.from_numpy(np.stack([labels, job.positions]))
        shape = (len(there), size, size, 3)
        if self._copies is None:
            images = torch.from_numpy(np.empty(shape, np.uint8))  # numpy's: it asks for huge pages
            self._fill(images, output, job.odd, count)
        else:
            if self._held is not None:
                self._held[1].synchronize()  # a copy of the step before, long done
            with torch.cuda.stream(self._copies):
                images = torch.empty(shape, dtype=torch.uint8, device=self.device)
                self._fill(images, output, job.odd, count)
                keys = keys.pin_memory().to(self.device, non_blocking=True)
                done = torch.cuda.Event()
                done.record(self._copies)
            self._held = (output, done)
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(done)
            images.record_stream(stream)
            keys.record_stream(stream)
        return Batch(images.permute(0, 3, 1, 2), keys[0], keys[1], job.indices, epoch, job.step)

    @staticmethod
    def _fill(images: torch.Tensor, output: Any, odd: dict[int, npt.NDArray[np.uint8]], count: int) -> None:
        """images [B, S, S, 3] from DALI's output (the first `count`, or one placeholder) and the rows decoded here."""
        images[:count].copy_(torch.from_dlpack(output.as_tensor())[:count])
        images[count:] = 0
        for row, pixels in odd.items():
            images[row].copy_(torch.from_numpy(pixels))

    # Ends

    def _drain(self) -> None:
        """Ends the epoch that is under way: lets DALI finish what it was given, and drops it."""
        self._next = None
        while self._pipe is not None and self._fed:
            try:
                self._pipe.run()
                self._fed.popleft()
            except StopIteration:
                break
            except RuntimeError:  # a faulty image among those that nobody wants any more
                self._pipe = None
        if self._pipe is not None:
            try:
                self._pipe.run()  # DALI learns of the end only when it asks for more
            except StopIteration:
                pass
        self._fed.clear()

    def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is None:
            return
        self._drain()
        pool.shutdown(wait=True)
        self._pipe = None
        self._held = None

    def __enter__(self) -> DaliLoader:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()


def sweep(
    spec: LoaderSpec, source: Source, loads: tuple[float, ...] = LOADS, steps: int = _SWEPT_STEPS
) -> tuple[float, list[dict[str, float]]]:
    """The best hw_decoder_load for this machine, and what was measured: images per second for each load.

    The best value depends on the GPU, the number of CPU threads and the images, so it is measured with the spec's own.
    """
    rows = []
    for load in loads:
        with DaliLoader(spec, source, load) as loader:
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
    """DALI's pipeline, with every setting in this one place. largest: height and width, to reserve memory for, on a GPU."""
    dali = _import_dali()
    fn, types = dali.fn, dali.types
    on_gpu = device.type == "cuda"
    pipe = dali.Pipeline(
        batch_size=batch,
        num_threads=threads,
        device_id=(device.index if device.index is not None else torch.cuda.current_device()) if on_gpu else None,
        prefetch_queue_depth=spec.ahead + 1,  # the one that is taken, and those ahead of it
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
