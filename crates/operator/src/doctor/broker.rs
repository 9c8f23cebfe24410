//! What the facts about NATS mean.

use std::time::Duration;

use super::{BrokerFacts, Check, DoctorConfig, span};
use aftercommit_core::error::Error;
use aftercommit_core::jetstream::api::has_no_leader;
use aftercommit_core::jetstream::consumer::Oddities;
use aftercommit_core::jetstream::doctor::{Consumer, Server, Stream};
use aftercommit_core::jetstream::monitoring::Sync;
use aftercommit_core::jetstream::rights::Rights;
use aftercommit_core::jetstream::stream::UNMAP;
use aftercommit_core::jetstream::topology::{FOREIGN, LARGEST_MESSAGE};
use aftercommit_core::owner::Owner;
use aftercommit_core::relay::Mode;

/// The first release of each line without the security holes that are known to us.
const SECURE: [(u64, u64, u64); 3] = [(2, 11, 16), (2, 12, 7), (2, 14, 0)];

/// How many event types a check names at most.
const LISTED: usize = 20;

pub(super) fn unreachable(error: &Error) -> Check {
    Check::fail("nats", error.report(), "start nats-server, or set NATS_URL and the login as docs/connections.md says")
}

pub(super) fn judge(facts: &BrokerFacts, sync: Option<&Result<Sync, Error>>, config: &DoctorConfig) -> Vec<Check> {
    let mut checks = vec![server(&facts.server)];
    checks.extend(max_payload(facts.server.max_payload));
    match &facts.stream {
        Err(error) => {
            let remedy = match has_no_leader(error) {
                true => "wait for some seconds; if that lasts, see \"A stream without a leader\" in docs/operations.md",
                false => "run `aftercommit provision`, or give the NATS user the right to look at the stream",
            };
            checks.push(Check::fail("stream", error.report(), remedy));
        }
        Ok(found) => {
            checks.extend(stream(found, config));
            checks.push(replicas(found, sync, config));
        }
    }
    checks.push(disk(sync));
    checks.extend(sync.and_then(|sync| store(sync.as_ref().ok()?)));
    checks.push(user(facts.rights.as_ref()));
    checks
}

/// None as long as there is room.
fn store(sync: &Sync) -> Option<Check> {
    let &Sync { stored, limit, ref server, .. } = sync;
    (limit > 0 && is_nearly_full(stored, limit)).then(|| {
        Check::warn(
            "room",
            format!("the server at {server} has {} MB of messages and takes {} MB", stored >> 20, limit >> 20),
            "remove streams that nobody needs, or raise max_file_store in nats-server's configuration and restart it",
        )
    })
}

/// From 85 % on.
fn is_nearly_full(used: u64, limit: u64) -> bool {
    u128::from(used) * 100 >= u128::from(limit) * 85
}

/// What the user that looks may do besides.
fn user(rights: Option<&Rights>) -> Check {
    const NAME: &str = "nats user";
    let Some(Rights { user, account, acts }) = rights else {
        return Check::unknown(
            NAME,
            "the server does not tell this user what it may do",
            "none for the users of deploy/nats/accounts.conf, which have just what they need; look as its user operator",
        );
    };
    if acts.is_empty() {
        return Check::ok(NAME, format!("{user} of the account {account} can look, and change nothing of the stream"));
    }
    let who = if user.is_empty() { "whoever reaches the server, without a login," } else { user };
    Check::warn(
        NAME,
        format!("{who} may {}", acts.join(", ")),
        "take the accounts and users of deploy/nats/accounts.conf, one for each process, and look as its user operator",
    )
}

/// Whether the stream is that of another outbox than the one that has events here.
pub(super) fn owner(facts: &BrokerFacts, ours: Option<&Owner>, config: &DoctorConfig) -> Option<Check> {
    let (theirs, ours) = (facts.stream.as_ref().ok()?.owner.as_ref()?, ours?);
    let foreign = config.mode == Mode::Exclusive && theirs != ours;
    let finding = format!(
        "{} belongs to the outbox in {theirs}; its relay does not publish this one's events",
        config.naming.stream
    );
    foreign.then(|| Check::fail("owner", finding, FOREIGN))
}

