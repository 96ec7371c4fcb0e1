//! The file of the label cache, an SQLite database: opening it, reading, writing, and telling damage from a disk that fails.
//!
//! SQLite with a write-ahead log lets several processes read and write the same file, survives a process that is killed and a disk
//! that is full at any write, and reads the file without mapping it into memory, so that damage is an error and not a crash.

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, TransactionBehavior, params};

use super::Key;
use crate::util::process::{file_system, sqlite};

/// How long a write waits for that of another process.
const PATIENCE: Duration = Duration::from_secs(10);

/// Marks a database as a label cache (`PRAGMA application_id`).
const APPLICATION: i32 = 0x5072_4c63;

/// Version of the tables (`PRAGMA user_version`).
const VERSION: i32 = 1;

/// The tables and the index. An answer lies next to its key, so that whatever is damaged, a key leads to its own entry or to
/// one whose checksum is wrong, which is then replaced. The numbers of answers rise in the order in which they came; an answer
/// is changed in place, and removed at the lowest numbers only, so that the numbers have no gaps. `imported` has what was
/// taken over from files of earlier programs.
const TABLES: [&str; 3] = [
    "CREATE INDEX ages ON answers (seq)",
    "CREATE TABLE answers (key BLOB PRIMARY KEY, seq INTEGER NOT NULL, entry BLOB NOT NULL) WITHOUT ROWID",
    "CREATE TABLE imported (name TEXT PRIMARY KEY, mark TEXT NOT NULL)",
];

/// Why the file cannot be used.
#[derive(Debug)]
pub(super) enum Fault {
    /// Another process has written for too long.
    Busy,
    /// Its content is not what was written.
    Damaged(String),
    /// It is not a file of this program, which a person has to look at.
    Foreign(String),
    /// The disk or the system failed, and may work again.
    Disk(String),
    /// Another file is at its path by now, or none.
    Moved,
    /// It could not be opened, or only for reading, and it is too early to try again.
    Closed,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Busy => write!(f, "another process has been writing into it for {} s", PATIENCE.as_secs()),
            Self::Moved => f.write_str("it was moved or removed"),
            Self::Closed => f.write_str("it is not open"),
            Self::Damaged(why) | Self::Foreign(why) | Self::Disk(why) => f.write_str(why),
        }
    }
}

/// The keys that an answer may be kept under.
#[derive(Debug, Clone, Copy)]
pub(super) struct Keys {
    /// Its key.
    pub(super) key: Key,
    /// Its key by the rules of earlier programs; `None` where they could not ask for it.
    pub(super) earlier: Option<Key>,
}

/// An entry as it was found.
#[derive(Debug, Clone)]
pub(super) struct Kept {
    /// Its bytes.
    pub(super) entry: Vec<u8>,
    /// Whether it is kept under the key of earlier programs.
    pub(super) earlier: bool,
}

/// An entry to write.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct New {
    /// Its key.
    pub(super) key: Key,
    /// Its bytes.
    pub(super) entry: Vec<u8>,
    /// The key of earlier programs that the answer was found under, which this entry replaces.
    pub(super) replaces: Option<Key>,
}

/// Answers that were written.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Written {
    /// Those that were there already.
    pub(super) again: u64,
    /// Answers in the file.
    pub(super) entries: u64,
}

/// Takes a key and its entry into the file.
pub(super) type Insert<'a> = dyn FnMut(&Key, &[u8]) -> Result<(), Fault> + 'a;

/// Which file it is: device and inode.
type Place = (u64, u64);

fn place(path: &Path) -> Option<Place> {
    std::fs::metadata(path).ok().map(|found| (found.dev(), found.ino()))
}

/// The open file. With a write-ahead log, reads do not wait for writes.
pub(super) struct File {
    path: PathBuf,
    place: Option<Place>,
    reader: Mutex<Connection>,
    /// `None` where the file was opened as one that nobody writes.
    writer: Option<Mutex<Connection>>,
}

impl File {
    /// Opens the file at `path`, which is made if need be. No other process may do so at the same time.
    pub(super) fn open(path: &Path) -> Result<Self, Fault> {
        Self::open_with(path, if file_system::is_shared(path) { "delete" } else { "wal" })
    }

