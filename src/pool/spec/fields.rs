//! Reading the keys of one table, gathering every problem on the way.

use super::error::{Problem, SpecProblem};
use super::tree::{Entry, Node, Span, Value, line_column};
use super::values::BadValue;
use std::collections::HashMap;

/// A key that was, and what to write instead of its value.
type Replaced<'k> = (&'k str, fn(&Value) -> &'static str);

/// One key of a table once it was looked at.
pub(super) enum Field<T> {
    Absent,
    /// There, wrong, and reported.
    Bad,
    Good(T),
}

impl<T> Field<T> {
    /// The value, or the default if there is none; `None` if it is wrong.
    pub fn or(self, default: T) -> Option<T> {
        match self {
            Self::Absent => Some(default),
            Self::Bad => None,
            Self::Good(value) => Some(value),
        }
    }

    /// The value if there is one; `None` if it is wrong.
    pub fn optional(self) -> Option<Option<T>> {
        match self {
            Self::Absent => Some(None),
            Self::Bad => None,
            Self::Good(value) => Some(Some(value)),
        }
    }

    /// Is the key there, right or wrong?
    pub fn present(&self) -> bool {
        !matches!(self, Self::Absent)
    }
}

/// Gathers problems and remembers where each key stands.
pub(super) struct Reader<'t> {
    text: Option<&'t str>,
    places: HashMap<String, Span>,
    problems: Vec<(Span, Problem)>,
}

/// One table being read.
pub(super) struct Fields<'n> {
    /// Path of the table with a dot, `disk[0].`; empty at the top.
    prefix: String,
    span: Span,
    entries: &'n [Entry],
}

/// Keys farther than this from every known key get no "did you mean"
/// (1 is equal, 0 has nothing in common).
const NEAR_ENOUGH: f64 = 0.6;

impl<'t> Reader<'t> {
    /// `text` is what the spans count in, if there was one.
    pub fn new(text: Option<&'t str>) -> Self {
        Self {
            text,
            places: HashMap::new(),
            problems: Vec::new(),
        }
    }

    /// Report a problem of the key at `path`, or of what is nearest around it.
    pub fn report(&mut self, path: &str, problem: Problem) {
        let mut path = path;
        let span = loop {
            if let Some(span) = self.places.get(path) {
                break span.clone();
            }
            match path.rfind(['.', '[']) {
                Some(end) => path = &path[..end],
                None => break Some(0..0),
            }
        };
        self.problems.push((span, problem));
    }

    /// Report a value at `path` that is not allowed.
    pub fn bad(&mut self, path: &str, value: &str, allowed: impl Into<String>) {
        let problem = Problem::BadValue {
            key: path.to_owned(),
            value: value.to_owned(),
            allowed: allowed.into(),
        };
        self.report(path, problem);
    }

