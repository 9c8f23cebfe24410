//! What is particular to a driver: the transactions of its pools, and what its types do not rule out.

use aftercommit::outbox::{PublishError, PublishErrorKind, RawEvent};
use aftercommit_adapters::Placed;
use aftercommit_adapters::database::Database;
use diesel::{Connection as _, PgConnection};
use diesel_async::pooled_connection::AsyncDieselConnectionManager;
use diesel_async::{AsyncConnection, AsyncPgConnection};

type AnyError = Box<dyn std::error::Error + Send + Sync>;

#[tokio::test]
async fn a_transaction_of_deadpool_postgres_is_one_of_tokio_postgres() {
    use aftercommit_outbox::tokio_postgres as outbox;
    let database = Database::migrated().await;
    let manager = deadpool_postgres::Manager::new(database.url.parse().unwrap(), tokio_postgres::NoTls);
    let pool = deadpool_postgres::Pool::builder(manager).build().unwrap();
    let mut client = pool.get().await.unwrap();
    let tx = client.transaction().await.unwrap();
    outbox::publish(&tx, &Placed::number(1)).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(database.written().await.len(), 1);
}

#[tokio::test]
async fn a_pooled_connection_of_diesel_async_publishes_in_its_transaction() {
    use aftercommit_outbox::diesel_async as outbox;
    let database = Database::migrated().await;
    let manager = AsyncDieselConnectionManager::<AsyncPgConnection>::new(&database.url);
    let pool = diesel_async::pooled_connection::deadpool::Pool::builder(manager).build().unwrap();
    let mut connection = pool.get().await.unwrap();
    connection
        .transaction(async |connection| {
            outbox::publish(connection, &Placed::number(1)).await?;
            Ok::<_, AnyError>(())
        })
        .await
        .unwrap();
    let in_vain = connection
        .transaction(async |connection| {
            outbox::publish(connection, &Placed::number(2)).await?;
            Err::<(), AnyError>("changed my mind".into())
        })
        .await;
    assert!(in_vain.is_err());
    assert_eq!(database.written().await.len(), 1);
}

fn assert_tells_of_no_transaction(refused: Result<impl Sized, PublishError>) {
    let error = refused.err().unwrap();
    assert_eq!((error.kind(), error.field()), (PublishErrorKind::Invalid, Some("transaction")));
    assert!(error.to_string().contains("transaction is not open"), "{error}");
}

#[tokio::test]
async fn diesel_async_refuses_to_publish_without_a_transaction() {
    use aftercommit_outbox::diesel_async as outbox;
    let database = Database::migrated().await;
    let mut connection = AsyncPgConnection::establish(&database.url).await.unwrap();
    assert_tells_of_no_transaction(outbox::publish(&mut connection, &Placed::number(1)).await);
    assert_tells_of_no_transaction(outbox::publish_all(&mut connection, &[Placed::number(1)]).await);
    connection.transaction(async |_| Ok::<_, diesel::result::Error>(())).await.unwrap();
    let late = RawEvent::new("a", "text/plain", "");
    assert_tells_of_no_transaction(outbox::publish_raw(&mut connection, late).await);
    assert_eq!(database.written().await, []);
}

#[tokio::test]
async fn diesel_refuses_to_publish_without_a_transaction() {
    use aftercommit_outbox::diesel as outbox;
    let database = Database::migrated().await;
    let mut connection = PgConnection::establish(&database.url).unwrap();
    assert_tells_of_no_transaction(outbox::publish(&mut connection, &Placed::number(1)));
    assert_tells_of_no_transaction(outbox::publish_all(&mut connection, &[Placed::number(1)]));
    connection.transaction(|_| Ok::<_, diesel::result::Error>(())).unwrap();
    assert_tells_of_no_transaction(outbox::publish_raw(&mut connection, RawEvent::new("a", "text/plain", "")));
    assert_eq!(database.written().await, []);

    connection
        .transaction(|connection| {
            outbox::publish(connection, &Placed::number(1))?;
            Ok::<_, AnyError>(())
        })
        .unwrap();
    assert_eq!(database.written().await.len(), 1);
}
