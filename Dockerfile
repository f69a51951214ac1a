# The worker's image; docs/image.md has the build commands and the sizes.
# The later a layer, the more often it changes: system, weights, torch, libraries, code.
ARG BASE_IMAGE=docker.io/library/python:3.11.14-slim-bookworm
# The model in the image: sdxl, checkpoint, shapes or none.
ARG MODEL=sdxl


FROM ${BASE_IMAGE} AS system
# torch.compile builds with g++. Its version is not pinned: Debian's mirrors keep only the newest
# one. The standard library is compiled because the base image comes without its bytecode.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && python -m compileall -q -x site-packages \
        "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
    && python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH


# The tools that download a model of the hub ...
FROM system AS tools-sdxl
WORKDIR /build
ARG PIP_EXTRA_INDEX_URL
COPY builder/requirements.txt builder/
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --requirement builder/requirements.txt

# ... and those that convert a single-file checkpoint.
FROM tools-sdxl AS tools-checkpoint
ARG PIP_EXTRA_INDEX_URL
COPY requirements.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --requirement requirements.txt

# hadolint ignore=DL3006
FROM tools-${MODEL} AS download
WORKDIR /build
COPY builder builder
ARG BASE
ARG REFINER
# The UNets go into layers of their own: layers are pulled in parallel, and none is over 5.5 GB.
# A checkpoint may lie in models/; the secret hf_token is a token for a gated or private model.
RUN --mount=type=bind,source=models,target=/build/models \
    --mount=type=secret,id=hf_token \
    HF_TOKEN_PATH=/run/secrets/hf_token python -m builder.download_weights --to /weights/rest \
        --base "$BASE" --refiner "$REFINER" \
    && mkdir -p /weights/base-unet/base /weights/refiner \
    && mv /weights/rest/base/unet /weights/base-unet/base \
    && if [ -d /weights/rest/refiner ]; then mv /weights/rest/refiner /weights/refiner; fi

FROM system AS weights
COPY --from=download /weights/base-unet /models/sdxl
COPY --from=download /weights/refiner /models/sdxl
COPY --from=download /weights/rest /models/sdxl
ENV MODEL_DIR=/models/sdxl


FROM weights AS model-sdxl

FROM weights AS model-checkpoint

FROM system AS model-shapes
COPY models/shapes /models/shapes
ENV MODEL_DIR=/models/shapes

FROM system AS model-none

# hadolint ignore=DL3006
FROM model-${MODEL} AS worker
WORKDIR /app
# The index of another build of torch, for another CUDA.
ARG PIP_EXTRA_INDEX_URL
# By far the largest layer. requirements.txt has the same version, but changes more often.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install torch==2.13.0
COPY requirements.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --requirement requirements.txt

# What this build of torch needs of the host's driver: below it, the SDK's check ends the worker.
ARG MIN_CUDA_VERSION=13.0
# The NVIDIA variables are those of NVIDIA's own images: without them some hosts pass on no GPU.
ENV HF_HUB_OFFLINE=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_VISIBLE_DEVICES=all \
    PYTHONUNBUFFERED=1 \
    RUNPOD_MIN_CUDA_VERSION=${MIN_CUDA_VERSION} \
    RUNPOD_LOG_LEVEL=INFO

COPY LICENSE handler.py test_input.json ./
COPY sdxl_worker sdxl_worker
RUN python -m compileall -q .

CMD ["python", "-u", "/app/handler.py"]
