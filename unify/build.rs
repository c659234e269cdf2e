//! Without a build script there would be no build dependencies.

fn main() {}
