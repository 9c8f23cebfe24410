-- What is on record of an event that is not done, beside its failed attempts: what it may do to its session and to the
-- server, and how long it has to wait. In a logged table, because what it does may be to crash the server.

-- How often the session ended in which the event ran, and how often the server crashed while it ran.
alter table aftercommit.attempt add column sessions_lost integer not null default 0;
alter table aftercommit.attempt add column database_crashes integer not null default 0;
-- How many of the deaths of the worker's process came while nothing else ran in it: only those tell on the event.
alter table aftercommit.attempt add column crashes_alone integer not null default 0;
alter table aftercommit.running add column alone boolean not null default false;
-- Not before this time may it run again, and what for it waits.
alter table aftercommit.attempt add column not_before timestamptz;
alter table aftercommit.attempt add column waits_for text;
alter table aftercommit.attempt add constraint attempt_wait_is_known check (waits_for in ('retry', 'snooze', 'unavailable'));