fn server(server: &Server) -> Check {
    let version = &server.version;
    if let Some(problem) = &server.problem {
        return Check::fail("nats", problem, "update nats-server");
    }
    match secure_from(version) {
        Some((major, minor, patch)) => Check::warn(
            "nats",
            format!("nats-server {version} has known security holes"),
            format!("update nats-server to {major}.{minor}.{patch} or newer"),
        ),
        None => Check::ok("nats", format!("nats-server {version} answers")),
    }
}

/// None when every event of an outbox fits.
fn max_payload(limit: usize) -> Option<Check> {
    (limit < LARGEST_MESSAGE.unsigned_abs() as usize).then(|| {
        Check::warn(
            "max_payload",
            format!("nats-server takes messages of up to {limit} bytes; larger events are parked"),
            format!(
                "set max_payload in nats-server's configuration to {LARGEST_MESSAGE} or more, such as its default, 1MB"
            ),
        )
    })
}

/// The release to update to; none when this one is new enough, or its version cannot be read.
fn secure_from(version: &str) -> Option<(u64, u64, u64)> {
    let mut numbers = version.split(['.', '-']).map_while(|part| part.parse().ok());
    let version = (numbers.next()?, numbers.next()?, numbers.next()?);
    // A line without an entry of its own is secure from the next line on.
    let floor = *SECURE.iter().find(|floor| (floor.0, floor.1) >= (version.0, version.1))?;
    (version < floor).then_some(floor)
}

fn stream(stream: &Stream, config: &DoctorConfig) -> Vec<Check> {
    let name = &config.naming.stream;
    let mut checks: Vec<Check> = stream
        .findings
        .problems
        .iter()
        .map(|problem| Check::fail("stream", format!("{name}: {}: {}", problem.setting, problem.why), problem.remedy))
        .collect();
    if checks.is_empty() {
        checks.push(Check::ok("stream", format!("{name} has no setting that would lose or re-order events")));
    }
    checks.extend(stream.findings.unknown.iter().map(|setting| {
        Check::warn(
            "stream",
            format!(
                "{name}: {setting}: this version does not know the setting, and what it does to events cannot be told"
            ),
            "look it up in the release notes of nats-server, and update aftercommit",
        )
    }));
    if let Some(message) = &stream.misplaced {
        checks.push(Check::fail("subjects", format!("{name}: {message}: nats-server maps subjects"), UNMAP));
    }
    checks.push(room(stream, name));
    checks.push(max_age(stream.max_age, name, config.retention));
    checks.push(subscribers(stream, name));
    checks.extend(stream.consumers.iter().flat_map(|found| consumer(found, name)));
    checks
}

fn room(stream: &Stream, name: &str) -> Check {
    const NAME: &str = "room";
    match stream.room.iter().find(|(_, used, limit)| is_nearly_full(*used, *limit)) {
        Some((setting, used, limit)) => Check::warn(
            NAME,
            format!("{name} has {used} of {setting} {limit}: when it is full nothing more is published"),
            format!("raise {setting} of the stream (`nats stream edit {name}`), or shorten its max_age"),
        ),
        None => Check::ok(NAME, format!("{name} is not near a limit of its own")),
    }
}

