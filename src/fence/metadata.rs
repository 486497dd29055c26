//! What an agent says it can do (`FenceAgentAPI`, "metadata"). Pure.

/// Most `<action>` elements looked at; real agents have about ten.
const ACTIONS_MAX: usize = 64;

/// The names of the actions in an agent's metadata, in its order. Text that is no metadata
/// has none. Not an XML parser: it finds each `<action …>` and its `name`.
#[must_use]
pub fn actions(xml: &str) -> Vec<String> {
    xml.split("<action")
        .skip(1)
        .filter(|rest| rest.starts_with([' ', '\t', '\n', '\r']))
        .take(ACTIONS_MAX)
        .filter_map(|rest| {
            let tag = rest.split('>').next()?;
            let value = tag
                .split_ascii_whitespace()
                .find_map(|word| word.strip_prefix("name="))?;
            let quote = value.chars().next().filter(|c| matches!(c, '"' | '\''))?;
            value[1..].split(quote).next().map(str::to_owned)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::actions;

    #[test]
    fn actions_are_read_and_their_container_is_not_one() {
        let xml = "<resource-agent><actions>\n<action name=\"on\" automatic=\"0\"/>\n\
                   <action name='off' />\n<action  timeout=\"1\" name=\"status\" />\n</actions>";
        assert_eq!(actions(xml), ["on", "off", "status"]);
        for other in ["", "<action", "<action name=off>", "<action name=\"", "off"] {
            assert!(!actions(other).contains(&"off".to_owned()), "{other}");
        }
    }
}
