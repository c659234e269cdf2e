use super::ContentsOptions;
use crate::pytorch::pickle::unpickle;

#[test]
#[ignore]
fn dump() {
    let dir = std::env::var("PKLDIR").unwrap();
    let mut paths: Vec<_> = std::fs::read_dir(&dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "pkl"))
        .collect();
    paths.sort();
    for path in paths {
        let bytes = std::fs::read(&path).unwrap();
        let t = std::time::Instant::now();
        let text = match unpickle(&bytes) {
            Err(e) => serde_json::json!({"error": e.to_string()}),
            Ok((pickle, n)) => {
                let t1 = t.elapsed();
                match pickle.contents(&ContentsOptions::default()) {
                    Err(e) => serde_json::json!({"error": e.to_string(), "n": n}),
                    Ok(c) => {
                        if bytes.len() > 100000 {
                            eprintln!(
                                "{path:?} {} bytes: unpickle {t1:?}, contents {:?}",
                                bytes.len(),
                                t.elapsed() - t1
                            );
                        }
                        serde_json::json!({"n": n, "len": bytes.len(),
                  "globals": pickle.globals().iter().map(|g| format!("{}.{} {:?} {}", g.module(), g.name(), g.verdict(), g.is_called())).collect::<Vec<_>>(),
                  "tensors": c.tensors.iter().map(|t| serde_json::json!([t.name, t.dtype.as_str(), t.shape, t.strides, match t.place { crate::pytorch::contents::Place::Storage{storage, offset} => serde_json::json!([c.storages[storage].key, offset]), crate::pytorch::contents::Place::Embedded{bytes} => serde_json::json!(c.embedded[bytes]) }, t.requires_grad, t.parameter])).collect::<Vec<_>>(),
                  "unreadable": c.unreadable.iter().map(|u| format!("{}: {}", u.name, u.why)).collect::<Vec<_>>(),
                  "storages": c.storages.iter().map(|s| format!("{s:?}")).collect::<Vec<_>>(),
                  "values": c.values})
                    }
                }
            }
        };
        std::fs::write(path.with_extension("json"), serde_json::to_string(&text).unwrap()).unwrap();
    }
}
