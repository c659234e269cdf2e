//! How files are written.

use super::values::parse_pair;
use uel_candle::SaveOptions;
use uel_core::{Durability, Symlinks};

/// How a file gets to its place.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Placing {
    /// What the files survive once the program has ended
    #[arg(long, value_enum, default_value = "atomic", hide_possible_values = false)]
    durability: Level,
    /// Where the destination is a symbolic link, replace the file that it leads to; otherwise that is an error
    #[arg(long)]
    follow_symlinks: bool,
}

/// A [`Durability`] as the command line has it.
#[derive(clap::ValueEnum, Clone, Copy, Debug)]
enum Level {
    /// After a loss of power the old file or the new one is there, whole
    Atomic,
    /// After a loss of power the new file is there
    Durable,
    /// Nothing is synced: after a loss of power anything may be there
    Fast,
}

impl Placing {
    pub(crate) fn durability(&self) -> Durability {
        match self.durability {
            Level::Atomic => Durability::Atomic,
            Level::Durable => Durability::Durable,
            Level::Fast => Durability::Fast,
        }
    }

    pub(crate) fn symlinks(&self) -> Symlinks {
        if self.follow_symlinks { Symlinks::Follow } else { Symlinks::Refuse }
    }

    pub(crate) fn options(&self) -> SaveOptions {
        SaveOptions::new().with_durability(self.durability()).with_symlinks(self.symlinks())
    }
}

/// How a safetensors file is written.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Writing {
    /// Store a hash of every 2 MiB of each tensor in the file's metadata
    #[arg(long)]
    hashes: bool,
    /// Set an entry of the metadata, which is otherwise that of the input; may be given several times
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_pair)]
    metadata: Vec<(String, String)>,
    #[command(flatten)]
    placing: Placing,
}

impl Writing {
    pub(crate) fn options(&self) -> SaveOptions {
        let options = self.placing.options().with_hashes(self.hashes);
        let entry = |options: SaveOptions, (key, value): &(String, String)| options.with_metadata_entry(key, value);
        self.metadata.iter().fold(options, entry)
    }
}
