//! The SQLite database file of the label cache: opening, reading, writing, and classifying errors as damage or disk
//! failure.
//!
//! SQLite with a write-ahead log lets several processes read and write the same file. It survives a killed process or a
//! full disk at any write. It reads the file without mapping it into memory, so that damage causes an error and not a
//! crash.

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, TransactionBehavior, params};

use super::Key;
use crate::util::mutex::lock;
use crate::util::process::{file_system, sqlite};

/// Time that a write waits for another process's write.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// Identifier of a label cache database (`PRAGMA application_id`).
const APPLICATION: i32 = 0x5072_4c63;

/// Version of the schema (`PRAGMA user_version`).
const VERSION: i32 = 1;

/// Schema of the tables and the index, sorted by name. An answer is stored next to its key, so that after any damage a
/// key leads to its own entry or to one with a wrong checksum, which is then replaced. `seq` numbers answers in
/// insertion order; an answer is updated in place, and only the lowest numbers are removed, so that the numbers have no
/// gaps. `imported` records the imported files of earlier versions.
const TABLES: [&str; 3] = [
    "CREATE INDEX ages ON answers (seq)",
    "CREATE TABLE answers (key BLOB PRIMARY KEY, seq INTEGER NOT NULL, entry BLOB NOT NULL) WITHOUT ROWID",
    "CREATE TABLE imported (name TEXT PRIMARY KEY, mark TEXT NOT NULL)",
];

/// Reason why the file cannot be used.
#[derive(Debug)]
pub(super) enum Fault {
    /// Another process has been writing for longer than [`WRITE_TIMEOUT`].
    Busy,
    /// The content is damaged.
    Damaged(String),
    /// The file belongs to another program or version; a person has to decide.
    Foreign(String),
    /// The disk or the system failed, possibly temporarily.
    Disk(String),
    /// The file at the path was replaced or removed.
    Moved,
    /// The file could not be opened, or only for reading, and it is too early to try again.
    Closed,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Busy => write!(f, "another process has been writing into it for {} s", WRITE_TIMEOUT.as_secs()),
            Self::Moved => f.write_str("it was moved or removed"),
            Self::Closed => f.write_str("it is not open"),
            Self::Damaged(why) | Self::Foreign(why) | Self::Disk(why) => f.write_str(why),
        }
    }
}

/// Keys under which an answer may be stored.
#[derive(Debug, Clone, Copy)]
pub(super) struct Keys {
    /// The answer's key.
    pub(super) key: Key,
    /// The answer's key in the format of earlier versions; `None` if they could not ask the question.
    pub(super) earlier: Option<Key>,
}

/// A stored entry.
#[derive(Debug, Clone)]
pub(super) struct StoredEntry {
    /// Encoded bytes of the entry.
    pub(super) entry: Vec<u8>,
    /// True if the entry is stored under its earlier key.
    pub(super) earlier: bool,
}

/// An entry to write.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct NewEntry {
    /// The entry's key.
    pub(super) key: Key,
    /// Encoded bytes of the entry.
    pub(super) entry: Vec<u8>,
    /// Earlier key of an existing entry that this one replaces.
    pub(super) replaces: Option<Key>,
}

/// Result of a write.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Written {
    /// Number of written answers that the file already held.
    pub(super) again: u64,
    /// Number of answers in the file afterwards.
    pub(super) entries: u64,
}

/// Callback that inserts a key and its entry into the file.
pub(super) type Insert<'a> = dyn FnMut(&Key, &[u8]) -> Result<(), Fault> + 'a;

/// Device and inode of a file.
type FileId = (u64, u64);

fn file_id(path: &Path) -> Option<FileId> {
    std::fs::metadata(path).ok().map(|found| (found.dev(), found.ino()))
}

/// An open database file. With a write-ahead log, reads do not wait for writes.
pub(super) struct File {
    path: PathBuf,
    file_id: Option<FileId>,
    reader: Mutex<Connection>,
    /// `None` if the file was opened with [`File::open_unchanging`].
    writer: Option<Mutex<Connection>>,
}

impl File {
    /// Opens the file at `path`, creating it if needed. No other process may do so at the same time.
    pub(super) fn open(path: &Path) -> Result<Self, Fault> {
        Self::open_with(path, if file_system::is_shared(path) { "delete" } else { "wal" })
    }

