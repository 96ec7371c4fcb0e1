//! Rendering of untrusted Jinja templates from models and configurations, with limits on steps, output, time and stack.

use std::error::Error as _;
use std::fmt::{self, Write};
use std::sync::Mutex;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use crate::util::mutex::lock;
use anyhow::{Context, Result, anyhow, bail, ensure};
use minijinja::value::ValueKind;
use minijinja::{Environment, Error, ErrorKind, Output, State, UndefinedBehavior, Value, filters};

/// Maximum size of a template in bytes. Models' templates have up to thirty thousand.
pub const LONGEST: usize = 64 << 10;
/// Maximum length of an error message in characters, since a template may have written it.
const LONGEST_ERROR: usize = 500;
/// Bytes of stack per step. A step can nest one value in another, and minijinja walks nested values by recursion with
/// up to 512 bytes of stack per level; nesting a level takes several steps. Unused stack pages take no memory, but
/// count towards a limit on address space.
const STACK_PER_STEP: usize = 512;
const STACK: std::ops::RangeInclusive<usize> = 16 << 20..=512 << 20;
/// Timeout of a template in units of [`POLL`], for operations that minijinja's fuel does not cover. A thread that
/// times out runs until the program exits, which follows from the error. The wait is divided into units so that the
/// time for which the program is suspended (SIGSTOP) does not count.
const TIMEOUT_POLLS: usize = 50;
const POLL: Duration = Duration::from_millis(100);
/// Bytes of a value's string form that one step of fuel covers.
pub const BYTES_PER_STEP: u64 = 4;
/// Size in bytes below which a user's template without a namespace cannot nest values deeply enough to overflow a
/// stack.
const SHALLOW: usize = 8 << 10;

/// Returns the number of steps that a template may take for `parts` parts (messages of a conversation) of `bytes` bytes
/// in total. A step also covers 64 written or copied bytes, so that the output is bounded too. Models' templates take
/// up to two hundred steps per message, and copy it six times. The time of some operations of minijinja grows with the
/// square of the number of steps; with this budget, they take seconds.
pub fn budget(parts: usize, bytes: usize) -> u64 {
    30_000 + 500 * parts as u64 + bytes as u64 / 4
}

/// Returns the environment in which templates are parsed and rendered. The caller sets the fuel.
pub fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_formatter(emit);
    environment.add_filter("string", |state: &State<'_, '_>, value: &Value| {
        affordable(state, value)?;
        filters::string(state, value)
    });
    environment
}

/// Checks the size of the template `source`.
///
/// # Errors
/// If it has more than [`LONGEST`] bytes.
pub fn check(source: &str) -> Result<()> {
    let length = source.len();
    ensure!(length <= LONGEST, "it has {length} bytes, but a template may have at most {LONGEST}");
    Ok(())
}

/// Renders a user's short template, in which undefined names are errors.
///
/// # Errors
/// If the template is too large, has a syntax error, uses an undefined name, or exceeds its budget.
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

