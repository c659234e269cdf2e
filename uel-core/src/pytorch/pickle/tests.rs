use super::assemble::{call, dict, doubled, float, get, global, int, list, persistent, pickle, put, text, tuple};
use super::*;
use crate::Kind;
use proptest::prelude::*;

fn plain(bytes: &[u8]) -> Plain {
    let (pickle, consumed) = unpickle(bytes).unwrap();
    assert_eq!(consumed, bytes.len());
    pickle.plain().unwrap()
}

fn str(text: &str) -> Plain {
    Plain::Str(text.to_owned())
}

#[test]
fn every_kind_of_value_in_every_spelling() {
    let values: &[(&[u8], Plain)] = &[
        (b"N.", Plain::None),
        (b"I01\n.", Plain::Bool(true)),
        (b"I00\n.", Plain::Bool(false)),
        (b"\x88.", Plain::Bool(true)),
        (b"\x89.", Plain::Bool(false)),
        (b"I-12\n.", Plain::Int(-12)),
        (b"K\xff.", Plain::Int(255)),
        (b"M\xff\xff.", Plain::Int(65535)),
        (b"J\xff\xff\xff\xff.", Plain::Int(-1)),
        (b"L12L\n.", Plain::Int(12)),
        (b"L36893488147419103232L\n.", Plain::Int(1 << 65)),
        (b"\x8a\x00.", Plain::Int(0)),
        (b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", Plain::Int(0x1950_a86a_20f9_469c_fc6c)),
        (b"\x8b\x02\x00\x00\x00\xff\x00.", Plain::Int(255)),
        (b"F1.5\n.", Plain::Float(1.5)),
        (b"G\xbf\xf8\x00\x00\x00\x00\x00\x00.", Plain::Float(-1.5)),
        (b"S'ab\\x43'\n.", str("abC")),
        (b"U\x02ab.", str("ab")),
        (b"T\x02\x00\x00\x00ab.", str("ab")),
        (b"U\x01\xff.", Plain::Bytes(vec![0xff])),
        (b"S'\\xff'\n.", Plain::Bytes(vec![0xff])),
        (b"Va\\u00e9\n.", str("aé")),
        (b"X\x02\x00\x00\x00\xc3\xa9.", str("é")),
        (b"\x8c\x02\xc3\xa9.", str("é")),
        (b"\x8d\x01\x00\x00\x00\x00\x00\x00\x00a.", str("a")),
        (b"C\x01\xc3.", Plain::Bytes(vec![0xc3])),
        (b"B\x01\x00\x00\x00\xc3.", Plain::Bytes(vec![0xc3])),
        (b"\x8e\x01\x00\x00\x00\x00\x00\x00\x00\xc3.", Plain::Bytes(vec![0xc3])),
        (b"\x96\x01\x00\x00\x00\x00\x00\x00\x00\xc3.", Plain::Bytes(vec![0xc3])),
        (b").", Plain::List(vec![])),
        (b"(t.", Plain::List(vec![])),
        (b"NK\x01\x86.", Plain::List(vec![Plain::None, Plain::Int(1)])),
        (b"N\x85.", Plain::List(vec![Plain::None])),
        (b"NNN\x87.", Plain::List(vec![Plain::None, Plain::None, Plain::None])),
        (b"(NK\x01l.", Plain::List(vec![Plain::None, Plain::Int(1)])),
        (b"]Na(K\x01K\x02e.", Plain::List(vec![Plain::None, Plain::Int(1), Plain::Int(2)])),
        (b"\x8f(K\x01K\x02\x90.", Plain::List(vec![Plain::Int(1), Plain::Int(2)])),
        (b"(K\x01\x91.", Plain::List(vec![Plain::Int(1)])),
        (b"(K\x01Nd.", Plain::Dict(vec![(Plain::Int(1), Plain::None)])),
        (b"}K\x01Ns(K\x02Nu.", Plain::Dict(vec![(Plain::Int(1), Plain::None), (Plain::Int(2), Plain::None)])),
        (b"(NN1K\x01.", Plain::Int(1)),
        (b"NK\x010K\x010.", Plain::None),
        (b"K\x01(0.", Plain::Int(1)),
        (b"K\x012\x86.", Plain::List(vec![Plain::Int(1), Plain::Int(1)])),
        (b"K\x07p9999\n0g9999\n.", Plain::Int(7)),
        (b"K\x07q\x050h\x05.", Plain::Int(7)),
        (b"K\x07r\xff\xff\xff\xff0j\xff\xff\xff\xff.", Plain::Int(7)),
        (b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00K\x07\x94h\x00\x86.", Plain::List(vec![Plain::Int(7); 2])),
        (b"cos\nsystem\n.", Plain::Global("os".to_owned(), "system".to_owned())),
    ];
    for (bytes, value) in values {
        assert_eq!(&plain(bytes), value, "{bytes:?}");
    }
    let (pickle, _) = unpickle(b"X\x01\x00\x00\x00\xff.").unwrap();
    assert_eq!(pickle.plain(), Some(str("\u{fffd}")), "half a surrogate pair is replaced");
}

/// A memo number that was put sparsely is found again when the numbers reach it.
#[test]
fn memo_numbers_in_any_order() {
    assert_eq!(plain(b"K\x07q\x010K\x08q\x000h\x01h\x00\x86."), Plain::List(vec![Plain::Int(7), Plain::Int(8)]));
    assert_eq!(plain(b"K\x07q\x01q\x000K\x08q\x010h\x01."), Plain::Int(8));
    assert_eq!(plain(b"K\x07q\x05\x940h\x01."), Plain::Int(7), "MEMOIZE counts entries");
}

/// What the fixed part of a legacy file has, one pickle behind the other.
#[test]
fn pickles_that_follow_each_other() {
    let magic = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.".to_vec();
    let info = pickle(dict(&[("protocol_version", int(1001)), ("little_endian", vec![0x88])]));
    let keys = pickle(list(&[text("94086"), int(12)]));
    let all = [magic, pickle(int(1001)), info, keys, vec![0; 40]].concat();
    let (magic, at) = unpickle(&all).unwrap();
    assert_eq!(magic.as_int(), Some(0x1950_a86a_20f9_469c_fc6c));
    let (protocol, len) = unpickle(&all[at..]).unwrap();
    assert_eq!(protocol.as_int(), Some(1001));
    let at = at + len;
    let (info, len) = unpickle(&all[at..]).unwrap();
    let Some(Plain::Dict(pairs)) = info.plain() else { panic!("no dict") };
    assert!(pairs.contains(&(Plain::Str("little_endian".to_owned()), Plain::Bool(true))));
    assert_eq!(info.as_int(), None);
    let at = at + len;
    let (keys, len) = unpickle(&all[at..]).unwrap();
    assert_eq!(keys.as_str_list(), Some(vec!["94086".to_owned(), "12".to_owned()]));
    assert_eq!(at + len + 40, all.len());
    assert_eq!(info.as_str_list(), None);
}

#[test]
fn globals_in_order_with_what_would_be_done_with_them() {
    let bytes = pickle(list(&[
        global("torch", "FloatStorage"),
        call(global("os", "system"), &[text("true")]),
        global("my.module", "Net"),
        global("torch", "FloatStorage"),
        b"\x8c\x05posix\x8c\x05popen\x93".to_vec(),
        b"(imy\nOld\n".to_vec(),
        b"(cmy\nOlder\no".to_vec(),
        b"cmy\nNew\n)\x81".to_vec(),
        b"cmy\nNewest\n)}\x92".to_vec(),
        b"cmy\nmodule\n}b".to_vec(),
        b"K\x01K\x02\x93".to_vec(),
        b"\x82\x07".to_vec(),
        call(persistent(tuple(&[text("module"), global("my", "Saved")])), &[]),
    ]));
    let (read, _) = unpickle(&bytes).unwrap();
    let got: Vec<_> = read
        .globals()
        .iter()
        .map(|global| (format!("{}.{}", global.module(), global.name()), global.verdict(), global.is_called()))
        .collect();
    let expected = [
        ("torch.FloatStorage", Verdict::Allowed, false),
        ("os.system", Verdict::Dangerous, true),
        ("my.module.Net", Verdict::Unknown, false),
        ("posix.popen", Verdict::Dangerous, false),
        ("my.Old", Verdict::Unknown, true),
        ("my.Older", Verdict::Unknown, true),
        ("my.New", Verdict::Unknown, true),
        ("my.Newest", Verdict::Unknown, true),
        ("my.module", Verdict::Unknown, true),
        ("<computed>.<computed>", Verdict::Dangerous, false),
        ("copyreg.extension 7", Verdict::Unknown, false),
        ("my.Saved", Verdict::Unknown, true),
    ];
    assert_eq!(got, expected.map(|(name, verdict, called)| (name.to_owned(), verdict, called)));
    for global in read.globals().iter().filter(|global| global.module() == "os") {
        assert_eq!(bytes[global.offset() as usize..][..10], b"cos\nsystem"[..]);
    }
}

/// Python would have made the call by then.
#[test]
fn a_scan_keeps_the_globals_before_a_fault() {
    let mut bytes = call(global("os", "system"), &[text("true")]);
    bytes.push(0xff);
    let (globals, end) = scan(&bytes);
    assert_eq!(globals.len(), 1);
    assert!(globals[0].is_called() && globals[0].verdict() == Verdict::Dangerous);
    assert_eq!(end.unwrap_err().offset(), Some(bytes.len() as u64 - 1));
    assert_eq!(scan(&pickle(int(1))).1.unwrap(), pickle(int(1)).len());
}

#[test]
fn every_opcode_that_takes_values_says_that_there_are_none() {
    let takes: &[&[u8]] = &[
        b"0",
        b"1",
        b"2",
        b"Q",
        b"R",
        b"a",
        b"b",
        b"d",
        b"e",
        b"i\n\n",
        b"l",
        b"o",
        b"q\0",
        b"p0\n",
        b"r\0\0\0\0",
        b"s",
        b"t",
        b"u",
        b"\x81",
        b"\x85",
        b"\x86",
        b"\x87",
        b"\x90",
        b"\x91",
        b"\x92",
        b"\x93",
        b"\x94",
        b".",
    ];
    for opcode in takes {
        for before in [&b""[..], b"(", b"N(", b"N"] {
            // One value, or a mark, is enough for some of them.
            let enough = match before {
                b"" => false,
                b"N" => matches!(opcode[0], b'0' | b'2' | b'Q' | b'q' | b'p' | b'r' | b'.' | 0x85 | 0x94),
                _ => matches!(opcode[0], b'0' | b'1' | b'd' | b'i' | b'l' | b't' | 0x91),
            };
            let bytes = [before, opcode, b"(N."].concat();
            let result = unpickle(&bytes);
            if enough {
                assert!(result.is_ok(), "{bytes:?}: {result:?}");
            } else {
                let error = result.unwrap_err();
                assert_eq!(
                    (error.kind(), error.offset()),
                    (Kind::Pickle, Some(before.len() as u64)),
                    "{bytes:?}: {error}"
                );
            }
        }
    }
}

#[test]
fn malformed_pickles_are_refused_where_they_are_wrong() {
    let wrong: &[(&[u8], u64)] = &[
        (b"", 0),
        (b"N", 1),
        (b"K", 1),
        (b"\x80\x06.", 0),
        (b"\x00", 0),
        (b"\xff", 0),
        (b"X\xff\xff\xff\xffabc", 5),
        (b"\x8d\x00\x00\x00\x00\x00\x00\x00\x80abc", 9),
        (b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffabc", 9),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc", 9),
        (b"\x95\xff\xff\xff\xff\xff\xff\xff\x7fN.", 9),
        (b"\x8b\xff\xff\xff\x7fabc", 5),
        (b"\x8b\xff\xff\xff\xffabc", 0),
        (b"T\xff\xff\xff\xffabc", 0),
        (b"h\x00.", 0),
        (b"j\xff\xff\xff\xff.", 0),
        (b"g-1\n.", 0),
        (b"Ix\n.", 0),
        (b"I1", 1),
        (b"Fx\n.", 0),
        (b"Sab\n.", 0),
        (b"V\\u12\n.", 0),
        (b"c\xff\nx\n.", 1),
        (b"\x97.", 0),
        (b"\x98.", 0),
        (b"NNs.", 2),
        (b"NN\x86Na.", 4),
        (b"N(Ne.", 3),
        (b"}(Nu.", 3),
        (b"}NNa.", 3),
        (b"(Nd.", 2),
        (b"NNb.", 2),
        (b"(o.", 1),
        (b"(K\x01K\x02", 5),
    ];
    for &(bytes, at) in wrong {
        let error = unpickle(bytes).unwrap_err();
        assert!(matches!(error.kind(), Kind::Pickle | Kind::UnexpectedEof), "{bytes:?}: {error}");
        assert_eq!(error.offset(), Some(at), "{bytes:?}: {error}");
    }
}

#[test]
fn values_may_contain_themselves() {
    for bytes in [&b"]q\0h\0a."[..], b"}q\0K\x01h\0s.", b"cm\nC\n)\x81q\0h\0b.", b"]q\0h\0\x85a."] {
        let (pickle, _) = unpickle(bytes).unwrap();
        assert_eq!(pickle.plain(), None, "{bytes:?}");
    }
}

#[test]
fn bombs_stay_small() {
    let bytes = pickle(doubled(int(1), 200));
    let (read, _) = unpickle(&bytes).unwrap();
    assert_eq!(read.plain(), None, "it is nested too deeply");
    // 2^24 leaves below eight levels of lists are too many for plain data.
    let mut wide = put(list(&vec![int(1); 8]), 0);
    for level in 0..7 {
        wide.push(b'0');
        wide.extend(put(list(&vec![get(level); 8]), level + 1));
    }
    assert_eq!(unpickle(&pickle(wide)).unwrap().0.plain(), None);
    let deep = [vec![b']'; 100_000], vec![b'a'; 99_999], vec![b'.']].concat();
    assert_eq!(unpickle(&deep).unwrap().1, deep.len());
    let tuples = [vec![b')'; 1], vec![0x85; 100_000], vec![b'.']].concat();
    assert_eq!(unpickle(&tuples).unwrap().1, tuples.len());
    let marks = vec![b'('; 100_000];
    assert_eq!(unpickle(&marks).unwrap_err().offset(), Some(100_000));
}

fn some_pickles() -> Vec<Vec<u8>> {
    vec![
        pickle(dict(&[("a", list(&[int(1), float(2.5), text("b")])), ("c", call(global("m", "C"), &[put(int(1), 0), get(0)]))])),
        b"\x80\x04\x95\x20\x00\x00\x00\x00\x00\x00\x00}\x94(\x8c\x01a\x94]\x94(K\x01K\x02e\x8c\x01b\x94\x8c\x02os\x94\x8c\x04path\x94\x93\x94u.".to_vec(),
        b"(dp0\nS'a'\np1\n(lp2\nI1\naL2L\naF1.5\nasVb\np3\n(I1\nI2\ntp4\ns.".to_vec(),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok((pickle, consumed)) = unpickle(&bytes) {
            prop_assert!(consumed <= bytes.len());
            prop_assert_eq!(bytes[consumed - 1], b'.');
            let _ = (pickle.plain(), pickle.as_int(), pickle.as_str_list());
        }
    }

    /// Bytes that are opcodes more often than not.
    #[test]
    fn random_opcodes_never_panic(
        bytes in prop::collection::vec(prop::sample::select(&b"(.012IKLMNPQRSTUVXabcdegihjlopqrstu})]G\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x8c\x8f\x90\x91\x92\x93\x94\n1\x00"[..]), 0..200)
    ) {
        if let Ok((pickle, _)) = unpickle(&bytes) {
            let _ = pickle.plain();
        }
    }

    #[test]
    fn mutated_pickles_never_panic(which in 0_usize..3, changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let mut bytes = some_pickles().swap_remove(which);
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok((pickle, consumed)) = unpickle(&bytes) {
            prop_assert!(consumed <= bytes.len());
            let _ = pickle.plain();
        }
    }
}

#[test]
fn the_pickles_that_are_mutated_are_well_formed() {
    for bytes in some_pickles() {
        assert_eq!(unpickle(&bytes).unwrap().1, bytes.len());
    }
}
