-- Jobs: one request that several participants answer, each once. The requester's database has the job and what each participant
-- answered, a participant's database how far it has come.

create table aftercommit.job (
    id             uuid        primary key,
    kind           text        not null,                            -- what is asked, such as 'tenant.deletion'
    request_key    text        not null,                            -- the same request is the same job
    request        jsonb       not null,
    requested_by   text        not null,
    requested_at   timestamptz not null default clock_timestamp(),
    due_at         timestamptz,                                     -- later it is overdue
    status         text        not null default 'running',
    ended_at       timestamptz,
    requested_type text        not null,                            -- the types of its events, for those who only have the row
    ended_type     text        not null,
    constraint job_request_is_unique unique (kind, request_key),
    constraint job_status_is_known check (status in ('running', 'completed', 'partial', 'failed', 'cancelled')),
    constraint job_end_has_a_time check ((status = 'running') = (ended_at is null))
);
create index job_running on aftercommit.job (requested_at) where status = 'running';

create table aftercommit.job_participant (
    job         uuid        not null references aftercommit.job on delete cascade,
    participant text        not null,
    round       integer     not null default 1,                     -- how often it was asked anew after it had failed
    status      text        not null default 'asked',
    asked_at    timestamptz not null default clock_timestamp(),
    started_at  timestamptz,
    ended_at    timestamptz,
    attempts    integer,
    counts      jsonb       not null default '{}',                  -- what it did, by what it was done to
    error       text,
    primary key (job, participant),
    constraint job_participant_status_is_known check (status in ('asked', 'done', 'failed', 'cancelled'))
);

-- In a participant's database: what it has done of a job. It is written in the transactions of the work itself.
create table aftercommit.job_work (
    job         uuid        not null,
    participant text        not null,
    round       integer     not null,
    started_at  timestamptz,                                        -- null: cancelled before it began
    position    jsonb,                                              -- where the next step begins
    counts      jsonb       not null default '{}',
    ended_at    timestamptz,
    primary key (job, participant)
);
