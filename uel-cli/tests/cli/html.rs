//! `uel inspect --html`.

use crate::{assert_exit, json_of, model, text, uel, write};
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use std::collections::HashMap;
use tempfile::TempDir;

#[test]
fn one_page_with_everything() {
    let dir = TempDir::new().unwrap();
    let path = model(&dir);
    let page = dir.path().join("page.html");
    let output = uel(&[&"inspect", &path, &"--html", &page]);
    assert_exit(&output, 0, 0);
    assert_eq!(text(&output.stdout), format!("wrote {}\n", page.display()));
    let html = std::fs::read_to_string(&page).unwrap();
    for part in [
        "<td>F32<td class=n>2<td class=n data-v=\"48\">48 B</tr>",
        "<td>model.layers<td class=n>2<td class=n data-v=\"48\">48 B</tr>",
        "<td>lm_head.weight<td>BF16<td data-v=\"4\">[4]<td class=n data-v=\"8\">8 B<td>model.safetensors</tr>",
        "<th>format<td>pt</tr>",
        "<p>3 tensors, 56 B (56 bytes), 1 file</p>",
        "<span id=shown>3 of 3</span>",
    ] {
        assert!(html.contains(part), "{part} in {html}");
    }
    assert!(!html.contains("src=") && !html.contains("href=") && !html.contains("http://"), "nothing to fetch");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "nothing else is left");
}

#[test]
fn the_checkpoint_itself_is_not_replaced() {
    let dir = TempDir::new().unwrap();
    let path = model(&dir);
    let before = std::fs::read(&path).unwrap();
    let again = dir.path().join(".").join("model.safetensors");
    let output = uel(&[&"inspect", &path, &"--html", &again]);
    assert_exit(&output, 1, 1);
    assert!(text(&output.stderr).contains("a file of the checkpoint"), "{}", text(&output.stderr));
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

#[test]
fn with_json_and_a_filter() {
    let dir = TempDir::new().unwrap();
    let path = model(&dir);
    let page = dir.path().join("page.html");
    std::fs::write(&page, "old").unwrap();
    let output = uel(&[&"inspect", &path, &"--html", &page, &"--json", &"--filter", &"head"]);
    assert_exit(&output, 0, 0);
    assert_eq!(json_of(&output)["tensor_count"], 1);
    let html = std::fs::read_to_string(&page).unwrap();
    assert!(html.contains("1 tensor (of 3)") && !html.contains("mlp"), "{html}");
}

#[test]
fn hostile_names_are_text() {
    const HOSTILE: &str = "</td><script>alert(1)</script><img src=x onerror='a'>\"&\u{202e}\n";
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("<b>&\"'.safetensors");
    let view = TensorView::new(Dtype::U8, vec![1], &[0]).unwrap();
    let metadata = HashMap::from([(HOSTILE.to_owned(), HOSTILE.to_owned())]);
    serialize_to_file([(format!("{HOSTILE}.{HOSTILE}"), view)], Some(metadata), &path).unwrap();
    let page = dir.path().join("page.html");
    assert_exit(&uel(&[&"inspect", &path, &"--html", &page]), 0, 0);

    // A page about something harmless has the same tags, in the same order.
    let harmless = dir.path().join("harmless.safetensors");
    write(&harmless, &[("a.b", Dtype::U8, &[1], vec![0])]);
    let plain = dir.path().join("plain.html");
    assert_exit(&uel(&[&"inspect", &harmless, &"--html", &plain]), 0, 0);
    let tags = |page| {
        let html = std::fs::read_to_string(page).unwrap();
        let (markup, _) = html.split_once("<script>\n").unwrap();
        assert!(!markup.contains('\u{202e}'));
        // Sizes differ.
        let tag = |tag: &str| tag.split('>').next().unwrap().replace(|c: char| c.is_ascii_digit(), "");
        markup.split('<').map(tag).collect::<Vec<_>>()
    };
    assert_eq!(tags(&page), tags(&plain));
    let html = std::fs::read_to_string(&page).unwrap();
    assert!(html.contains("&lt;/td&gt;&lt;script&gt;alert(1)&lt;/script&gt;"), "{html}");
    assert_eq!(html.matches("<script").count(), 1);
}

#[test]
fn a_page_that_cannot_be_written() {
    let dir = TempDir::new().unwrap();
    let path = model(&dir);
    for page in [dir.path().to_path_buf(), dir.path().join("no").join("page.html")] {
        let output = uel(&[&"inspect", &path, &"--html", &page]);
        assert_exit(&output, 1, 1);
        assert!(text(&output.stderr).starts_with(&format!("uel: cannot write {}: ", page.display())));
        assert!(output.stdout.is_empty());
    }
}
