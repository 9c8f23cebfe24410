-- What each process may do in a database with the schema aftercommit, and nothing more. docs/security.md explains it.
--
--   psql --no-psqlrc --file roles.sql --dbname shop                          roles aftercommit_relay, aftercommit_worker, …
--   psql --no-psqlrc --file roles.sql --dbname shop --set prefix=shop_       roles shop_relay, shop_worker, …
--   psql --no-psqlrc --file roles.sql --dbname shop --set schema=events      for a schema of another name
--
-- Run it as a superuser, or as the database's owner with CREATEROLE, in the publisher's database and in each subscriber's.
-- The roles cannot log in: make a login for each process and grant it the role of its work.
--
--   create role relay_1 login password '…' in role aftercommit_relay;
--
-- Run it again after each `aftercommit migrate`, before the new programs start. It takes away what these roles should
-- not have and grants what they need, in one transaction, so that running processes notice nothing. Run before the
-- first `aftercommit migrate`, it makes the roles only.

\set ON_ERROR_STOP on
\set QUIET on
\if :{?prefix}
\else
    \set prefix aftercommit_
\endif
\if :{?schema}
\else
    \set schema aftercommit
\endif
\set owner :prefix owner
\set publisher :prefix publisher
\set relay :prefix relay
\set worker :prefix worker
\set outbox_reconciler :prefix outbox_reconciler
\set inbox_reconciler :prefix inbox_reconciler
\set own_reconciler :prefix own_reconciler
\set pruner :prefix pruner
\set requester :prefix requester
\set eraser :prefix eraser
\set reader :prefix reader
\set operator :prefix operator

begin;
-- Whoever runs this has more rights than those who may create functions and operators in the schema public.
set local search_path = pg_catalog, pg_temp;
set local lock_timeout = '3s';
set local client_min_messages = warning;

select format('create role %I nologin', role)
  from unnest(array[:'owner', :'publisher', :'relay', :'worker', :'outbox_reconciler', :'inbox_reconciler',
                    :'own_reconciler', :'pruner', :'requester', :'eraser', :'reader', :'operator']) as role
 where not exists (select from pg_roles where rolname = role)
\gexec

-- The owner runs `aftercommit migrate`. A superuser gives it what is there; anybody else must be a member for that.
select format('grant %I to current_user', :'owner') where not pg_has_role(current_user, :'owner', 'usage')
\gexec
select format('grant create on database %I to %I', current_database(), :'owner')
\gexec

select exists (select from pg_namespace where nspname = :'schema') as migrated
\gset
\if :migrated

grant usage, create on schema :"schema" to :"owner";
alter schema :"schema" owner to :"owner";
select format('alter %s %I.%I owner to %I', case relkind when 'v' then 'view' else 'table' end, :'schema', relname, :'owner')
  from pg_class
 where relnamespace = :'schema'::regnamespace and relkind in ('r', 'p', 'v')
   and relowner <> (select oid from pg_roles where rolname = :'owner')
\gexec
select format('alter function %s owner to %I', oid::regprocedure, :'owner')
  from pg_proc
 where pronamespace = :'schema'::regnamespace
   and proowner <> (select oid from pg_roles where rolname = :'owner')
\gexec

revoke all on schema :"schema" from public;
revoke all on all functions in schema :"schema" from public;
revoke all on schema :"schema" from
    :"publisher", :"relay", :"worker", :"outbox_reconciler", :"inbox_reconciler", :"own_reconciler", :"pruner", :"requester", :"eraser", :"reader", :"operator";
revoke all on all tables in schema :"schema" from
    public, :"publisher", :"relay", :"worker", :"outbox_reconciler", :"inbox_reconciler", :"own_reconciler", :"pruner", :"requester", :"eraser", :"reader", :"operator";
revoke all on all sequences in schema :"schema" from
    public, :"publisher", :"relay", :"worker", :"outbox_reconciler", :"inbox_reconciler", :"own_reconciler", :"pruner", :"requester", :"eraser", :"reader", :"operator";
