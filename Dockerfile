# std_fast with FFCV and DALI in the tested versions, each checked by its SHA-256:
#   docker build -t std-fast .
#   docker run --rm --gpus all --shm-size 8g -v /data:/data std-fast train mixer_s16_std --data.train /data/imagenet-train.beton
# Not built by us as an image. Its steps were run one by one in a chroot of Ubuntu 24.04 (debootstrap, so without the CUDA base layer) on
# 2026-11-29: each ended with exit code 0; `std-fast doctor` found FFCV, DALI and all else but a GPU.
# torch's wheels bring their own CUDA libraries; the base image supplies the driver hooks and nvcc's runtime for other tools.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04
ENV DEBIAN_FRONTEND=noninteractive PYTHONUNBUFFERED=1 PATH=/std_fast/.venv/bin:$PATH
RUN apt-get update && apt-get install -y --no-install-recommends \
      make python3 python3-venv python3-dev g++ pkg-config libopencv-dev libturbojpeg0-dev && \
    rm -rf /var/lib/apt/lists/*
WORKDIR /std_fast
# The packages are installed from the locks alone, so that a change of the code does not repeat it.
COPY pyproject.toml setup.py constraints.txt README.md LICENSE Makefile ./
COPY scripts scripts
COPY std_fast/__init__.py std_fast/__init__.py
RUN CI=true scripts/bootstrap.sh image && rm -rf /root/.cache
COPY . .
RUN std-fast doctor
ENTRYPOINT ["std-fast"]
CMD ["--help"]
