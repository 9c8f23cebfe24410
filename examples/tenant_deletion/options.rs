//! What is disturbed.

use std::time::Duration;

use super::services;

pub const HELP: &str = "\
Deletes a tenant in twelve services, and proves it

Usage: tenant_deletion [OPTIONS]

  --kill NAME            Kill this service with SIGKILL while it works, and start it again
  --fail NAME:TIMES      Let the first attempts of this service fail
  --down NAME:SECONDSs   Start this service so much later
  --kill-requester       Kill the requester between the commit of the request and its reply; the caller asks again
  --disturb              All of these: --kill pos --fail suppliers:2 --down training:20s --kill-requester
  --beside ROUNDS        Measure what erasing 100,000 rows costs others in the same tables, who have 1,000,000";

/// What is disturbed; by default nothing.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Options {
    /// A service that is killed while it works.
    pub kill: Option<String>,
    /// A service, and how many of its first attempts fail.
    pub fail: Option<(String, u32)>,
    /// A service that starts later.
    pub down: Option<(String, Duration)>,
    /// Whether the requester is killed before it replies.
    pub kill_requester: bool,
    /// How often it is measured what an erasure costs others; 0 to delete a tenant.
    pub beside: usize,
}

impl Options {
    /// Everything at once.
    pub fn disturb(down: Duration) -> Self {
        Self {
            kill: Some("pos".into()),
            fail: Some(("suppliers".into(), 2)),
            down: Some(("training".into(), down)),
            kill_requester: true,
            beside: 0,
        }
    }

    /// From a command line. None when help is asked for.
    pub fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Option<Self>, String> {
        let (mut options, mut arguments) = (Self::default(), arguments.into_iter());
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or_else(|| format!("{argument} needs a value"));
            match argument.as_str() {
                "--kill" => options.kill = Some(known(&value()?)?),
                "--fail" => {
                    let (name, times) = pair(&argument, &value()?)?;
                    let times = times.parse().map_err(|_| format!("{argument}: {times:?} is no number of attempts"))?;
                    options.fail = Some((name, times));
                }
                "--down" => {
                    let (name, time) = pair(&argument, &value()?)?;
                    let seconds = time.strip_suffix('s').and_then(|seconds| seconds.parse().ok());
                    let seconds = seconds.ok_or_else(|| format!("{argument}: {time:?} is no time, such as 20s"))?;
                    options.down = Some((name, Duration::from_secs(seconds)));
                }
                "--kill-requester" => options.kill_requester = true,
                "--disturb" => options = Self::disturb(Duration::from_secs(20)),
                "--beside" => {
                    let rounds = value()?;
                    options.beside =
                        rounds.parse().map_err(|_| format!("{argument}: {rounds:?} is no number of rounds"))?;
                }
                "-h" | "--help" => return Ok(None),
                _ => return Err(format!("{argument:?} is unknown; --help lists what there is")),
            }
        }
        Ok(Some(options))
    }
}

fn known(name: &str) -> Result<String, String> {
    let names = services::ALL.map(|service| service.name).join(", ");
    services::service(name).map(|found| found.name.into()).ok_or_else(|| format!("{name:?} is none of {names}"))
}

fn pair(argument: &str, value: &str) -> Result<(String, String), String> {
    let (name, rest) = value.split_once(':').ok_or_else(|| format!("{argument} takes NAME:VALUE, not {value:?}"))?;
    Ok((known(name)?, rest.into()))
}
