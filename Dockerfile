# syntax=docker/dockerfile:1
# Targets: `api` (HTTP; no torch, no ONNX Runtime), `worker-cpu`, and `worker` (CUDA and TensorRT). The images run the code
# from /app as an unprivileged user and write nowhere but /tmp (and /engines, where a GPU worker keeps what it built). To pin a base by digest, pass it as a build argument.
ARG PYTHON_IMAGE=python:3.12-slim-bookworm
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04

# The packages, in virtual environments of their own.
FROM ${PYTHON_IMAGE} AS packages-api
WORKDIR /build
COPY pyproject.toml constraints.txt LICENSE ./
COPY ditserve/ ditserve/
# The code itself comes with the images below: what is installed here is its dependencies.
RUN mkdir bench export model service
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /venv && /venv/bin/pip install --constraint constraints.txt .

FROM packages-api AS packages-worker-cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    /venv/bin/pip install --constraint constraints.txt '.[cpu]'

FROM ${CUDA_IMAGE} AS python-cuda
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3 && rm -rf /var/lib/apt/lists/*

FROM python-cuda AS packages-worker
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY pyproject.toml constraints.txt LICENSE ./
COPY ditserve/ ditserve/
RUN mkdir bench export model service
ARG TENSORRT_INDEX=https://pypi.nvidia.com
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /venv && \
    /venv/bin/pip install --constraint constraints.txt --extra-index-url ${TENSORRT_INDEX} '.[gpu]'

# The images.
FROM ${PYTHON_IMAGE} AS api
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
ENV DIT_HOST=0.0.0.0 DIT_PORT=8000
WORKDIR /app
COPY --from=packages-api /venv /venv
COPY LICENSE ./
COPY ditserve/ ditserve/
COPY model/ model/
COPY service/ service/
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --start-interval=1s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
ENTRYPOINT ["python", "-m", "service"]
CMD ["api"]

FROM ${PYTHON_IMAGE} AS worker-cpu
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
ENV DIT_WORKER_METRICS_PORT=9100
WORKDIR /app
COPY --from=packages-worker-cpu /venv /venv
COPY LICENSE ./
COPY ditserve/ ditserve/
COPY model/ model/
COPY service/ service/
USER 10001:10001
EXPOSE 9100
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --start-interval=1s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:9100/metrics', timeout=2)"]
ENTRYPOINT ["python", "-m", "service"]
CMD ["worker"]

FROM python-cuda AS worker
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
ENV DIT_WORKER_METRICS_PORT=9100 NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /app
COPY --from=packages-worker /venv /venv
COPY LICENSE ./
COPY ditserve/ ditserve/
COPY model/ model/
COPY export/ export/
COPY service/ service/
RUN install -d -o 10001 -g 10001 /engines
USER 10001:10001
EXPOSE 9100
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --start-interval=1s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:9100/metrics', timeout=2)"]
ENTRYPOINT ["python", "-m", "service"]
CMD ["worker"]
