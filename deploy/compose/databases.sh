#!/bin/sh
# The databases of docker-compose.yml: roles, logins and their rights. Changes nothing when all is as it should be.
#
#   databases.sh logins     before `aftercommit migrate`: databases, roles, logins, and what the subscriber receipts works on
#   databases.sh rights     behind it: what each role may do

set -eu

sql() { psql -X --quiet -v ON_ERROR_STOP=1 "$@"; }

until pg_isready --quiet; do sleep 1; done

if [ "$1" = logins ]; then
    for database in shop receipts; do
        sql -d postgres <<SQL
select 'create database $database' where not exists (select from pg_database where datname = '$database')
\gexec
revoke all on database $database from public;
SQL
        # It says that the rights come later.
        sql -d "$database" -f /etc/aftercommit/roles.sql >/dev/null
    done
    # Nobody logs in before the password is set.
    sql -d postgres <<'SQL'
select format('create role %I', login)
  from unnest(array['shop_owner', 'shop_provisioner', 'shop_relay', 'shop_eraser', 'shop_pruner', 'shop_operator', 'shop_doctor', 'shop_service',
                    'receipts_owner', 'receipts_provisioner', 'receipts_worker', 'receipts_operator']) as login
 where not exists (select from pg_roles where rolname = login)
\gexec
\i /secrets/postgres/logins.sql
grant connect on database shop to shop_owner, shop_provisioner, shop_relay, shop_eraser, shop_pruner, shop_operator, shop_doctor, shop_service;
grant connect on database receipts to receipts_owner, receipts_provisioner, receipts_worker, receipts_operator;
grant aftercommit_owner to shop_owner, receipts_owner;
grant aftercommit_publisher to shop_service;
grant aftercommit_relay, aftercommit_outbox_reconciler to shop_relay;
-- What a relay may do, which doctor looks at, and what operators see.
grant aftercommit_relay, aftercommit_outbox_reconciler, aftercommit_reader, pg_read_all_stats to shop_doctor;
grant aftercommit_worker, aftercommit_inbox_reconciler to receipts_worker;
grant aftercommit_eraser to shop_eraser;
grant aftercommit_pruner to shop_pruner;
grant aftercommit_operator to shop_provisioner, shop_operator, receipts_provisioner, receipts_operator;
SQL
    sql -d receipts -f /etc/aftercommit/receipts.sql
else
    for database in shop receipts; do sql -d "$database" -f /etc/aftercommit/roles.sql; done
fi
