//! `aftercommit worker`: pause and resume.

use clap::{Args, Subcommand};

use super::who::WhoArgs;
use crate::admin::worker::{self, Paused, Resumed, Which};
use crate::cli::PostgresArgs;
use crate::error::Error;

#[derive(Subcommand)]
pub(super) enum Worker {
    /// Stop handling events until told to resume; running handlers finish, the rest waits in the stream
    Pause {
        #[command(flatten)]
        whom: Whom,
        /// Why, for the next one who looks
        #[arg(long)]
        reason: Option<String>,
        #[command(flatten)]
        who: WhoArgs,
        #[command(flatten)]
        postgres: PostgresArgs,
    },
    /// Handle events again, from where it stopped
    Resume {
        #[command(flatten)]
        whom: Whom,
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
    fn which(&self) -> Which<'_> {
        self.subscriber.as_deref().map_or(Which::All, Which::Subscriber)
    }

    fn option(&self) -> String {
        self.subscriber.as_ref().map_or_else(|| "--all".into(), |name| format!("--subscriber {name}"))
    }
}

pub(super) async fn run(command: Worker) -> Result<String, Error> {
    match command {
        Worker::Pause { whom, reason, who, postgres } => {
            let paused = worker::pause(&postgres.config()?, whom.which(), &who.name(), reason.as_deref()).await?;
            Ok(tell_paused(&paused, &whom.option()))
        }
        Worker::Resume { whom, who, postgres } => {
            let resumed = worker::resume(&postgres.config()?, whom.which(), &who.name()).await?;
            Ok(tell_resumed(&resumed, whom.which()))
        }
    }
}

fn tell_paused(paused: &Paused, option: &str) -> String {
    let mut text = match paused.changed {
        true => format!("paused; `aftercommit worker resume {option}` goes on\n"),
        false => "it was paused already\n".into(),
    };
    if !paused.known {
        text.push_str("no worker has served this subscriber in this database yet: is the name right?\n");
    }
    text
}

fn tell_resumed(resumed: &Resumed, which: Which<'_>) -> String {
    let mut text = String::from(if resumed.changed { "resumed\n" } else { "it was not paused\n" });
    match which {
        Which::Subscriber(_) if resumed.all_paused => {
            text.push_str("all subscribers are paused, this one too: `aftercommit worker resume --all`\n");
        }
        Which::All if !resumed.paused.is_empty() => {
            text.push_str(&format!("still paused by themselves: {}\n", resumed.paused.join(", ")));
        }
        _ => {}
    }
    text
}