fn replicas(stream: &Stream, sync: Option<&Result<Sync, Error>>, config: &DoctorConfig) -> Check {
    let (replicas, name) = (stream.replicas, &config.naming.stream);
    if replicas > 1 && (stream.batches || config.mode == Mode::Shared) {
        return Check::ok("replicas", format!("{name} is kept on {replicas} servers"));
    }
    if replicas > 1 {
        return Check::warn(
            "replicas",
            format!("{name} is kept on {replicas} servers and takes no atomic batches: messages go out one at a time"),
            "run `aftercommit provision` with nats-server 2.12 or newer",
        );
    }
    if sync.is_some_and(|sync| sync.as_ref().is_ok_and(|sync| sync.always)) {
        let text = format!(
            "{name} is kept on one server, which acknowledges what is on its disk; while it is down nothing is published"
        );
        return Check::ok("replicas", text);
    }
    Check::warn(
        "replicas",
        format!(
            "{name} is kept on one server: while it is down nothing is published, and with its disk all messages are \
             lost; the outbox still has the events of the last {}",
            span(config.retention)
        ),
        format!(
            "run a cluster of three servers, `nats stream edit {name} --replicas 3` and `aftercommit provision`; or let the one \
             write before it acknowledges: see disk"
        ),
    )
}

fn max_age(max_age: Option<Duration>, name: &str, retention: Duration) -> Check {
    match max_age {
        Some(age) if age < retention => Check::warn(
            "retention",
            format!(
                "{name} keeps events for {}, the outbox for {}: a subscriber that is away for longer than the stream keeps \
                 them misses events, although the outbox still has them",
                span(age),
                span(retention)
            ),
            format!("`nats stream edit {name} --max-age {}h`, or longer", retention.as_secs().div_ceil(3_600)),
        ),
        age => {
            let age = age.map_or_else(|| "for ever".into(), |age| format!("for {}", span(age)));
            Check::ok("retention", format!("{name} keeps events {age}, the outbox for {}", span(retention)))
        }
    }
}

fn subscribers(stream: &Stream, name: &str) -> Check {
    let Stream { types, unread, .. } = stream;
    if *types == 0 {
        return Check::ok("subscribers", format!("{name} holds no events"));
    }
    if unread.is_empty() {
        return Check::ok("subscribers", format!("each of the {types} event types in {name} has a subscriber"));
    }
    let listed: Vec<&str> = unread.iter().take(LISTED).map(String::as_str).collect();
    let more = if unread.len() > LISTED { ", ..." } else { "" };
    Check::warn(
        "subscribers",
        format!("{} of {types} event types in {name} have no subscriber: {}{more}", unread.len(), listed.join(", ")),
        "if that is not meant so, provision a subscriber for them: it starts with the oldest event that the stream holds",
    )
}

fn consumer(consumer: &Consumer, stream: &str) -> Vec<Check> {
    let name = &consumer.name;
    let mut checks = Vec::new();
    let mut warn = |finding: String, remedy: String| checks.push(Check::warn("consumer", finding, remedy));
    let Oddities { unfit, differences, unknown } = &consumer.oddities;
    let whose = if consumer.ours { "" } else { "; `aftercommit provision` did not make it" };
    // A new one has these right as well.
    if !differences.is_empty() && unfit.is_empty() {
        let remedy = "`aftercommit provision --config worker.toml`, if it is a subscriber's".into();
        warn(format!("{name} is not as subscribers need it: {}{whose}", differences.join(", ")), remedy);
    }
    if !unfit.is_empty() {
        let remedy = format!(
            "if it is a subscriber's: `nats consumer rm {stream} {name}`, then `aftercommit provision --config worker.toml`"
        );
        warn(format!("{name} {}{whose}", unfit.join(", and ")), remedy);
    }
    if !unknown.is_empty() {
        let remedy = "look it up in the release notes of nats-server, and update aftercommit".into();
        let settings = unknown.join(", ");
        warn(format!("{name}: {settings}: this version does not know the setting, and what it does to events"), remedy);
    }
    if consumer.paused {
        warn(format!("{name} is paused and gets no events"), format!("`nats consumer resume {stream} {name}`"));
    }
    if checks.is_empty() {
        let text = format!("{name} has no setting with which a subscriber would lose events or stand still{whose}");
        checks.push(Check::ok("consumer", text));
    }
    checks
}