    /// Opens the file as [`File::open`] does, with the given `PRAGMA journal_mode`.
    pub(super) fn open_with(path: &Path, journal: &str) -> Result<Self, Fault> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let mut writer = connect(path, flags | OpenFlags::SQLITE_OPEN_CREATE)?;
        let is_new = is_new(&mut writer)?;
        run(&mut writer, |writer| {
            // A file system without shared memory keeps the rollback journal, which is as safe but slower.
            writer.pragma_update_and_check(None, "journal_mode", journal, |_| Ok(()))?;
            // Committed transactions are synced to disk.
            writer.pragma_update(None, "synchronous", "full")?;
            writer.pragma_update(None, "journal_size_limit", 16 << 20)
        })?;
        if is_new {
            make_tables(&mut writer)?;
        }
        let reader = connect(path, flags)?;
        let file = Self {
            path: path.to_owned(),
            file_id: file_id(path),
            reader: Mutex::new(reader),
            writer: Some(Mutex::new(writer)),
        };
        file.len()?;
        Ok(file)
    }

    /// Opens the file at `path` read-only and without locks, so that it can be read where nothing can be written.
    /// Concurrent writes by other processes may be missed.
    pub(super) fn open_unchanging(path: &Path) -> Result<Self, Fault> {
        let disk = |error: &dyn fmt::Display| Fault::Disk(error.to_string());
        let absolute = std::path::absolute(path).map_err(|error| disk(&error))?;
        let mut address =
            url::Url::from_file_path(absolute).map_err(|()| disk(&"its path cannot be written as a URL"))?;
        address.set_query(Some("immutable=1"));
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_URI;
        let reader = connect(Path::new(address.as_str()), flags)?;
        let file = Self { path: path.to_owned(), file_id: file_id(path), reader: Mutex::new(reader), writer: None };
        file.len()?;
        Ok(file)
    }

    /// Returns whether the path now refers to another file or none, so that writes to this one would be lost.
    pub(super) fn is_moved(&self) -> bool {
        file_id(&self.path) != self.file_id
    }

    /// Returns the number of answers in the file.
    pub(super) fn len(&self) -> Result<u64, Fault> {
        self.reading(count)
    }

    /// Returns the entries of `keys`. Several keys are read in one transaction.
    pub(super) fn get(&self, keys: &[Keys]) -> Result<Vec<Option<StoredEntry>>, Fault> {
        self.reading(|reader| {
            let alone = keys.len() == 1;
            let _moment = if alone { None } else { Some(reader.unchecked_transaction()?) };
            let mut find = reader.prepare_cached("SELECT entry FROM answers WHERE key = ?1")?;
            let mut entry = |key: &Key, earlier: bool| {
                let found = find.query_row([key.as_slice()], |row| {
                    // An entry of another column type is damaged, like an empty one.
                    Ok(row.get_ref(0)?.as_bytes().unwrap_or_default().to_vec())
                });
                Ok(found.optional()?.map(|entry| StoredEntry { entry, earlier }))
            };
            keys.iter()
                .map(|keys| match (entry(&keys.key, false)?, &keys.earlier) {
                    (None, Some(earlier)) => match entry(earlier, true)? {
                        // Another process may have moved the entry to the new key between the two queries.
                        None if alone => entry(&keys.key, false),
                        found => Ok(found),
                    },
                    (found, _) => Ok(found),
                })
                .collect()
        })
    }

    /// Writes entries in one transaction; they are synced to disk on return. If there are more than `most` entries
    /// afterwards, the oldest are removed. An entry that replaces an existing one counts as bought again if `is_sound`
    /// accepts the existing one.
    pub(super) fn put(
        &self,
        entries: &[NewEntry],
        most: u64,
        is_sound: impl Fn(&Key, &[u8]) -> bool,
    ) -> Result<Written, Fault> {
        self.writing(|writer| {
            let writing = writer.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let mut written = Written::default();
            let mut added = 0;
            {
                let mut find = writing.prepare_cached("SELECT entry FROM answers WHERE key = ?1")?;
                let mut change = writing.prepare_cached("UPDATE answers SET entry = ?2 WHERE key = ?1")?;
                let mut rename = writing.prepare_cached("UPDATE answers SET key = ?1, entry = ?2 WHERE key = ?3")?;
                let mut insert = writing.prepare_cached("INSERT INTO answers (key, seq, entry) VALUES (?1, ?2, ?3)")?;
                let mut next = next(&writing)?;
                for NewEntry { key, entry, replaces } in entries {
                    let before = find.query_row([key.as_slice()], |row| {
                        Ok(is_sound(key, row.get_ref(0)?.as_bytes().unwrap_or_default()))
                    });
                    match (before.optional()?, replaces) {
                        // Another process has moved the entry to the new key.
                        (Some(true), Some(_)) => {}
                        (Some(sound), _) => {
                            written.again += u64::from(sound);
                            change.execute(params![key.as_slice(), entry])?;
                        }
                        (None, Some(earlier))
                            if rename.execute(params![key.as_slice(), entry, earlier.as_slice()])? > 0 => {}
                        (None, _) => {
                            added += insert.execute(params![key.as_slice(), next, entry])? as u64;
                            next = next.saturating_add(1);
                        }
                    }
                }
            }
            written.entries = trim(&writing, most, added)?;
            writing.commit()?;
            Ok(written)
        })
    }

    /// Adds the entries that `source` provides, unless their keys exist, in one transaction. If `source` returns true
    /// (complete), the transaction also records that the state `mark` of the file `name` was imported. Returns the
    /// number of added entries.
    pub(super) fn import(
        &self,
        name: &str,
        mark: &str,
        most: u64,
        source: impl FnOnce(&mut Insert<'_>) -> Result<bool, Fault>,
    ) -> Result<u64, Fault> {
        let Some(writer) = &self.writer else { return Err(Fault::Closed) };
        let mut writer = lock(writer);
        // The index is filled in random order, which needs a larger cache.
        run(&mut writer, |writer| writer.pragma_update(None, "cache_size", -(256 << 10)))?;
        let added = import(&mut writer, (name, mark), most, source);
        run(&mut writer, |writer| writer.pragma_update(None, "cache_size", -(8 << 10)))?;
        added
    }

    /// Returns the mark of the last complete import of the file `name`.
    pub(super) fn imported(&self, name: &str) -> Result<Option<String>, Fault> {
        self.reading(|reader| {
            reader.query_row("SELECT mark FROM imported WHERE name = ?1", [name], |row| row.get(0)).optional()
        })
    }

    fn reading<T>(&self, work: impl FnOnce(&mut Connection) -> rusqlite::Result<T>) -> Result<T, Fault> {
        run(&mut lock(&self.reader), work).map_err(|fault| match fault {
            // Without locks, the file may have been changed while it was read.
            Fault::Damaged(why) if self.writer.is_none() => Fault::Disk(why),
            fault => fault,
        })
    }

    fn writing<T>(&self, work: impl FnOnce(&mut Connection) -> rusqlite::Result<T>) -> Result<T, Fault> {
        let Some(writer) = &self.writer else { return Err(Fault::Closed) };
        run(&mut lock(writer), work)
    }
}