revoke all on all functions in schema :"schema" from
    :"publisher", :"relay", :"worker", :"outbox_reconciler", :"inbox_reconciler", :"own_reconciler", :"pruner", :"requester", :"eraser", :"reader", :"operator";

grant usage on schema :"schema" to
    :"publisher", :"relay", :"worker", :"outbox_reconciler", :"inbox_reconciler", :"own_reconciler", :"pruner", :"requester", :"eraser", :"reader", :"operator";
-- Which version the schema has, for `aftercommit doctor`.
grant select on :"schema".migrations to :"relay", :"worker", :"pruner", :"requester", :"eraser", :"reader", :"operator";

-- The publishing service. It cannot read what it wrote, and it gives neither `id` nor `xid`.
grant insert (event_id, type, version, key, headers, payload, content_type) on :"schema".outbox to :"publisher";
grant execute on function :"schema".publish, :"schema".new_event_id to :"publisher";
-- For the trigger that asks which role may publish what; it is off until somebody switches it on.
grant select on :"schema".allowed_type to :"publisher";
-- Capture. Who owns a table captures it, and its triggers write with the owner's rights.
grant execute on function :"schema".capture, :"schema".capture_remove, :"schema".capture_checked, :"schema".capture_names,
    :"schema".capture_wrong_header, :"schema".capture_make_function, :"schema".capture_fit to :"publisher";
-- What captures there are, and whether they are as they should be. These read the catalog only.
grant select on :"schema".captures to :"publisher", :"reader", :"operator";
grant execute on function :"schema".capture_check, :"schema".capture_all, :"schema".capture_problems, :"schema".capture_settings,
    :"schema".capture_function, :"schema".capture_prefix, :"schema".capture_per, :"schema".capture_triggers,
    :"schema".capture_refusal, :"schema".capture_lacks, :"schema".capture_source, :"schema".capture_insert,
    :"schema".capture_headers, :"schema".capture_header, :"schema".capture_object, :"schema".capture_differs,
    :"schema".capture_pins, :"schema".capture_base_type, :"schema".capture_per_now, :"schema".capture_primary_key,
    :"schema".capture_call, :"schema".capture_call_with, :"schema".capture_partitions, :"schema".capture_remedy to :"publisher", :"reader", :"operator";

-- Sealed events: a subject's first event makes its key. The role eraser forgets it.
grant select (subject_kind, subject_id, key_ref, wrapped_key, key_id), insert (subject_kind, subject_id, key_ref, wrapped_key, key_id)
    on :"schema".data_key to :"publisher";

-- aftercommit-relay. It deletes what is published and old, and stamps rows anew after a restore: `update (xid)`.
grant select, delete, update (xid) on :"schema".outbox to :"relay";
grant select, update on sequence :"schema".outbox_id_seq to :"relay";
grant select, insert, update (holder, epoch, expires_at) on :"schema".lease to :"relay";
grant select, insert, delete on :"schema".relay_log to :"relay";
grant select, insert, update on :"schema".relay_status to :"relay";
grant select, insert, update, delete on :"schema".parked to :"relay";
grant select, update, delete on :"schema".repair to :"relay";
grant select on :"schema".pause to :"relay";
grant execute on function :"schema".timeline, :"schema".reads_up_to to :"relay";
-- Everybody may call it, unless somebody has taken that away.
select format('grant execute on function pg_control_system() to %I', :'relay')
 where (select rolsuper from pg_roles where rolname = current_user)
\gexec

-- aftercommit-worker, beside what its handlers do themselves. Columns, because who may update all of a table may lock it,
-- and because an id that somebody chooses would be in the way of the next one.
grant select, insert, update (holder, epoch, expires_at) on :"schema".lease to :"worker";
grant select, insert, delete on :"schema".inbox to :"worker";
grant select, insert, update, delete on :"schema".attempt, :"schema".running to :"worker";
grant select, update (attempts, reason, dead_at),
    insert (subscriber, event_id, type, version, key, source, time, sequence, headers, payload, content_type, stream,
            stream_seq, attempts, reason, first_failed_at)
    on :"schema".dead_letter to :"worker";
