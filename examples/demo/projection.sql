-- In the worker's database: pgbench's balances, made of nothing but events.

create schema demo;

-- Events of different branches are handled at the same time, and a teller or an account has business with all of them.
-- A row per branch keeps two branches from ever waiting for each other; the views add them up.
create table demo.teller_at_branch (
    tid     integer not null,
    bid     integer not null,
    balance bigint  not null,
    primary key (tid, bid)
);
create view demo.teller as select tid, sum(balance)::bigint as balance from demo.teller_at_branch group by tid;

create table demo.account_at_branch (
    aid     integer not null,
    bid     integer not null,
    balance bigint  not null,
    primary key (aid, bid)
);
create view demo.account as select aid, sum(balance)::bigint as balance from demo.account_at_branch group by aid;

create table demo.branch (
    bid       integer primary key,
    balance   bigint  not null,
    events    bigint  not null,
    outbox_id bigint  not null  -- of the last event applied
);

-- Events whose branch did not have the balance here that it had when the event was written. One that is lost, applied
-- twice or out of turn breaks the chain of balances.
create table demo.violation (
    event_id  uuid    not null,
    bid       integer not null,
    projected bigint  not null,
    published bigint  not null
);

create function demo.apply_history(event jsonb) returns void
    language plpgsql
as $$
declare
    history   record;
    projected bigint;
begin
    select * into history
      from jsonb_to_record(event -> 'data') as h (aid int, tid int, bid int, delta int, branch_balance bigint);

    insert into demo.account_at_branch as a values (history.aid, history.bid, history.delta)
        on conflict (aid, bid) do update set balance = a.balance + excluded.balance;
    insert into demo.teller_at_branch as t values (history.tid, history.bid, history.delta)
        on conflict (tid, bid) do update set balance = t.balance + excluded.balance;
    insert into demo.branch as b values (history.bid, history.delta, 1, (event ->> 'sequence')::bigint)
        on conflict (bid) do update
            set balance = b.balance + excluded.balance, events = b.events + 1, outbox_id = excluded.outbox_id
        returning balance into projected;

    if projected <> history.branch_balance then
        insert into demo.violation values ((event ->> 'id')::uuid, history.bid, projected, history.branch_balance);
    end if;
end
$$;
