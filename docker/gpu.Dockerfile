# For NVIDIA GPUs: the host brings the driver (525 or newer) and the NVIDIA Container Toolkit; CUDA and cuDNN come with pip.
#
#   docker build -f docker/gpu.Dockerfile -t maskvit:gpu .
#   docker run --gpus all --shm-size 8g -v $PWD:/run_here maskvit:gpu train --config=configs/pretrain/mae_b_1600e.py --workdir=runs/mae_b
FROM python:3.12-slim

COPY pyproject.toml setup.py MANIFEST.in requirements.txt requirements-py312.lock LICENSE /source/
COPY maskvit /source/maskvit
COPY configs /source/configs
COPY assets /source/assets
RUN pip install --no-cache-dir --constraint /source/requirements-py312.lock '/source[gpu]'

# What is written below /run_here belongs to this user: the folder mounted there must let it write (--user $(id -u) where it does not).
RUN useradd --create-home maskvit && mkdir /run_here && chown maskvit /run_here
USER maskvit
WORKDIR /run_here

ENTRYPOINT ["maskvit"]
