//! The index file of a sharded checkpoint: which tensor lies in which shard.

use super::faults::Faults;
use super::json::Scanner;
use super::strict;
use crate::{Error, Kind, Result, limits};
use std::borrow::Cow;
use std::collections::HashMap;

/// A decoded index file, borrowing from its text.
#[derive(Debug)]
pub(crate) struct IndexFile<'a> {
    /// File names of the shards, sorted.
    pub(crate) shards: Vec<Cow<'a, str>>,
    /// Tensor names and their shards' positions in `shards`, in the order of the file. A name may stand twice.
    pub(crate) weights: Vec<(Cow<'a, str>, usize)>,
    /// The `total_size` of the metadata, where it has one, or what is wrong with it.
    pub(crate) total_size: Option<Result<u64>>,
}

impl<'a> IndexFile<'a> {
    /// As [`decode`](Self::decode), ending at the first fault.
    pub(crate) fn decode_strictly(json: &'a [u8]) -> Result<Self> {
        Self::decode(json, &mut Faults::Stop)
    }

    /// Decodes the text of an index file. Keys other than `metadata` and `weight_map` are passed over.
    pub(super) fn decode(json: &'a [u8], faults: &mut Faults) -> Result<Self> {
        let mut scan = Scanner::new(strict::utf8(json, 0)?, 0);
        scan.typed_object("an object with a weight_map")??;
        let mut file = Self { shards: Vec::new(), weights: Vec::new(), total_size: None };
        let (mut first, mut found) = (true, false);
        while let Some((key, at)) = scan.next_key(first)? {
            first = false;
            match &*key {
                "weight_map" => {
                    if std::mem::replace(&mut found, true) {
                        let error = scan.error(Kind::DuplicateKey, at, "the weight_map stands twice");
                        faults.report(error.with_expected("each key once").with_got("a second weight_map"))?;
                    }
                    file.weight_map(&mut scan, faults)?;
                }
                "metadata" => file.metadata(&mut scan)?,
                _ => scan.skip_value()?,
            }
        }
        scan.skip_space();
        if scan.peek().is_some() {
            return Err(scan.unexpected("the index file goes on behind its closing brace", "the end"));
        }
        if !found {
            let error = Error::new(Kind::IndexFile, "the index file has no weight_map");
            faults.report(error.with_expected("a weight_map").with_got("an object without"))?;
        } else if file.weights.is_empty() {
            let error = Error::new(Kind::IndexFile, "the weight_map names no tensor");
            faults.report(error.with_expected("a tensor at least").with_got("an empty object"))?;
        }
        file.sort_shards();
        Ok(file)
    }

    fn weight_map(&mut self, scan: &mut Scanner<'a>, faults: &mut Faults) -> Result<()> {
        let entered = scan.typed_object("an object of shard names")?;
        if faults.check(entered)?.is_none() {
            return Ok(());
        }
        let mut numbers: HashMap<Cow<'a, str>, Option<usize>> = HashMap::new();
        let mut first = true;
        while let Some((name, at)) = scan.next_key(first)? {
            first = false;
            let shard = scan.typed_string("the name of a shard")?;
            let Some(shard) = faults.check(shard.map_err(|error| error.with_tensor(&name)))? else { continue };
            let number = match numbers.get(&shard) {
                Some(&number) => number,
                None => {
                    let number = match check_shard_name(&shard) {
                        Ok(()) => Some(self.shards.len()),
                        Err(error) => {
                            faults.report(error.with_tensor(&name).with_offset(scan.offset(at)))?;
                            None
                        }
                    };
                    if number.is_some_and(|number| number >= limits::MAX_SHARDS) {
                        return Err(scan.too_many(at, "too many shards", limits::MAX_SHARDS));
                    }
                    self.shards.extend(number.map(|_| shard.clone()));
                    numbers.insert(shard, number);
                    number
                }
            };
            if self.weights.len() >= limits::MAX_TENSORS {
                return Err(scan.too_many(at, "too many tensors", limits::MAX_TENSORS));
            }
            self.weights.extend(number.map(|number| (name, number)));
        }
        Ok(())
    }

    /// The metadata is for people; only `total_size` has a meaning, and a wrong one is no reason not to load.
    fn metadata(&mut self, scan: &mut Scanner<'a>) -> Result<()> {
        if let Err(fault) = scan.typed_object("an object")? {
            self.total_size = Some(Err(fault));
            return Ok(());
        }
        let mut first = true;
        while let Some((key, _)) = scan.next_key(first)? {
            first = false;
            if key == "total_size" {
                self.total_size = Some(scan.typed_unsigned("the number of bytes of all tensors")?);
            } else {
                scan.skip_value()?;
            }
        }
        Ok(())
    }