grant select, delete on :"schema".redrive to :"worker";
grant select on :"schema".pause to :"worker";
grant select, insert, update, delete on :"schema".worker_status to :"worker";
grant select, insert, delete on :"schema".failure to :"worker";
grant select, insert, delete on :"schema".reached to :"worker";
grant select, insert, update (pruned_to) on :"schema".inbox_pruned to :"worker";
-- To open sealed events.
grant select (subject_kind, subject_id, key_ref, wrapped_key, key_id) on :"schema".data_key to :"worker";
grant select (key_ref) on :"schema".forgotten_key to :"worker";
-- aftercommit provision, and aftercommit-worker --provision.
grant select, insert, update (stream, stream_created, sequence, starts_at, asked, recorded_at) on :"schema".subscriber_start
    to :"worker", :"operator";

-- All reconcilers keep their runs and findings.
grant select, insert (name),
    update (last_attempt_at, last_success_at, failures, retry_at, reconciled_up_to, full_sweep_at, position, repaired_total)
    on :"schema".reconciler to :"outbox_reconciler", :"inbox_reconciler", :"own_reconciler";
grant select, delete, insert (name, cause, mode, scope, holder, alive_until),
    update (alive_until, ended_at, result, error, scanned, found, repaired, failed, detail)
    on :"schema".reconcile_run to :"outbox_reconciler", :"inbox_reconciler", :"own_reconciler";
grant select, delete,
    insert (name, kind, item, event_id, outbox_id, key, stream_seq, detail, state, first_run, last_run, settled_at),
    update (stream_seq, detail, state, last_run, settled_at)
    on :"schema".finding to :"outbox_reconciler", :"inbox_reconciler", :"own_reconciler";

-- aftercommit-relay --reconcile-every and `aftercommit reconcile --comparison outbox`, beside the relay's.
grant select on :"schema".outbox, :"schema".relay_log, :"schema".parked to :"outbox_reconciler";
grant select on sequence :"schema".outbox_id_seq to :"outbox_reconciler";
grant select, insert, update (event_id, key, state, times, queued_at, published_at, sequence, reason) on :"schema".repair
    to :"outbox_reconciler";
grant execute on function :"schema".reads_up_to to :"outbox_reconciler";

-- aftercommit-worker --reconcile-every and `aftercommit reconcile --comparison consumer` and `--comparison inbox`.
grant select on :"schema".inbox, :"schema".inbox_pruned, :"schema".subscriber_start, :"schema".dead_letter,
    :"schema".reached to :"inbox_reconciler";
grant select, delete,
    insert (subscriber, event_id, type, version, key, source, time, sequence, headers, payload, content_type, stream,
            stream_seq, requested_at, requested_by)
    on :"schema".redrive to :"inbox_reconciler";
grant insert (who, action, subscriber, event_id, detail) on :"schema".audit to :"outbox_reconciler", :"inbox_reconciler";

-- A service's own reconcilers need nothing more, beside what they do themselves.

-- Who prunes keeps a record of it: the relay and the worker what is theirs, and `aftercommit prune run` the application's tables,
-- on which it needs rights of its own, and by functions the audit trail and leases of the dead.
grant select, insert (category, swept_by, period),
    update (swept_by, period, started_at, last_swept_at, result, error, removed, removed_total, place)
    on :"schema".sweep to :"relay", :"worker", :"pruner";
grant insert (event_id, type, version, key, headers, payload, content_type) on :"schema".outbox to :"pruner";
grant select on :"schema".allowed_type to :"pruner";
grant select, insert, update (holder, epoch, expires_at) on :"schema".lease to :"pruner";
grant execute on function :"schema".prune_audit, :"schema".prune_leases to :"pruner";

