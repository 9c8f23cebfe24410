//! What the database knows.

use aftercommit_core::config::PostgresConfig;
use aftercommit_core::error::Error;
use aftercommit_core::postgres::pause::{self, Pause};
use aftercommit_core::postgres::status::{self, AtWork, Backlog, Leader};
use aftercommit_core::postgres::worker_status::{self, Heard};
use aftercommit_core::postgres::{database_error, parked, relay_log};
use aftercommit_core::{postgres, relay};

pub(super) struct Database {
    pub(super) backlog: Backlog,
    pub(super) parked: parked::Summary,
    pub(super) leader: Option<Leader>,
    pub(super) paused: Vec<Pause>,
    pub(super) at_work: Vec<AtWork>,
    pub(super) heard: Vec<Heard>,
}

pub(super) async fn look(config: &PostgresConfig) -> Result<Database, Error> {
    let failed = |error| database_error("reading the status failed", error);
    let mut connection = postgres::connect(config, "aftercommit-status").await?;
    let state = relay_log::newest(&mut connection).await.map_err(failed)?;
    let leader = status::leader(&mut connection, relay::LEASE).await.map_err(failed)?;
    let last_id = leader.as_ref().and_then(|leader| leader.last_id).unwrap_or(0);
    Ok(Database {
        backlog: status::backlog(&mut connection, &state, last_id).await.map_err(failed)?,
        parked: parked::summary(&mut connection).await.map_err(failed)?,
        leader,
        paused: pause::list(&mut connection).await.map_err(failed)?,
        at_work: status::subscribers(&mut connection).await.map_err(failed)?,
        heard: worker_status::list(&mut connection, None).await.map_err(failed)?,
    })
}
