//! Waiting for answers of a server that may be gone without a word.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::stream::BoxStream;
use futures_util::{Stream, StreamExt};
use sqlx::Error;
use tokio::time::{Instant, Sleep};

/// An answer, if it comes in time.
pub(super) async fn heard<T>(
    patience: Option<Duration>,
    answer: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    match patience {
        Some(patience) => tokio::time::timeout(patience, answer).await.unwrap_or_else(|_| Err(silent())),
        None => answer.await,
    }
}

/// The same for each row of one.
pub(super) fn heard_out<'e, T: Send + 'e>(
    patience: Option<Duration>,
    rows: BoxStream<'e, Result<T, Error>>,
) -> BoxStream<'e, Result<T, Error>> {
    match patience {
        Some(patience) => {
            let silence = Box::pin(tokio::time::sleep(patience));
            Box::pin(HeardOut { rows: Some(rows), patience, silence, heard: false })
        }
        None => rows,
    }
}

fn silent() -> Error {
    Error::Io(io::Error::new(io::ErrorKind::TimedOut, "PostgreSQL does not answer"))
}

/// Rows, and an error at the end when the next one does not come in time.
struct HeardOut<'e, T> {
    /// None behind the end.
    rows: Option<BoxStream<'e, T>>,
    patience: Duration,
    /// One timer for all rows: it is set anew only when one has to be waited for.
    silence: Pin<Box<Sleep>>,
    /// Whether something came since it was set.
    heard: bool,
}

impl<T> Stream for HeardOut<'_, Result<T, Error>> {
    type Item = Result<T, Error>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        let Some(rows) = &mut this.rows else { return Poll::Ready(None) };
        if let Poll::Ready(next) = rows.poll_next_unpin(context) {
            this.heard = true;
            return Poll::Ready(next);
        }
        if std::mem::take(&mut this.heard) {
            this.silence.as_mut().reset(Instant::now() + this.patience);
        }
        match this.silence.as_mut().poll(context) {
            Poll::Ready(()) => {
                this.rows = None;
                Poll::Ready(Some(Err(silent())))
            }
            Poll::Pending => Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{StreamExt, TryStreamExt, stream};

    use super::*;

    const SILENCE: Duration = Duration::from_secs(60);

    /// Rows that come after these pauses in seconds, heard with a patience of one minute: each row, or why there is
    /// none.
    async fn rows(pauses: &'static [u64], ends: bool) -> Vec<Result<u64, io::ErrorKind>> {
        let rows = stream::iter(pauses).then(async |pause| {
            tokio::time::sleep(Duration::from_secs(*pause)).await;
            Ok(*pause)
        });
        let rows = if ends { rows.boxed() } else { rows.chain(stream::pending()).boxed() };
        let heard = heard_out(Some(SILENCE), rows).map_err(|error| match error {
            Error::Io(error) => error.kind(),
            other => panic!("{other}"),
        });
        heard.collect().await
    }

    #[tokio::test(start_paused = true)]
    async fn rows_are_waited_for_one_by_one() {
        assert_eq!(rows(&[50, 59, 0, 59], true).await, [Ok(50), Ok(59), Ok(0), Ok(59)]);
        assert_eq!(rows(&[50, 61, 0], true).await, [Ok(50), Err(io::ErrorKind::TimedOut)], "and nothing behind it");
        assert_eq!(rows(&[], false).await, [Err(io::ErrorKind::TimedOut)]);
        assert_eq!(rows(&[1, 2], false).await, [Ok(1), Ok(2), Err(io::ErrorKind::TimedOut)]);
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_limit_an_answer_may_take_hours() {
        let late = async {
            tokio::time::sleep(Duration::from_hours(5)).await;
            Ok(7)
        };
        assert_eq!(heard(None, late).await.unwrap(), 7);
        let silent = heard(Some(SILENCE), std::future::pending::<Result<(), Error>>()).await.unwrap_err();
        assert!(crate::postgres::is_outage(&silent), "{silent}");
    }
}
