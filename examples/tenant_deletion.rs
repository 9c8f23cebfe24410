//! A tenant is deleted in twelve services, each a process with a database, a worker and a relay of its own, while one is killed, one
//! fails, one is away, and the requester dies before it replies. In the end the rows of every table and the messages of every stream
//! are read.
//!
//! `cargo run --features testing --example tenant_deletion -- --disturb` does it on servers that it starts for itself; `--help` lists
//! what can be disturbed.

#[path = "tenant_deletion/beside.rs"]
pub(crate) mod beside;
#[path = "tenant_deletion/fleet.rs"]
pub(crate) mod fleet;
#[path = "tenant_deletion/options.rs"]
pub(crate) mod options;
#[path = "tenant_deletion/proof.rs"]
pub(crate) mod proof;
#[path = "tenant_deletion/requester.rs"]
mod requester;
#[path = "tenant_deletion/seat.rs"]
mod seat;
#[path = "tenant_deletion/service.rs"]
mod service;
#[path = "tenant_deletion/services.rs"]
mod services;
#[path = "tenant_deletion/show.rs"]
mod show;

use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use aftercommit::fanout::{JobId, JobStatus};
use fleet::Fleet;
use options::Options;
use seat::Seat;
use services::DELETED;
use show::Show;

/// Whatever goes wrong ends the example.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// The name of the service that has the tenants.
const REQUESTER: &str = "requester";
/// Long enough for a slow machine.
const SOON: Duration = Duration::from_secs(60);
/// How long all of it may take.
const ALL_OF_IT: Duration = Duration::from_secs(300);
/// How often things are looked at.
const TICK: Duration = Duration::from_millis(50);
/// How long a step of the service takes that is to be killed while it works.
const PAUSE: Duration = Duration::from_millis(50);

/// What came of it.
#[derive(Debug)]
pub struct Proof {
    /// Such as `12/12`.
    pub completed: String,
    /// Services that failed.
    pub failed: u64,
    /// Rows and files of the tenant.
    pub left: u64,
    /// Rows that were deleted, as answered.
    pub total: u64,
    /// Messages that were read.
    pub messages: usize,
    /// Whatever is not as it should be.
    pub wrong: Vec<String>,
}

/// All of it. `program` is the program that each service runs, which begins with [`serve`].
pub async fn run(options: &Options, program: fn() -> Result<Command, Error>, quiet: bool) -> Result<Proof, Error> {
    let mut show = Show::new(quiet);
    let mut fleet = Fleet::prepare(program).await?;
    show.say("13 databases and 13 streams are made, with rows of five tenants");
    let planted = proof::plant(&fleet).await?;
    start(&mut fleet, options)?;
    let ran = tokio::time::timeout(ALL_OF_IT, disturbed(&mut fleet, options, &mut show)).await;
    let (job, status) = match ran {
        Ok(Ok(ended)) => ended,
        Ok(Err(error)) => return Err(format!("{error}\n{}", fleet.logs()).into()),
        Err(_) => return Err(format!("it does not end within {ALL_OF_IT:?}\n{}", fleet.logs()).into()),
    };
    let (left, mut wrong) = proof::check_rows(&fleet, &planted).await?;
    let (messages, about_messages) = proof::check_messages(&fleet, &planted, &job.to_string()).await?;
    wrong.extend(about_messages);
    wrong.extend(again(&mut fleet, job, &show).await?);
    Ok(Proof { completed: status.completed, failed: status.failed, left, total: status.total, messages, wrong })
}

fn start(fleet: &mut Fleet, options: &Options) -> Result<(), Error> {
    if let Some((name, times)) = &options.fail {
        fleet.seat_mut(name)?.fails = *times;
    }
    if let Some(name) = &options.kill {
        fleet.seat_mut(name)?.pause = PAUSE;
    }
    if options.kill_requester {
        fleet.hold_reply()?;
    }
    let late = options.down.as_ref().map(|(name, _)| name.as_str());
    let names = services::ALL.iter().map(|service| service.name).chain([REQUESTER]);
    names.filter(|name| late != Some(*name)).try_for_each(|name| fleet.start(name))
}

