# Stands in for postgres:17-bookworm where no image can be pulled: its user, its variables, its signal.
ARG BASE=debian:bookworm-slim
FROM ${BASE}
RUN groupadd --gid 999 postgres \
    && useradd --uid 999 --gid 999 --home-dir /var/lib/postgresql postgres \
    && mkdir /etc/postgresql-common \
    && echo create_main_cluster=false > /etc/postgresql-common/createcluster.conf \
    && apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends postgresql-15 \
    && install --directory --owner=999 --group=999 --mode=700 /var/lib/postgresql/data \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/usr/lib/postgresql/15/bin:$PATH \
    PGDATA=/var/lib/postgresql/data
COPY postgresql.sh /usr/local/bin/
USER 999:999
STOPSIGNAL SIGINT
ENTRYPOINT ["postgresql.sh"]
