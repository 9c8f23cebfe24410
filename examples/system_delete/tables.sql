-- A user sees a monitor as a steward of a system that it watches, or because somebody said so.
create table system (id text primary key);
create table monitor (id text primary key);
create table watched (
    system_id  text not null references system on delete cascade,
    monitor_id text not null references monitor,
    primary key (system_id, monitor_id)
);
create table steward (
    system_id text   not null references system on delete cascade,
    user_id   bigint not null,
    primary key (system_id, user_id)
);
create table explicit (
    monitor_id text   not null references monitor,
    user_id    bigint not null,
    primary key (monitor_id, user_id)
);
create view access as
    select monitor_id, user_id from watched join steward using (system_id)
    union
    select monitor_id, user_id from explicit;

-- Derived, and asked at every request: what each user sees.
create table client (user_id bigint primary key, monitors text[] not null default '{}');

insert into system select 's' || n from generate_series(1, 6) n;
insert into monitor select 'm' || n from generate_series(1, 6) n;
insert into watched select 's' || n, 'm' || m from generate_series(1, 6) n, lateral unnest(array[n, n % 6 + 1]) m;
insert into steward select 's' || n, u from generate_series(1, 6) n, lateral unnest(array[n, n % 6 + 1, 100]) u;
insert into explicit values ('m1', 1), ('m3', 4);
insert into client
select user_id, coalesce((select array_agg(monitor_id order by monitor_id) from access a where a.user_id = u.user_id), '{}')
  from (select distinct user_id from steward) u;
