# The worker's image; docs/image.md has the build commands and the sizes.
# The later a layer, the more often it changes: system, weights, torch, libraries, code.
# A stage or an image; `official` is the next stage.
ARG BASE_IMAGE=official
# The model in the image: sdxl, checkpoint, shapes or none.
ARG MODEL=sdxl


# The digest is the one of the index of all platforms. Dependabot renews what stands after FROM.
FROM docker.io/library/python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d AS official


# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS system
# torch.compile builds with g++. Its version is not pinned: Debian's mirrors keep only the newest
# one. The standard library is compiled because the base image comes without its bytecode.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && python -m compileall -q -x site-packages \
        "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
    && python -m venv /opt/venv \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin worker
ENV PATH=/opt/venv/bin:$PATH


# The tools that download a model of the hub ...
FROM system AS tools-sdxl
WORKDIR /build
COPY builder/requirements.lock builder/
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-deps --only-binary=:all: --require-hashes \
        --requirement builder/requirements.lock \
    && pip check

# ... and those that convert a single-file checkpoint.
FROM tools-sdxl AS tools-checkpoint
COPY requirements-torch.lock requirements.lock ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-deps --only-binary=:all: --require-hashes \
        --requirement requirements-torch.lock --requirement requirements.lock \
    && pip check

# hadolint ignore=DL3006
FROM tools-${MODEL} AS download
WORKDIR /build
COPY builder builder
# A mirror of the hub.
ARG HF_ENDPOINT
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

# What single-file checkpoints of a volume lack, a few MB, for the image without weights.
FROM tools-sdxl AS configs
WORKDIR /build
COPY builder builder
ARG HF_ENDPOINT
RUN python -m builder.download_weights --to /configs/sdxl-configs --configs

# What stands beside a model, if it is asked for: names and repositories with commas between them.
FROM tools-sdxl AS extras
WORKDIR /build
COPY builder builder
ARG HF_ENDPOINT
ARG CONTROLNET
ARG PREPROCESSOR
ARG IP_ADAPTER
ARG SAFETY_CHECKER
RUN --mount=type=secret,id=hf_token \
    export HF_TOKEN_PATH=/run/secrets/hf_token \
    && python -m builder.download_weights --to /extras/control \
        --controlnet "$CONTROLNET" --preprocessor "$PREPROCESSOR" \
    && python -m builder.download_weights --to /extras/image --ip-adapter "$IP_ADAPTER" \
    && python -m builder.download_weights --to /extras/safety --safety-checker "$SAFETY_CHECKER"

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
COPY --from=configs /configs /models

# hadolint ignore=DL3006
FROM model-${MODEL} AS worker
# Into controlnets/, ip-adapters/ and safety-checker/, each a layer of its own.
COPY --from=extras /extras/control /models
COPY --from=extras /extras/image /models
COPY --from=extras /extras/safety /models
WORKDIR /app
# By far the largest layer. requirements.lock has all the rest, and changes more often.
COPY requirements-torch.lock ./
# The index of another build of torch, for another CUDA. The lock has no hashes of other builds: of
# these only torch's version is fixed. torch comes without its dependencies, because pip would take any
# package from that index that has a higher version there, whoever published it.
ARG PIP_EXTRA_INDEX_URL
# hadolint ignore=DL3013
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ -z "$PIP_EXTRA_INDEX_URL" ]; then \
        pip install --no-deps --only-binary=:all: --require-hashes \
            --requirement requirements-torch.lock; \
    else \
        torch="$(grep -o '^torch==[^ ]*' requirements-torch.lock)" \
        && pip install --no-deps "$torch" \
        && env --unset=PIP_EXTRA_INDEX_URL pip install "$torch"; \
    fi
COPY requirements.lock ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-deps --only-binary=:all: --require-hashes --requirement requirements.lock \
    && pip check
# What makes maps of pictures, and reads upscalers. pip check comes before: requirements-control.txt
# says what these packages declare and must not have.
ARG CONTROL_EXTRAS=true
COPY requirements-control.lock ./
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ "$CONTROL_EXTRAS" = true ]; then \
        pip install --no-deps --only-binary=:all: --require-hashes \
            --requirement requirements-control.lock; \
    fi

# What this build of torch needs of the host's driver: below it, the SDK's check ends the worker.
ARG MIN_CUDA_VERSION=13.0
# The NVIDIA variables are those of NVIDIA's own images: without them some hosts pass on no GPU.
ENV HF_HUB_OFFLINE=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_VISIBLE_DEVICES=all \
    ORT_DISABLE_TELEMETRY=1 \
    PYTHONUNBUFFERED=1 \
    RUNPOD_MIN_CUDA_VERSION=${MIN_CUDA_VERSION} \
    RUNPOD_LOG_LEVEL=INFO

COPY LICENSE handler.py start.sh test_input.json ./
COPY sdxl_worker sdxl_worker
# Readable for every user, whatever the mode was where the image is built. To output/ every user may
# write, for a local job's pictures. Templates that were made for 2.1.0 may start /handler.py, which is
# start.sh's other name.
RUN python -m compileall -q . \
    && chmod -R a+rX . \
    && install --directory --mode=777 output \
    && echo 'import os, sys; os.execvp("sh", ["sh", "/app/start.sh", *sys.argv[1:]])' > /handler.py \
    && chmod a+r /handler.py

# It starts as root and becomes the user `worker`. There is no USER: the Hub's tests run in the image,
# and install what they need.
CMD ["sh", "/app/start.sh"]
