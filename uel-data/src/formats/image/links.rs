//! Folders in which links lead to others.

use std::os::unix::fs::symlink;
use std::time::{Duration, Instant};

use super::{ImageFolder, ImageTransform};
use crate::{Dataset as _, Kind};

fn open(root: &std::path::Path) -> uel_core::Result<ImageFolder> {
    ImageFolder::open(root, ImageTransform::resize(4, 4))
}

/// Two links back to their folder would be listed 2^32 times.
#[test]
fn a_link_that_leads_back_is_refused_at_once() {
    let root = tempfile::tempdir().unwrap();
    let class = root.path().join("cats");
    std::fs::create_dir_all(class.join("more")).unwrap();
    symlink(class.join("more"), class.join("more/a")).unwrap();
    symlink(&class, class.join("more/b")).unwrap();
    let began = Instant::now();
    let error = open(root.path()).unwrap_err();
    assert_eq!(error.kind(), Kind::Malformed, "{error}");
    assert!(error.to_string().contains("more/a"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(5));
}

/// A folder that stands beside another one may be linked to, and its images belong to both classes.
#[test]
fn links_aside_are_followed() {
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(root.path().join("cats/young")).unwrap();
    std::fs::create_dir_all(root.path().join("dogs")).unwrap();
    std::fs::write(root.path().join("cats/young/one.png"), b"").unwrap();
    symlink(root.path().join("cats/young"), root.path().join("dogs/young")).unwrap();
    symlink(root.path().join("cats"), root.path().join("tigers")).unwrap();
    let images = open(root.path()).unwrap();
    assert_eq!((images.len(), images.classes().len()), (3, 3));
}
