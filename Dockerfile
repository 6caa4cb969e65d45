# The commands and the pipeline, without a GPU: docker build -t replaceme . && docker run --rm -v "$PWD:/work" replaceme --help
# torch is what pip gives, on Linux the CUDA build. For a GPU: docker run --gpus all.
# The image was never built; its pip line was run in an empty virtual environment (Python 3.11, processor build of torch).
ARG BASE=python:3.11-slim
FROM ${BASE}
# git: DVC's experiments are commits.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/*
ENV VIRTUAL_ENV=/opt/replaceme PATH=/opt/replaceme/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv "$VIRTUAL_ENV"
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY replaceme ./replaceme
RUN pip install --constraint constraints.txt '.[pipeline,4bit]'
RUN useradd --create-home user
USER user
WORKDIR /work
ENTRYPOINT ["replaceme"]
CMD ["--help"]
