//! Catching of panics of a library without printing them.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work`, and returns `None` if it panics. Panics on this thread in `work` are not printed.
pub fn catch<T>(work: impl FnOnce() -> T) -> Option<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = take_hook();
        set_hook(Box::new(move |panic| {
            // The thread-local is gone while a thread ends.
            if !QUIET.try_with(Cell::get).unwrap_or(false) {
                before(panic);
            }
        }));
    });
    let outer = QUIET.replace(true);
    let done = catch_unwind(AssertUnwindSafe(work));
    QUIET.set(outer);
    done.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_caught_silently_and_later_panics_are_printed() {
        assert_eq!(catch(|| 3), Some(3));
        assert_eq!(catch(|| -> u32 { panic!("this must not be printed") }), None);
        assert!(!QUIET.get());
        assert_eq!(catch(|| catch(|| -> u32 { panic!("nor this") })), Some(None));
    }
}
