"""NVIDIA DALI decodes: on a GPU with its JPEG engine and its cores (`mixed`), on a CPU by the same pipeline.

    loader.py    the consumer's thread: queues steps, waits, delivers
    prepare.py   the pool's threads: read encoded bytes, decode on the host what DALI does not
    driver.py    one thread: feeds DALI, runs it, copies its output
    pipeline.py  DALI's pipeline with all its settings
    sweep.py     the best share of the GPU's JPEG engine, measured once per machine and dataset

DALI gets batches of encoded bytes with our boxes and decodes just the boxes. On a GPU it resizes them too; on a CPU its
resizing takes two thirds of its time, five times what ours takes (`native.resample`), so our threads do it. Images
that a JPEG decoder would read differently or not at all (raw samples, EXIF rotations, CMYK, PNG, ...) are decoded on
the host and written into the batch.

An epoch ends exactly with its last step: our sampler decides what is fed, so nothing is padded, dropped or repeated,
and leaving one early drains what was fed. At most `ahead` batches and three more are decoded or under way: the one in
use and two in DALI's queue; the encoded bytes of as many again are in memory.

Pixels: on a CPU those of the other backends. On a GPU nvJPEG's DCT rounds differently, and DALI's filter rounds once
where PIL's does after each pass and repeats the border's pixels where PIL's is cut off (the filter alone, measured on a
CPU: mean 0.16, at the border up to 12 of 255). Defaults that changed between DALI's releases are set in `pipeline.py`.
"""
