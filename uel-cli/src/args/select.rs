//! Which tensors are written, and under which names.

use super::values::parse_pair;
use globset::{Glob, GlobMatcher};
use regex::Regex;
use uel_candle::Edit;
use uel_core::{Error, Kind, Result};

/// Filters see the names of the input. Then a prefix is stripped, the renames follow in the order given, and a prefix is
/// added last.
#[derive(clap::Args, Debug, Default)]
pub(crate) struct Selecting {
    /// Only tensors whose names match GLOB; may be given several times
    #[arg(long, value_name = "GLOB", value_parser = parse_glob)]
    include: Vec<GlobMatcher>,
    /// No tensors whose names match GLOB; may be given several times, and wins over --include
    #[arg(long, value_name = "GLOB", value_parser = parse_glob)]
    exclude: Vec<GlobMatcher>,
    /// Replace every match of REGEX in the names, where $1 is what the first group matched; may be given several times
    #[arg(long, value_name = "REGEX=REPLACEMENT", value_parser = Rename::parse)]
    rename: Vec<Rename>,
    /// Take P off the beginning of the names that have it
    #[arg(long, value_name = "P")]
    strip_prefix: Option<String>,
    /// Put P before all names
    #[arg(long, value_name = "P")]
    add_prefix: Option<String>,
}

#[derive(Clone, Debug)]
struct Rename {
    regex: Regex,
    replacement: String,
}

impl Rename {
    fn parse(text: &str) -> Result<Self, String> {
        let (regex, replacement) = parse_pair(text)?;
        // The library draws what is wrong over several lines; the last says it.
        let reason = |error: regex::Error| error.to_string().lines().last().unwrap_or_default().trim().to_owned();
        Ok(Self { regex: Regex::new(&regex).map_err(reason)?, replacement })
    }
}

fn parse_glob(text: &str) -> Result<GlobMatcher, globset::Error> {
    Ok(Glob::new(text)?.compile_matcher())
}

impl Selecting {
    /// Whether the tensor called `name` in the input is written.
    pub(crate) fn keeps(&self, name: &str) -> bool {
        (self.include.is_empty() || self.include.iter().any(|glob| glob.is_match(name)))
            && !self.exclude.iter().any(|glob| glob.is_match(name))
    }

    /// `edit` with what is left of its tensors, under their new names. Filters that leave nothing are an error.
    pub(crate) fn apply(&self, edit: Edit) -> Result<Edit> {
        let filters = !self.include.is_empty() || !self.exclude.is_empty();
        let edit = edit.retain(|name| self.keeps(name)).rename(|name| self.renamed(name));
        if filters && edit.metas()?.is_empty() {
            return Err(Error::new(Kind::MissingTensors, "the filters leave no tensor"));
        }
        Ok(edit)
    }

    fn renamed(&self, name: &str) -> String {
        let stripped = self.strip_prefix.as_ref().and_then(|prefix| name.strip_prefix(prefix.as_str()));
        let mut name = stripped.unwrap_or(name).to_owned();
        for rename in &self.rename {
            name = rename.regex.replace_all(&name, rename.replacement.as_str()).into_owned();
        }
        match &self.add_prefix {
            Some(prefix) => format!("{prefix}{name}"),
            None => name,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_stripped_renamed_and_prefixed_in_this_order() {
        let selecting = Selecting {
            rename: vec![Rename::parse(r"^h\.(\d+)=layers.$1").unwrap(), Rename::parse("layers=blocks").unwrap()],
            strip_prefix: Some("transformer.".to_owned()),
            add_prefix: Some("model.".to_owned()),
            ..Selecting::default()
        };
        assert_eq!(selecting.renamed("transformer.h.3.attn"), "model.blocks.3.attn");
        assert_eq!(selecting.renamed("lm_head"), "model.lm_head");
        assert!(Rename::parse("(=x").unwrap_err().starts_with("error: "));
    }

    #[test]
    fn exclusion_wins() {
        let selecting = Selecting {
            include: vec![parse_glob("a.*").unwrap(), parse_glob("b").unwrap()],
            exclude: vec![parse_glob("*.bias").unwrap()],
            ..Selecting::default()
        };
        let kept = ["a.weight", "a.bias", "b", "c"].map(|name| selecting.keeps(name));
        assert_eq!(kept, [true, false, true, false]);
    }
}
