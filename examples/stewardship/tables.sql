-- What people change.
create table system (id text collate "C" primary key);
create table client (
    user_id  bigint             primary key,
    monitors text[] collate "C" not null default '{}'  -- derived: the monitors that the user is a steward of
);
create table system_steward (
    system_id text collate "C" not null references system on delete cascade,
    user_id   bigint           not null references client,
    primary key (system_id, user_id)
);
create table connection_link (
    system_id     text collate "C" not null references system on delete cascade,
    connection_id text             not null,
    primary key (system_id, connection_id)
);
create table monitor (
    key           text collate "C" primary key,
    connection_id text             not null,
    inherit       boolean          not null
);
create table operation (
    monitor_key text collate "C" not null references monitor on delete cascade,
    type        text             not null
);

-- What is derived from it; rows with the source 'explicit' are people's, too.
create table monitor_steward (
    monitor_key   text collate "C" not null references monitor on delete cascade,
    user_id       bigint           not null references client,
    source        text             not null check (source in ('explicit', 'inherited')),
    source_system text collate "C" not null default '',
    primary key (monitor_key, user_id, source, source_system),
    check ((source = 'inherited') = (source_system <> ''))
);
create table monitor_stat (
    monitor_key text collate "C" primary key references monitor on delete cascade,
    operations  bigint           not null
);

-- The inherited stewards that there should be.
create view inheritance as
    select monitor.key as monitor_key, system_steward.user_id, system_steward.system_id as source_system
      from monitor
      join connection_link using (connection_id)
      join system_steward using (system_id)
     where monitor.inherit;

-- Every monitor for which something is derived, or should be.
create view swept as
    select key from monitor where inherit
    union select monitor_key from monitor_steward where source = 'inherited'
    union select monitor_key from operation
    union select unnest(monitors) from client;
