-- Jobs: one request that several participants answer, each once. The requester's database has the job and what each participant
-- answered, a participant's database how far it has come.

create table aftercommit.job (
    id             uuid        primary key,
    kind           text        not null,                            -- what is asked, such as 'tenant.deletion'
    request_key    text        not null,                            -- the same request is the same job
    request        jsonb       not null,
    requested_by   text        not null,
    requested_at   timestamptz not null default clock_timestamp(),
    begin_at       timestamptz,                                     -- nobody begins before
    due_at         timestamptz,                                     -- later it is overdue
    status         text        not null default 'running',
    ended_at       timestamptz,
    requested_type text        not null,                            -- the types of its events, for those who only have the row
    ended_type     text        not null,
    parent         uuid        references aftercommit.job on delete cascade, -- which ends only when this one has ended
    joinable       boolean     not null default false,              -- who registers while it runs is asked, too
    constraint job_request_is_unique unique (kind, request_key),
    constraint job_status_is_known check (status in ('running', 'completed', 'partial', 'failed', 'cancelled')),
    constraint job_end_has_a_time check ((status = 'running') = (ended_at is null))
);
create index job_running on aftercommit.job (requested_at) where status = 'running';
create index job_parent on aftercommit.job (parent) where parent is not null;
-- The erasures of a subject.
create index job_subject on aftercommit.job ((request -> 'subject'), requested_at) where request ? 'subject';

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
    notes       jsonb       not null default '[]',                  -- what else it says, such as a table that it does not have
    error       text,
    primary key (job, participant),
    constraint job_participant_status_is_known check (status in ('asked', 'done', 'failed', 'cancelled'))
);

-- Who takes part in the jobs of a kind, for those who ask whoever is registered.
create table aftercommit.participant (
    kind          text        not null,                             -- such as 'erasure'
    name          text        not null,
    registered_at timestamptz not null default clock_timestamp(),
    primary key (kind, name),
    constraint participant_has_a_name check (octet_length(name) between 1 and 100)
);

-- In a participant's database: what it has done of a job. It is written in the transactions of the work itself.
create table aftercommit.job_work (
    job         uuid        not null,
    participant text        not null,
    round       integer     not null,
    failed      integer     not null default 0,                     -- the newest round that was answered as failed
    error       text,                                               -- why
    started_at  timestamptz,                                        -- null: cancelled before it began
    position    jsonb,                                              -- where the next step begins
    counts      jsonb       not null default '{}',
    notes       jsonb       not null default '[]',
    ended_at    timestamptz,
    primary key (job, participant)
);

-- In a participant's database: whose data it was asked to erase. The row is written with the first step of the work.
create table aftercommit.erased_subject (
    kind text        not null,                                      -- such as 'tenant'
    id   text        not null,                                      -- as PostgreSQL writes it as text
    job  uuid        not null,
    at   timestamptz not null default clock_timestamp(),
    primary key (kind, id)
);

-- Whether this database was asked to erase a subject. It tells that and nothing else, so a service may call it.
create function aftercommit.is_erased(kind text, id text) returns boolean
    language sql stable security definer
    set search_path = pg_catalog, pg_temp
as $$
    select exists (select from aftercommit.erased_subject s where s.kind = is_erased.kind and s.id = is_erased.id)
$$;
revoke all on function aftercommit.is_erased from public;

-- Refuses rows of an erased subject, where the owner of a table wants that:
--   create trigger refuse_erased before insert or update of tenant_id on orders
--      for each row execute function aftercommit.refuse_erased('tenant', 'tenant_id');
create function aftercommit.refuse_erased() returns trigger
    language plpgsql security definer
    set search_path = pg_catalog, pg_temp
as $$
declare
    written jsonb := to_jsonb(new);
begin
    if tg_nargs <> 2 or not written ? tg_argv[1] then
        raise exception 'aftercommit.refuse_erased on %.% needs the kind of subject and a column of the table',
            tg_table_schema, tg_table_name using errcode = 'invalid_parameter_value';
    end if;
    if exists (select from aftercommit.erased_subject s where s.kind = tg_argv[0] and s.id = written ->> tg_argv[1]) then
        raise exception 'the % of this row is erased: %.% takes no rows of it', tg_argv[0], tg_table_schema, tg_table_name
            using errcode = 'check_violation';
    end if;
    return new;
end
$$;
revoke all on function aftercommit.refuse_erased from public;
