//! Panics of a library that are an answer: they are caught, and nothing of them is printed. A leaf.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work`; `None` where it panicked. Of this thread's panics in it nothing is printed.
pub fn catch<T>(work: impl FnOnce() -> T) -> Option<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = take_hook();
        set_hook(Box::new(move |panic| {
            // A thread that ends has no such cell any more.
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
    fn a_panic_is_caught_and_the_thread_is_loud_again() {
        assert_eq!(catch(|| 3), Some(3));
        assert_eq!(catch(|| -> u32 { panic!("this must not be printed") }), None);
        assert!(!QUIET.get());
        assert_eq!(catch(|| catch(|| -> u32 { panic!("nor this") })), Some(None));
    }
}
