//! XChaCha20-Poly1305. Its nonces are long enough to be random, however many events one key seals.

use aftercommit_outbox::EventId;
use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use uuid::Uuid;
use zeroize::Zeroizing;

use super::error::{SealError, SealErrorKind};

const NONCE: usize = 24;

/// The bytes of a key, which are overwritten when it is dropped.
pub(super) type Key = Zeroizing<[u8; 32]>;

fn random<const N: usize>() -> Result<[u8; N], SealError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| {
        SealError::new(SealErrorKind::Random, format!("the system gives no random numbers: {error}"))
    })?;
    Ok(bytes)
}

/// A new key.
pub(super) fn new_key() -> Result<Key, SealError> {
    random().map(Zeroizing::new)
}

/// The nonce, and behind it the ciphertext.
pub(super) fn encrypt(key: &Key, plain: &[u8], associated: &[u8]) -> Result<Vec<u8>, SealError> {
    let nonce: [u8; NONCE] = random()?;
    let sealed = XChaCha20Poly1305::new(&(**key).into())
        .encrypt(&XNonce::from(nonce), Payload { msg: plain, aad: associated })
        .map_err(|_| SealError::new(SealErrorKind::Event, "the payload is too large to be encrypted"))?;
    Ok([nonce.as_slice(), &sealed].concat())
}

/// None when the key, what is associated, or a bit of it is another.
pub(super) fn decrypt(key: &Key, sealed: &[u8], associated: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let (nonce, sealed) = sealed.split_at_checked(NONCE)?;
    let nonce: [u8; NONCE] = nonce.try_into().ok()?;
    let payload = Payload { msg: sealed, aad: associated };
    XChaCha20Poly1305::new(&(**key).into()).decrypt(&XNonce::from(nonce), payload).ok().map(Zeroizing::new)
}

/// What binds a payload to its event.
pub(super) fn for_event(id: EventId, event_type: &str, key_ref: Uuid) -> Vec<u8> {
    parts(&[b"aftercommit sealed event 1", id.as_uuid().as_bytes(), event_type.as_bytes(), key_ref.as_bytes()])
}

/// What binds a data key to its row.
pub(super) fn for_key(key_ref: Uuid, kind: &str, id: &str, master: &str) -> Vec<u8> {
    let domain = b"aftercommit data key 1";
    parts(&[domain, key_ref.as_bytes(), kind.as_bytes(), id.as_bytes(), master.as_bytes()])
}

/// Each part with its length in front, so that no two lists of parts are the same bytes.
fn parts(parts: &[&[u8]]) -> Vec<u8> {
    parts.iter().flat_map(|part| (part.len() as u64).to_be_bytes().into_iter().chain(part.iter().copied())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_key_and_place_open_it() {
        let (key, other) = (new_key().unwrap(), new_key().unwrap());
        let sealed = encrypt(&key, b"ann", b"here").unwrap();
        assert_eq!(decrypt(&key, &sealed, b"here").unwrap().as_slice(), b"ann");
        assert_ne!(encrypt(&key, b"ann", b"here").unwrap(), sealed, "each time another nonce");
        assert!(decrypt(&other, &sealed, b"here").is_none() && decrypt(&key, &sealed, b"there").is_none());
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert!(decrypt(&key, &changed, b"here").is_none(), "byte {at}");
            assert!(decrypt(&key, &sealed[..at], b"here").is_none(), "{at} bytes of it");
        }
    }

    #[test]
    fn no_two_places_are_the_same() {
        let (key, event) = (Uuid::new_v4(), EventId::new());
        assert_ne!(for_key(key, "ab", "c", "m"), for_key(key, "a", "bc", "m"));
        assert_ne!(for_event(event, "a", key), for_event(EventId::new(), "a", key));
        assert_ne!(for_event(event, "a", key), for_event(event, "b", key));
    }
}
