//! Servers where something turns row-level security on for every new table.

use crate::stage::{Stage, server, succeeded};
use crate::support::Database;
use crate::work::every_process_works;

const EVENT_TRIGGER: &str = "create function public.secure() returns event_trigger language plpgsql as $$
    declare
        made record;
    begin
        for made in select * from pg_event_trigger_ddl_commands()
                     where object_type = 'table' and schema_name = 'aftercommit' loop
            execute format('alter table %s enable row level security', made.object_identity);
        end loop;
    end $$;
    create event trigger secure on ddl_command_end when tag in ('CREATE TABLE') execute function public.secure()";

#[tokio::test(flavor = "multi_thread")]
async fn every_process_works_with_row_level_security_on() {
    let database = Database::empty().await;
    database.execute(EVENT_TRIGGER).await;
    let stage = Stage::on(database, server(None).await.unwrap()).await.provision().await;
    let secured: i64 = sqlx::query_scalar(
        "select count(*) from pg_class where relnamespace = 'aftercommit'::regnamespace and relkind = 'r' and relrowsecurity",
    )
    .fetch_one(&stage.database.pool().await)
    .await
    .unwrap();
    assert!(secured > 10, "{secured}");
    every_process_works(&stage).await;
}

/// Until roles.sql has run again, everybody who is stopped by it says so.
#[tokio::test(flavor = "multi_thread")]
async fn row_level_security_without_policies_is_named() {
    let stage = Stage::provisioned().await;
    stage.database.execute("alter table aftercommit.relay_log enable row level security").await;
    let doctor = stage.run("aftercommit", "relay", "operator", &["doctor", "--role", "relay"]);
    let report = String::from_utf8_lossy(&doctor.stdout).into_owned();
    assert!(
        report.contains("roles.sql again") && report.contains("row-level security of aftercommit.relay_log"),
        "{report}"
    );
    let status = stage.run("aftercommit", "reader", "operator", &["status"]);
    let text = String::from_utf8_lossy(&status.stdout).into_owned() + &String::from_utf8_lossy(&status.stderr);
    assert!(text.contains("row-level security"), "{text}");
    stage.roles.grant(&stage.database);
    succeeded(&stage.run("aftercommit", "reader", "operator", &["status"]));
}
