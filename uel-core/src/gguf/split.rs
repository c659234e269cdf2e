//! Models in several GGUF files, each of which says which part it is and of how many.

use super::file::GgufFile;
use super::value::Value;
use crate::{Error, Kind, Result};
use std::path::{Path, PathBuf};

/// The number of a part, counted from 0.
const NO_KEY: &str = "split.no";

/// How many parts there are.
const COUNT_KEY: &str = "split.count";

/// How many tensors all parts have together.
const TENSORS_KEY: &str = "split.tensors.count";

/// The digits of a number in the name of a part.
const DIGITS: usize = 5;

/// The parts of a name such as `STEM-00001-of-00003.gguf`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SplitName {
    stem: String,
    /// Counted from 1.
    pub(crate) number: u32,
    pub(crate) count: u32,
}

impl SplitName {
    pub(crate) fn of(name: &str) -> Option<Self> {
        let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        let parse = |text: &str| {
            let digits = text.len() == DIGITS && text.bytes().all(|byte| byte.is_ascii_digit());
            text.parse::<u32>().ok().filter(|&number| digits && number > 0)
        };
        Some(Self { stem: stem.to_owned(), number: parse(number)?, count: parse(count)? })
    }

    /// The name of another part of the same model.
    pub(crate) fn part(&self, number: u32) -> String {
        format!("{}-{number:0DIGITS$}-of-{:0DIGITS$}.gguf", self.stem, self.count)
    }

    /// Whether both name parts of one model.
    pub(crate) fn is_with(&self, other: &Self) -> bool {
        (&self.stem, self.count) == (&other.stem, other.count)
    }
}

/// What a file says of the split that it is a part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    no: u64,
    count: u64,
    tensors: Option<u64>,
}

/// A number among the split's keys. Writers use different integer types for them.
fn number(file: &GgufFile, key: &str) -> Result<Option<u64>> {
    let Some(value) = file.metadata().get(key) else { return Ok(None) };
    let offset = file.metadata().range(key).map_or(0, |range| range.start());
    let found = value.to_number::<u64>();
    found.map(Some).map_err(|error| {
        Error::new(Kind::Split, format!("the value of {key} is no count"))
            .with_path(file.source().path())
            .with_offset(offset)
            .with_expected("an integer that is not negative")
            .with_got(match value {
                Value::String(_) | Value::Array(_) => value.value_type().to_string(),
                other => other.to_json().to_string(),
            })
            .with_source(error)
    })
}

/// What a file says of its split; `None` for a file that is whole.
fn part_of(file: &GgufFile) -> Result<Option<Part>> {
    let count = number(file, COUNT_KEY)?.unwrap_or(0);
    if count <= 1 {
        return Ok(None);
    }
    let no = number(file, NO_KEY)?.ok_or_else(|| {
        fault(file, "a part of a split file must say which one it is").with_expected(NO_KEY).with_got("no such key")
    })?;
    if no >= count {
        return Err(fault(file, "a part of a split file has a number that is none of its parts'")
            .with_expected(format!("{NO_KEY} below {count}"))
            .with_got(no));
    }
    Ok(Some(Part { no, count, tensors: number(file, TENSORS_KEY)? }))
}

#[cold]
fn fault(file: &GgufFile, message: &str) -> Error {
    let keys = [NO_KEY, COUNT_KEY];
    let error = Error::new(Kind::Split, message).with_path(file.source().path());
    match keys.iter().find_map(|key| file.metadata().range(key)) {
        Some(range) => error.with_offset(range.start()),
        None => error,
    }
}

/// The files of one model.
#[derive(Debug)]
pub(crate) struct Splits;

