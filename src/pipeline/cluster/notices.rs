//! Notices from one process to all others of a run: the last value of each key is kept, or told once to those who listen.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use preceptor_actors::transport::TransportError;

use crate::util::mutex::lock;

/// Notice boards that processes share. Keys consist of letters, digits, `-` and `_`.
pub trait Notices: Send + Sync {
    /// Creates a board, unless it exists.
    ///
    /// # Errors
    /// If the transport is not available.
    fn open(&self, board: &str) -> Result<(), TransportError>;

    /// Sets the value of `key`, which stays until it is set again.
    ///
    /// # Errors
    /// If the transport is not available.
    fn set(&self, board: &str, key: &str, value: &[u8]) -> Result<(), TransportError>;

    /// Returns the value of `key`; `None` if it was never set.
    ///
    /// # Errors
    /// If the transport is not available.
    fn get(&self, board: &str, key: &str) -> Result<Option<Vec<u8>>, TransportError>;

    /// Sends a value to those who listen to the board now. It is not kept, and may be lost.
    ///
    /// # Errors
    /// If the transport is not available.
    fn tell(&self, board: &str, key: &str, value: &[u8]) -> Result<(), TransportError>;

    /// Returns what was told since the last call, with the keys; the first call begins to listen.
    ///
    /// # Errors
    /// If the transport is not available.
    fn heard(&self, board: &str) -> Result<Vec<(String, Vec<u8>)>, TransportError>;
}

/// Notice boards in the memory of this process. A clone shares them.
#[derive(Clone, Default)]
pub struct MemoryNotices(Arc<Mutex<HashMap<String, Board>>>);

#[derive(Default)]
struct Board {
    values: HashMap<String, Vec<u8>>,
    told: Vec<(String, Vec<u8>)>,
}

impl Notices for MemoryNotices {
    fn open(&self, board: &str) -> Result<(), TransportError> {
        lock(&self.0).entry(board.to_owned()).or_default();
        Ok(())
    }

    fn set(&self, board: &str, key: &str, value: &[u8]) -> Result<(), TransportError> {
        lock(&self.0).entry(board.to_owned()).or_default().values.insert(key.to_owned(), value.to_vec());
        Ok(())
    }

    fn get(&self, board: &str, key: &str) -> Result<Option<Vec<u8>>, TransportError> {
        Ok(lock(&self.0).get(board).and_then(|board| board.values.get(key).cloned()))
    }

    fn tell(&self, board: &str, key: &str, value: &[u8]) -> Result<(), TransportError> {
        let mut boards = lock(&self.0);
        let told = &mut boards.entry(board.to_owned()).or_default().told;
        // As with a broker, nobody may be listening.
        if told.len() < 1000 {
            told.push((key.to_owned(), value.to_vec()));
        }
        Ok(())
    }

    fn heard(&self, board: &str) -> Result<Vec<(String, Vec<u8>)>, TransportError> {
        Ok(std::mem::take(&mut lock(&self.0).entry(board.to_owned()).or_default().told))
    }
}
