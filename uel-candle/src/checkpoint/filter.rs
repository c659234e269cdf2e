//! Which tensors a load brings.

use std::collections::BTreeSet;

use globset::{GlobBuilder, GlobMatcher};
use regex::Regex;
use uel_core::{Error, Kind, Result};

/// A choice of tensors by name: one match of any kind is enough, and without any rule every name matches.
#[derive(Clone, Debug, Default)]
pub(crate) struct Filter {
    prefixes: Vec<String>,
    globs: Vec<GlobMatcher>,
    regexes: Vec<Regex>,
    names: BTreeSet<String>,
    by_name: bool,
}

impl Filter {
    pub(crate) fn add_prefix(&mut self, prefix: String) {
        self.prefixes.push(prefix);
    }

    pub(crate) fn add_glob(&mut self, glob: &str) -> Result<()> {
        let built = GlobBuilder::new(glob).literal_separator(false).build();
        let glob = built.map_err(|error| malformed("glob", glob, error))?;
        self.globs.push(glob.compile_matcher());
        Ok(())
    }

    pub(crate) fn add_regex(&mut self, regex: &str) -> Result<()> {
        self.regexes.push(Regex::new(regex).map_err(|error| malformed("regular expression", regex, error))?);
        Ok(())
    }

    pub(crate) fn add_names(&mut self, names: impl Iterator<Item = String>) {
        self.by_name = true;
        self.names.extend(names);
    }

    /// The names that were asked for one by one.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(String::as_str)
    }

    pub(crate) fn matches(&self, name: &str) -> bool {
        let no_rule = !self.by_name && self.prefixes.is_empty() && self.globs.is_empty() && self.regexes.is_empty();
        no_rule
            || self.names.contains(name)
            || self.prefixes.iter().any(|prefix| name.starts_with(prefix.as_str()))
            || self.globs.iter().any(|glob| glob.is_match(name))
            || self.regexes.iter().any(|regex| regex.is_match(name))
    }
}

fn malformed(what: &str, given: &str, error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::new(Kind::Argument, format!("the {what} is not well-formed: {error}")).with_got(given).with_source(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_add_up() {
        let mut filter = Filter::default();
        assert!(filter.matches("anything"));
        filter.add_prefix("encoder.".into());
        filter.add_glob("model.layers.{0,1}.*weight").unwrap();
        filter.add_regex(r"\.bias$").unwrap();
        filter.add_names(["lm_head".to_owned()].into_iter());
        for name in ["encoder.x", "model.layers.1.mlp.weight", "a.bias", "lm_head"] {
            assert!(filter.matches(name), "{name}");
        }
        for name in ["decoder.x", "model.layers.2.mlp.weight", "a.bias2", "lm_head.weight"] {
            assert!(!filter.matches(name), "{name}");
        }
        let mut none = Filter::default();
        none.add_names(std::iter::empty());
        assert!(!none.matches("anything"), "an empty list of names asks for nothing");
    }

    #[test]
    fn malformed_rules_are_argument_errors() {
        assert_eq!(Filter::default().add_glob("a[").unwrap_err().kind(), Kind::Argument);
        assert_eq!(Filter::default().add_regex("a(").unwrap_err().kind(), Kind::Argument);
    }
}
