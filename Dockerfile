# A server for one adapted folder, on the CPU.
#
#   docker build -t trimtab-server .
#   docker run --rm -p 8000:8000 -v "$PWD/runs/mine:/model:ro" -v "$HOME/.cache/trimtab:/cache:ro" trimtab-server

FROM python:3.11-slim AS build
# From PyPI, torch for Linux brings gigabytes for GPUs.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH=torch==2.13.0
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/trimtab
ENV PATH=/opt/trimtab/bin:$PATH
# Before the source, so that a change of it does not fetch torch again.
RUN pip install --index-url "$TORCH_INDEX" "$TORCH"
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY recipes recipes
COPY src src
RUN pip install '.[serve,index]'

FROM python:3.11-slim
# FAISS and torch use OpenMP.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends libgomp1 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin trimtab \
 && install --directory --owner trimtab /cache
COPY --from=build /opt/trimtab /opt/trimtab
ENV PATH=/opt/trimtab/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    TRIMTAB_CACHE=/cache \
    HF_HOME=/cache/hub
USER 10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
# Not through a shell: signals reach the server, which then answers what it has and ends.
ENTRYPOINT ["trimtab"]
CMD ["serve", "/model", "--host", "0.0.0.0"]
