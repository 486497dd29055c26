//! What is wrong with a spec, where, and what would be right.

use std::fmt;

/// Why a spec was refused. Shows one line for each problem:
/// `origin:line:column: what is wrong; what to do`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecError {
    /// Where the text came from: a path, `-`, or `spec` for JSON.
    pub origin: String,
    /// Every problem found, in the order of the text. Never empty.
    pub problems: Vec<SpecProblem>,
}

/// One problem of a spec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecProblem {
    /// Line and column, both from 1, columns counted in characters; `None` if the
    /// spec did not come as text.
    pub at: Option<(usize, usize)>,
    /// What it is.
    pub what: Problem,
}

/// The kinds of problem. Paths name a key like `disk[0].size`, from 0.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// The text is too long to be a spec.
    #[error("the text has {bytes} bytes; a VM spec has at most {max}")]
    TooLong {
        /// Bytes given.
        bytes: usize,
        /// Bytes allowed.
        max: usize,
    },
    /// The text is not TOML.
    #[error("not valid TOML: {0}")]
    Syntax(String),
    /// A key that no spec has.
    #[error("unknown key `{key}`{}; {table} has {}", nearest_words(nearest.as_ref()), known.join(", "))]
    UnknownKey {
        /// Path of the key.
        key: String,
        /// The known key that looks most like it.
        nearest: Option<String>,
        /// The table it stands in, in words.
        table: &'static str,
        /// Every key the table has.
        known: Vec<&'static str>,
    },
    /// A key that every spec needs.
    #[error("`{key}` is missing: {allowed}")]
    Missing {
        /// Path of the key.
        key: String,
        /// What to write.
        allowed: String,
    },
    /// A value of the wrong type.
    #[error("`{key}` is {got}; it must be {want}")]
    WrongType {
        /// Path of the key.
        key: String,
        /// What it must be.
        want: &'static str,
        /// What it is.
        got: &'static str,
    },
    /// A value that is not allowed.
    #[error("`{key} = {value}` is not valid: {allowed}")]
    BadValue {
        /// Path of the key.
        key: String,
        /// The value as written.
        value: String,
        /// What is allowed.
        allowed: String,
    },
    /// A value that a later version will accept.
    #[error("`{key} = {value}` is not built yet: {instead}")]
    NotBuilt {
        /// Path of the key.
        key: String,
        /// The value as written.
        value: String,
        /// What to use now.
        instead: &'static str,
    },
    /// A key that an earlier version had.
    #[error("`{key} = {value}` is a key of an earlier version: {instead}")]
    Replaced {
        /// Path of the key.
        key: String,
        /// The value as written.
        value: String,
        /// What to write now.
        instead: &'static str,
    },
    /// Two parts of the spec that do not go together.
    #[error("{0}")]
    Conflict(String),
}

fn nearest_words(nearest: Option<&String>) -> String {
    nearest.map_or_else(String::new, |key| format!(", did you mean `{key}`?"))
}

impl fmt::Display for SpecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.problems.iter().enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            match problem.at {
                Some((line, column)) => {
                    write!(f, "{}:{line}:{column}: {}", self.origin, problem.what)?;
                }
                None => write!(f, "{}: {}", self.origin, problem.what)?,
            }
        }
        Ok(())
    }
}

impl std::error::Error for SpecError {}
