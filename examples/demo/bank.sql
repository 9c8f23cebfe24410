-- In pgbench's own database: each row that a transaction adds to pgbench_history becomes an event of that transaction.

create schema demo;

-- The transaction holds the row lock of its branch at this point, so the events of one branch are numbered in the order
-- in which their transactions commit, and each tells the balance that its transaction leaves behind.
create function demo.capture() returns trigger
    language plpgsql
as $$
begin
    perform aftercommit.publish(
        'pgbench.history',
        jsonb_build_object(
            'aid', new.aid, 'tid', new.tid, 'bid', new.bid, 'delta', new.delta,
            'branch_balance', (select bbalance from pgbench_branches where bid = new.bid)),
        key => 'branch-' || new.bid);
    return null;
end
$$;

create trigger capture after insert on pgbench_history for each row execute function demo.capture();
