//! In which order a transaction's changes are told.

use serde_json::json;

use super::Shop;

/// Three levels, each removed by the one above.
pub const FAMILY: &str = "
    create table parent (id int primary key, name text);
    create table child (id int primary key, parent int references parent on delete cascade on update cascade);
    create table grandchild (id int primary key, child int references child on delete cascade);
    insert into parent values (1, 'a'), (2, 'b');
    insert into child select 10 * p + c, p from generate_series(1, 2) as p, generate_series(1, 2) as c;
    insert into grandchild select 10 * id + g, id from child, generate_series(1, 2) as g;
    select aftercommit.capture(t::regclass, type => t) from unnest(array['parent', 'child', 'grandchild']) as t;";

#[tokio::test]
async fn a_cascade_is_told_from_the_top() {
    let shop = Shop::with(FAMILY).await;
    shop.run("delete from parent where id = 1").await;
    assert_eq!(
        shop.told_of().await,
        [
            "parent.deleted 1",
            "child.deleted 11",
            "child.deleted 12",
            "grandchild.deleted 111",
            "grandchild.deleted 112",
            "grandchild.deleted 121",
            "grandchild.deleted 122"
        ]
    );
    shop.run("update parent set id = 3").await;
    let told = shop.told().await;
    let keys: Vec<_> =
        told.iter().map(|(event_type, key, _)| format!("{event_type} {}", key.as_ref().unwrap())).collect();
    assert_eq!(keys, ["parent.updated 3", "child.updated 21", "child.updated 22"]);
    assert_eq!(told[1].2["new"], json!({"id": 21, "parent": 3}));
    // Of several rows at once each is told once.
    shop.run(
        "insert into parent values (1, 'a'); insert into child values (11, 1); insert into grandchild values (111, 11)",
    )
    .await;
    shop.told().await;
    shop.run("delete from parent").await;
    assert_eq!(
        shop.told_of().await,
        [
            "parent.deleted 3",
            "parent.deleted 1",
            "child.deleted 21",
            "child.deleted 22",
            "child.deleted 11",
            "grandchild.deleted 211",
            "grandchild.deleted 212",
            "grandchild.deleted 221",
            "grandchild.deleted 222",
            "grandchild.deleted 111"
        ]
    );
}

#[tokio::test]
async fn a_row_that_a_constraint_changes_again_is_told_twice_in_order() {
    let shop = Shop::with(
        "create table node (id int primary key, up int references node on update cascade on delete set null);
         insert into node values (1, 1), (2, 1), (3, 2);
         select aftercommit.capture('node', type => 'node')",
    )
    .await;
    shop.run("update node set id = 9 where id = 1").await;
    let told: Vec<_> =
        shop.told().await.into_iter().map(|(_, key, data)| (key.unwrap(), data["new"]["up"].clone())).collect();
    let of_row = |row: &str| told.iter().filter(|(key, _)| key == row).map(|(_, up)| up.clone()).collect::<Vec<_>>();
    assert_eq!((of_row("9"), of_row("2")), (vec![json!(1), json!(9)], vec![json!(9)]));
    shop.run("delete from node where id = 2").await;
    assert_eq!(shop.told_of().await, ["node.deleted 2", "node.updated 3"]);
}

/// A trigger of the table's own that changes the rows again: the events of a row have the order of its changes.
#[tokio::test]
async fn a_row_that_a_trigger_changes_again_is_told_in_order() {
    let shop = Shop::with(
        "create table page (id int primary key, body text, revision int default 0);
         create function revise() returns trigger language plpgsql as $$
         begin
             if pg_trigger_depth() = 1 then
                 update page set revision = revision + 1 where id = new.id;
             end if;
             return null;
         end $$;
         create trigger \"Revise\" after insert or update on page for each row execute function revise();
         select aftercommit.capture('page', type => 'page')",
    )
    .await;
    shop.run("insert into page values (1, 'a'), (2, 'b'); update page set body = 'c'").await;
    let told = shop.told().await;
    for id in ["1", "2"] {
        let of_row = told.iter().filter(|(_, key, _)| key.as_deref() == Some(id));
        let revisions: Vec<_> = of_row.map(|(_, _, data)| data["new"]["revision"].as_i64().unwrap()).collect();
        assert_eq!(revisions, [0, 1, 1, 2], "{told:?}");
    }
    // Such a trigger that comes later is a problem that another call solves.
    shop.run(
        "create table later (id int primary key); select aftercommit.capture('later', type => 'later');
         create trigger later after insert on later for each row execute function revise()",
    )
    .await;
    assert_eq!(
        shop.problems().await,
        [
            "a row trigger (later) was added since: call capture() again, events of one row may be out of order until then"
        ]
    );
    let remedy = shop.one::<String>("select remedy from aftercommit.capture_check() where not ok").await;
    shop.run(&remedy).await;
    assert_eq!(shop.problems().await, [""; 0]);
    shop.run("drop trigger later on later").await;
    assert_eq!(
        shop.problems().await,
        ["it has no row triggers any more: call capture() again, and its events are written faster"]
    );
}

#[tokio::test]
async fn a_trigger_that_writes_to_the_table_is_captured_as_any_other() {
    let shop = Shop::with(
        "create table step (id int primary key, note text);
         create function next_step() returns trigger language plpgsql as $$
         begin
             insert into step select new.id + 1, 'made by ' || new.id where new.id < 5;
             return null;
         end $$;
         create trigger next_step after insert on step for each row execute function next_step();
         select aftercommit.capture('step', type => 'step')",
    )
    .await;
    shop.run("insert into step values (1, 'by hand')").await;
    assert_eq!(
        shop.told_of().await,
        ["step.inserted 1", "step.inserted 2", "step.inserted 3", "step.inserted 4", "step.inserted 5"]
    );
}
