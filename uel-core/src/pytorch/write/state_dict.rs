//! What a file is to hold, but for the tensors' bytes.

use crate::save::TensorMeta;
use serde_json::{Map, Value};

/// What a PyTorch file is to hold: the tensors of a state_dict, in its order, names that share a tensor, and values that
/// stand beside it.
///
/// ```
/// use uel_core::Dtype;
/// use uel_core::pytorch::write::StateDict;
/// use uel_core::save::TensorMeta;
/// let embedding = TensorMeta::new("wte.weight", Dtype::F32, [4, 2]);
/// let dict = StateDict::new([embedding]).with_tied("lm_head.weight", "wte.weight");
/// let checkpoint = dict.under("state_dict").with_value("epoch", 3);
/// # let _ = checkpoint;
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StateDict {
    pub(super) metas: Vec<TensorMeta>,
    /// Other name, name.
    pub(super) tied: Vec<(String, String)>,
    pub(super) key: Option<String>,
    pub(super) values: Map<String, Value>,
}

impl StateDict {
    /// A dict of these tensors alone, which is what torch's `load_state_dict` takes.
    pub fn new(metas: impl IntoIterator<Item = TensorMeta>) -> Self {
        Self { metas: metas.into_iter().collect(), ..Self::default() }
    }

    /// Gives the tensor called `name` another name too. Both share one storage, as tied weights do in torch; its bytes are
    /// written once, under `name`.
    pub fn with_tied(mut self, other: impl Into<String>, name: impl Into<String>) -> Self {
        self.tied.push((other.into(), name.into()));
        self
    }

    /// Puts the tensors into a dict that stands under `key` of the outermost one, as training programs do:
    /// `{"state_dict": …, "epoch": 3}`.
    pub fn under(mut self, key: impl Into<String>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// Puts a value into the outermost dict, behind the tensors. Objects become dicts, arrays lists, numbers without a
    /// fraction ints. A value of the same key is replaced.
    pub fn with_value(mut self, key: impl Into<String>, value: impl Into<Value>) -> Self {
        self.values.insert(key.into(), value.into());
        self
    }

    /// The tensors whose bytes are written.
    pub fn metas(&self) -> &[TensorMeta] {
        &self.metas
    }

    /// Names that share a tensor with another: other name, name.
    pub fn tied(&self) -> impl ExactSizeIterator<Item = (&str, &str)> {
        self.tied.iter().map(|(other, name)| (other.as_str(), name.as_str()))
    }
}

impl<I: IntoIterator<Item = TensorMeta>> From<I> for StateDict {
    fn from(metas: I) -> Self {
        Self::new(metas)
    }
}
