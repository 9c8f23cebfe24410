-- How far a subscriber has come in its stream by its own account: everything at or before this message is done. A message
-- is known by its sequence and by when the server stored it, so that another one that came into its place later is not
-- taken for it. Beside the newest place older ones are kept, ever fewer, for a stream that has lost its end.
create table aftercommit.reached (
    id         bigint      generated always as identity primary key,
    subscriber text        not null,
    stream     text        not null,
    sequence   bigint      not null,
    stored_at  bigint      not null   -- nanoseconds since 1970, by the server's clock
);
create index reached_subscriber on aftercommit.reached (subscriber, stream, id);