/// What a power cut takes.
fn disk(sync: Option<&Result<Sync, Error>>) -> Check {
    const ALWAYS: &str = "set `sync_interval: always` in the block `jetstream` of nats-server's configuration";
    match sync {
        None => Check::unknown(
            "disk",
            "when nats-server writes to the disk cannot be seen by a client: by default every two minutes, and a power cut \
             takes the acknowledged messages of up to two minutes",
            format!("{ALWAYS}; with --nats-monitor http://host:8222 this check reads the setting"),
        ),
        Some(Err(error)) => Check::unknown(
            "disk",
            format!("when nats-server writes to the disk: {}", error.report()),
            "name the server's HTTP monitoring port with --nats-monitor http://host:8222",
        ),
        Some(Ok(sync)) if sync.always => Check::ok(
            "disk",
            format!("the server at {} writes messages to the disk before it acknowledges them", sync.server),
        ),
        Some(Ok(sync)) => Check::warn(
            "disk",
            format!(
                "the server at {} writes to the disk every {}: a power cut takes the acknowledged messages of that time",
                sync.server,
                span(sync.interval)
            ),
            ALWAYS,
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Severity;
    use aftercommit_core::error::ErrorKind;
    use aftercommit_core::jetstream::settings::{Findings, Problem};

    fn config() -> DoctorConfig {
        let postgres = aftercommit_core::config::PostgresConfig::new("postgres://");
        DoctorConfig::new(postgres, Default::default(), Default::default())
    }

    fn good() -> Stream {
        let consumer = Consumer {
            name: "c".into(),
            oddities: Oddities::default(),
            paused: false,
            ours: true,
            filters: vec![],
            ack_wait: Duration::from_secs(30),
            owner: None,
        };
        let max_age = Some(Duration::from_hours(14 * 24));
        let (findings, consumers, unread) = (Findings::default(), vec![consumer], vec![]);
        Stream {
            findings,
            misplaced: None,
            owner: None,
            replicas: 3,
            batches: true,
            max_age,
            room: vec![],
            consumers,
            types: 2,
            unread,
        }
    }

    fn worst(checks: &[Check]) -> Severity {
        checks.iter().map(|check| check.status).max().unwrap()
    }

    #[test]
    fn old_servers_are_told_apart() {
        for (version, floor) in [
            ("2.11.15", Some((2, 11, 16))),
            ("2.11.16", None),
            ("2.12.6", Some((2, 12, 7))),
            ("2.12.8", None),
            ("2.13.9", Some((2, 14, 0))),
            ("2.14.0", None),
            ("2.15.1", None),
            ("2.15.0-RC.1", None),
            ("3.0.0", None),
            ("dev", None),
        ] {
            assert_eq!(secure_from(version), floor, "{version}");
        }
        let problem = Some("too old".to_string());
        let max_payload = 1 << 20;
        assert_eq!(server(&Server { version: "2.10.0".into(), problem, max_payload }).status, Severity::Fail);
        assert_eq!(server(&Server { version: "2.12.1".into(), problem: None, max_payload }).status, Severity::Warn);
    }

    #[test]
    fn a_server_that_takes_less_than_an_event_may_have_is_named() {
        assert_eq!(max_payload(1 << 20), None);
        assert!(max_payload(65_536).is_some_and(|check| check.finding.contains("65536")));
    }

    #[test]
    fn a_good_stream_has_nothing_to_tell() {
        assert_eq!(worst(&stream(&good(), &config())), Severity::Ok);
    }

    #[test]
    fn each_problem_of_a_stream_fails() {
        let problem = |setting| Problem { setting, why: "why".into(), remedy: "remedy" };
        let findings =
            Findings { problems: vec![problem("storage"), problem("no_ack")], unknown: vec!["tuesdays".into()] };
        let checks = stream(&Stream { findings, ..good() }, &config());
        let told = checks.iter().find(|check| check.finding.contains("tuesdays"));
        assert_eq!(told.map(|check| check.status), Some(Severity::Warn), "an unknown setting is named");
        let failed: Vec<&Check> = checks.iter().filter(|check| check.status == Severity::Fail).collect();
        assert_eq!(failed.len(), 2);
        assert!(failed[0].finding.contains("storage: why") && failed[0].remedy.as_deref() == Some("remedy"));
    }

    #[test]
    fn what_a_stream_can_lose_is_a_warning() {
        type Spoil = fn(&mut Stream);
        let cases: [(&str, Spoil); 7] = [
            ("subscribers", |stream| stream.unread = vec!["order.lost".into()]),
            ("room", |stream| stream.room = vec![("max_bytes", 85, 100)]),
            ("retention", |stream| stream.max_age = Some(Duration::from_hours(24))),
            ("consumer", |stream| stream.consumers[0].oddities.differences = vec!["max_deliver: 5 -> -1".into()]),
            ("consumer", |stream| stream.consumers[0].oddities.unfit = vec!["has the ack policy none".into()]),
            ("consumer", |stream| stream.consumers[0].oddities.unknown = vec!["skip_every_second".into()]),
            ("consumer", |stream| stream.consumers[0].paused = true),
        ];
        for (name, spoil) in cases {
            let mut spoilt = good();
            spoil(&mut spoilt);
            let checks = stream(&spoilt, &config());
            let wrong: Vec<_> = checks.iter().filter(|check| check.status != Severity::Ok).collect();
            assert_eq!(
                wrong.iter().map(|check| (check.name, check.status)).collect::<Vec<_>>(),
                [(name, Severity::Warn)]
            );
        }
        let checks = stream(&Stream { max_age: None, ..good() }, &config());
        assert_eq!(worst(&checks), Severity::Ok, "for ever is long enough");
    }

    #[test]
    fn one_server_is_enough_when_it_writes_before_it_acknowledges() {
        let judged = |replicas, batches, sync: Option<&Result<Sync, Error>>| {
            super::replicas(&Stream { replicas, batches, ..good() }, sync, &config()).status
        };
        let (always, late) = (Ok(synced(true)), Ok(synced(false)));
        assert_eq!((judged(3, true, None), judged(3, false, None)), (Severity::Ok, Severity::Warn));
        let one = [None, Some(&late), Some(&always)].map(|sync| judged(1, true, sync));
        assert_eq!(one, [Severity::Warn, Severity::Warn, Severity::Ok]);
    }

    #[test]
    fn a_user_that_can_do_more_than_look_is_told() {
        let rights = |user: &str, acts| Rights { user: user.into(), account: "A".into(), acts };
        assert_eq!(user(None).status, Severity::Unknown);
        assert_eq!(user(Some(&rights("operator", vec![]))).status, Severity::Ok);
        let check = user(Some(&rights("", vec!["create streams", "delete the stream"])));
        assert!(
            check.status == Severity::Warn && check.finding.ends_with("may create streams, delete the stream"),
            "{check:?}"
        );
    }

    #[test]
    fn a_store_that_is_nearly_full_is_told() {
        let judged = |stored, limit| store(&Sync { stored, limit, ..synced(true) }).map(|check| check.status);
        assert_eq!((judged(84, 100), judged(85, 100), judged(85, 0)), (None, Some(Severity::Warn), None));
    }

    fn synced(always: bool) -> Sync {
        Sync { server: "n1".into(), always, interval: Duration::from_mins(2), stored: 0, limit: 0 }
    }

    #[test]
    fn only_a_server_that_syncs_always_is_safe_from_a_power_cut() {
        let sync = |always| Ok(synced(always));
        assert_eq!(disk(Some(&sync(true))).status, Severity::Ok);
        let check = disk(Some(&sync(false)));
        assert!(check.status == Severity::Warn && check.finding.contains("every 2 minutes"), "{check:?}");
        assert_eq!(disk(None).status, Severity::Unknown);
        assert_eq!(disk(Some(&Err(Error::new(ErrorKind::Broker, "no answer")))).status, Severity::Unknown);
    }
}
