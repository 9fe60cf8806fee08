# Stands in for ghcr.io/mlflow/mlflow:v3.17.2-full where no image can be pulled.
ARG BASE=debian:bookworm-slim
FROM ${BASE}
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN --mount=type=cache,target=/root/.cache/pip python3 -m venv /opt/mlflow \
    && /opt/mlflow/bin/pip install 'mlflow[auth]==3.17.2' boto3==1.43.117 psycopg2-binary==2.9.13
ENV PATH=/opt/mlflow/bin:$PATH
USER 1000:1000
