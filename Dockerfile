# msn-eval with PyTorch for NVIDIA GPUs. Not built or run by the tests.
#     docker build -t msn-eval .
#     docker run --gpus all --shm-size 8g -v /datasets:/datasets:ro -v "$PWD":/workspace msn-eval --checkpoint vitb16.pth --data /datasets/imagenet
FROM python:3.12-slim-bookworm

# Wheels of PyTorch for Linux contain CUDA; the host supplies the driver and the NVIDIA container toolkit.
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 XDG_CACHE_HOME=/workspace/.cache
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY msn_eval msn_eval
COPY msn_pretrain msn_pretrain
COPY configs configs
COPY imagenet_subsets imagenet_subsets
COPY reports/published_results.csv reports/published_results.csv
# hadolint ignore=DL3013
RUN pip install '.[all]' && useradd --create-home --uid 1000 user && mkdir /workspace && chown user /workspace
USER 1000
WORKDIR /workspace
ENTRYPOINT ["msn-eval"]
CMD ["doctor"]
