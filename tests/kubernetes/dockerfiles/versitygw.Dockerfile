# Stands in for versity/versitygw:v1.8.0 where no image can be pulled; the context is the folder with the program.
ARG BASE=debian:bookworm-slim
FROM ${BASE}
COPY versitygw /usr/local/bin/
ENTRYPOINT ["versitygw"]
