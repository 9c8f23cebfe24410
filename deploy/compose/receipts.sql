-- What the subscriber `receipts` of worker.toml works on: put your own in its place. The worker's login gets what its function needs.
create table if not exists public.receipts (id bigint generated always as identity, event_id uuid not null, what jsonb not null);
create or replace function public.receipt(event jsonb) returns void language sql as $$
    insert into public.receipts (event_id, what) values ((event ->> 'id')::uuid, event -> 'data')
$$;
grant insert on public.receipts to receipts_worker;
grant select on public.receipts to receipts_operator;