    /// Begin a table: every key must be one of `known`.
    pub fn table<'n>(
        &mut self,
        prefix: &str,
        span: Span,
        entries: &'n [Entry],
        words: &'static str,
        known: &[&'static str],
    ) -> Fields<'n> {
        self.table_replacing(prefix, span, entries, words, known, &[])
    }

    /// As [`Self::table`] for one that had other keys once: each of `replaced` is refused
    /// with what its function says to write instead of the value.
    pub fn table_replacing<'n>(
        &mut self,
        prefix: &str,
        span: Span,
        entries: &'n [Entry],
        words: &'static str,
        known: &[&'static str],
        replaced: &[Replaced<'_>],
    ) -> Fields<'n> {
        for entry in entries {
            let path = format!("{prefix}{}", entry.key);
            self.places.insert(path.clone(), entry.span.clone());
            if let Some((_, instead)) = replaced.iter().find(|(key, _)| *key == entry.key) {
                let value = &entry.node.value;
                let problem = Problem::Replaced {
                    key: path.clone(),
                    value: shown(value),
                    instead: instead(value),
                };
                self.report(&path, problem);
            } else if !known.contains(&entry.key.as_str()) {
                let nearest = known
                    .iter()
                    .map(|key| (strsim::jaro_winkler(key, &entry.key), key))
                    .filter(|(likeness, _)| *likeness >= NEAR_ENOUGH)
                    .max_by(|a, b| a.0.total_cmp(&b.0))
                    .map(|(_, key)| (*key).to_owned());
                let problem = Problem::UnknownKey {
                    key: path.clone(),
                    nearest,
                    table: words,
                    known: known.to_vec(),
                };
                self.report(&path, problem);
            }
        }
        Fields {
            prefix: prefix.to_owned(),
            span,
            entries,
        }
    }

    /// The value of a key of any type.
    pub fn node<'n>(&mut self, fields: &Fields<'n>, key: &str) -> Option<&'n Node> {
        let entry = fields.entries.iter().find(|entry| entry.key == key)?;
        Some(&entry.node)
    }

    fn wrong_type(&mut self, path: &str, want: &'static str, got: &Value) {
        let problem = Problem::WrongType {
            key: path.to_owned(),
            want,
            got: got.type_words(),
        };
        self.report(path, problem);
    }

    /// Report a key that is needed and not there.
    pub fn missing(&mut self, fields: &Fields<'_>, key: &str, allowed: &str) {
        let problem = Problem::Missing {
            key: fields.path(key),
            allowed: allowed.to_owned(),
        };
        // The place of a table is that of its header or brace.
        self.problems
            .push((fields.span.clone().or(Some(0..0)), problem));
    }

    /// A string, checked by `parse`.
    pub fn text<T>(
        &mut self,
        fields: &Fields<'_>,
        key: &str,
        parse: impl FnOnce(&str) -> Result<T, BadValue>,
    ) -> Field<T> {
        let path = fields.path(key);
        match self.node(fields, key).map(|node| &node.value) {
            None => Field::Absent,
            Some(Value::Text(text)) => match parse(text) {
                Ok(value) => Field::Good(value),
                Err(BadValue(allowed)) => {
                    self.bad(&path, &quoted(text), allowed);
                    Field::Bad
                }
            },
            Some(other) => {
                self.wrong_type(&path, "a string", other);
                Field::Bad
            }
        }
    }

    /// A size: a string with a unit, or an integer number of bytes.
    pub fn size<T>(
        &mut self,
        fields: &Fields<'_>,
        key: &str,
        check: impl FnOnce(u64) -> Result<T, BadValue>,
    ) -> Field<T> {
        let path = fields.path(key);
        let (shown, result) = match self.node(fields, key).map(|node| &node.value) {
            None => return Field::Absent,
            Some(Value::Text(text)) => (
                quoted(text),
                text.parse::<super::SizeBytes>()
                    .and_then(|size| check(size.get())),
            ),
            Some(Value::Integer(number)) => (
                number.to_string(),
                u64::try_from(*number)
                    .map_err(|_| {
                        BadValue("a size is not negative and fits into 64 bits".to_owned())
                    })
                    .and_then(check),
            ),
            Some(other) => {
                self.wrong_type(&path, "a size like \"512 MiB\" or a number of bytes", other);
                return Field::Bad;
            }
        };
        match result {
            Ok(value) => Field::Good(value),
            Err(BadValue(allowed)) => {
                self.bad(&path, &shown, allowed);
                Field::Bad
            }
        }
    }

    /// An integer from `min` to `max`.
    pub fn integer<T: TryFrom<i128> + Copy + Into<i128>>(
        &mut self,
        fields: &Fields<'_>,
        key: &str,
        min: T,
        max: T,
    ) -> Field<T> {
        let path = fields.path(key);
        match self.node(fields, key).map(|node| &node.value) {
            None => Field::Absent,
            Some(Value::Integer(number)) => {
                let (low, high): (i128, i128) = (min.into(), max.into());
                match T::try_from(*number) {
                    Ok(value) if (low..=high).contains(number) => Field::Good(value),
                    _ => {
                        let allowed = format!("use an integer from {low} to {high}");
                        self.bad(&path, &number.to_string(), allowed);
                        Field::Bad
                    }
                }
            }
            Some(other) => {
                self.wrong_type(&path, "an integer", other);
                Field::Bad
            }
        }
    }

    /// `true` or `false`.
    pub fn flag(&mut self, fields: &Fields<'_>, key: &str) -> Field<bool> {
        match self.node(fields, key).map(|node| &node.value) {
            None => Field::Absent,
            Some(Value::Bool(flag)) => Field::Good(*flag),
            Some(other) => {
                self.wrong_type(&fields.path(key), "true or false", other);
                Field::Bad
            }
        }
    }

    /// A list of at most `max` items; none if the key is not there.
    pub fn list<'n>(
        &mut self,
        fields: &Fields<'n>,
        key: &str,
        want: &'static str,
        max: usize,
    ) -> Option<&'n [Node]> {
        match self.node(fields, key).map(|node| &node.value) {
            None => Some(&[]),
            Some(Value::Array(items)) if items.len() <= max => {
                for (i, item) in items.iter().enumerate() {
                    self.places
                        .insert(format!("{}[{i}]", fields.path(key)), item.span.clone());
                }
                Some(items)
            }
            Some(Value::Array(items)) => {
                let path = fields.path(key);
                let shown = format!("({} items)", items.len());
                self.bad(&path, &shown, format!("a VM has at most {max}"));
                None
            }
            Some(other) => {
                self.wrong_type(&fields.path(key), want, other);
                None
            }
        }
    }

    /// The entries of an item that must be a table.
    pub fn entries<'n>(&mut self, path: &str, node: &'n Node) -> Option<&'n [Entry]> {
        match &node.value {
            Value::Table(entries) => Some(entries),
            other => {
                self.wrong_type(path, "a table", other);
                None
            }
        }
    }

    /// The text of an item that must be a string.
    pub fn item_text<'n>(&mut self, path: &str, node: &'n Node) -> Option<&'n str> {
        match &node.value {
            Value::Text(text) => Some(text),
            other => {
                self.wrong_type(path, "a string", other);
                None
            }
        }
    }

    /// Were there problems?
    pub fn failed(&self) -> bool {
        !self.problems.is_empty()
    }

    /// The problems in the order of the text.
    pub fn finish(mut self) -> Vec<SpecProblem> {
        self.problems
            .sort_by_key(|(span, _)| span.as_ref().map(|span| span.start));
        self.problems
            .into_iter()
            .map(|(span, what)| SpecProblem {
                at: self
                    .text
                    .zip(span)
                    .map(|(text, span)| line_column(text, span.start)),
                what,
            })
            .collect()
    }
}

impl Fields<'_> {
    /// Path of a key of this table.
    pub fn path(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }
}

/// A value on one line.
fn shown(value: &Value) -> String {
    match value {
        Value::Text(text) => quoted(text),
        Value::Integer(number) => number.to_string(),
        Value::Bool(flag) => flag.to_string(),
        other => format!("({})", other.type_words()),
    }
}

/// Longest value shown in an error, in characters: one line of a terminal.
const SHOWN_CHARS_MAX: usize = 80;

/// A string as TOML writes it, on one line, cut if it is long.
pub(super) fn quoted(text: &str) -> String {
    if text.chars().count() > SHOWN_CHARS_MAX {
        let start: String = text.chars().take(SHOWN_CHARS_MAX).collect();
        format!("{start:?}…")
    } else {
        format!("{text:?}")
    }
}
