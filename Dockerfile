# syntax=docker/dockerfile:1
#
#   docker build -t reprise:cpu .                          without CUDA
#   docker build -t reprise:cuda --build-arg TORCH=cuda .  for NVIDIA GPUs; CUDA itself comes with torch
#   docker run -p 127.0.0.1:8000:8000 reprise:cpu          serves the bundled model
#   docker run --gpus all -p 127.0.0.1:8000:8000 -v huggingface:/var/cache/huggingface reprise:cuda serve MODEL

ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim AS build
ARG TORCH=cpu
WORKDIR /src
RUN python -m venv /opt/reprise
ENV PATH=/opt/reprise/bin:$PATH
# torch in a layer of its own: it is large and seldom changes.
COPY constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    version=$(sed -n 's/^torch==//p' constraints.txt) && \
    case "$TORCH" in \
    cpu) pip install --index-url https://download.pytorch.org/whl/cpu "torch==$version+cpu" ;; \
    cuda) pip install "torch==$version" ;; \
    *) echo "TORCH is '$TORCH'; it is cpu or cuda" >&2; exit 1 ;; \
    esac
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY server server
RUN --mount=type=cache,target=/root/.cache/pip pip install --constraint constraints.txt .

FROM python:${PYTHON_VERSION}-slim
RUN apt-get update && apt-get install -y --no-install-recommends tini && rm -rf /var/lib/apt/lists/* && \
    useradd --uid 10001 --create-home --shell /usr/sbin/nologin reprise && \
    install -d -o reprise -g reprise /var/cache/huggingface
COPY --from=build /opt/reprise /opt/reprise
ENV PATH=/opt/reprise/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/var/cache/huggingface \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    REPRISE_HOST=0.0.0.0
USER reprise
WORKDIR /home/reprise
VOLUME /var/cache/huggingface
EXPOSE 8000
STOPSIGNAL SIGTERM
# Alive, not ready: a model may take long to load, and a restart would not make that shorter.
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:%s/health' % os.environ.get('REPRISE_PORT', '8000'), timeout=4)"]
ENTRYPOINT ["tini", "--", "reprise"]
CMD ["serve"]