/// Renders the template `name` of an [`environment`] whose fuel is a [`budget`].
///
/// # Errors
/// Returns the template's error, or an error if it exceeds its budget or the timeout.
pub fn fill(environment: Environment<'static>, name: &'static str, values: Value) -> Result<String> {
    let steps = environment.fuel().and_then(|steps| usize::try_from(steps).ok()).unwrap_or(usize::MAX);
    let stack = steps.saturating_mul(STACK_PER_STEP).clamp(*STACK.start(), *STACK.end());
    let worker = Worker::with(stack)?;
    let (sender, receiver) = sync_channel(1);
    // Sending fails if the receiver has timed out.
    worker.send(Box::new(move || drop(sender.send(render(&environment, name, values)))))?;
    for _ in 0..TIMEOUT_POLLS {
        match receiver.recv_timeout(POLL) {
            Ok(filled) => {
                worker.park();
                return filled;
            }
            Err(RecvTimeoutError::Disconnected) => bail!("internal error: the template engine panicked"),
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
    Err(endless())
}

type Job = Box<dyn FnOnce() + Send>;

/// A thread that renders templates one after another, because starting a thread takes ten times as long as most
/// templates. The thread ends once the worker is dropped and its job is done.
struct Worker {
    /// Stack size in bytes.
    stack: usize,
    jobs: SyncSender<Job>,
}

/// Workers without a job.
static IDLE: Mutex<Vec<Worker>> = Mutex::new(Vec::new());
/// Maximum number of idle workers.
const MAX_IDLE: usize = 64;

impl Worker {
    /// Returns an idle worker with a stack of at least `stack` bytes, or starts one.
    ///
    /// # Errors
    /// If the system's limits on threads or memory prevent it; the error has the remedy.
    fn with(stack: usize) -> Result<Self> {
        let mut idle = lock(&IDLE);
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

    fn send(&self, job: Job) -> Result<()> {
        self.jobs.send(job).map_err(|_| anyhow!("internal error: the template engine panicked"))
    }

    /// Returns the worker to the idle ones.
    fn park(self) {
        let mut idle = lock(&IDLE);
        if idle.len() < MAX_IDLE {
            idle.push(self);
        }
    }
}

fn render(environment: &Environment<'static>, name: &str, values: Value) -> Result<String> {
    environment.get_template(name).and_then(|template| template.render(values)).map_err(|error| short_error(&error))
}

/// Writes a value if the fuel suffices. Minijinja charges fuel only after writing, which is too late for a list that
/// contains another list twice, and so on: such a value is cheap to build, but its string form is exponentially long.
fn emit(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    affordable(state, value)?;
    minijinja::escape_formatter(out, state, value)
}

/// Checks that the remaining fuel covers the string form of `value`.
///
/// # Errors
/// [`ErrorKind::OutOfFuel`] if it does not.
pub fn affordable(state: &State<'_, '_>, value: &Value) -> Result<(), Error> {
    let plain = !matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::Iterable | ValueKind::Plain);
    let Some((_, left)) = state.fuel_levels().filter(|_| !plain) else { return Ok(()) };
    write!(Counted(left.saturating_mul(BYTES_PER_STEP)), "{value}").map_err(|_| ErrorKind::OutOfFuel.into())
}

/// A writer that counts down a number of bytes, discards them, and fails when the number is exceeded.
struct Counted(u64);

impl fmt::Write for Counted {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0 = self.0.checked_sub(text.len() as u64).ok_or(fmt::Error)?;
        Ok(())
    }
}

fn endless() -> anyhow::Error {
    anyhow!(
        "it takes too many steps, or writes too much, and may never end; shorten its input, or use another template (a model's is in its chat_template.jinja)"
    )
}

/// Returns the error with its causes, truncated to [`LONGEST_ERROR`] characters.
fn short_error(error: &Error) -> anyhow::Error {
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
    let mut words: String = causes.join(": ").chars().take(LONGEST_ERROR).collect();
    if words.contains("% operator on unsupported types string") {
        words += "; Python's formatting with % is not supported: write ~ between the parts, in chat_template.jinja if it is a model's template";
    }
    anyhow!(words)
}

#[cfg(test)]
mod tests {
    use minijinja::context;

    use super::*;

    #[test]
    fn a_user_s_template_has_the_same_limits() {
        assert_eq!(fill_text("{{ a }}!", context! { a => 1 }).unwrap(), "1!");
        for (source, words) in [
            ("{{ b }}", "undefined"),
            ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "never end"),
            ("{% for a in range(99999) %}{{ a }}{% endfor %}", "writes too much"),
            ("{% include 'Cargo.toml' %}", "template not found"),
        ] {
            let error = format!("{:#}", fill_text(source, context! { a => 1 }).unwrap_err());
            assert!(error.contains(words), "{source}: {error}");
        }
    }
}
