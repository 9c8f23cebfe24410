//! Behind a PgBouncer in transaction mode that knows no prepared statements: what `set_pooled` promises for each
//! driver. SeaORM is not among them.

use aftercommit::outbox;
use aftercommit::testing::servers::{PgBouncer, Postgres};
use aftercommit_adapters::database::Database;
use aftercommit_adapters::{Connection, Placed, Transaction, drivers};
use tokio_postgres::SimpleQueryMessage;

/// Two clients share one session of the server.
async fn clients_do_not_meet<C: Connection>() {
    outbox::set_pooled(true);
    let database = Database::migrated().await;
    let bouncer = PgBouncer::start(Postgres::shared().await.unwrap(), 1, &[]).await.unwrap();
    let (_, name) = database.url.rsplit_once('/').unwrap();
    let url = bouncer.url(name);

    let mut clients = [C::connect(&url).await, C::connect(&url).await];
    for number in 1..=3 {
        for client in &mut clients {
            let mut tx = client.begin().await;
            tx.publish(&Placed::number(number)).await.unwrap();
            tx.publish_all(&[Placed::number(number), Placed::number(-number)]).await.unwrap();
            tx.commit().await;
            assert_eq!(kept_statements(&url).await, 0);
        }
    }
    assert_eq!(database.written().await.len(), 18);
}

/// How many prepared statements of a publish the server's session holds.
async fn kept_statements(url: &str) -> usize {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await.unwrap();
    let connection = tokio::spawn(connection);
    let sql = "select name from pg_prepared_statements where statement like 'insert into aftercommit.outbox%'";
    let rows = client.simple_query(sql).await.unwrap();
    connection.abort();
    rows.iter().filter(|message| matches!(message, SimpleQueryMessage::Row(_))).count()
}

#[tokio::test]
async fn sqlx09() {
    clients_do_not_meet::<drivers::Sqlx09>().await;
}

#[tokio::test]
async fn sqlx08() {
    clients_do_not_meet::<drivers::Sqlx08>().await;
}

#[tokio::test]
async fn tokio_postgres() {
    clients_do_not_meet::<drivers::TokioPostgres>().await;
}

#[tokio::test]
async fn diesel() {
    clients_do_not_meet::<drivers::Diesel>().await;
}

#[tokio::test]
async fn diesel_async() {
    clients_do_not_meet::<drivers::DieselAsync>().await;
}