/// The deletion until everybody has verified it, with what is disturbed.
async fn disturbed(fleet: &mut Fleet, options: &Options, show: &mut Show) -> Result<(JobId, JobStatus), Error> {
    let began = Instant::now();
    fleet.ask(DELETED)?;
    if options.kill_requester {
        fleet.committed().await?;
        fleet.kill(REQUESTER)?;
        fleet.seat_mut(REQUESTER)?.holds = None;
        fleet.start(REQUESTER)?;
        fleet.ask(DELETED)?;
        show.say("the requester was killed behind its commit, before it replied; it is started again, and asked again");
    }
    let reply = fleet.reply().await?;
    if reply.new == options.kill_requester {
        return Err(format!("the requester replied {reply:?}").into());
    }
    show.say(&format!("the job {} {}", reply.job, if reply.new { "is asked for" } else { "was asked for already" }));
    let job: JobId = reply.job.parse()?;
    let (mut kill, mut down) = (options.kill.as_deref(), options.down.as_ref());
    loop {
        if let Some(ended) = fleet.ended() {
            return Err(ended.into());
        }
        if let Some((name, _)) = down.filter(|(_, time)| began.elapsed() >= *time) {
            fleet.start(name)?;
            show.say(&format!("{name:<16} is started"));
            down = None;
        }
        if let Some(name) = kill
            && kill_at_work(fleet, name, job, show).await?
        {
            kill = None;
        }
        let status = show::status(fleet.pool(REQUESTER)?, job).await?;
        show.status(&status)?;
        let (state, times) = requester::tenant(fleet.pool(REQUESTER)?, DELETED).await?;
        match status.job.status.as_str() {
            "running" => {}
            // Its last event is handled, too.
            "completed" if state == "deleted" && times > 0 => return Ok((job, status)),
            "completed" => {}
            other => return Err(format!("the job has ended as {other}: {status:?}").into()),
        }
        tokio::time::sleep(TICK).await;
    }
}

/// Kills a service when it has deleted something and not all. False when it is too early.
async fn kill_at_work(fleet: &mut Fleet, name: &str, job: JobId, show: &Show) -> Result<bool, Error> {
    match show::progress(fleet.pool(name)?, job).await? {
        Some((_, true)) => return Err(format!("{name} has ended before it could be killed").into()),
        Some((done, false)) if done > 0 => {}
        _ => return Ok(false),
    }
    fleet.kill(name)?;
    let (done, ended) = show::progress(fleet.pool(name)?, job).await?.unwrap_or_default();
    if ended {
        return Err(format!("{name} was killed too late: it had done all").into());
    }
    show.say(&format!("{name:<16} was killed when it had deleted {done} rows; it is started again"));
    fleet.start(name)?;
    Ok(true)
}

/// A second request changes nothing, and says so.
async fn again(fleet: &mut Fleet, job: JobId, show: &Show) -> Result<Vec<String>, Error> {
    fleet.ask(DELETED)?;
    let reply = fleet.reply().await?;
    show.say(&format!("asked for once more: nothing to do, the job {} is {}", reply.job, reply.status));
    let mut wrong = Vec::new();
    if reply.new || reply.job != job.to_string() || reply.status != "completed" {
        wrong.push(format!("the second request was answered {reply:?}"));
    }
    match requester::tenant(fleet.pool(REQUESTER)?, DELETED).await? {
        (state, 1) if state == "deleted" => {}
        tenant => wrong.push(format!("the requester has its tenant as {tenant:?}")),
    }
    Ok(wrong)
}

/// A process of the fleet, when this is one. False when it is not.
pub async fn serve() -> Result<bool, Error> {
    match Seat::of_this_process()? {
        Some(seat) => {
            tracing_subscriber::fmt().with_max_level(tracing::Level::INFO).with_writer(std::io::stderr).init();
            Box::pin(requester::process(&seat)).await.map(|()| true)
        }
        None => Ok(false),
    }
}

fn this_program() -> Result<Command, Error> {
    Ok(Command::new(std::env::current_exe()?))
}

async fn example() -> Result<bool, Error> {
    if serve().await? {
        return Ok(true);
    }
    let Some(options) = Options::parse(std::env::args().skip(1))? else {
        println!("{}", options::HELP);
        return Ok(true);
    };
    if options.beside > 0 {
        beside::measure(this_program, beside::Size::default(), options.beside).await?;
        return Ok(true);
    }
    let began = Instant::now();
    let proof = run(&options, this_program, false).await?;
    println!(
        "{} rows were deleted, {} messages were read, in {:.1} s",
        proof.total,
        proof.messages,
        began.elapsed().as_secs_f64()
    );
    proof.wrong.iter().for_each(|wrong| println!("WRONG: {wrong}"));
    println!(
        "services_completed: {}, services_failed: {}, verification: {} rows left",
        proof.completed, proof.failed, proof.left
    );
    Ok(proof.wrong.is_empty() && proof.left == 0 && proof.failed == 0)
}

#[tokio::main]
async fn main() -> ExitCode {
    match example().await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
