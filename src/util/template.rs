//! Templates as programs that came with a model or a configuration: each is given a budget, and a stack on which values
//! that it nests in each other can be taken apart again.

use std::error::Error as _;
use std::fmt::{self, Write};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use minijinja::value::ValueKind;
use minijinja::{Environment, Error, ErrorKind, Output, State, UndefinedBehavior, Value, filters};

/// Most bytes of a template; those that models carry have up to thirty thousand.
pub const LONGEST: usize = 64 << 10;
/// Longest message of an error, which a template may have written.
const LONGEST_ERROR: usize = 500;
/// A step can put a value into another one, and minijinja walks them by recursion: it takes up to 512 bytes of stack for each,
/// and several steps put one into another. Pages that are not used are not taken, but count for a limit on address space.
const STACK_PER_STEP: usize = 512;
const STACK: std::ops::RangeInclusive<usize> = 16 << 20..=512 << 20;
/// How long a template is waited for, in moments: what minijinja does not charge for ends here. A thread that is given up
/// on ends with the program, which this is the end of. Moments, since a program that was stopped and goes on has not waited.
const PATIENCE: usize = 50;
const MOMENT: Duration = Duration::from_millis(100);
/// Bytes of a value's written form that a step pays for: it is walked for them.
pub const BYTES_PER_STEP: u64 = 4;
/// A person's own template of fewer bytes without a namespace cannot nest values deeper than any stack bears.
const SHALLOW: usize = 8 << 10;

/// Steps that a template may take over so many parts (messages of a conversation) of so many bytes in all. A step also
/// pays for 64 bytes that are written or copied, so that this bounds the output, too. Models' templates take up to two
/// hundred steps for a message, and copy it six times. Some things that minijinja does grow with the square of the steps:
/// with these, they take seconds.
pub fn budget(parts: usize, bytes: usize) -> u64 {
    30_000 + 500 * parts as u64 + bytes as u64 / 4
}

/// Where templates are parsed and filled in. Whoever fills one in sets the fuel.
pub fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_formatter(emit);
    environment.add_filter("string", |state: &State<'_, '_>, value: &Value| {
        affordable(state, value)?;
        filters::string(state, value)
    });
    environment
}

/// Checks that `source` may be a template.
///
/// # Errors
/// When it is longer than any is.
pub fn check(source: &str) -> Result<()> {
    let length = source.len();
    ensure!(length <= LONGEST, "it has {length} bytes, and {LONGEST} are the most that a template may have");
    Ok(())
}

/// Fills in a short template of a person's own, in which every name must be there.
///
/// # Errors
/// Syntax that is no Jinja, a name that is not there, or a template that does not come to an end.
pub fn fill_text(source: &str, values: Value) -> Result<String> {
    const NAME: &str = "text";
    check(source)?;
    let mut environment = environment();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    let names = values.try_iter().into_iter().flatten();
    let bytes: usize = names.filter_map(|name| values.get_item(&name).ok()?.as_str().map(str::len)).sum();
    environment.set_fuel(Some(budget(1, source.len() + bytes)));
    environment.add_template_owned(NAME, source.to_owned())?;
    if source.len() < SHALLOW && !source.contains("namespace") {
        return render(&environment, NAME, values);
    }
    fill(environment, NAME, values)
}

