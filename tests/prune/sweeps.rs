//! Periodic pruning: budgets, places, leases, failures, and the command line.

use std::process::{Command, Output};
use std::time::Duration;

use aftercommit::prune::{Pace, Policy, PruneConfig, Pruner, Spec, SweepResult, SweepStatus, status};
use tokio_util::sync::CancellationToken;

use crate::sessions::{Sessions, whole};
use crate::support::{Directory, SOON, succeeded};

fn config(policy: Policy, pace: Pace) -> PruneConfig {
    PruneConfig { pace, policies: vec![policy], ..PruneConfig::default() }
}

fn quick() -> Pace {
    Pace { rest: 0.0, ..Pace::default() }
}

async fn sweep(sessions: &Sessions, config: &PruneConfig) -> (u64, Option<SweepResult>) {
    let pruner = Pruner::new(&sessions.database.config, config.clone()).unwrap();
    let swept = pruner.sweep(&CancellationToken::new()).await.unwrap().remove(0);
    println!("{swept:?}");
    (swept.removed, swept.result)
}

async fn record(sessions: &Sessions) -> SweepStatus {
    let all = status(&sessions.database.config).await.unwrap();
    all.into_iter().find(|status| status.category == "sessions").unwrap()
}

/// Many finished sessions of which each ended at a time of its own.
async fn many(sessions: &Sessions, count: u32) {
    sessions
        .database
        .execute(&format!(
            "truncate sessions cascade; create index on sessions (terminated_at) where status = 'terminated';
             insert into sessions select n, 'terminated', now() - interval '1 day' - n * interval '1 s'
               from generate_series(1, {count}) n"
        ))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_is_older_than_the_period_goes() {
    let sessions = Sessions::new().await;
    let policy = Policy::new(whole(), Some(Duration::from_secs(3600)));
    assert_eq!(sweep(&sessions, &config(policy.clone(), quick())).await, (3, Some(SweepResult::Done)));
    let found = record(&sessions).await;
    assert_eq!((found.removed, found.removed_total, found.period_seconds), (3, 3, Some(3600.0)));
    assert!(
        found.result.as_deref() == Some("done") && found.place.is_none() && found.last_swept_at.is_some(),
        "{found:?}"
    );
    assert_eq!(sweep(&sessions, &config(policy.clone(), quick())).await, (0, Some(SweepResult::Done)));
    assert_eq!((record(&sessions).await.removed, record(&sessions).await.removed_total), (0, 3));
    let off =
        PruneConfig { policies: vec![Policy { enabled: false, period: None, ..policy }], ..PruneConfig::default() };
    let swept = Pruner::new(&sessions.database.config, off).unwrap().sweep(&CancellationToken::new()).await.unwrap();
    assert_eq!(swept.iter().map(|swept| swept.category.as_str()).collect::<Vec<_>>(), ["leases"]);
    assert_eq!(sessions.count("sessions").await, 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_budget_ends_a_sweep_and_the_next_goes_on_there() {
    let sessions = Sessions::new().await;
    many(&sessions, 100).await;
    let policy = Policy::new(whole(), None);
    let pace = Pace { batch: 20, budget: 50, rest: 0.0 };
    assert_eq!(sweep(&sessions, &config(policy.clone(), pace)).await, (50, Some(SweepResult::Budget)));
    let place = record(&sessions).await.place;
    let last: Option<String> = sqlx::query_scalar("select (now() - interval '1 day' - interval '50 s')::text")
        .fetch_one(&sessions.pool)
        .await
        .unwrap();
    assert!(place.is_some() && place <= last, "{place:?} {last:?}");
    // One that has become finished before that place is for the same sweep, too.
    sessions.database.execute("insert into sessions values (1000, 'terminated', now() - interval '1 year')").await;
    assert_eq!(sweep(&sessions, &config(policy, Pace { budget: 1000, ..pace })).await, (51, Some(SweepResult::Done)));
    assert_eq!((sessions.count("sessions").await, record(&sessions).await.removed_total), (0, 101));
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_without_a_time_and_rows_of_one_moment_go_in_one_sweep() {
    let sessions = Sessions::new().await;
    let config = config(Policy::new(whole(), None), Pace { batch: 10, ..quick() });
    for time in ["null", "now()"] {
        sessions
            .database
            .execute(&format!(
                "truncate sessions cascade; insert into sessions select n, 'terminated', {time} from generate_series(1, 95) n"
            ))
            .await;
        assert_eq!(sweep(&sessions, &config).await, (95, Some(SweepResult::Done)), "{time}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_ends_it_after_its_batch_and_nothing_is_lost() {
    let sessions = Sessions::new().await;
    many(&sessions, 1000).await;
    let pace = Pace { batch: 10, ..quick() };
    let pruner = Pruner::new(&sessions.database.config, config(Policy::new(whole(), None), pace)).unwrap();
    let stop = CancellationToken::new();
    stop.cancel();
    assert!(pruner.sweep(&stop).await.unwrap().is_empty(), "it does not begin");
    let stop = CancellationToken::new();
    let sweeping = pruner.sweep(&stop);
    let stopping = async {
        let begun = async || sessions.count("sessions").await < 1000;
        aftercommit::testing::eventually(SOON, "a batch is through", begun).await.unwrap();
        stop.cancel();
    };
    let (swept, ()) = tokio::join!(sweeping, stopping);
    let swept = swept.unwrap().remove(0);
    assert_eq!(swept.result, Some(SweepResult::Stopped));
    assert_eq!(sessions.count("sessions").await + swept.removed.cast_signed(), 1000);
    assert_eq!(record(&sessions).await.removed_total, swept.removed.cast_signed());
    // Who comes next need not wait until a lease runs out.
    assert_eq!(sweep(&sessions, &config(Policy::new(whole(), None), quick())).await.1, Some(SweepResult::Done));
    assert_eq!(sessions.count("sessions").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_process_sweeps_a_category_at_a_time() {
    let sessions = Sessions::new().await;
    sessions
        .database
        .execute(
            "insert into aftercommit.lease (name, holder, epoch, expires_at) values ('prune:sessions', 'x', 3, now() + interval '50 s')",
        )
        .await;
    let config = config(Policy::new(whole(), None), quick());
    assert_eq!(sweep(&sessions, &config).await, (0, None));
    sessions.database.execute("update aftercommit.lease set expires_at = now() - interval '1 s'").await;
    assert_eq!(sweep(&sessions, &config).await, (5, Some(SweepResult::Done)), "its holder is dead");
}

#[tokio::test(flavor = "multi_thread")]
async fn locked_rows_are_passed_over_and_gone_the_next_time() {
    let sessions = Sessions::new().await;
    let config = config(Policy::new(whole(), None), Pace { batch: 2, ..quick() });
    let mut holds = sessions.pool.begin().await.unwrap();
    sqlx::query("select from sessions where id = 1 for key share").execute(&mut *holds).await.unwrap();
    assert_eq!(sweep(&sessions, &config).await, (4, Some(SweepResult::Done)));
    holds.rollback().await.unwrap();
    assert_eq!(sweep(&sessions, &config).await, (1, Some(SweepResult::Done)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_is_on_record_and_makes_the_process_unhealthy() {
    use aftercommit::health::Check;
    let sessions = Sessions::new().await;
    let spec = Spec::new("public.sessions", "status = 'terminated'").name("sessions");
    let broken = PruneConfig { interval: Duration::from_secs(1), ..config(Policy::new(spec, None), quick()) };
    let pruner = Pruner::new(&sessions.database.config, broken).unwrap();
    let (monitor, stop) = (pruner.monitor(), CancellationToken::new());
    let running = tokio::spawn({
        let stop = stop.clone();
        async move { pruner.run(stop).await }
    });
    aftercommit::testing::eventually(SOON, "it says so", async || !monitor.health().ok).await.unwrap();
    assert!(monitor.health().text.contains("kernels_session_id_fkey"), "{}", monitor.health().text);
    let found = record(&sessions).await;
    assert!(found.result.as_deref() == Some("failed") && found.error.unwrap().contains("[23503]"));
    sessions.database.execute("truncate kernels").await;
    aftercommit::testing::eventually(SOON, "it heals by itself", async || monitor.health().ok).await.unwrap();
    assert_eq!(sessions.count("sessions").await, 3);
    stop.cancel();
    running.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_is_refused_before_anything_runs() {
    let sessions = Sessions::new().await;
    let policy = Policy::new(whole(), None);
    let twice = PruneConfig { policies: vec![policy.clone(), policy.clone()], ..PruneConfig::default() };
    let short = PruneConfig { interval: Duration::ZERO, ..PruneConfig::default() };
    let pace = |pace| config(policy.clone(), pace);
    for (config, told) in [
        (twice, "two categories are called \"sessions\""),
        (short, "interval must be at least 1s"),
        (pace(Pace { batch: 0, ..quick() }), "batch must be"),
        (pace(Pace { budget: 0, ..quick() }), "budget"),
        (pace(Pace { rest: f64::NAN, ..quick() }), "rest must be"),
    ] {
        let error = Pruner::new(&sessions.database.config, config).unwrap_err();
        assert!(error.kind() == aftercommit::ErrorKind::Config && error.to_string().contains(told), "{error}");
    }
}

/// A directory with this `prune.toml`, and the command in the database.
struct Cli<'a> {
    sessions: &'a Sessions,
    directory: Directory,
}

const TOML: &str = "
rest = 0.0
batch = 2
[[category]]
name = 'sessions'
table = 'public.sessions'
finished = \"status = 'terminated'\"
before = 'terminated_at'
period = '1h'
[[category.child]]
table = 'public.kernels'
column = 'session_id'
";

impl Cli<'_> {
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_aftercommit"));
        command.args(arguments).env("DATABASE_URL", &self.sessions.database.config.url);
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let file = self.directory.write("prune.toml", TOML).display().to_string();
        let arguments: Vec<&str> =
            arguments.iter().map(|word| if *word == "FILE" { file.as_str() } else { word }).collect();
        self.command(&arguments).output().unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_plans_runs_and_tells() {
    let sessions = Sessions::new().await;
    let cli = Cli { sessions: &sessions, directory: Directory::new() };
    assert_eq!(succeeded(cli.run(&["prune", "status"])), "nothing was pruned yet\n");
    let plan = succeeded(cli.run(&["prune", "plan", "--config", "FILE"]));
    assert!(plan.contains("sessions: 3 rows\n  6 of public.kernels\n  warning: no index finds"), "{plan}");
    assert_eq!(sessions.count("sessions").await, 8);
    let swept = succeeded(cli.run(&["prune", "run", "--config", "FILE", "--once"]));
    assert_eq!(swept, "sessions: 3 rows, done\nleases: 0 rows, done\n");
    assert_eq!((sessions.count("sessions").await, sessions.told().await.len()), (5, 2));
    let told = succeeded(cli.run(&["prune", "status"]));
    assert!(
        told.contains("sessions  kept 3600 s  last swept 2")
            && told.contains(" by ")
            && told.contains("3 rows  3 in all  done"),
        "{told}"
    );
    let json: serde_json::Value = serde_json::from_str(&succeeded(cli.run(&["prune", "status", "--json"]))).unwrap();
    assert_eq!(
        (&json[1]["category"], &json[1]["removed_total"], &json[1]["result"]),
        (&"sessions".into(), &3.into(), &"done".into())
    );
    sessions
        .database
        .execute(
            "create table of_session (id bigint references sessions); insert into of_session values (4);
                               update sessions set terminated_at = now() - interval '1 day'",
        )
        .await;
    let failed = cli.run(&["prune", "run", "--config", "FILE", "--once", "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&failed.stdout).unwrap();
    assert_eq!((failed.status.code(), &json[0]["result"]), (Some(1), &"failed".into()));
    assert!(json[0]["error"].as_str().unwrap().contains("of_session_id_fkey"), "{json}");
    for (arguments, told) in [
        (&["prune", "run", "--config", "nowhere.toml", "--once"][..], "nowhere.toml: it cannot be read"),
        (&["prune", "run", "--json"], "--once"),
        (&["prune", "plan"], "--config"),
    ] {
        let output = cli.run(arguments);
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && text.contains(told), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_moment_it_leaves_no_half() {
    let sessions = Sessions::new().await;
    many(&sessions, 3000).await;
    sessions
        .database
        .execute("insert into kernels select n * 10 + k, n from generate_series(1, 3000) n, generate_series(1, 3) k")
        .await;
    let cli = Cli { sessions: &sessions, directory: Directory::new() };
    let file = cli.directory.write("prune.toml", TOML).display().to_string();
    for left in [2900, 2500, 2000, 1500, 1000] {
        let mut pruner = cli.command(&["prune", "run", "--config", &file]).spawn().unwrap();
        let begun = async || sessions.count("sessions").await < left;
        aftercommit::testing::eventually(SOON, "it prunes", begun).await.unwrap();
        pruner.kill().unwrap();
        pruner.wait().unwrap();
        sessions.database.nobody_is_at_work().await;
        let count = sessions.count("sessions").await;
        assert_eq!(sessions.count("kernels").await, count * 3);
        // Its lease would run out by itself.
        sessions.database.execute("update aftercommit.lease set expires_at = to_timestamp(0)").await;
    }
    succeeded(cli.run(&["prune", "run", "--config", "FILE", "--once"]));
    assert_eq!((sessions.count("sessions").await, sessions.count("kernels").await), (0, 0));
    let told = sessions.told().await;
    let mut ids: Vec<u32> = told
        .iter()
        .flat_map(|event| event["ids"].as_array().unwrap())
        .map(|id| id.as_str().unwrap().parse().unwrap())
        .collect();
    ids.sort_unstable();
    assert_eq!(ids, (1..=3000).collect::<Vec<_>>(), "each was told once");
    assert_eq!(record(&sessions).await.removed_total, 3000);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_role_of_the_pruner_suffices() {
    use crate::support::Roles;
    let sessions = Sessions::new().await;
    let roles = Roles::of(&sessions.database);
    let login = roles.login(&sessions.database, "prune", &["pruner"]).await;
    sessions
        .database
        .execute(&format!(
            "grant select, update, delete on sessions, kernels to {login};
             insert into aftercommit.audit (at, who, action) values (now() - interval '90 days', 'me', 'x');
             insert into aftercommit.lease values ('subscriber:gone', 'x', 1, now() - interval '1 year')"
        ))
        .await;
    let cli = Cli { sessions: &sessions, directory: Directory::new() };
    let file = cli.directory.write("prune.toml", format!("audit = '50d'\n{TOML}")).display().to_string();
    let mut command = cli.command(&["prune", "run", "--once", "--config", &file]);
    let swept = succeeded(command.env("DATABASE_URL", sessions.database.url_of(&login)).output().unwrap());
    assert_eq!(swept, "sessions: 3 rows, done\naudit: 1 rows, done\nleases: 1 rows, done\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn it_prunes_and_tells_in_another_schema() {
    let sessions = Sessions::new().await;
    sessions.database.execute("drop schema aftercommit cascade").await;
    let cli = Cli { sessions: &sessions, directory: Directory::new() };
    succeeded(cli.run(&["migrate", "--schema", "shop"]));
    succeeded(cli.run(&["prune", "plan", "--schema", "shop", "--config", "FILE"]));
    let swept = succeeded(cli.run(&["prune", "run", "--schema", "shop", "--config", "FILE", "--once"]));
    assert_eq!(swept, "sessions: 3 rows, done\nleases: 0 rows, done\n");
    assert_eq!(sessions.count("shop.outbox where type = 'rows.pruned'").await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_every_step_it_ends_in_the_same_state() {
    for step in ["locked", "children-deleted", "deleted", "told", "recorded", "committed"] {
        let sessions = Sessions::new().await;
        let cli = Cli { sessions: &sessions, directory: Directory::new() };
        let file = cli.directory.write("prune.toml", TOML).display().to_string();
        // In the first batch, and in the second.
        for times in [1, 2] {
            let mut command = cli.command(&["prune", "run", "--once", "--config", &file]);
            let output = command.env("AFTERCOMMIT_FAULT", format!("prune-{step}:{times}")).output().unwrap();
            let died = output.status.code().is_none();
            assert!(died || (step == "committed" && times == 2), "{step}:{times}");
            assert_eq!(sessions.count("kernels").await, sessions.count("sessions").await * 2, "{step}:{times}");
            sessions.database.nobody_is_at_work().await;
            sessions.database.execute("update aftercommit.lease set expires_at = to_timestamp(0)").await;
        }
        succeeded(cli.run(&["prune", "run", "--once", "--config", "FILE"]));
        let told = sessions.told().await;
        let mut ids: Vec<&str> =
            told.iter().flat_map(|event| event["ids"].as_array().unwrap()).map(|id| id.as_str().unwrap()).collect();
        ids.sort_unstable();
        assert_eq!(ids, ["1", "2", "3"], "{step}: each was told once");
        assert_eq!((sessions.count("sessions").await, record(&sessions).await.removed_total), (5, 3), "{step}");
    }
}

/// A row that cannot go is passed over and named, and all others go.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_cannot_go_holds_back_no_others() {
    let sessions = Sessions::new().await;
    many(&sessions, 100).await;
    sessions
        .database
        .execute(
            "create table orders (id int primary key, session bigint constraint of_session references sessions);
             insert into orders values (1, 55), (2, 77)",
        )
        .await;
    let pruner =
        Pruner::new(&sessions.database.config, config(Policy::new(whole(), None), Pace { batch: 10, ..quick() }))
            .unwrap();
    let swept = pruner.sweep(&CancellationToken::new()).await.unwrap().remove(0);
    assert_eq!((swept.removed, swept.result), (98, Some(SweepResult::Failed)));
    let error = swept.error.unwrap();
    for told in ["sessions: 2 rows cannot go and were passed over", "such as 77", "of_session"] {
        assert!(error.contains(told), "{told}: {error}");
    }
    assert_eq!(sessions.count("sessions").await, 2);
    assert_eq!(sessions.told().await.iter().map(|event| event["ids"].as_array().unwrap().len()).sum::<usize>(), 98);
    // When nothing can go, it gives up after a while.
    many(&sessions, 300).await;
    sessions.database.execute("insert into orders select n, n from generate_series(1, 300) n").await;
    let swept = pruner.sweep(&CancellationToken::new()).await.unwrap().remove(0);
    assert_eq!((swept.removed, swept.result), (0, Some(SweepResult::Failed)));
    assert!(swept.error.unwrap().contains("passes over 100 such rows"));
}

/// What concerns all rows is told at once, and not looked for row by row.
#[tokio::test(flavor = "multi_thread")]
async fn a_condition_that_cannot_be_is_told_at_once() {
    let sessions = Sessions::new().await;
    many(&sessions, 300).await;
    let spec = Spec::new("public.sessions", "nowhere = 1").name("sessions");
    let pruner = Pruner::new(&sessions.database.config, config(Policy::new(spec, None), quick())).unwrap();
    let error = pruner.sweep(&CancellationToken::new()).await.unwrap().remove(0).error.unwrap();
    assert!(error.contains("nowhere") && error.starts_with("sessions: ") && !error.contains("passed over"), "{error}");
}

/// Whoever may create functions in the schema public would run them with the pruner's rights, and decide what is finished.
#[tokio::test(flavor = "multi_thread")]
async fn nobodys_functions_decide_what_goes() {
    let sessions = Sessions::new().await;
    sessions
        .database
        .execute(
            "create table jobs (id varchar(20) primary key, status varchar(20)); insert into jobs values ('1', 'done'), ('2', 'running');
             create function public.evil(varchar, varchar) returns bool language plpgsql as $$ begin return true; end $$;
             create operator public.= (leftarg = varchar, rightarg = varchar, function = public.evil);
             create function public.lower(varchar) returns text language sql as $$ select 'done' $$",
        )
        .await;
    let spec = Spec::new("public.jobs", "status = 'done' and lower(status) = 'done'").name("sessions");
    let config = config(Policy::new(spec, None), quick());
    assert_eq!(sweep(&sessions, &config).await, (1, Some(SweepResult::Done)));
    assert_eq!(sessions.count("jobs where status::text = 'running'").await, 1);
    // Names are looked up elsewhere only when somebody says so.
    sessions.database.execute("create function finished(text) returns bool language sql as $$ select true $$").await;
    let spec = Spec::new("public.jobs", "finished(status)").name("sessions");
    let blind = PruneConfig { policies: vec![Policy::new(spec, None)], ..config };
    let pruner = Pruner::new(&sessions.database.config, blind.clone()).unwrap();
    let error = pruner.sweep(&CancellationToken::new()).await.unwrap().remove(0).error.unwrap();
    assert!(error.contains("finished") && error.contains("search path") && !error.contains("migrate"), "{error}");
    let seeing = PruneConfig { search_path: Some("public".into()), ..blind };
    assert_eq!(sweep(&sessions, &seeing).await, (1, Some(SweepResult::Done)));
}

/// A signal ends a single sweep after its batch, and the next need not wait for the lease.
#[tokio::test(flavor = "multi_thread")]
async fn a_signal_ends_a_single_sweep_in_order() {
    let sessions = Sessions::new().await;
    many(&sessions, 5000).await;
    let cli = Cli { sessions: &sessions, directory: Directory::new() };
    let file = cli.directory.write("prune.toml", TOML).display().to_string();
    let mut command = cli.command(&["prune", "run", "--once", "--config", &file]);
    let pruner = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let begun = async || sessions.count("sessions").await < 4900;
    aftercommit::testing::eventually(SOON, "it prunes", begun).await.unwrap();
    let killed = Command::new("kill").args(["-TERM", &pruner.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let output = pruner.wait_with_output().unwrap();
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.code() == Some(1) && told.contains("rows, stopped"), "{:?} {told}", output.status);
    assert_eq!(record(&sessions).await.result.as_deref(), Some("stopped"));
    let swept = succeeded(cli.run(&["prune", "run", "--config", "FILE", "--once"]));
    assert!(swept.contains("rows, done"), "{swept}");
    assert_eq!(sessions.count("sessions").await, 0);
}

/// What kept a sweep from its work is tried again soon, whatever the interval is.
#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_that_could_not_be_is_tried_again_soon() {
    let sessions = Sessions::new().await;
    sessions
        .database
        .execute("insert into aftercommit.lease values ('prune:sessions', 'a dead one', 1, now() + interval '1 s')")
        .await;
    let pruner = Pruner::new(&sessions.database.config, config(Policy::new(whole(), None), quick())).unwrap();
    let stop = CancellationToken::new();
    let running = tokio::spawn({
        let stop = stop.clone();
        async move { pruner.run(stop).await }
    });
    let gone = async || sessions.count("sessions").await == 3;
    aftercommit::testing::eventually(SOON, "it is swept long before the interval of an hour", gone).await.unwrap();
    stop.cancel();
    running.await.unwrap();
}