-- Jobs that several services answer: a participant's worker writes down how far it is. Who asks, and the worker that writes answers
-- down, also needs the role requester, and both publish.
grant select, insert (job, participant, round, started_at, ended_at), update (round, failed, error, position, counts, notes, ended_at)
    on :"schema".job_work to :"worker";
grant select, insert (kind, id, job) on :"schema".erased_subject to :"worker";
grant select,
    insert (id, kind, request_key, request, requested_by, due_at, requested_type, ended_type, parent, joinable, begin_at),
    update (status, ended_at) on :"schema".job to :"requester";
grant select, insert (job, participant),
    update (status, round, asked_at, started_at, ended_at, attempts, counts, notes, error)
    on :"schema".job_participant to :"requester";
grant select, delete, insert (kind, name) on :"schema".participant to :"requester";
grant insert (who, action, subscriber, event_id, detail) on :"schema".audit to :"requester";
-- A service that refuses rows of erased subjects, or asks whether one is erased.
grant execute on function :"schema".is_erased, :"schema".refuse_erased to :"publisher", :"worker";

-- `aftercommit forget`, and a service that forgets in its own transactions. It reads no payload; functions erase them.
grant select (id, event_id, type, key, content_type, created_at) on :"schema".outbox to :"eraser";
grant select (event_id, type, key, content_type) on :"schema".dead_letter, :"schema".redrive to :"eraser";
grant select on :"schema".forget_request, :"schema".tombstone to :"eraser";
grant select (seq, stream) on :"schema".relay_log to :"eraser";
grant select (outbox_id, event_id, state) on :"schema".repair, :"schema".parked to :"eraser";
-- Keys of sealed events are wrapped anew when the master key changes, and forgotten.
grant select (subject_kind, subject_id, key_ref, wrapped_key, key_id), update (wrapped_key, key_id) on :"schema".data_key to :"eraser";
grant execute on function :"schema".forget, :"schema".forget_begin, :"schema".forget_more, :"schema".forget_late, :"schema".forget_unknown, :"schema".forget_at,
    :"schema".forget_publish, :"schema".forget_unsettled, :"schema".forget_found, :"schema".forget_end, :"schema".forget_data_key to :"eraser";
-- Whoever compares messages with events knows what an event was before, by its digest; workers forget what they get tombstones of.
grant select on :"schema".tombstone to :"relay", :"outbox_reconciler";
grant select (id, ended_at) on :"schema".forget_request to :"outbox_reconciler";
grant execute on function :"schema".take_tombstones to :"worker";

-- Operators who look: status, explain, peek, audit, findings, runs, dead list and show, parked list. They see payloads.
grant select on
    :"schema".outbox, :"schema".events, :"schema".parked, :"schema".relay_log, :"schema".relay_status, :"schema".repair,
    :"schema".inbox, :"schema".attempt, :"schema".running, :"schema".dead_letter, :"schema".redrive,
    :"schema".reached, :"schema".inbox_pruned, :"schema".subscriber_start, :"schema".worker_status, :"schema".failure,
    :"schema".reconciler, :"schema".reconcile_run, :"schema".finding,
    :"schema".lease, :"schema".pause, :"schema".audit, :"schema".allowed_type, :"schema".sweep,
    :"schema".job, :"schema".job_participant, :"schema".participant, :"schema".job_work, :"schema".erased_subject,
    :"schema".forget_request, :"schema".tombstone
    to :"reader", :"operator";
grant select on sequence :"schema".outbox_id_seq to :"reader", :"operator";
grant execute on function :"schema".payload_json, :"schema".reads_up_to to :"reader", :"operator";

-- Operators who act: besides, dead retry, edit and discard, relay and worker pause and resume, parked release and discard,
-- replay. The audit trail only grows; role, time and number of an entry are PostgreSQL's. What is done to dead letters and
-- to events that were sent back, triggers write there.
grant delete, update (headers, payload) on :"schema".dead_letter to :"operator";
grant execute on function :"schema".tell to :"operator";
grant delete, insert (subscriber, event_id, stream_seq, sequence, outcome), update (outcome, handled_at)
    on :"schema".inbox to :"operator";
