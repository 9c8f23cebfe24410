//! `aftercommit worker`: pause and resume.

use clap::{Args, Subcommand};

use super::as_json;
use super::relay::tell_paused;
use super::terminal::plain;
use super::who::WhoArgs;
use crate::cli::PostgresArgs;
use aftercommit_core::error::Error;
use aftercommit_operator::worker::{self, Resumed, Which};

#[derive(Subcommand)]
pub(super) enum Worker {
    /// Stop handling events until told to resume; running handlers finish, the rest waits in the stream
    #[command(
        after_help = "Example:\n  aftercommit worker pause --subscriber mails --reason \"the mail server moves\""
    )]
    Pause {
        #[command(flatten)]
        whom: Whom,
        /// Pause the subscriber although no worker has served it in this database yet
        #[arg(long, requires = "subscriber")]
        ahead: bool,
        /// Why, for the next one who looks; of what is paused already, the new reason
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
        /// Print it as JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        who: WhoArgs,
        #[command(flatten)]
        postgres: PostgresArgs,
    },
    /// Handle events again, from where it stopped
    #[command(after_help = "Example:\n  aftercommit worker resume --subscriber mails")]
    Resume {
        #[command(flatten)]
        whom: Whom,
        /// Print it as JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        who: WhoArgs,
        #[command(flatten)]
        postgres: PostgresArgs,
    },
}

#[derive(Args)]
#[group(required = true, multiple = false)]
pub(super) struct Whom {
    /// One subscriber
    #[arg(long, value_name = "NAME")]
    subscriber: Option<String>,
    /// All subscribers of this database, whatever else is paused or resumed
    #[arg(long)]
    all: bool,
}

impl Whom {
    fn which(&self, ahead: bool) -> Which<'_> {
        match &self.subscriber {
            None => Which::All,
            Some(name) if ahead => Which::Ahead(name),
            Some(name) => Which::Subscriber(name),
        }
    }

    fn option(&self) -> String {
        self.subscriber.as_ref().map_or_else(|| "--all".into(), |name| format!("--subscriber {}", plain(name)))
    }
}

pub(super) async fn run(command: Worker) -> Result<String, Error> {
    match command {
        Worker::Pause { whom, ahead, reason, json, who, postgres } => {
            let which = whom.which(ahead);
            let pausing = worker::pause(&postgres.config()?, which, &who.name(), reason.as_deref()).await?;
            tell_paused(pausing, &format!("aftercommit worker resume {}", whom.option()), json)
        }
        Worker::Resume { whom, json, who, postgres } => {
            let which = whom.which(true);
            let resumed = worker::resume(&postgres.config()?, which, &who.name()).await?;
            if json { as_json(&resumed) } else { Ok(tell_resumed(&resumed, which)) }
        }
    }
}

fn tell_resumed(resumed: &Resumed, which: Which<'_>) -> String {
    let mut text = String::from(if resumed.changed { "resumed\n" } else { "it was not paused\n" });
    match which {
        Which::All if !resumed.paused.is_empty() => {
            text.push_str(&format!("still paused by themselves: {}\n", plain(&resumed.paused.join(", "))));
        }
        Which::All => {}
        _ if resumed.all_paused => {
            text.push_str("all subscribers are paused, this one too: `aftercommit worker resume --all`\n");
        }
        _ => {}
    }
    text
}
