#!/bin/sh
# Makes the secrets and certificates of docker-compose.yml in the volume /secrets, each that is missing: what is there stays. Every process is a user of
# its own, and finds in /secrets a directory that nobody else may enter. Run by docker-compose.yml as the service `prepare`, without a network.

set -eu
umask 077
cd /secrets
chmod 755 .

# Writes standard input into the file $1, whole or not at all.
keep() { cat >"$1.new" && mv "$1.new" "$1"; }

# A key and a certificate for the service $1, in its directory, by the authority in /tmp.
certificate() {
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -noenc -subj "/CN=$1" -keyout "$1/server.key" -out /tmp/request
    printf 'subjectAltName=DNS:%s,DNS:localhost,IP:127.0.0.1\nbasicConstraints=CA:FALSE\nextendedKeyUsage=serverAuth\n' "$1" >/tmp/extensions
    openssl x509 -req -in /tmp/request -CA /tmp/ca.crt -CAkey /tmp/ca.key -days 3650 -extfile /tmp/extensions -out "$1/server.crt"
}

# The URL of a login, in the file $1, and for databases.sh the statement that gives it its password.
login() {
    file=$1 name=$2 database=$3
    [ -s "$file" ] || printf 'postgres://%s:%s@postgres:5432/%s?sslmode=verify-full&sslrootcert=/secrets/ca.crt\n' "$name" "$(openssl rand -hex 24)" "$database" | keep "$file"
    password=$(sed 's,^postgres://[^:]*:\([^@]*\)@.*,\1,' "$file")
    printf "alter role %s login password '%s';\n" "$name" "$password" >>postgres/logins.sql
}

# The password of a user of accounts.conf, in the file $2, and for nats-server. That takes what begins with a digit for a number.
nats_user() {
    [ -s "$2" ] || printf 'p%s\n' "$(openssl rand -hex 24)" | keep "$2"
    printf 'AFTERCOMMIT_%s_PASSWORD=%s\n' "$(printf %s "$1" | tr '[:lower:]' '[:upper:]')" "$(cat "$2")" >>nats/server.env
}

mkdir -p postgres nats owner provisioner relay receipts eraser pruner operator doctor service grafana
rm -f postgres/logins.sql nats/server.env

if ! [ -s ca.crt ] || ! [ -s postgres/server.crt ] || ! [ -s nats/server.crt ]; then
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -noenc -subj /CN=aftercommit-compose -days 3650 -keyout /tmp/ca.key -out /tmp/ca.crt
    certificate postgres
    certificate nats
    # The key goes with /tmp: nobody can make another certificate.
    keep ca.crt </tmp/ca.crt
fi

[ -s postgres/password ] || openssl rand -hex 24 | keep postgres/password
printf '*:*:*:*:%s\n' "$(cat postgres/password)" | keep postgres/pgpass
login owner/shop.url shop_owner shop
login owner/receipts.url receipts_owner receipts
login provisioner/shop.url shop_provisioner shop
login provisioner/receipts.url receipts_provisioner receipts
login relay/database.url shop_relay shop
login receipts/database.url receipts_worker receipts
login eraser/database.url shop_eraser shop
login pruner/database.url shop_pruner shop
login operator/shop.url shop_operator shop
login operator/receipts.url receipts_operator receipts
login doctor/database.url shop_doctor shop
login service/database.url shop_service shop

nats_user provisioner provisioner/nats.password
nats_user relay relay/nats.password
nats_user receipts receipts/nats.password
nats_user eraser eraser/nats.password
nats_user operator operator/nats.password
# `aftercommit doctor` looks as an operator at NATS.
keep doctor/nats.password <operator/nats.password
# Users of accounts.conf whom no process here has need of.
for user in system outbox_reconciler branch_balance receipts_reconciler; do nats_user "$user" "nats/$user.password"; done

[ -s grafana/password ] || openssl rand -hex 24 | keep grafana/password

# Whose they are: the users of docker-compose.yml.
hand_over() { chmod 400 "$1"/* && chmod 500 "$1" && chown -R "$2:$2" "$1"; }
hand_over postgres 999
hand_over nats 10001
hand_over owner 10002
hand_over provisioner 10003
hand_over relay 10004
hand_over receipts 10005
hand_over eraser 10006
hand_over pruner 10007
hand_over operator 10008
hand_over doctor 10009
hand_over service 10010
hand_over grafana 472
chmod 444 ca.crt
chown 10001:10001 /var/lib/nats
