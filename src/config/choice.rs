//! Keys with enumerated values, written as words.

use super::key::Input;
use super::types::{KeyType, Shape};

/// An enumeration whose values are written as words in a configuration.
pub trait Choice: Copy + PartialEq + 'static {
    /// Every value with its word.
    const WORDS: &'static [(&'static str, Self)];
    /// The meaning of each word, in the same order.
    const MEANINGS: &'static [&'static str];

    /// Returns the word of this value.
    fn word(self) -> &'static str {
        Self::WORDS.iter().find(|(_, value)| *value == self).map_or("", |(word, _)| word)
    }
}

/// Reads one of the words of `C`.
pub(super) fn read<C: Choice>(input: &Input<'_>) -> Option<C> {
    let word = String::read(input)?;
    if let Some((_, choice)) = C::WORDS.iter().find(|(name, _)| *name == word) {
        return Some(*choice);
    }
    let names: Vec<&str> = C::WORDS.iter().map(|(name, _)| *name).collect();
    let hint = super::document::suggestion(&word, &names);
    input.error(&format!("{word:?} is not one of {}{hint}", names.join(", ")))
}

/// Returns the words of `C` with their meanings.
pub(super) fn shape<C: Choice>() -> Shape {
    let meanings = C::MEANINGS.iter().map(|meaning| meaning.trim());
    Shape::Word(C::WORDS.iter().map(|(word, _)| *word).zip(meanings).collect())
}

/// Defines an enumeration whose values are written as words in a configuration, each with its meaning.
macro_rules! choice {
    ($(#[doc = $about:literal])* pub enum $name:ident {
        $($(#[doc = $meaning:literal])+ $variant:ident = $word:literal,)+
    }) => {
        $(#[doc = $about])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name {
            $($(#[doc = $meaning])+ $variant,)+
        }
        $crate::config::choice::words! { $name { $($variant = $word: concat!($($meaning),+),)+ } }
    };
}

/// Assigns words in a configuration to the values of an enumeration of another module.
macro_rules! words {
    ($name:ty { $($variant:ident = $word:literal: $meaning:expr,)+ }) => {
        impl $crate::config::choice::Choice for $name {
            const WORDS: &'static [(&'static str, Self)] = &[$(($word, Self::$variant)),+];
            const MEANINGS: &'static [&'static str] = &[$($meaning),+];
        }

        impl $crate::config::types::KeyType for $name {
            fn shape() -> $crate::config::types::Shape {
                $crate::config::choice::shape::<Self>()
            }
            fn read(input: &$crate::config::key::Input<'_>) -> Option<Self> {
                $crate::config::choice::read(input)
            }
            fn write(&self) -> Option<toml::Value> {
                Some(toml::Value::String($crate::config::choice::Choice::word(*self).to_owned()))
            }
        }
    };
}

pub(super) use {choice, words};
