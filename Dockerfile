# Targets: `api` (HTTP; no torch, no ONNX Runtime), `worker-cpu`, and `worker` (CUDA and TensorRT). The images run the code
# from /app as an unprivileged user and write nowhere but /tmp (and /engines, where a GPU worker keeps what it built; /keys, where
# API keys are kept). Build arguments: the base images (a mirror's, or one pinned by digest), EXTRAS, TENSORRT_INDEX.
ARG PYTHON_IMAGE=python:3.12-slim-bookworm
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04

FROM ${PYTHON_IMAGE} AS python
# Nothing is installed into a running service. A Python without pip is as wanted.
RUN ! python3 -m pip --version >/dev/null 2>&1 || python3 -m pip uninstall --yes --root-user-action ignore pip

FROM ${CUDA_IMAGE} AS python-cuda
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3 && rm -rf /var/lib/apt/lists/*

# The packages, in virtual environments without pip: the one that installs has an environment of its own. The code itself comes with the
# images below: what is installed here is its dependencies, at the versions of a lock and with its hashes. The locks have traces, and
# what models need that take text, those of the workers the text encoder `minilm` too. With other EXTRAS of pyproject.toml, or none, the
# versions are those of constraints.txt, and `minilm` is not among them.
FROM ${PYTHON_IMAGE} AS packages
RUN python3 -m venv /pip && python3 -m venv --without-pip /venv
WORKDIR /build
COPY pyproject.toml constraints.txt LICENSE ./
COPY ditserve/ ditserve/
COPY deploy/locks/ locks/
RUN mkdir bench export model service

FROM packages AS packages-api
ARG EXTRAS=otel,serve-text
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ "${EXTRAS}" = otel,serve-text ]; \
    then set -- --no-deps --require-hashes --requirement locks/api.txt; \
    else set -- --constraint constraints.txt ".${EXTRAS:+[${EXTRAS}]}"; fi && \
    /pip/bin/pip --python /venv/bin/python install "$@"

FROM packages AS packages-worker-cpu
ARG EXTRAS=otel,serve-text
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ "${EXTRAS}" = otel,serve-text ]; \
    then set -- --no-deps --require-hashes --requirement locks/worker-cpu.txt; \
    else set -- --constraint constraints.txt ".[cpu${EXTRAS:+,${EXTRAS}}]"; fi && \
    /pip/bin/pip --python /venv/bin/python install "$@"

FROM python-cuda AS packages-worker
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/* && \
    python3 -m venv /pip && python3 -m venv --without-pip /venv
WORKDIR /build
COPY constraints.txt ./
# TensorRT's libraries come from an index of NVIDIA's, which is asked for nothing else, and first: where it cannot be reached, the
# hundreds of megabytes below need not be fetched.
ARG TENSORRT_INDEX=https://pypi.nvidia.com
RUN --mount=type=cache,target=/root/.cache/pip \
    libraries=$(grep '^tensorrt-cu13-libs==' constraints.txt) && \
    PIP_EXTRA_INDEX_URL= /pip/bin/pip --python /venv/bin/python install --no-deps --only-binary :all: \
        --index-url "${TENSORRT_INDEX}" "$libraries" || { \
    echo "error: $libraries cannot be had from ${TENSORRT_INDEX}: name an index that has it with --build-arg TENSORRT_INDEX=URL" >&2; \
    exit 1; }
COPY pyproject.toml LICENSE ./
COPY ditserve/ ditserve/
COPY deploy/locks/ locks/
RUN mkdir bench export model service
ARG EXTRAS=otel,serve-text
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ "${EXTRAS}" = otel,serve-text ]; \
    then set -- --no-deps --require-hashes --requirement locks/worker.txt; \
    else set -- --constraint constraints.txt ".[gpu${EXTRAS:+,${EXTRAS}}]"; fi && \
    /pip/bin/pip --python /venv/bin/python install "$@"

# The images. HEALTHCHECK asks whether the process lives, and nobody else: whether it can work is what /readyz and /startupz tell.
FROM python AS api
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
ENV DIT_HOST=0.0.0.0 DIT_PORT=8000
WORKDIR /app
RUN install -d -o 10001 -g 10001 /keys
COPY --from=packages-api /venv /venv
COPY LICENSE ./
COPY ditserve/ ditserve/
COPY model/ model/
COPY service/ service/
RUN python -m compileall -q .
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=3s --start-period=30s \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['DIT_PORT'] + '/livez', timeout=2)"]
ENTRYPOINT ["python", "-m", "service"]
CMD ["api"]

FROM python AS worker-cpu
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
ENV DIT_WORKER_METRICS_PORT=9100
WORKDIR /app
COPY --from=packages-worker-cpu /venv /venv
COPY LICENSE ./
COPY ditserve/ ditserve/
COPY model/ model/
COPY service/ service/
RUN python -m compileall -q .
USER 10001:10001
EXPOSE 9100
HEALTHCHECK --interval=5s --timeout=3s --start-period=30s \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['DIT_WORKER_METRICS_PORT'] + '/metrics', timeout=2)"]
ENTRYPOINT ["python", "-m", "service"]
CMD ["worker"]

FROM python-cuda AS worker
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
ENV DIT_WORKER_METRICS_PORT=9100 NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /app
RUN install -d -o 10001 -g 10001 /engines
COPY --from=packages-worker /venv /venv
COPY LICENSE ./
COPY ditserve/ ditserve/
COPY model/ model/
COPY export/ export/
COPY service/ service/
RUN python -m compileall -q .
USER 10001:10001
EXPOSE 9100
HEALTHCHECK --interval=5s --timeout=3s --start-period=30s \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['DIT_WORKER_METRICS_PORT'] + '/metrics', timeout=2)"]
ENTRYPOINT ["python", "-m", "service"]
CMD ["worker"]
