-- What keeps the relay's work bounded by what is new, not by what is retained.

-- A window behind a large backlog is cut: its target holds no id above `target_id`, though more was committed then.
alter table aftercommit.relay_log add column cut boolean not null default false;

-- Parked events that wait, in the order of the outbox, and those that are done with, by their age.
create index parked_waiting on aftercommit.parked (outbox_id) where state in ('parked', 'released');
create index parked_sequence on aftercommit.parked (sequence);
create index parked_done on aftercommit.parked (changed_at) where state in ('published', 'discarded');

-- Repairs that are done, by their age.
create index repair_done on aftercommit.repair (published_at) where state = 'published';

-- Marks count ids from 1. Not valid, so that the rows that are there are not looked through.
alter table aftercommit.outbox add constraint outbox_id_is_positive check (id > 0) not valid;
