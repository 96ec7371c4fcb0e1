//! The file of the label cache: opening it, reading, writing, and telling damage from a disk that fails.

use std::cell::Cell;
use std::fmt;
use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Once;

use redb::{
    CommitError, Database, DatabaseError, ReadableDatabase, ReadableTable, ReadableTableMetadata, StorageError,
    TableDefinition, TableError, TransactionError,
};

use super::Key;

const REPLIES: TableDefinition<&[u8; 32], &[u8]> = TableDefinition::new("replies");

/// Keys in the order in which their answers came, so that the oldest can go.
const ORDER: TableDefinition<u64, &[u8; 32]> = TableDefinition::new("order");

/// Why the file cannot be used.
#[derive(Debug)]
pub(super) enum Fault {
    /// Another process has it open.
    InUse,
    /// Its content is not what was written.
    Damaged(String),
    /// The disk or the system failed, and may work again.
    Disk(String),
    /// It was closed by such a failure, and it is too early to open it again.
    Closed,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InUse => f.write_str("another process has it open"),
            Self::Closed => f.write_str("it is closed"),
            Self::Damaged(why) | Self::Disk(why) => f.write_str(why),
        }
    }
}

impl From<StorageError> for Fault {
    fn from(error: StorageError) -> Self {
        match &error {
            StorageError::Corrupted(_) => Self::Damaged(error.to_string()),
            // A file that is no database, or ends where a page should be.
            StorageError::Io(io) if matches!(io.kind(), ErrorKind::InvalidData | ErrorKind::UnexpectedEof) => {
                Self::Damaged(error.to_string())
            }
            _ => Self::Disk(error.to_string()),
        }
    }
}

impl From<DatabaseError> for Fault {
    fn from(error: DatabaseError) -> Self {
        match error {
            DatabaseError::DatabaseAlreadyOpen => Self::InUse,
            DatabaseError::Storage(error) => error.into(),
            other => Self::Damaged(other.to_string()),
        }
    }
}

impl From<TransactionError> for Fault {
    fn from(error: TransactionError) -> Self {
        match error {
            TransactionError::Storage(error) => error.into(),
            other => Self::Disk(other.to_string()),
        }
    }
}

impl From<TableError> for Fault {
    fn from(error: TableError) -> Self {
        match error {
            TableError::Storage(error) => error.into(),
            other => Self::Damaged(other.to_string()),
        }
    }
}

impl From<CommitError> for Fault {
    fn from(error: CommitError) -> Self {
        match error {
            CommitError::Storage(error) => error.into(),
            other => Self::Disk(other.to_string()),
        }
    }
}

/// Answers that were written.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Written {
    /// Those that were there already.
    pub(super) again: u64,
    /// Answers in the file.
    pub(super) entries: u64,
}

/// The open file.
pub(super) struct File(Option<Database>);

impl File {
    /// Opens the file at `path`, which is made if need be.
    pub(super) fn open(path: &Path) -> Result<Self, Fault> {
        let known = path.exists();
        let opened = Self::open_or_make(path);
        if opened.is_err() && !known {
            // Half a file, of a disk that was full, would be taken for a damaged one. There is nothing in it.
            let _ = std::fs::remove_file(path);
        }
        opened
    }

    fn open_or_make(path: &Path) -> Result<Self, Fault> {
        guarded(|| {
            let database = Database::create(path)?;
            let reading = database.begin_read()?;
            // Opening a file that is whole writes nothing, so that a full disk can be read.
            match (reading.open_table(REPLIES), reading.open_table(ORDER)) {
                (Ok(replies), Ok(order)) => {
                    replies.len()?;
                    order.last()?;
                }
                (Err(TableError::TableDoesNotExist(_)), _) | (_, Err(TableError::TableDoesNotExist(_))) => {
                    let writing = database.begin_write()?;
                    writing.open_table(REPLIES)?;
                    writing.open_table(ORDER)?;
                    writing.commit()?;
                }
                (Err(error), _) | (_, Err(error)) => return Err(error.into()),
            }
            drop(reading);
            Ok(Self(Some(database)))
        })
    }

    fn database(&self) -> Result<&Database, Fault> {
        self.0.as_ref().ok_or(Fault::Closed)
    }

    /// Answers in it.
    pub(super) fn len(&self) -> Result<u64, Fault> {
        guarded(|| Ok(self.database()?.begin_read()?.open_table(REPLIES)?.len()?))
    }

    /// The entries of `keys`.
    pub(super) fn get(&self, keys: &[Key]) -> Result<Vec<Option<Vec<u8>>>, Fault> {
        guarded(|| {
            let table = self.database()?.begin_read()?.open_table(REPLIES)?;
            keys.iter().map(|key| Ok(table.get(key)?.map(|value| value.value().to_vec()))).collect()
        })
    }

    /// Writes entries; they are on the disk when this returns. Beyond `most` entries the oldest go. An entry that is there
    /// already counts as one that was bought again if `is_sound` says so of it.
    pub(super) fn put(
        &self,
        entries: &[(Key, Vec<u8>)],
        most: u64,
        is_sound: impl Fn(&Key, &[u8]) -> bool,
    ) -> Result<Written, Fault> {
        guarded(|| {
            let writing = self.database()?.begin_write()?;
            let mut written = Written::default();
            {
                let (mut table, mut order) = (writing.open_table(REPLIES)?, writing.open_table(ORDER)?);
                let mut next = order.last()?.map_or(0, |(last, _)| last.value().wrapping_add(1));
                for (key, entry) in entries {
                    if let Some(before) = table.insert(key, entry.as_slice())? {
                        written.again += u64::from(is_sound(key, before.value()));
                        continue;
                    }
                    order.insert(next, key)?;
                    next = next.wrapping_add(1);
                }
                while table.len()? > most {
                    let Some(oldest) = order.pop_first()?.map(|(_, key)| *key.value()) else { break };
                    table.remove(&oldest)?;
                }
                written.entries = table.len()?;
            }
            writing.commit()?;
            Ok(written)
        })
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let database = self.0.take();
        // Closing a damaged file may fail like any use of it.
        let _ = guarded(|| {
            drop(database);
            Ok(())
        });
    }
}

thread_local! {
    /// Whether a panic on this thread is told as an error by who catches it.
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work` on the database. The library panics on some kinds of damage; that becomes an error, and is not printed.
fn guarded<T>(work: impl FnOnce() -> Result<T, Fault>) -> Result<T, Fault> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !GUARDED.get() {
                before(info);
            }
        }));
    });
    let outer = GUARDED.replace(true);
    let done = catch_unwind(AssertUnwindSafe(work));
    GUARDED.set(outer);
    done.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
        Err(Fault::Damaged(format!("its content is inconsistent ({})", text.lines().next().unwrap_or_default())))
    })
}
