//! Fuzzes [`entries::model_config`].
#![no_main]

#[path = "../entries.rs"]
mod entries;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    entries::model_config(data);
});
