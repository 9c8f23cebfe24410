//! Whether the projection is what pgbench's own tables say, event by event and cent by cent.

use std::collections::{HashMap, HashSet};
use std::fmt;

use aftercommit::envelope::{CE_ID, CE_PARTITIONKEY, CE_SEQUENCE};
use async_nats::HeaderMap;
use async_nats::jetstream::consumer::{DeliverPolicy, pull};
use futures_util::StreamExt;
use sqlx::PgPool;
use uuid::Uuid;

use crate::Result;
use crate::watch::Watch;

/// What was found. It is a proof when nothing is wrong.
pub struct Proof {
    pub transactions: usize,
    pub events: usize,
    pub lost: usize,
    pub duplicated: usize,
    pub out_of_order: usize,
    /// What else does not agree, in words.
    pub wrong: Vec<String>,
}

impl Proof {
    pub fn holds(&self) -> bool {
        self.lost == 0 && self.duplicated == 0 && self.out_of_order == 0 && self.wrong.is_empty()
    }
}

impl fmt::Display for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "lost {}, duplicated {}, out of order {}", self.lost, self.duplicated, self.out_of_order)
    }
}

/// What the stream holds of our events.
#[derive(Default)]
struct Stored {
    ids: HashSet<Uuid>,
    messages: usize,
    /// Messages behind a later event of the same key.
    out_of_order: usize,
}

/// Compares everything. `transactions` is what pgbench says that it did.
pub async fn prove(watch: &Watch, stream: &str, transactions: usize) -> Result<Proof> {
    let history: i64 = sqlx::query_scalar("select count(*) from pgbench_history").fetch_one(&watch.bank).await?;
    let outbox = ids(&watch.bank, "select event_id from aftercommit.outbox").await?;
    let inbox = ids(&watch.projection, "select event_id from aftercommit.inbox where outcome = 'handled'").await?;
    let applied: i64 = sqlx::query_scalar("select coalesce(sum(events), 0)::bigint from demo.branch")
        .fetch_one(&watch.projection)
        .await?;
    let broken: i64 = sqlx::query_scalar("select count(*) from demo.violation").fetch_one(&watch.projection).await?;
    let stored = read_stream(watch, stream).await?;

    let mut wrong = Vec::new();
    let mut same = |what: &str, left: usize, right: usize| {
        if left != right {
            wrong.push(format!("{what}: {left} and {right}"));
        }
    };
    same("transactions and rows of pgbench_history", transactions, history as usize);
    same("rows of pgbench_history and of the outbox", history as usize, outbox.len());
    same("rows of the outbox and events applied to the projection", outbox.len(), applied as usize);
    same("messages in the stream that are in no outbox, expected", stored.ids.difference(&outbox).count(), 0);
    same("inbox rows of events that are in no outbox, expected", inbox.difference(&outbox).count(), 0);
    for (what, bank, projection) in [
        (
            "account",
            "select aid, abalance::bigint from pgbench_accounts where abalance <> 0",
            "select aid, balance from demo.account where balance <> 0",
        ),
        (
            "teller",
            "select tid, tbalance::bigint from pgbench_tellers where tbalance <> 0",
            "select tid, balance from demo.teller where balance <> 0",
        ),
        (
            "branch",
            "select bid, bbalance::bigint from pgbench_branches where bbalance <> 0",
            "select bid, balance from demo.branch where balance <> 0",
        ),
    ] {
        let (theirs, ours) = (balances(&watch.bank, bank).await?, balances(&watch.projection, projection).await?);
        let different = theirs.iter().filter(|(id, balance)| ours.get(id) != Some(balance)).count();
        let surplus = ours.keys().filter(|id| !theirs.contains_key(id)).count();
        same(&format!("{what} balances that differ, expected"), different + surplus, 0);
    }

    let not_stored = outbox.difference(&stored.ids).count();
    Ok(Proof {
        transactions,
        events: outbox.len(),
        lost: not_stored.max(outbox.difference(&inbox).count()),
        duplicated: (stored.messages - stored.ids.len()) + (applied as usize).saturating_sub(inbox.len()),
        out_of_order: stored.out_of_order + broken as usize,
        wrong,
    })
}

async fn ids(database: &PgPool, sql: &'static str) -> Result<HashSet<Uuid>> {
    Ok(sqlx::query_scalar(sql).fetch_all(database).await?.into_iter().collect())
}

async fn balances(database: &PgPool, sql: &'static str) -> Result<HashMap<i32, i64>> {
    Ok(sqlx::query_as(sql).fetch_all(database).await?.into_iter().collect())
}

/// Reads the whole stream, headers only.
async fn read_stream(watch: &Watch, name: &str) -> Result<Stored> {
    let stream = watch.nats.get_stream(name).await?;
    let expected = stream.cached_info().state.messages as usize;
    let config = pull::OrderedConfig { deliver_policy: DeliverPolicy::All, headers_only: true, ..Default::default() };
    let mut messages = stream.create_consumer(config).await?.messages().await?.take(expected);
    let mut stored = Stored::default();
    let mut last: HashMap<String, i64> = HashMap::new();
    while let Some(message) = messages.next().await {
        let message = message?;
        let headers = message.headers.as_ref().ok_or("a message in the stream has no headers")?;
        stored.messages += 1;
        stored.ids.insert(Uuid::parse_str(header(headers, CE_ID)?)?);
        let sequence: i64 = header(headers, CE_SEQUENCE)?.parse()?;
        let before = last.insert(header(headers, CE_PARTITIONKEY)?.to_string(), sequence);
        stored.out_of_order += usize::from(before.is_some_and(|before| before > sequence));
    }
    Ok(stored)
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Result<&'a str> {
    Ok(headers.get(name).ok_or_else(|| format!("a message in the stream has no header {name}"))?.as_str())
}
