"""Loaders: the samples of a dataset as uint8 batches on the device, in an order that the seed decides.

## Mental model, in five steps

1. **Source.** `source.open_source` opens a dataset and gives, for an index 0..N-1, the sample's encoded bytes, height,
   width and label. It validates everything it reads and decodes nothing.
2. **Sampler.** `order.BatchSampler` maps (epoch, step) to B positions, 0..N-1 or -1 past the end, and a seeded
   permutation maps each position to an index. Rank r of W takes the r-th part of the same global batch.
3. **Boxes.** `crops.CropSpec` draws each row's box from (seed, epoch, position), for the stored height and width. Rows,
   sizes and boxes of a batch are its `BatchSlots`. Up to here all backends run the same code.
4. **Decode, crop, resize.** The backend fills `images`, uint8 [B, 3, S, S], channels_last, for the given boxes. A
   sample that cannot be decoded goes to the `CorruptTracker`, which raises or substitutes another one.
5. **Deliver.** The consumer gets a `Batch` (images, labels, positions, indices) on its device. At most `ahead` batches
   are prepared beyond the one in use. On a GPU the consumer's stream waits for the copy; the host does not.

A batch is thus a pure function of (seed, epoch, step): a loader has no state to save, and resuming at step k is
`loader.epoch(epoch, start_step=k)`.

## Backends

| backend  | step 4 runs in                                   | choose it for                                         |
|----------|--------------------------------------------------|-------------------------------------------------------|
| ffcv     | threads: libturbojpeg and numba                  | betons and folders on a CPU: the fastest decoder here |
| torch    | threads: libturbojpeg or torchvision; or nvJPEG  | any machine                                           |
| dali     | DALI: JPEG engine and cores of the GPU, or a CPU | machines with few CPU cores per GPU                   |
| resident | the device: two matrix products per batch        | small datasets of small images, decoded once and kept |

`factory.open_loader` opens one; "auto" takes resident where the decoded dataset is small, else ffcv, else torch.
`base.LoaderBase` holds what all of them do alike, `prefetch.ThreadedLoader` the threads of ffcv and torch, the package
`dali` DALI's threads, `native` the compiled code.
"""
