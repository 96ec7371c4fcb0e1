//! A program under test whose standard error is read while it runs.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use crate::common::PATIENCE;

/// A process whose standard error is read line by line.
pub struct Running {
    pub child: Child,
    lines: Receiver<String>,
    text: String,
}

impl Running {
    pub fn start(mut command: Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let errors = BufReader::new(child.stderr.take().unwrap());
        let (sender, lines) = sync_channel(100_000);
        std::thread::spawn(move || errors.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        Self { child, lines, text: String::new() }
    }

    /// Waits for a line that contains `part`, and returns it.
    pub fn says(&mut self, part: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let line = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now()));
            let line = line.unwrap_or_else(|_| panic!("{part:?} is not printed: {}", self.text));
            self.text.push_str(&format!("{line}\n"));
            if line.contains(part) {
                return line;
            }
        }
    }

    /// Waits until `holds` returns true.
    pub fn until(&mut self, what: &str, holds: impl Fn() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !holds() {
            assert!(self.child.try_wait().unwrap().is_none() && Instant::now() < deadline, "{what}: {}", self.rest());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }

    /// Waits for the process to end.
    pub fn end(mut self) -> (ExitStatus, String) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return (status, self.rest());
            }
            if Instant::now() > deadline {
                self.child.kill().unwrap();
                panic!("it does not end: {}", self.rest());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn rest(&mut self) -> String {
        while let Ok(line) = self.lines.recv_timeout(Duration::from_secs(1)) {
            self.text.push_str(&format!("{line}\n"));
        }
        self.text.clone()
    }
}