fn connect(path: &Path, flags: OpenFlags) -> Result<Connection, Fault> {
    let mut connection = Connection::open_with_flags(path, flags).map_err(|error| fault(error, None))?;
    run(&mut connection, |connection| {
        connection.busy_timeout(WRITE_TIMEOUT)?;
        // A damaged file must not be trusted.
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)?;
        connection.pragma_update(None, "cell_size_check", true)?;
        connection.pragma_update(None, "cache_size", -(8 << 10))
    })?;
    Ok(connection)
}

/// Returns whether the database is empty; fails unless it is empty or has this program's schema.
fn is_new(writer: &mut Connection) -> Result<bool, Fault> {
    let number = |writer: &Connection, name: &str| writer.pragma_query_value(None, name, |row| row.get::<_, i32>(0));
    let tables = |writer: &Connection| -> rusqlite::Result<Vec<String>> {
        let mut all = writer.prepare("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY name")?;
        all.query_map([], |row| row.get(0))?.collect()
    };
    let (application, version, found) = run(writer, |writer| {
        Ok((number(writer, "application_id")?, number(writer, "user_version")?, tables(writer)?))
    })?;
    match (application, version) {
        (0, 0) if found.is_empty() => Ok(true),
        (APPLICATION, VERSION) if found == TABLES => Ok(false),
        (APPLICATION, VERSION) => Err(Fault::Damaged("its tables differ from those of the label cache".into())),
        (APPLICATION, later) => Err(Fault::Foreign(format!("its tables have version {later}, of another program"))),
        _ => Err(Fault::Foreign("it is a database of another program".into())),
    }
}

fn make_tables(writer: &mut Connection) -> Result<(), Fault> {
    run(writer, |writer| {
        let making = writer.transaction_with_behavior(TransactionBehavior::Immediate)?;
        // In reverse name order, so that the index follows its table.
        for table in TABLES.iter().rev() {
            making.execute(table, [])?;
        }
        making.pragma_update(None, "application_id", APPLICATION)?;
        making.pragma_update(None, "user_version", VERSION)?;
        making.commit()
    })
}

