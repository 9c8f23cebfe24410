# aftercommit, aftercommit-relay and aftercommit-worker, with nothing beside them: no shell, no package manager.
#
#   docker build --tag localhost/aftercommit:0.1.0 .
#   scripts/image        builds it with podman and tries it
#
# Each program is a command of the image: `docker run … localhost/aftercommit:0.1.0 aftercommit-relay`. It runs as any user, on a read-only file
# system, without capabilities. FEATURES are features of the package aftercommit beside the default ones, separated by commas.

FROM docker.io/library/rust:1.95.0-slim-trixie AS base
WORKDIR /source
ENV CARGO_PROFILE_RELEASE_DEBUG=none CARGO_PROFILE_RELEASE_STRIP=symbols
ARG FEATURES="otlp"

# What decides which dependencies there are, and nothing in place of the source.
FROM base AS manifests
COPY . .
RUN find . -type f ! -name Cargo.toml ! -name Cargo.lock -delete \
    && for crate in . crates/*; do mkdir -p "$crate/src" && touch "$crate/src/lib.rs"; done \
    && mkdir -p src/bin examples \
    && for main in src/bin/aftercommit.rs src/bin/aftercommit-relay.rs src/bin/aftercommit-worker.rs crates/bench/src/main.rs examples/demo.rs; do \
        echo 'fn main() {}' >"$main"; \
    done

# The dependencies: made again only when a Cargo.toml or Cargo.lock changes.
FROM base AS dependencies
COPY --from=manifests /source /source
RUN cargo build --locked --release --bins --features "$FEATURES"

FROM dependencies AS programs
COPY . .
# Cargo goes by the time of a file, and what was built in place of the source is newer than the source.
RUN rm -rf target/release/.fingerprint/aftercommit* && cargo build --locked --release --bins --features "$FEATURES"
RUN deploy/image/collect.sh /image "$FEATURES"

FROM scratch
COPY --from=programs /image /
# Of which commit it is, and when that was made, the builder says with --label, as scripts/image does.
LABEL org.opencontainers.image.title="aftercommit" \
    org.opencontainers.image.description="Transactional outbox for PostgreSQL and NATS JetStream: relay, worker, and the operator's tool" \
    org.opencontainers.image.version="0.1.0" \
    org.opencontainers.image.licenses="MIT OR Apache-2.0" \
    org.opencontainers.image.base.name="scratch"
# Health checks and metrics are on. `aftercommit health` asks where AFTERCOMMIT_HTTP says.
ENV PATH=/usr/bin AFTERCOMMIT_HTTP=0.0.0.0:9464
EXPOSE 9464
USER 65532:65532
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=30s --retries=3 CMD ["aftercommit", "health"]
CMD ["aftercommit", "--help"]