    /// As [`File::open`], with this journal (`PRAGMA journal_mode`).
    pub(super) fn open_with(path: &Path, journal: &str) -> Result<Self, Fault> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let mut writer = connect(path, flags | OpenFlags::SQLITE_OPEN_CREATE)?;
        let is_new = is_new(&mut writer)?;
        run(&mut writer, |writer| {
            // A file system that offers no shared memory keeps the older journal, which is as safe and slower.
            writer.pragma_update_and_check(None, "journal_mode", journal, |_| Ok(()))?;
            // What was committed is on the disk.
            writer.pragma_update(None, "synchronous", "full")?;
            writer.pragma_update(None, "journal_size_limit", 16 << 20)
        })?;
        if is_new {
            make_tables(&mut writer)?;
        }
        let reader = connect(path, flags)?;
        let file = Self {
            path: path.to_owned(),
            place: place(path),
            reader: Mutex::new(reader),
            writer: Some(Mutex::new(writer)),
        };
        file.len()?;
        Ok(file)
    }

    /// Opens the file at `path` for reading only and without locks, so that it can be read where nothing can be written.
    /// What another process writes meanwhile may be missed.
    pub(super) fn open_unchanging(path: &Path) -> Result<Self, Fault> {
        let disk = |error: &dyn fmt::Display| Fault::Disk(error.to_string());
        let absolute = std::path::absolute(path).map_err(|error| disk(&error))?;
        let mut address = url::Url::from_file_path(absolute).map_err(|()| disk(&"its path has no address"))?;
        address.set_query(Some("immutable=1"));
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_URI;
        let reader = connect(Path::new(address.as_str()), flags)?;
        let file = Self { path: path.to_owned(), place: place(path), reader: Mutex::new(reader), writer: None };
        file.len()?;
        Ok(file)
    }

    /// Whether the file at the path is another one by now: what is written into this one would be lost.
    pub(super) fn is_moved(&self) -> bool {
        place(&self.path) != self.place
    }

    /// Answers in it.
    pub(super) fn len(&self) -> Result<u64, Fault> {
        self.reading(count)
    }

    /// The entries of `keys`. Those of several keys are as they were kept at one moment.
    pub(super) fn get(&self, keys: &[Keys]) -> Result<Vec<Option<Kept>>, Fault> {
        self.reading(|reader| {
            let alone = keys.len() == 1;
            let _moment = if alone { None } else { Some(reader.unchecked_transaction()?) };
            let mut find = reader.prepare_cached("SELECT entry FROM answers WHERE key = ?1")?;
            let mut entry = |key: &Key, earlier: bool| {
                let found = find.query_row([key.as_slice()], |row| {
                    // An entry of another type is a damaged one, as is an empty one.
                    Ok(row.get_ref(0)?.as_bytes().unwrap_or_default().to_vec())
                });
                Ok(found.optional()?.map(|entry| Kept { entry, earlier }))
            };
            keys.iter()
                .map(|keys| match (entry(&keys.key, false)?, &keys.earlier) {
                    (None, Some(earlier)) => match entry(earlier, true)? {
                        // Between the two looks another process may have given it the new key.
                        None if alone => entry(&keys.key, false),
                        found => Ok(found),
                    },
                    (found, _) => Ok(found),
                })
                .collect()
        })
    }

    /// Writes entries in one transaction; they are on the disk when this returns. Beyond `most` entries the oldest are
    /// removed. An entry that is there already counts as one that was bought again if `is_sound` says so of it.
    pub(super) fn put(
        &self,
        entries: &[New],
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
                for New { key, entry, replaces } in entries {
                    let before = find.query_row([key.as_slice()], |row| {
                        Ok(is_sound(key, row.get_ref(0)?.as_bytes().unwrap_or_default()))
                    });
                    match (before.optional()?, replaces) {
                        // Another process has given it the new key.
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

    /// Adds the entries that `source` gives, unless they are there, and notes that what is marked `mark` was taken over
    /// from the file called `name` if `source` says that it was whole; all in one transaction.
    pub(super) fn import(
        &self,
        name: &str,
        mark: &str,
        most: u64,
        source: impl FnOnce(&mut Insert<'_>) -> Result<bool, Fault>,
    ) -> Result<u64, Fault> {
        let Some(writer) = &self.writer else { return Err(Fault::Closed) };
        let mut writer = lock(writer);
        // The index is filled in no order.
        run(&mut writer, |writer| writer.pragma_update(None, "cache_size", -(256 << 10)))?;
        let added = import(&mut writer, (name, mark), most, source);
        run(&mut writer, |writer| writer.pragma_update(None, "cache_size", -(8 << 10)))?;
        added
    }

    /// The mark of what was taken over from the file called `name`.
    pub(super) fn imported(&self, name: &str) -> Result<Option<String>, Fault> {
        self.reading(|reader| {
            reader.query_row("SELECT mark FROM imported WHERE name = ?1", [name], |row| row.get(0)).optional()
        })
    }

    fn reading<T>(&self, work: impl FnOnce(&mut Connection) -> rusqlite::Result<T>) -> Result<T, Fault> {
        run(&mut lock(&self.reader), work).map_err(|fault| match fault {
            // Without locks it may have been read while it changed.
            Fault::Damaged(why) if self.writer.is_none() => Fault::Disk(why),
            fault => fault,
        })
    }

    fn writing<T>(&self, work: impl FnOnce(&mut Connection) -> rusqlite::Result<T>) -> Result<T, Fault> {
        let Some(writer) = &self.writer else { return Err(Fault::Closed) };
        run(&mut lock(writer), work)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn connect(path: &Path, flags: OpenFlags) -> Result<Connection, Fault> {
    let mut connection = Connection::open_with_flags(path, flags).map_err(|error| fault(error, None))?;
    run(&mut connection, |connection| {
        connection.busy_timeout(PATIENCE)?;
        // A damaged file is not to be trusted.
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)?;
        connection.pragma_update(None, "cell_size_check", true)?;
        connection.pragma_update(None, "cache_size", -(8 << 10))
    })?;
    Ok(connection)
}

/// Whether the file has nothing in it yet. Otherwise its tables are those of this program.
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
        (APPLICATION, VERSION) => Err(Fault::Damaged("its tables are not those that were made".into())),
        (APPLICATION, later) => Err(Fault::Foreign(format!("its tables have version {later}, of another program"))),
        _ => Err(Fault::Foreign("it is a database of another program".into())),
    }
}

fn make_tables(writer: &mut Connection) -> Result<(), Fault> {
    run(writer, |writer| {
        let making = writer.transaction_with_behavior(TransactionBehavior::Immediate)?;
        // The index after its table.
        for table in TABLES.iter().rev() {
            making.execute(table, [])?;
        }
        making.pragma_update(None, "application_id", APPLICATION)?;
        making.pragma_update(None, "user_version", VERSION)?;
        making.commit()
    })
}

/// Answers in the file.
fn count(connection: &mut Connection) -> rusqlite::Result<u64> {
    Ok(span(connection)?.map_or(0, |(first, last)| last.abs_diff(first) + 1))
}

/// The lowest and the highest number of an answer. They are found without a walk over the answers.
fn span(connection: &Connection) -> rusqlite::Result<Option<(i64, i64)>> {
    let sql = "SELECT (SELECT min(seq) FROM answers), (SELECT max(seq) FROM answers)";
    connection.prepare_cached(sql)?.query_row([], |row| Ok(row.get::<_, Option<i64>>(0)?.zip(row.get(1)?)))
}

/// The number of the next answer.
fn next(connection: &Connection) -> rusqlite::Result<i64> {
    Ok(span(connection)?.map_or(0, |(_, last)| last.saturating_add(1)))
}

/// Removes the oldest answers beyond `most`, after `added` were added; returns how many are left.
fn trim(connection: &Connection, most: u64, added: u64) -> rusqlite::Result<u64> {
    let mut entries = span(connection)?.map_or(0, |(first, last)| last.abs_diff(first).saturating_add(1));
    if entries > most.saturating_add(added) {
        // A lower bound than before, or numbers that are damaged and are given anew.
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
        let place: &Connection = writer;
        let mut insert = place
            .prepare("INSERT OR IGNORE INTO answers (key, seq, entry) VALUES (?1, ?2, ?3)")
            .map_err(|error| fault(error, Some(place)))?;
        let mut next = next(place).map_err(|error| fault(error, Some(place)))?;
        let whole = source(&mut |key, entry| {
            let new = insert.execute(params![key.as_slice(), next, entry]);
            if new.map_err(|error| fault(error, Some(place)))? > 0 {
                added += 1;
                next = next.saturating_add(1);
            }
            Ok(())
        })?;
        let finish = || {
            if whole {
                place.execute("INSERT OR REPLACE INTO imported (name, mark) VALUES (?1, ?2)", [name, mark])?;
            }
            trim(place, most, added)?;
            place.execute_batch("COMMIT")
        };
        finish().map_err(|error| fault(error, Some(place)))
    })();
    if done.is_err() {
        // Some errors have rolled it back already.
        let _ = writer.execute_batch("ROLLBACK");
    }
    done.map(|()| added)
}

fn run<T>(connection: &mut Connection, work: impl FnOnce(&mut Connection) -> rusqlite::Result<T>) -> Result<T, Fault> {
    work(connection).map_err(|error| fault(error, Some(connection)))
}

/// What `error` of `connection` means.
fn fault(error: rusqlite::Error, connection: Option<&Connection>) -> Fault {
    let Some(code) = error.sqlite_error_code() else {
        // A row of other types than were written.
        return Fault::Damaged(error.to_string());
    };
    match code {
        ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt => Fault::Damaged(error.to_string()),
        ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked => Fault::Busy,
        // A table or a column that is not there, or a row against the tables' rules.
        ErrorCode::Unknown | ErrorCode::ConstraintViolation | ErrorCode::TypeMismatch => {
            Fault::Damaged(error.to_string())
        }
        _ => Fault::Disk(match connection.and_then(sqlite::system_error) {
            Some(system) => format!("{error}: {system}"),
            None => error.to_string(),
        }),
    }
}
