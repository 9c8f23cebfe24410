//! What PostgreSQL's error codes mean for whoever publishes or handles events: whether to wait, to try again, or to mend
//! something. The codes are those of the PostgreSQL documentation, appendix A.

/// The way out for a connection that turns out to be no session of its own.
pub const POOLED: &str = " (is it PgBouncer that answers? set AFTERCOMMIT_PGBOUNCER=true or --pgbouncer, in code \
    PostgresConfig::pooled; outbox::set_pooled where events are published; .persistent(false) in handlers' queries)";

/// The way out where row-level security stands between a role and rows that it has a grant for.
pub const ROW_SECURITY: &str = " (does row-level security hide it from this role, because something turned it on? run \
    deploy/postgres/roles.sql, which makes the policies)";

/// Whether a code says that the server or the way to it is in trouble, rather than that the statement was wrong: class 08
/// connection exception, 53 insufficient resources, 57P operator intervention (shutdown, crash, cannot connect now), 58
/// system error, 25006 read-only (a former primary).
pub fn is_outage(code: &str) -> bool {
    ["08", "53", "57P", "58"].iter().any(|class| code.starts_with(class)) || code == "25006"
}

/// Whether PostgreSQL undid the transaction because of others that ran beside it (serialization failure, deadlock, a lock
/// that was not free in time): the same again may well succeed.
pub fn is_conflict(code: &str) -> bool {
    matches!(code, "40001" | "40P01" | "55P03")
}

/// Whether somebody else's prepared statement was in our way, or ours was gone: it is not we alone who use this session
/// of the server.
pub fn is_mixed_up(code: &str) -> bool {
    matches!(code, "42P05" | "26000")
}

/// Where to look, for an error of the server with this code and message; empty when there is nothing to say.
pub fn hint(code: &str, message: &str) -> &'static str {
    match code {
        // A schema, a table, a column or a function that is not there.
        "3F000" | "42P01" | "42703" | "42883" => {
            " (is the schema there, and up to date? run `aftercommit migrate`, or \
             name another schema with --schema, AFTERCOMMIT_SCHEMA)"
        }
        "42501" if message.contains("row-level security") => ROW_SECURITY,
        "42501" => " (the role lacks a grant)",
        code if is_mixed_up(code) || message.contains("startup parameter") => POOLED,
        _ => "",
    }
}

/// The server's message. That of a value that does not fit (class 22) quotes the value, which may be a part of a payload, so
/// it is left out.
pub fn without_values(code: &str, message: &str) -> String {
    let quotes = message.find(['"', '«', '„', '“']).zip(message.rfind(['"', '»', '“', '”']));
    match quotes {
        Some((first, last)) if first < last && code.starts_with("22") => {
            format!("{}…{}", &message[..first], message[last..].trim_start_matches(['"', '»', '“', '”']))
        }
        _ => message.to_string(),
    }
}

/// What the server said, with its code and the way out: the message of an error about `doing`.
pub fn told(doing: &str, code: &str, message: &str) -> String {
    format!("{doing}: {} [{code}]{}", without_values(code, message), hint(code, message))
}
