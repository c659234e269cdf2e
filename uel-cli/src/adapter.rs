//! LoRA adapters, with the configuration that PEFT keeps beside them.

use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use uel_candle::{Edit, LoraOptions};
use uel_core::{Error, Kind, Result};

/// The name of PEFT's configuration file.
const CONFIG: &str = "adapter_config.json";

/// More than any configuration has.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// What decides how an adapter's updates are scaled and laid out.
#[derive(Debug, Deserialize)]
struct Config {
    r: Option<u64>,
    lora_alpha: Option<f64>,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    fan_in_fan_out: bool,
    #[serde(default)]
    rank_pattern: Option<BTreeMap<String, serde_json::Value>>,
    #[serde(default)]
    alpha_pattern: Option<BTreeMap<String, serde_json::Value>>,
}

/// Adds the adapter at `path`, a file or its folder, to `edit`. Without `scale` the adapter's own is taken: that of its
/// alpha tensors, or of its configuration.
pub(crate) fn add(edit: Edit, path: &Path, scale: Option<f64>) -> Result<Edit> {
    let adapter = crate::args::open_options().open(path)?;
    let config_path = if path.is_dir() { path.join(CONFIG) } else { path.with_file_name(CONFIG) };
    let has_alphas = adapter.infos().any(|info| info.name().ends_with(".alpha"));
    // A file with alphas has its scales itself, whatever stands beside it.
    let config = if has_alphas { None } else { read(&config_path)? };
    if config.as_ref().is_some_and(|config| config.fan_in_fan_out) {
        return Err(Error::new(
            Kind::Argument,
            "the adapter's updates are for transposed weights, which cannot be merged",
        )
        .with_path(&config_path)
        .with_expected("fan_in_fan_out false")
        .with_got("true"));
    }
    let scale = match (scale, &config) {
        (Some(scale), _) => Some(scale),
        (None, Some(config)) => Some(config.scale(&config_path)?),
        (None, None) if has_alphas => None,
        (None, None) => {
            return Err(Error::new(Kind::Argument, "the adapter does not say how to scale its updates; give --scale")
                .with_path(path)
                .with_expected(format!("alpha tensors, or {}", config_path.display())));
        }
    };
    let options = LoraOptions::new();
    let options = scale.map_or(options.clone(), |scale| options.with_scale(scale));
    edit.lora(&adapter, &options).map_err(|error| error.with_path(path))
}

/// The configuration, where there is one.
fn read(path: &PathBuf) -> Result<Option<Config>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("open", path, error)),
    };
    let mut text = Vec::new();
    file.take(MAX_CONFIG_BYTES).read_to_end(&mut text).map_err(|error| Error::io("read", path, error))?;
    serde_json::from_slice(&text).map(Some).map_err(|error| {
        Error::new(Kind::Json, format!("no configuration of an adapter: {error}")).with_path(path).with_source(error)
    })
}

impl Config {
    /// `alpha / r`, or `alpha / √r` for rank-stabilised adapters.
    fn scale(&self, path: &Path) -> Result<f64> {
        let differs = |pattern: &Option<BTreeMap<_, _>>| pattern.as_ref().is_some_and(|pattern| !pattern.is_empty());
        if differs(&self.rank_pattern) || differs(&self.alpha_pattern) {
            return Err(Error::new(
                Kind::Argument,
                "the adapter scales its modules differently, which cannot be merged",
            )
            .with_path(path)
            .with_expected("no rank_pattern and no alpha_pattern"));
        }
        match (self.r, self.lora_alpha) {
            (Some(r @ 1..), Some(alpha)) if self.use_rslora => Ok(alpha / (r as f64).sqrt()),
            (Some(r @ 1..), Some(alpha)) => Ok(alpha / r as f64),
            (r, alpha) => Err(Error::new(Kind::Argument, "the configuration gives no scale; give --scale")
                .with_path(path)
                .with_expected("r from 1 up, and lora_alpha")
                .with_got(format!("r {r:?}, lora_alpha {alpha:?}"))),
        }
    }
}
