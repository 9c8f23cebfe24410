-- What the inbox of a subscriber has forgotten: events that were handled at or before this moment. A reconciler that went by
-- the present `inbox_retention` would run them again once that is longer than it was.
create table aftercommit.inbox_pruned (
    subscriber text        primary key,
    pruned_to  timestamptz not null
);
-- What was pruned until now was, as a rule, handled before the oldest row that is left.
insert into aftercommit.inbox_pruned (subscriber, pruned_to)
select subscriber, min(handled_at) from aftercommit.inbox group by subscriber;
