//! The operating system's errors behind those of SQLite.

use rusqlite::{Connection, ffi};

/// Returns the operating system's error that caused the last error of `connection`, if there is one.
pub fn system_error(connection: &Connection) -> Option<std::io::Error> {
    // SAFETY: the connection is open, and the function reads a number from it.
    let number = unsafe { ffi::sqlite3_system_errno(connection.handle()) };
    (number != 0).then(|| std::io::Error::from_raw_os_error(number))
}
