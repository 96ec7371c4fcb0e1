//! Import of label caches of earlier versions (`labels.redb`).
//!
//! The earlier file is only read and stays in place, so that an earlier version still finds its answers. A mark in the
//! present file, written in the same transaction as the answers, identifies the imported state: an interrupted import
//! is repeated from the start, and a file that an earlier version has added to is imported again.

use std::path::Path;
use std::time::UNIX_EPOCH;

use redb::{
    DatabaseError, ReadOnlyDatabase, ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition,
    TableError,
};

use super::database::{Fault, File, Insert};
use crate::observe::telemetry;
use crate::util::quiet;

const REPLIES: TableDefinition<&[u8; 32], &[u8]> = TableDefinition::new("replies");

/// Keys in insertion order.
const ORDER: TableDefinition<u64, &[u8; 32]> = TableDefinition::new("order");

/// Imports the answers of `labels.redb`, in the folder of the cache at `path`, into `file`, unless this state of it was
/// imported before. Failures are logged with the remedy, and the import is tried again when the cache is next opened.
pub(super) fn import(file: &File, path: &Path, most: u64) -> Result<(), Fault> {
    let earlier = path.with_file_name("labels.redb");
    let Some(mark) = mark(&earlier) else { return Ok(()) };
    if file.imported(NAME)?.as_ref() == Some(&mark) {
        return Ok(());
    }
    let place = earlier.display();
    let database = match open(&earlier) {
        Ok(database) => database,
        Err(ImportError::InUse) => {
            tracing::warn!(
                "the label cache {place} of an earlier program is in use by another process; this process does not find its labels and requests those that it needs again. The next process that starts after the other one has ended imports them"
            );
            return Ok(());
        }
        Err(trouble) => {
            log_import(&earlier, &trouble.to_string(), 0);
            return Ok(());
        }
    };
    // Opening may have repaired, and so changed, the file.
    let mark = self::mark(&earlier).unwrap_or(mark);
    let mut broken = None;
    let added = file.import(NAME, &mark, most, |insert| {
        // Answers read before a library error are kept; a failure to write into the present file ends the import.
        match quiet::catch(|| read(&database, most, insert)) {
            Some(Ok(())) => return Ok(true),
            Some(Err(ImportError::Writing(fault))) => return Err(fault),
            Some(Err(trouble)) => broken = Some(trouble.to_string()),
            None => broken = Some("its content is inconsistent".into()),
        }
        Ok(false)
    })?;
    let _ = quiet::catch(|| drop(database));
    match broken {
        Some(why) => log_import(&earlier, &why, added),
        None => tracing::info!(
            "{added} labels of the earlier label cache {place} were imported into {}; the earlier file is no longer needed",
            path.display()
        ),
    }
    Ok(())
}

/// Key under which the import mark is stored.
const NAME: &str = "labels.redb";

/// Returns a description of the state of the file at `path`, its length and modification time; `None` if it does not
/// exist.
fn mark(path: &Path) -> Option<String> {
    let about = std::fs::metadata(path).ok()?;
    let changed = about.modified().ok()?.duration_since(UNIX_EPOCH).unwrap_or_default();
    Some(format!("{} bytes, changed at {}.{:09}", about.len(), changed.as_secs(), changed.subsec_nanos()))
}

fn log_import(earlier: &Path, why: &str, added: u64) {
    telemetry::label_cache_damaged();
    tracing::error!(
        "the label cache {} of an earlier program cannot be read: {why}; {added} of its labels were imported, and the others will be requested again. Put an intact copy in its place, or remove it",
        earlier.display()
    );
}

#[derive(Debug, thiserror::Error)]
enum ImportError {
    #[error("another process has it open")]
    InUse,
    #[error(transparent)]
    Reading(#[from] redb::Error),
    #[error("its content is inconsistent")]
    Panic,
    #[error("{0}")]
    Writing(Fault),
}

/// Open cache file of an earlier version.
enum EarlierFile {
    Intact(ReadOnlyDatabase),
    /// A file that an interrupted process left in need of repair, repaired on opening.
    Repaired(redb::Database),
}

fn open(path: &Path) -> Result<EarlierFile, ImportError> {
    // The library panics on some kinds of damage.
    let opened = quiet::catch(|| match ReadOnlyDatabase::open(path) {
        Ok(database) => Ok(EarlierFile::Intact(database)),
        Err(DatabaseError::RepairAborted) => redb::Database::open(path).map(EarlierFile::Repaired),
        Err(error) => Err(error),
    });
    match opened {
        Some(Ok(database)) => Ok(database),
        Some(Err(DatabaseError::DatabaseAlreadyOpen)) => Err(ImportError::InUse),
        Some(Err(error)) => Err(ImportError::Reading(error.into())),
        None => Err(ImportError::Panic),
    }
}

/// Passes the newest `most` answers to `insert`, oldest first.
fn read(database: &EarlierFile, most: u64, insert: &mut Insert<'_>) -> Result<(), ImportError> {
    let reading = match database {
        EarlierFile::Intact(database) => database.begin_read(),
        EarlierFile::Repaired(database) => database.begin_read(),
    };
    let reading = reading.map_err(redb::Error::from)?;
    let (replies, order) = match (reading.open_table(REPLIES), reading.open_table(ORDER)) {
        (Ok(replies), Ok(order)) => (replies, order),
        // The writing process was killed before it stored anything.
        (Err(TableError::TableDoesNotExist(_)), _) | (_, Err(TableError::TableDoesNotExist(_))) => return Ok(()),
        (Err(error), _) | (_, Err(error)) => return Err(redb::Error::from(error).into()),
    };
    let beyond = order.len().map_err(redb::Error::from)?.saturating_sub(most);
    for row in order.iter().map_err(redb::Error::from)?.skip(usize::try_from(beyond).unwrap_or(usize::MAX)) {
        let (_, key) = row.map_err(redb::Error::from)?;
        let key = key.value();
        if let Some(entry) = replies.get(key).map_err(redb::Error::from)? {
            insert(key, entry.value()).map_err(ImportError::Writing)?;
        }
    }
    Ok(())
}
