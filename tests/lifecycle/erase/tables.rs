//! Erasers of tables.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use aftercommit::erase::Preview;
use aftercommit::fanout::Step;
use aftercommit::testing::unique_name;
use serde_json::Value;

use super::*;

async fn preview(service: &Service, tables: &Tables, id: &str) -> Result<Preview, String> {
    let mut tx = service.pool.begin().await.unwrap();
    tables.preview(&mut tx, &Subject::new("tenant", id)).await.map_err(|error| format!("{error:?}"))
}

/// All steps, each of them committed; the counts of all of them, and how many it were.
async fn erase(service: &Service, tables: &Tables, id: &str) -> Result<(BTreeMap<String, u64>, usize), String> {
    let (mut counts, mut position, mut steps) = (BTreeMap::new(), None, 0);
    loop {
        let mut tx = service.pool.begin().await.unwrap();
        let step = tables.step(&mut tx, &Subject::new("tenant", id), position).await;
        let Step { counts: more, next, .. } = step.map_err(|error| format!("{error:?}"))?;
        tx.commit().await.unwrap();
        for (table, count) in more {
            *counts.entry(table).or_default() += count;
        }
        steps += 1;
        match next {
            Some(next) => position = Some(next),
            None => return Ok((counts, steps)),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn children_go_first_and_preview_and_deletion_count_the_same() {
    let service = Service::new(&(ORDERS.to_string() + &rows())).await;
    let found = preview(&service, &orders(), TENANT).await.unwrap();
    assert_eq!(found.counts, all_orders());
    assert_eq!(found.notes, ["there is no table public.old_orders: skipped"]);
    for chunk in [1000, 7] {
        let mut tx = service.pool.begin().await.unwrap();
        let tables = orders().chunk(chunk);
        let (mut counts, mut position) = (BTreeMap::new(), None);
        loop {
            let step = tables.step(&mut tx, &Subject::new("tenant", TENANT), position).await.unwrap();
            aftercommit_add(&mut counts, step.counts);
            position = step.next;
            if position.is_none() {
                break;
            }
        }
        assert_eq!(counts, all_orders(), "{chunk}");
        tx.rollback().await.unwrap();
    }
    let (counts, steps) = erase(&service, &orders().chunk(7), TENANT).await.unwrap();
    assert_eq!(counts, all_orders());
    assert!(steps > 20, "{steps}");
    assert!(preview(&service, &orders(), TENANT).await.unwrap().is_zero());
    let left =
        [("orders", 20), ("items", 40), ("item_notes", 40), ("attachments", 20), ("pages", 20), ("templates", 1)];
    for (table, count) in left {
        assert_eq!(service.count(table).await, count, "{table}");
    }
}

fn aftercommit_add(counts: &mut BTreeMap<String, u64>, more: BTreeMap<String, u64>) {
    for (table, count) in more {
        *counts.entry(table).or_default() += count;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_that_a_column_would_cut_is_refused() {
    let service = Service::new(
        "create table short (tenant varchar(3)); create table fixed (tenant char(3)); create table one (tenant \"char\");
         create table number (tenant bigint); create table ids (tenant uuid);
         insert into short values ('abc'); insert into fixed values ('abc'); insert into one values ('a');
         insert into number values (12); insert into ids values ('0d0f3a52-6b5b-4b1c-9a3e-0c6d1f2a3b4f')",
    )
    .await;
    for (table, good, bad) in [
        ("short", "abc", None),
        ("fixed", "abc", None),
        ("one", "a", Some("abc")),
        ("number", "12", Some(" 12")),
        ("number", "12", Some("twelve")),
        ("ids", "0d0f3a52-6b5b-4b1c-9a3e-0c6d1f2a3b4f", Some("0D0F3A52-6B5B-4B1C-9A3E-0C6D1F2A3B4F")),
    ] {
        let tables = Tables::new("short").of("tenant", [Rows::of(format!("public.{table}")).column("tenant")]);
        assert_eq!(preview(&service, &tables, good).await.unwrap().counts[&format!("public.{table}")], 1, "{table}");
        match bad {
            Some(bad) => {
                let error = preview(&service, &tables, bad).await.unwrap_err();
                assert!(error.contains(&format!("public.{table}.tenant")), "{error}");
                assert!(erase(&service, &tables, bad).await.is_err());
            }
            // What is longer is another one.
            None => assert!(preview(&service, &tables, "abcdef").await.unwrap().is_zero(), "{table}"),
        }
    }
}

/// A chunk of grandchildren goes by the rows that they hang on: what others have in the table is not read each time.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_chunk_reads_does_not_grow_with_others_rows() {
    let service = Service::new(
        "create table orders (id bigint primary key, tenant bigint); create index on orders (tenant);
         create table lines (id bigint primary key, order_id bigint references orders); create index on lines (order_id);
         create table notes (id bigint primary key, line_id bigint references lines); create index on notes (line_id);
         insert into orders select n, case when n <= 10000 then 1 else 2 end from generate_series(1, 10200) n;
         insert into lines select n, (n - 1) % 10200 + 1 from generate_series(1, 20400) n;
         insert into notes select n, n from generate_series(1, 20400) n; analyze",
    )
    .await;
    let read = async || {
        let sql = "select sum(coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0))::bigint from pg_stat_user_tables
                    where relname in ('lines', 'notes')";
        let mut last: i64 = -1;
        // What a session has read is known when it ends, or has been idle for a second.
        loop {
            tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
            let now: i64 = sqlx::query_scalar(sql).fetch_one(&service.pool).await.unwrap();
            if std::mem::replace(&mut last, now) == now {
                return now;
            }
        }
    };
    let tables = Tables::new("orders").chunk(20).of(
        "tenant",
        [
            Rows::of("public.notes").parent("line_id", "public.lines"),
            Rows::of("public.lines").parent("order_id", "public.orders"),
            Rows::of("public.orders").column("tenant"),
        ],
    );
    let before = read().await;
    let (counts, steps) = erase(&service, &tables, "2").await.unwrap();
    assert_eq!(
        (counts["public.orders"], counts["public.lines"], counts["public.notes"], steps > 50),
        (200, 400, 400, true)
    );
    let read = read().await - before;
    assert!(read < 100_000, "{read} rows were read to delete 800 in {steps} steps");
}

/// Tables of one parent that do not stand together go in the order in which they are named.
#[tokio::test(flavor = "multi_thread")]
async fn the_order_of_the_tables_is_kept() {
    let service = Service::new(
        "create table orders (id bigint primary key, tenant bigint);
         create table bills (id bigint primary key, tenant bigint);
         create table lines (id bigint primary key, order_id bigint references orders, bill bigint references bills);
         create table notes (id bigint primary key, order_id bigint references orders);
         insert into bills select n, n % 2 from generate_series(1, 40) n; insert into orders select n, n % 2 from generate_series(1, 40) n;
         insert into lines select n, n, n from generate_series(1, 40) n; insert into notes select n, n from generate_series(1, 40) n",
    )
    .await;
    // Lines refer to bills, so they go before them; notes could go later.
    let tables = Tables::new("orders").chunk(3).of(
        "tenant",
        [
            Rows::of("public.lines").parent("order_id", "public.orders"),
            Rows::of("public.bills").column("tenant"),
            Rows::of("public.notes").parent("order_id", "public.orders"),
            Rows::of("public.orders").column("tenant"),
        ],
    );
    let (counts, _) = erase(&service, &tables, "1").await.unwrap();
    assert_eq!(counts.values().copied().collect::<Vec<_>>(), [20, 20, 20, 20]);
    assert!(preview(&service, &tables, "1").await.unwrap().is_zero());
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_stay_stop_a_cascade_that_would_take_them() {
    let service = Service::new(
        "create table tenants (id bigint primary key);
         create table recipes (id bigint primary key, tenant bigint references tenants on delete cascade, is_system boolean);
         create index on recipes (tenant);
         insert into tenants values (1), (2); insert into recipes values (1, 1, true), (2, 1, false), (3, 2, null)",
    )
    .await;
    let tables = Tables::new("recipes").of(
        "tenant",
        [Rows::of("public.recipes").column("tenant").keep("is_system"), Rows::of("public.tenants").column("id")],
    );
    let error = erase(&service, &tables, "1").await.unwrap_err();
    assert!(error.contains("rows of public.recipes are to stay"), "{error}");
    assert_eq!(service.count("recipes where is_system").await, 1);
    assert_eq!(erase(&service, &tables, "2").await.unwrap().0["public.recipes"], 1);
    // What refers to a row that stays, stays.
    service
        .database
        .execute("create table steps (recipe bigint references recipes); insert into steps values (1), (1), (2)")
        .await;
    let tables = Tables::new("recipes").of(
        "tenant",
        [
            Rows::of("public.steps").parent("recipe", "public.recipes"),
            Rows::of("public.recipes").column("tenant").keep("is_system"),
        ],
    );
    let (counts, _) = erase(&service, &tables, "1").await.unwrap();
    assert_eq!((counts["public.steps"], counts["public.recipes"], service.count("steps").await), (1, 1, 2));
}

/// Rows that a role does not see would be counted as none, and proven to be gone.
#[tokio::test(flavor = "multi_thread")]
async fn row_level_security_that_hides_rows_is_an_error() {
    let role = unique_name("eraser");
    let service = Service::new(&format!(
        "create table a (id bigint primary key, tenant bigint); insert into a values (1, 1), (2, 2);
         create role {role}; grant select, update, delete on a to {role};
         alter table a enable row level security;
         create policy own on a using (tenant = nullif(current_setting('app.tenant', true), '')::bigint)"
    ))
    .await;
    let tables = Tables::new("a").of("tenant", [Rows::of("public.a").column("tenant")]);
    let look = async || {
        let mut tx = service.pool.begin().await.unwrap();
        sqlx::query(sqlx::AssertSqlSafe(format!("set local role {role}"))).execute(&mut *tx).await.unwrap();
        tables.preview(&mut tx, &Subject::new("tenant", 1)).await.map_err(|error| format!("{error:?}"))
    };
    let hidden = look().await.unwrap_err();
    assert!(hidden.contains("row-level security may hide rows of public.a"), "{hidden}");
    service.database.execute(&format!("create policy whole on a to {role} using (true)")).await;
    assert_eq!(look().await.unwrap().counts["public.a"], 1);
    service.database.execute(&format!("create policy narrow on a as restrictive to {role} using (id > 1)")).await;
    assert!(look().await.is_err());
    service.database.execute(&format!("drop owned by {role}; drop role {role}")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn trees_and_partitions_are_counted_exactly() {
    let service = Service::new(
        "create table nodes (id bigint primary key, parent bigint references nodes on delete cascade, tenant bigint);
         create index on nodes (parent); create index on nodes (tenant);
         insert into nodes select n, nullif(n / 2, 0), case when n < 4 then 1 else 2 end from generate_series(1, 31) n;
         create table parts (id bigint, tenant bigint) partition by range (id);
         create table parts_1 partition of parts for values from (0) to (50);
         create table parts_2 partition of parts for values from (50) to (1000);
         create index on parts (tenant);
         insert into parts select n, n % 2 from generate_series(1, 100) n",
    )
    .await;
    let nodes = Tables::new("nodes").of("tenant", [Rows::of("public.nodes").column("tenant")]).chunk(1);
    let (counts, _) = erase(&service, &nodes, "1").await.unwrap();
    assert_eq!((counts["public.nodes"], service.count("nodes").await), (31, 0), "what the cascade takes is counted");
    let parts = Tables::new("parts").of("tenant", [Rows::of("public.parts").column("tenant")]).chunk(7);
    let (counts, _) = erase(&service, &parts, "1").await.unwrap();
    assert_eq!((counts["public.parts"], service.count("parts where tenant = 0").await), (50, 50));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_takes_its_own_doing_with_it_and_counts_nothing() {
    let fleet = Fleet::new().await;
    let job = fleet.ask().await;
    fleet.orders.database.execute(
        "create function refuse() returns trigger language plpgsql as $$ begin raise exception 'orders stay'; end $$;
         create trigger refuse before delete on orders for each row execute function refuse()",
    ).await;
    let participant = erase::participant(orders()).attempts(2);
    assert_eq!(fleet.works(&fleet.orders, &participant).await, 2);
    fleet.coordinate().await;
    let status = fleet.status(job).await;
    let orders = status.participants.iter().find(|one| one.participant == "orders").unwrap();
    assert!(orders.error.as_ref().unwrap().contains("erasing from public.orders failed"), "{orders:?}");
    assert_eq!(
        (orders.total, fleet.orders.count("items").await),
        (Some(0), 80),
        "nothing was committed, nothing is counted"
    );

    // A trigger that silently keeps rows is no success either.
    fleet
        .bills
        .database
        .execute(
            "create function keep() returns trigger language plpgsql as $$ begin return null; end $$;
         create trigger keep before delete on bills for each row execute function keep()",
        )
        .await;
    let error = erase(&fleet.bills, &bills(), TENANT).await.unwrap_err();
    assert!(error.contains("keeps 5 rows of public.bills"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_is_refused_by_the_name_of_its_table() {
    let service =
        Service::new("create table a (id bigint primary key, tenant bigint); create view v as select * from a").await;
    let rows = |rows: Vec<Rows>| Tables::new("x").of("tenant", rows);
    for (tables, told) in [
        (rows(vec![]), "names no tables"),
        (rows(vec![Rows::of("public.a")]), "public.a needs exactly one"),
        (rows(vec![Rows::of("public.a").column("tenant").condition("tenant = $1::bigint")]), "exactly one"),
        (rows(vec![Rows::of("public.a").condition("true")]), "does not ask for the subject's id"),
        (rows(vec![Rows::of("public.a").condition("tenant = $2::bigint")]), "more placeholders"),
        (rows(vec![Rows::of("public.a").condition("true) or ($1 = $1")]), "did not open"),
        (rows(vec![Rows::of("public.a").condition("tenant = $1::bigint; drop table a")]), "semicolon"),
        (rows(vec![Rows::of("public.a").column("tenant").keep("$1 = ''")]), "`keep` has no placeholders"),
        (rows(vec![Rows::of("public.a").column("tenant"), Rows::of("public.a").column("id")]), "named twice"),
        (rows(vec![Rows::of("public.a").parent("tenant", "public.b")]), "parent public.b must be named below"),
        (rows(vec![Rows::of("public.a").column("tenent")]), "no column \"tenent\""),
        (rows(vec![Rows::of("public.v").column("tenant")]), "is no table"),
        (rows(vec![Rows::of("public.b").column("tenant")]), "there is no table \"public.b\""),
        (rows(vec![Rows::of("aftercommit.outbox").column("key")]), "belongs to PostgreSQL or to aftercommit"),
        (
            Tables::new("x").of("person", [Rows::of("public.a").column("id")]),
            "no tables for subjects of the kind \"tenant\"",
        ),
        (Tables::new("x"), "names no tables"),
    ] {
        for error in
            [preview(&service, &tables, "1").await.unwrap_err(), erase(&service, &tables, "1").await.unwrap_err()]
        {
            let error = error.replace("\\\"", "\"");
            assert!(error.contains(told) && error.contains("Reject"), "{told}: {error}");
        }
    }
    let hostile = Service::new(
        "create table \"a\"\"; drop--\" (\"ten\"\"ant\" text); insert into \"a\"\"; drop--\" values ('1')",
    )
    .await;
    let tables = rows(vec![Rows::of("public.\"a\"\"; drop--\"").column("ten\"ant")]);
    assert_eq!(erase(&hostile, &tables, "1").await.unwrap().0.values().sum::<u64>(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_index_is_warned_of() {
    let service = Service::new(
        "create table a (id bigint primary key, tenant bigint); create table b (tenant bigint, a bigint references a);
         create table c (a bigint references a on delete cascade)",
    )
    .await;
    let tables = || {
        let rows =
            [Rows::of("public.b").parent("a", "public.a"), Rows::of("public.a").condition("tenant = $1::bigint")];
        Tables::new("a").of("tenant", rows)
    };
    let notes = preview(&service, &tables(), "1").await.unwrap().notes;
    for told in ["public.b has no index on a", "public.a has no index that finds", "public.c has no index on a"] {
        assert!(notes.iter().any(|note| note.contains(told)), "{told}: {notes:?}");
    }
    service.database.execute("create index on a (tenant); create index on b (a); create index on c (a)").await;
    assert_eq!(preview(&service, &tables(), "1").await.unwrap().notes, [""; 0]);
}

/// An eraser of a service's own, whose files are deleted before its rows are counted.
struct Files {
    there: Arc<AtomicBool>,
}

impl Eraser for Files {
    fn name(&self) -> &str {
        "orders"
    }

    async fn preview(&self, _: &mut sqlx::PgTransaction<'_>, _: &Subject) -> Result<Preview, HandlerError> {
        Ok(Preview::of([("models", u64::from(self.there.load(Ordering::Relaxed)))]))
    }

    async fn step(&self, _: &mut sqlx::PgTransaction<'_>, _: &Subject, _: Option<Value>) -> Result<Step, HandlerError> {
        let gone = self.there.swap(false, Ordering::Relaxed);
        Ok(Step::done([("models", u64::from(gone))]))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_outside_of_the_database_has_an_eraser_of_its_own() {
    let fleet = Fleet::new().await;
    let job = fleet.ask().await;
    let there = Arc::new(AtomicBool::new(true));
    for _ in 0..2 {
        fleet.works(&fleet.orders, &erase::participant(Files { there: Arc::clone(&there) })).await;
        fleet.works(&fleet.bills, &erase::participant(bills())).await;
        fleet.coordinate().await;
    }
    let status = fleet.status(job).await;
    assert_eq!((status.status.as_str(), status.total_items_deleted), ("completed", Some(6)));
}

/// Rows that come while others go: children of a parent that is about to go.
#[tokio::test(flavor = "multi_thread")]
async fn children_that_come_meanwhile_go_with_the_others() {
    let service = Service::new(&(ORDERS.to_string() + &rows())).await;
    let tables = orders().chunk(60);
    let subject = Subject::new("tenant", TENANT);
    let mut tx = service.pool.begin().await.unwrap();
    let step = tables.step(&mut tx, &subject, None).await.unwrap();
    tx.commit().await.unwrap();
    let step = {
        let mut tx = service.pool.begin().await.unwrap();
        let step = tables.step(&mut tx, &subject, step.next).await.unwrap();
        tx.commit().await.unwrap();
        step
    };
    // Items and attachments are gone, or going; one more of each comes behind.
    service
        .database
        .execute(&format!(
            "insert into orders values (1000, '{TENANT}'); insert into items values (1000, 1000);
         insert into attachments values (1000, 1000); insert into pages values (1000, 1000)"
        ))
        .await;
    let mut position = step.next;
    while position.is_some() {
        let mut tx = service.pool.begin().await.unwrap();
        position = tables.step(&mut tx, &subject, position).await.unwrap().next;
        tx.commit().await.unwrap();
    }
    assert!(preview(&service, &orders(), TENANT).await.unwrap().is_zero());
}

/// Chunks in any order cannot keep such a key; what would help is said at once.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_refer_to_their_own_table_name_the_way_out() {
    let service = Service::new(&format!(
        "create table nodes (id bigint primary key, tenant_id uuid, parent bigint constraint to_parent references nodes);
         create index on nodes (tenant_id);
         insert into nodes select n, '{TENANT}', nullif(n - 1, 0) from generate_series(1, 20) n"
    ))
    .await;
    let tables = || Tables::new("nodes").of("tenant", [Rows::of("public.nodes").column("tenant_id")]);
    let refused = erase(&service, &tables().chunk(5), TENANT).await.unwrap_err();
    assert!(refused.contains("by to_parent, so they do not go a chunk at a time"), "{refused}");
    assert_eq!(service.count("nodes").await, 20);
    service
        .database
        .execute(
            "alter table nodes drop constraint to_parent,
                               add constraint to_parent foreign key (parent) references nodes on delete set null",
        )
        .await;
    let (counts, _) = erase(&service, &tables().chunk(5), TENANT).await.unwrap();
    assert_eq!(counts["public.nodes"], 20);
}