impl Splits {
    /// The files of the model that `file`, opened as `path`, is a part of, in their order: `path` itself for one that is
    /// whole.
    ///
    /// # Errors
    ///
    /// [`Kind::Split`] where the name does not say what the others are called, or contradicts the file.
    pub(crate) fn paths(path: &Path, file: &GgufFile) -> Result<Vec<PathBuf>> {
        let Some(part) = part_of(file)? else { return Ok(vec![path.to_path_buf()]) };
        let name = path.file_name().and_then(|name| name.to_str());
        let expected = || format!("a name that ends with -{:0DIGITS$}-of-{:0DIGITS$}.gguf", part.no + 1, part.count);
        let Some(parsed) = name.and_then(SplitName::of) else {
            return Err(fault(
                file,
                "the file is a part of a split one, and its name does not say what the others are called",
            )
            .with_expected(expected())
            .with_got(name.unwrap_or("another")));
        };
        if (u64::from(parsed.number), u64::from(parsed.count)) != (part.no + 1, part.count) {
            return Err(fault(file, "the name of the file and its metadata say different things of its split")
                .with_expected(expected())
                .with_got(name.unwrap_or_default()));
        }
        // Five digits are fewer files than any limit.
        Ok((1..=parsed.count).map(|number| path.with_file_name(parsed.part(number))).collect())
    }

    /// The files must be all parts of one model, each once, or whole ones.
    ///
    /// # Errors
    ///
    /// [`Kind::Split`] where they contradict one another, [`Kind::MissingShard`] where one is not there.
    pub(crate) fn check(files: &[GgufFile]) -> Result<()> {
        let mut seen: Vec<Option<&GgufFile>> = vec![None; files.len()];
        let mut first: Option<(Part, &GgufFile)> = None;
        let mut whole = 0;
        for file in files {
            let Some(part) = part_of(file)? else {
                whole += 1;
                continue;
            };
            let (expected, _) = *first.get_or_insert((part, file));
            if part.count != expected.count {
                return Err(fault(file, "the parts of a split file disagree on how many there are")
                    .with_expected(expected.count)
                    .with_got(part.count));
            }
            if part.tensors.zip(expected.tensors).is_some_and(|(own, other)| own != other) {
                return Err(fault(file, "the parts of a split file disagree on how many tensors there are")
                    .with_expected(expected.tensors.unwrap_or_default())
                    .with_got(part.tensors.unwrap_or_default()));
            }
            // More than there are files cannot all be there, which is said below.
            let slot = usize::try_from(part.no).ok().and_then(|no| seen.get_mut(no));
            if let Some(slot) = slot
                && let Some(other) = slot.replace(file)
            {
                return Err(fault(file, "two files are the same part of a split one")
                    .with_expected("each part once")
                    .with_got(format!("part {} in {} too", part.no, other.source().path().display())));
            }
        }
        let Some((part, file)) = first else { return Ok(()) };
        if whole > 0 {
            return Err(fault(file, "the file is a part of a split one, and others are not")
                .with_expected(format!("the {} parts and no other file", part.count))
                .with_got(format!("{whole} that are whole")));
        }
        if files.len() as u64 != part.count {
            let missing = seen.iter().position(Option::is_none).unwrap_or(files.len());
            return Err(Error::new(Kind::MissingShard, "a part of a split file is missing")
                .with_path(file.source().path())
                .with_expected(format!("all {} parts", part.count))
                .with_got(format!("{}, without number {missing}", files.len())));
        }
        let tensors: u64 = files.iter().map(|file| file.index().len() as u64).sum();
        match part.tensors {
            Some(expected) if expected != tensors => {
                Err(fault(file, "the parts have another number of tensors than they say")
                    .with_expected(expected)
                    .with_got(tensors))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_parts() {
        let name = SplitName::of("model-q4_k-00002-of-00003.gguf").unwrap();
        assert_eq!((name.number, name.count), (2, 3));
        assert_eq!(name.part(3), "model-q4_k-00003-of-00003.gguf");
        assert!(name.is_with(&SplitName::of(&name.part(1)).unwrap()));
        assert!(!name.is_with(&SplitName::of("other-00001-of-00003.gguf").unwrap()));
        for other in ["m.gguf", "m-2-of-3.gguf", "m-00000-of-00003.gguf", "m-00001-of-00003.bin", "00001-of-00003.gguf"]
        {
            assert_eq!(SplitName::of(other), None, "{other}");
        }
    }
}