    fn sort_shards(&mut self) {
        let mut order: Vec<usize> = (0..self.shards.len()).collect();
        order.sort_by(|&a, &b| self.shards.get(a).cmp(&self.shards.get(b)));
        let mut rank = vec![0; order.len()];
        for (to, &from) in order.iter().enumerate() {
            if let Some(rank) = rank.get_mut(from) {
                *rank = to;
            }
        }
        self.shards.sort();
        for (_, shard) in &mut self.weights {
            *shard = rank.get(*shard).copied().unwrap_or_default();
        }
    }
}

/// A shard lies beside the index file. Anything but a plain file name could lead out of the folder.
fn check_shard_name(name: &str) -> Result<()> {
    let plain = !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', '\0', ':']);
    if plain && name.len() <= 255 {
        return Ok(());
    }
    Err(Error::new(Kind::IndexFile, "the weight_map names a shard that is no plain file name")
        .with_expected("the name of a file beside the index file")
        .with_got(format!("{name:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(json: &str) -> Option<Kind> {
        IndexFile::decode(json.as_bytes(), &mut Faults::Stop).err().map(|error| error.kind())
    }

    #[test]
    fn decodes_and_numbers_shards_by_name() {
        let json = " {\"metadata\": {\"total_size\": 12, \"x\": [1.5]}, \"other\": {\"a\": [[]]},\n\"weight_map\": \
                    {\"w\": \"m-2.safetensors\", \"v\": \"m-1.safetensors\", \"u\": \"m-2.safetensors\"}}\n";
        let file = IndexFile::decode(json.as_bytes(), &mut Faults::Stop).unwrap();
        assert_eq!(file.shards, ["m-1.safetensors", "m-2.safetensors"]);
        assert_eq!(
            file.weights.iter().map(|(name, shard)| (&**name, *shard)).collect::<Vec<_>>(),
            [("w", 1), ("v", 0), ("u", 1)]
        );
        assert_eq!(file.total_size.unwrap().unwrap(), 12);
    }

    #[test]
    fn refuses_what_leads_out_of_the_folder() {
        for name in ["", ".", "..", "/etc/passwd", "../x", "a/b", "a\\\\b", "C:x", "x\\u0000", &"n".repeat(256)] {
            let json = format!("{{\"weight_map\":{{\"w\":\"{name}\"}}}}");
            assert_eq!(kind(&json), Some(Kind::IndexFile), "{name}");
        }
        assert_eq!(kind("{\"weight_map\":{\"w\":\"..x.safetensors\"}}"), None);
    }

    #[test]
    fn refuses_malformed_files() {
        let deep = format!("{{\"x\":{}", "[".repeat(100_000));
        for (json, expected) in [
            ("", Kind::Json),
            ("[]", Kind::JsonType),
            ("{}", Kind::IndexFile),
            ("{\"weight_map\":{}}", Kind::IndexFile),
            ("{\"weight_map\":[]}", Kind::JsonType),
            ("{\"weight_map\":{\"a\":1}}", Kind::JsonType),
            ("{\"weight_map\":{\"a\":\"s\"},\"weight_map\":{\"a\":\"s\"}}", Kind::DuplicateKey),
            ("{\"weight_map\":{\"a\":\"s\"}}x", Kind::Json),
            ("\u{feff}{\"weight_map\":{\"a\":\"s\"}}", Kind::Json),
            (&deep, Kind::JsonDepth),
        ] {
            assert_eq!(kind(json), Some(expected), "{}", &json[..json.len().min(60)]);
        }
        assert_eq!(kind("{\"metadata\":{\"total_size\":1.5},\"weight_map\":{\"a\":\"s\"}}"), None);
        assert_eq!(kind("{\"metadata\":null,\"weight_map\":{\"a\":\"s\"}}"), None);
    }

    #[test]
    fn lists_all_faults() {
        let mut faults = Faults::collect();
        let json = r#"{"weight_map":{"a":1,"b":"../x","c":"s","d":"../x","e":"/y"}}"#;
        let file = IndexFile::decode(json.as_bytes(), &mut faults).unwrap();
        assert_eq!(file.weights.len(), 1);
        assert_eq!(faults.into_list(None).len(), 3);
    }
}