grant delete, update (headers, payload, requested_by),
    insert (subscriber, event_id, type, version, key, source, time, sequence, headers, payload, content_type, stream,
            stream_seq, requested_at, requested_by)
    on :"schema".redrive to :"operator";
grant delete, insert (name, reason), update (paused_by, reason) on :"schema".pause to :"operator";
grant update (state, changed_at) on :"schema".parked to :"operator";
grant insert (who, action, subscriber, event_id, detail) on :"schema".audit to :"operator";

-- Some tables have rows of several of them, where one database is publisher and subscriber at once: a worker cannot take
-- the relay's lease, nor hold up the other's reconcilers. The owner sees all rows; roles that are not named here see none.
alter table :"schema".lease enable row level security;
alter table :"schema".reconciler enable row level security;
alter table :"schema".reconcile_run enable row level security;
alter table :"schema".finding enable row level security;

drop policy if exists :"relay" on :"schema".lease;
create policy :"relay" on :"schema".lease to :"relay" using (name = 'relay');
drop policy if exists :"worker" on :"schema".lease;
create policy :"worker" on :"schema".lease to :"worker" using (name like 'subscriber:%');
drop policy if exists :"pruner" on :"schema".lease;
create policy :"pruner" on :"schema".lease to :"pruner" using (name like 'prune:%');

\set own_name 'name <> ''outbox'' and name not like ''consumer:%'' and name not like ''inbox:%'''
select format('drop policy if exists %1$I on %3$I.%2$I', role, relation, :'schema'),
       format('create policy %1$I on %4$I.%2$I to %1$I using (%3$s)', role, relation, rows, :'schema')
  from unnest(array['reconciler', 'reconcile_run', 'finding']) as relation
 cross join (values (:'outbox_reconciler', 'name = ''outbox'''),
                    (:'inbox_reconciler', 'name like ''consumer:%'' or name like ''inbox:%'''),
                    (:'own_reconciler', :'own_name')) as p (role, rows)
\gexec
select format('drop policy if exists %1$I on %3$I.%2$I', role, relation, :'schema'),
       format('create policy %1$I on %3$I.%2$I for select to %1$I using (true)', role, relation, :'schema')
  from unnest(array['lease', 'reconciler', 'reconcile_run', 'finding']) as relation
 cross join unnest(array[:'reader', :'operator']) as role
\gexec

-- An event trigger of this server may have turned row-level security on for tables that have none of ours: then the
-- grants alone would show no row. They stay the only limit.
\set grants :prefix grants
select format('drop policy if exists %I on %s', :'grants', c.oid::regclass),
       format('create policy %I on %s to %s using (true) with check (true)', :'grants', c.oid::regclass, roles.list)
  from pg_class c
 cross join (select string_agg(format('%I', role), ', ') as list
               from unnest(array[:'owner', :'publisher', :'relay', :'worker', :'outbox_reconciler', :'inbox_reconciler',
                                 :'own_reconciler', :'pruner', :'requester', :'eraser', :'reader', :'operator']) as role) as roles
 where c.relnamespace = :'schema'::regnamespace and c.relkind in ('r', 'p') and c.relrowsecurity
   and c.relname not in ('lease', 'reconciler', 'reconcile_run', 'finding')
\gexec
-- Where it is forced, the owner would see no row of the others either.
select format('drop policy if exists %I on %s', :'owner', c.oid::regclass),
       format('create policy %I on %s to %I using (true) with check (true)', :'owner', c.oid::regclass, :'owner')
  from pg_class c
 where c.relnamespace = :'schema'::regnamespace and c.relforcerowsecurity
   and c.relname in ('lease', 'reconciler', 'reconcile_run', 'finding')
\gexec

\else
\echo 'The roles are made. They have no rights yet: this database has no schema' :schema
\echo 'Now run `aftercommit migrate` (with --schema if it has another name than aftercommit), and then this again.'
\endif

commit;
