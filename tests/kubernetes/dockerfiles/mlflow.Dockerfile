# Stands in for ghcr.io/mlflow/mlflow:v3.17.2-full where no image can be pulled: MLflow is in the trainer's image, but for what
# its server wants besides.
ARG BASE=debian:bookworm-slim
ARG TRAINER
FROM ${BASE} AS server
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ca-certificates python3 python3-venv
RUN --mount=type=cache,target=/root/.cache/pip python3 -m venv /opt/tools \
    && /opt/tools/bin/pip install --target /opt/server --no-deps Flask-WTF==1.2.2 WTForms==3.2.1 psycopg2-binary==2.9.13

FROM ${TRAINER}
COPY --from=server /opt/server /opt/server
ENV PYTHONPATH=/opt/server