/// Fills in the template called `name` of an environment of this module's, which has been given a [`budget`].
///
/// # Errors
/// What the template stumbles over, or that it does not come to an end.
pub fn fill(environment: Environment<'static>, name: &'static str, values: Value) -> Result<String> {
    let steps = environment.fuel().and_then(|steps| usize::try_from(steps).ok()).unwrap_or(usize::MAX);
    let stack = steps.saturating_mul(STACK_PER_STEP).clamp(*STACK.start(), *STACK.end());
    let worker = Worker::with(stack)?;
    let (said, heard) = sync_channel(1);
    // The listener may have given up.
    worker.give(Box::new(move || drop(said.send(render(&environment, name, values)))))?;
    for _ in 0..PATIENCE {
        match heard.recv_timeout(MOMENT) {
            Ok(filled) => {
                worker.rest();
                return filled;
            }
            Err(RecvTimeoutError::Disconnected) => bail!("the template engine broke down"),
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
    Err(endless())
}

type Job = Box<dyn FnOnce() + Send>;

/// A thread that fills templates in, one after another: to start a thread takes ten times as long as most templates. It ends
/// once it is dropped and its job, if it has one, is done.
struct Worker {
    /// Bytes of its stack.
    stack: usize,
    jobs: SyncSender<Job>,
}

/// Workers without a job.
static IDLE: Mutex<Vec<Worker>> = Mutex::new(Vec::new());
/// Most workers that are kept without a job.
const MOST_IDLE: usize = 64;

impl Worker {
    /// Returns an idle worker with a stack of at least `stack` bytes, or starts one.
    ///
    /// # Errors
    /// The system's limits on threads and memory, with the remedy.
    fn with(stack: usize) -> Result<Self> {
        let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
        let fitting = idle.iter().position(|worker| worker.stack >= stack);
        if let Some(worker) = fitting.map(|i| idle.swap_remove(i)) {
            return Ok(worker);
        }
        drop(idle);
        let (jobs, given) = sync_channel::<Job>(1);
        std::thread::Builder::new()
            .name("template".into())
            .stack_size(stack)
            .spawn(move || given.into_iter().for_each(|job| job()))
            .with_context(|| {
                format!("cannot start a thread with a stack of {} MiB; raise the limit on threads (ulimit -u) or on address space (ulimit -v)", stack >> 20)
            })?;
        Ok(Self { stack, jobs })
    }

    fn give(&self, job: Job) -> Result<()> {
        self.jobs.send(job).map_err(|_| anyhow!("the template engine broke down"))
    }

    /// Keeps the worker for the next template.
    fn rest(self) {
        let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < MOST_IDLE {
            idle.push(self);
        }
    }
}

fn render(environment: &Environment<'static>, name: &str, values: Value) -> Result<String> {
    environment.get_template(name).and_then(|template| template.render(values)).map_err(|error| told(&error))
}

/// Writes a value out if it can be paid for. Minijinja charges for what was written, which is late for a list that holds
/// another twice, and so on: that is short to build and endless to write.
fn emit(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    affordable(state, value)?;
    minijinja::escape_formatter(out, state, value)
}

/// Checks that the fuel that is left pays for the written form of `value`.
///
/// # Errors
/// It does not.
pub fn affordable(state: &State<'_, '_>, value: &Value) -> Result<(), Error> {
    let plain = !matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::Iterable | ValueKind::Plain);
    let Some((_, left)) = state.fuel_levels().filter(|_| !plain) else { return Ok(()) };
    write!(Counted(left.saturating_mul(BYTES_PER_STEP)), "{value}").map_err(|_| ErrorKind::OutOfFuel.into())
}

/// Takes so many bytes, and keeps none.
struct Counted(u64);

impl fmt::Write for Counted {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0 = self.0.checked_sub(text.len() as u64).ok_or(fmt::Error)?;
        Ok(())
    }
}

fn endless() -> anyhow::Error {
    anyhow!(
        "it takes so many steps, or writes so much, that it may never end; shorten what it is filled in with, or give another template (a model's stands in its chat_template.jinja)"
    )
}

/// What went wrong, in as many words as a person will read.
fn told(error: &Error) -> anyhow::Error {
    let mut causes = vec![error.to_string()];
    let mut spent = error.kind() == ErrorKind::OutOfFuel;
    let mut cause = error.source();
    while let Some(inner) = cause {
        spent |= inner.downcast_ref::<Error>().is_some_and(|error| error.kind() == ErrorKind::OutOfFuel);
        causes.push(inner.to_string());
        cause = inner.source();
    }
    if spent {
        return endless();
    }
    anyhow!("{}", causes.join(": ").chars().take(LONGEST_ERROR).collect::<String>())
}

#[cfg(test)]
mod tests {
    use minijinja::context;

    use super::*;

    #[test]
    fn a_persons_own_template_is_held_to_the_same() {
        assert_eq!(fill_text("{{ a }}!", context! { a => 1 }).unwrap(), "1!");
        for (source, words) in [
            ("{{ b }}", "undefined"),
            ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "never end"),
            ("{% for a in range(99999) %}{{ a }}{% endfor %}", "writes so much"),
            ("{% include 'Cargo.toml' %}", "template not found"),
        ] {
            let error = format!("{:#}", fill_text(source, context! { a => 1 }).unwrap_err());
            assert!(error.contains(words), "{source}: {error}");
        }
    }
}
