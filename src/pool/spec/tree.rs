//! A TOML document as a plain tree with places, whether it came as text or as JSON.

use std::ops::Range;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Byte range in the text; `None` if there was none.
pub(super) type Span = Option<Range<usize>>;

/// A value and where it stands.
pub(super) struct Node {
    pub span: Span,
    pub value: Value,
}

/// A value.
pub(super) enum Value {
    Text(String),
    Integer(i128),
    Bool(bool),
    Array(Vec<Node>),
    Table(Vec<Entry>),
    /// A float or a date: no spec has one. Its type in words.
    Other(&'static str),
}

/// One key of a table.
pub(super) struct Entry {
    pub key: String,
    pub span: Span,
    pub node: Node,
}

impl Value {
    /// The type in words, as in "is a string".
    pub fn type_words(&self) -> &'static str {
        match self {
            Self::Text(_) => "a string",
            Self::Integer(_) => "an integer",
            Self::Bool(_) => "a boolean",
            Self::Array(_) => "a list",
            Self::Table(_) => "a table",
            Self::Other(words) => words,
        }
    }
}

/// The entries of a parsed document's table, in the order of the text.
pub(super) fn from_parsed(table: &DeTable<'_>) -> Vec<Entry> {
    let mut entries: Vec<Entry> = table
        .iter()
        .map(|(key, value)| Entry {
            key: key.get_ref().to_string(),
            span: Some(key.span()),
            node: parsed_node(value),
        })
        .collect();
    entries.sort_by_key(|entry| entry.span.as_ref().map(|span| span.start));
    entries
}

fn parsed_node(value: &Spanned<DeValue<'_>>) -> Node {
    let inner = match value.get_ref() {
        DeValue::String(text) => Value::Text(text.to_string()),
        DeValue::Integer(number) => {
            // More than 128 bits is as wrong as the largest of them.
            let number = i128::from_str_radix(number.as_str(), number.radix()).unwrap_or(i128::MAX);
            Value::Integer(number)
        }
        DeValue::Boolean(flag) => Value::Bool(*flag),
        DeValue::Array(items) => Value::Array(items.iter().map(parsed_node).collect()),
        DeValue::Table(table) => Value::Table(from_parsed(table)),
        DeValue::Float(_) => Value::Other("a number with a fraction"),
        DeValue::Datetime(_) => Value::Other("a date"),
    };
    Node {
        span: Some(value.span()),
        value: inner,
    }
}

/// The entries of a table that did not come as text.
pub(super) fn from_table(table: toml::Table) -> Vec<Entry> {
    table
        .into_iter()
        .map(|(key, value)| Entry {
            key,
            span: None,
            node: plain_node(value),
        })
        .collect()
}

fn plain_node(value: toml::Value) -> Node {
    use toml::Value as Plain;
    let value = match value {
        Plain::String(text) => Value::Text(text),
        Plain::Integer(number) => Value::Integer(number.into()),
        Plain::Boolean(flag) => Value::Bool(flag),
        Plain::Array(items) => Value::Array(items.into_iter().map(plain_node).collect()),
        Plain::Table(table) => Value::Table(from_table(table)),
        Plain::Float(_) => Value::Other("a number with a fraction"),
        Plain::Datetime(_) => Value::Other("a date"),
    };
    Node { span: None, value }
}

/// Line and column, both from 1, of the byte `offset` in `text`; columns count characters.
pub(super) fn line_column(text: &str, offset: usize) -> (usize, usize) {
    let before = &text.as_bytes()[..offset.min(text.len())];
    let line_start = before
        .iter()
        .rposition(|&b| b == b'\n')
        .map_or(0, |newline| newline + 1);
    let line = before.iter().filter(|&&b| b == b'\n').count() + 1;
    // Bytes that continue a character (10xxxxxx) do not count.
    let column = before[line_start..]
        .iter()
        .filter(|&&b| b & 0xc0 != 0x80)
        .count()
        + 1;
    (line, column)
}