/// Returns the number of answers in the file.
fn count(connection: &mut Connection) -> rusqlite::Result<u64> {
    Ok(span(connection)?.map_or(0, |(first, last)| last.abs_diff(first) + 1))
}

/// Returns the lowest and the highest `seq`, using the index.
fn span(connection: &Connection) -> rusqlite::Result<Option<(i64, i64)>> {
    let sql = "SELECT (SELECT min(seq) FROM answers), (SELECT max(seq) FROM answers)";
    connection.prepare_cached(sql)?.query_row([], |row| Ok(row.get::<_, Option<i64>>(0)?.zip(row.get(1)?)))
}

/// Returns the `seq` of the next answer.
fn next(connection: &Connection) -> rusqlite::Result<i64> {
    Ok(span(connection)?.map_or(0, |(_, last)| last.saturating_add(1)))
}

/// Removes the oldest answers beyond `most`, after `added` were added. Returns the number of remaining answers.
fn trim(connection: &Connection, most: u64, added: u64) -> rusqlite::Result<u64> {
    let mut entries = span(connection)?.map_or(0, |(first, last)| last.abs_diff(first).saturating_add(1));
    if entries > most.saturating_add(added) {
        // The limit was lowered, or numbers are damaged and are assigned again.
        let counted = connection.query_row("SELECT count(*) FROM answers", [], |row| row.get::<_, i64>(0))? as u64;
        if counted != entries {
            connection.execute_batch(
                "REINDEX ages;
                 UPDATE answers SET seq = new.seq
                 FROM (SELECT key, row_number() OVER (ORDER BY seq) AS seq FROM answers) AS new
                 WHERE answers.key = new.key",
            )?;
            entries = connection.query_row("SELECT count(*) FROM answers", [], |row| row.get::<_, i64>(0))? as u64;
        }
    }
    let beyond = entries.saturating_sub(most);
    if beyond > 0 {
        let sql = "DELETE FROM answers WHERE key IN (SELECT key FROM answers ORDER BY seq LIMIT ?1)";
        connection.execute(sql, [i64::try_from(beyond).unwrap_or(i64::MAX)])?;
    }
    Ok(entries - beyond)
}

fn import(
    writer: &mut Connection,
    (name, mark): (&str, &str),
    most: u64,
    source: impl FnOnce(&mut Insert<'_>) -> Result<bool, Fault>,
) -> Result<u64, Fault> {
    run(writer, |writer| writer.execute_batch("BEGIN IMMEDIATE"))?;
    let mut added = 0;
    let done = (|| {
        let connection: &Connection = writer;
        let mut insert = connection
            .prepare("INSERT OR IGNORE INTO answers (key, seq, entry) VALUES (?1, ?2, ?3)")
            .map_err(|error| fault(error, Some(connection)))?;
        let mut next = next(connection).map_err(|error| fault(error, Some(connection)))?;
        let whole = source(&mut |key, entry| {
            let new = insert.execute(params![key.as_slice(), next, entry]);
            if new.map_err(|error| fault(error, Some(connection)))? > 0 {
                added += 1;
                next = next.saturating_add(1);
            }
            Ok(())
        })?;
        let finish = || {
            if whole {
                connection.execute("INSERT OR REPLACE INTO imported (name, mark) VALUES (?1, ?2)", [name, mark])?;
            }
            trim(connection, most, added)?;
            connection.execute_batch("COMMIT")
        };
        finish().map_err(|error| fault(error, Some(connection)))
    })();
    if done.is_err() {
        // Some errors have already rolled back.
        let _ = writer.execute_batch("ROLLBACK");
    }
    done.map(|()| added)
}

fn run<T>(connection: &mut Connection, work: impl FnOnce(&mut Connection) -> rusqlite::Result<T>) -> Result<T, Fault> {
    work(connection).map_err(|error| fault(error, Some(connection)))
}

/// Classifies `error` of `connection`.
fn fault(error: rusqlite::Error, connection: Option<&Connection>) -> Fault {
    let Some(code) = error.sqlite_error_code() else {
        // A row has other column types than were written.
        return Fault::Damaged(error.to_string());
    };
    match code {
        ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt => Fault::Damaged(error.to_string()),
        ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked => Fault::Busy,
        // A missing table or column, or a row that violates a constraint.
        ErrorCode::Unknown | ErrorCode::ConstraintViolation | ErrorCode::TypeMismatch => {
            Fault::Damaged(error.to_string())
        }
        _ => Fault::Disk(match connection.and_then(sqlite::system_error) {
            Some(system) => format!("{error}: {system}"),
            None => error.to_string(),
        }),
    }
}
