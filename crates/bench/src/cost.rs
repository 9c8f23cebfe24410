//! What work costs: time by the clock, and processor time as the system tells it.

use std::fs;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// What an arm took for its events, without what it needed to get ready.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Cost {
    pub(crate) seconds: f64,
    /// Of all its threads; none where the system does not tell.
    pub(crate) cpu_seconds: Option<f64>,
}

/// Takes the time from now on.
pub(crate) struct Clock {
    started: Instant,
    cpu: Option<Duration>,
}

impl Clock {
    pub(crate) fn start() -> Self {
        Self { cpu: cpu("self"), started: Instant::now() }
    }

    pub(crate) fn stop(self) -> Cost {
        let seconds = self.started.elapsed().as_secs_f64();
        let cpu = self.cpu.zip(cpu("self")).map(|(before, now)| (now - before).as_secs_f64());
        Cost { seconds, cpu_seconds: cpu }
    }
}

/// The processor time of a process, or of `self`; none where the system does not tell.
pub(crate) fn cpu(process: &str) -> Option<Duration> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // Behind the program's name, which is in brackets and may hold anything: user and system time are the 12th and 13th
    // field, in hundredths of a second.
    let mut fields = stat.rsplit(')').next()?.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    Some(Duration::from_millis((ticks()? + ticks()?) * 10))
}
