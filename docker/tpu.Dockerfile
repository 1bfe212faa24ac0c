# For TPU VMs: libtpu comes with pip, and the container must see the devices.
#
#   docker build -f docker/tpu.Dockerfile -t maskvit:tpu .
#   docker run --privileged --net host --shm-size 8g -v $PWD:/run_here maskvit:tpu train --config=configs/pretrain/mae_b_1600e.py --workdir=runs/mae_b
FROM python:3.12-slim

COPY pyproject.toml setup.py MANIFEST.in requirements.txt requirements-py312.lock LICENSE /source/
COPY maskvit /source/maskvit
COPY configs /source/configs
COPY assets /source/assets
RUN pip install --no-cache-dir --constraint /source/requirements-py312.lock '/source[tpu]'

# What is written below /run_here belongs to this user: the folder mounted there must let it write (--user $(id -u) where it does not).
RUN useradd --create-home maskvit && mkdir /run_here && chown maskvit /run_here
USER maskvit
WORKDIR /run_here

ENTRYPOINT ["maskvit"]
