//! The macro that declares a section of the configuration.

/// Defines the structure of a section from the declarations of its keys:
///
/// ```text
/// section! {
///     /// The section's purpose.
///     pub struct Sft {
///         /// The key's meaning.
///         [Fixed] steps: u64 = is(0).below(1000),
///     }
/// }
/// ```
///
/// The brackets hold the effect of a change on a resumed run (`Fixed`, `AcceptChange` or `Changeable`), followed by
/// `secret` for a key that names the place of a secret. If a key's name differs from the field's, it follows the field
/// in parentheses. The expression after `=` is a `Spec`, in which the values of the preceding keys are in scope.
/// `..field: Type` appends the keys of another section. `checked by f` calls `f(&section, &reader)` after all keys have
/// been read.
macro_rules! section {
    (
        $(#[doc = $about:literal])+
        pub struct $name:ident $(checked by $check:ident)? {
            $(
                $(#[doc = $doc:literal])+
                [$resume:ident $(, $secret:ident)?]
                $field:ident $(($key:literal))?: $type:ty = $spec:expr,
            )*
            $(
                ..$(#[doc = $flat_doc:literal])+
                $flat:ident: $flat_type:ty,
            )?
        }
    ) => {
        $(#[doc = $about])+
        #[derive(Debug, Clone, PartialEq)]
        pub struct $name {
            $(
                $(#[doc = $doc])+
                #[doc = concat!("\n\nDeclared as `` ", stringify!($spec), " ``.")]
                pub $field: $type,
            )*
            $(
                $(#[doc = $flat_doc])+
                pub $flat: $flat_type,
            )?
        }

        impl $crate::config::key::Section for $name {
            fn read_keys(reader: &mut $crate::config::key::Reader<'_>) -> Self {
                $(
                    let name = $crate::config::section::name!($field $($key)?);
                    let secret = $crate::config::section::secret!($($secret)?);
                    let $field: $type = reader.key(name, secret, $spec);
                )*
                $(let $flat = <$flat_type as $crate::config::key::Section>::read_keys(reader);)?
                let section = Self { $($field,)* $($flat,)? };
                $($check(&section, reader);)?
                section
            }

            fn write_keys(&self, fields: &mut $crate::config::key::Fields) {
                $(
                    let name = $crate::config::section::name!($field $($key)?);
                    fields.push((name, $crate::config::types::KeyType::write(&self.$field)));
                )*
                $($crate::config::key::Section::write_keys(&self.$flat, fields);)?
            }

            fn keys() -> Vec<$crate::config::key::Key> {
                let mut keys = Vec::new();
                $(
                    let name = $crate::config::section::name!($field $($key)?);
                    let secret = $crate::config::section::secret!($($secret)?);
                    let class = ($crate::config::key::Resume::$resume, secret);
                    let spec: $crate::config::key::Spec<$type> = $spec;
                    keys.push($crate::config::key::Key::new(name, &[$($doc),+], class, &spec));
                    #[allow(unused_variables)]
                    let $field = spec.value;
                )*
                $(keys.extend(<$flat_type as $crate::config::key::Section>::keys());)?
                keys
            }

            fn about() -> String {
                $crate::config::key::lines(&[$($about),+])
            }
        }

        impl Default for $name {
            /// Returns the section with all keys at their defaults. Required keys are empty.
            fn default() -> Self {
                $(
                    let spec: $crate::config::key::Spec<$type> = $spec;
                    let $field = spec.value;
                )*
                Self { $($field,)* $($flat: Default::default(),)? }
            }
        }
    };
}

/// Expands to the name of a key: the given literal, or else the field's name.
macro_rules! name {
    ($field:ident) => {
        stringify!($field)
    };
    ($field:ident $key:literal) => {
        $key
    };
}

/// Expands to `true` for a key that names the place of a secret.
macro_rules! secret {
    () => {
        false
    };
    (secret) => {
        true
    };
}

pub(super) use {name, secret, section};
