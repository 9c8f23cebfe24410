//! A proxy that sends reads to a standby, as those do that split reads from writes.

use std::collections::HashSet;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Forwards each session to a primary, and what begins with `select` to a standby.
pub struct Split {
    pub address: String,
}

/// A message of PostgreSQL's protocol, version 3: a byte that tells its kind, then its length, then the rest.
async fn message(from: &mut TcpStream) -> Option<Vec<u8>> {
    let mut message = vec![0; 5];
    from.read_exact(&mut message).await.ok()?;
    let length = u32::from_be_bytes(message[1..].try_into().unwrap()) as usize;
    message.resize(length + 1, 0);
    from.read_exact(&mut message[5..]).await.ok()?;
    Some(message)
}

/// Everything up to the server's word that it is ready for the next query.
async fn answer(server: &mut TcpStream, client: Option<&mut TcpStream>) -> Option<()> {
    let mut all = Vec::new();
    loop {
        let next = message(server).await?;
        all.extend_from_slice(&next);
        if next[0] == b'Z' {
            break;
        }
    }
    match client {
        Some(client) => client.write_all(&all).await.ok(),
        None => Some(()),
    }
}

fn texts(message: &[u8]) -> (String, String) {
    let mut parts = message[5..].split(|byte| *byte == 0).map(|part| String::from_utf8_lossy(part).into_owned());
    (parts.next().unwrap_or_default(), parts.next().unwrap_or_default())
}

/// One session. A request ends with Sync, or is a simple query.
async fn session(mut client: TcpStream, mut primary: TcpStream, mut standby: TcpStream) -> Option<()> {
    let mut startup = vec![0; 4];
    client.read_exact(&mut startup).await.ok()?;
    startup.resize(u32::from_be_bytes(startup[..4].try_into().unwrap()) as usize, 0);
    client.read_exact(&mut startup[4..]).await.ok()?;
    primary.write_all(&startup).await.ok()?;
    standby.write_all(&startup).await.ok()?;
    answer(&mut primary, Some(&mut client)).await?;
    answer(&mut standby, None).await?;
    let mut reads = HashSet::new();
    loop {
        let (mut request, mut is_read) = (Vec::new(), false);
        loop {
            let next = message(&mut client).await?;
            request.extend_from_slice(&next);
            match next[0] {
                b'P' => {
                    let (name, sql) = texts(&next);
                    is_read = sql.trim_start().starts_with("select") && !sql.contains("nextval");
                    if is_read {
                        reads.insert(name)
                    } else {
                        reads.remove(&name)
                    };
                }
                b'B' => is_read = reads.contains(&texts(&next).1),
                b'C' => is_read |= next[5] == b'S' && reads.contains(&texts(&next).0[1..]),
                b'X' => return None,
                b'Q' | b'S' => break,
                _ => {}
            }
        }
        let server = if is_read { &mut standby } else { &mut primary };
        server.write_all(&request).await.ok()?;
        answer(server, Some(&mut client)).await?;
    }
}

impl Split {
    /// Between servers that ask for no password, by their URLs.
    pub async fn between(primary: &str, standby: &str) -> Self {
        let address = |url: &str| url.rsplit('@').next().unwrap().split('/').next().unwrap().to_string();
        let (primary, standby) = (address(primary), address(standby));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let split = Self { address: listener.local_addr().unwrap().to_string() };
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (Ok(primary), Ok(standby)) =
                    (TcpStream::connect(&primary).await, TcpStream::connect(&standby).await)
                else {
                    continue;
                };
                tokio::spawn(session(client, primary, standby));
            }
        });
        split
    }
}
