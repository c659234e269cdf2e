//! The pickle machine: it builds plain data and calls nothing.

use super::arena::{Arena, EMPTY, FALSE, Id, NONE, Node, TRUE};
use super::opcodes as op;
use super::reader::{Reader, fault};
use super::text::{self, Decimal};
use crate::{Error, Kind, Result, limits};
use std::borrow::Cow;
use std::collections::HashMap;

#[derive(Debug)]
pub(super) struct Machine<'a> {
    reader: Reader<'a>,
    pub(super) arena: Arena<'a>,
    stack: Vec<Id>,
    /// How high the stack was at each mark. What lies below the last one is out of reach until that is taken.
    marks: Vec<usize>,
    floor: usize,
    memo: Memo,
    /// Where the opcode stands that is being executed.
    at: usize,
}

/// Values under numbers. Picklers count from 0, so those are in a vector, and any others in a map: a number may be as
/// large as it likes.
#[derive(Debug, Default)]
struct Memo {
    dense: Vec<Id>,
    sparse: HashMap<u64, Id, foldhash::fast::RandomState>,
}

impl Memo {
    fn put(&mut self, index: u64, id: Id) {
        let len = self.dense.len() as u64;
        if index == len {
            self.sparse.remove(&index);
            self.dense.push(id);
        } else if let Some(place) = usize::try_from(index).ok().and_then(|index| self.dense.get_mut(index)) {
            *place = id;
        } else {
            self.sparse.insert(index, id);
        }
    }

    fn get(&self, index: u64) -> Option<Id> {
        let dense = usize::try_from(index).ok().and_then(|index| self.dense.get(index));
        dense.or_else(|| self.sparse.get(&index)).copied()
    }

    fn len(&self) -> u64 {
        self.dense.len() as u64 + self.sparse.len() as u64
    }
}

impl<'a> Machine<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self {
            reader: Reader::new(bytes),
            arena: Arena::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            floor: 0,
            memo: Memo::default(),
            at: 0,
        }
    }

    /// How many bytes have been read.
    pub(super) fn consumed(&self) -> usize {
        self.reader.at()
    }

    #[cold]
    fn fault(&self, message: impl Into<String>) -> Error {
        fault(self.at, message)
    }

    #[inline]
    fn push(&mut self, id: Id) -> Result<()> {
        if self.stack.len() >= limits::MAX_PICKLE_VALUES {
            return Err(Error::new(Kind::Limit, "the stack of the pickle is too high")
                .with_offset(self.at as u64)
                .with_expected(limits::MAX_PICKLE_VALUES));
        }
        self.stack.push(id);
        Ok(())
    }

    #[inline]
    fn push_node(&mut self, node: Node<'a>) -> Result<()> {
        let id = self.arena.push(node).map_err(|error| error.with_offset(self.at as u64))?;
        self.push(id)
    }

    #[inline]
    fn pop(&mut self) -> Result<Id> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    #[inline]
    fn top(&self) -> Result<Id> {
        match self.stack.get(self.floor..).and_then(<[Id]>::last) {
            Some(&id) => Ok(id),
            None => Err(self.fault("the pickle takes a value from its stack, which has none")),
        }
    }

    /// Takes the last mark away; what lies above it begins there on the stack.
    #[inline]
    fn take_mark(&mut self) -> Result<usize> {
        let Some(start) = self.marks.pop() else {
            return Err(self.fault("the pickle takes the values above a mark, but there is no mark"));
        };
        self.floor = self.marks.last().copied().unwrap_or(0);
        Ok(start)
    }

    /// Puts a list, dict or set in the place of what stands above the last mark.
    fn collect(&mut self, kind: fn(u32) -> Node<'a>) -> Result<()> {
        let start = self.take_mark()?;
        let id = self.arena.push_list(self.stack.get(start..).unwrap_or_default(), kind)?;
        self.stack.truncate(start);
        self.push(id)
    }

    /// Puts a tuple in the place of what stands from `start` on.
    #[inline]
    fn tuple(&mut self, start: usize) -> Result<()> {
        let id = self.arena.push_tuple(self.stack.get(start..).unwrap_or_default())?;
        self.stack.truncate(start);
        self.push(id)
    }

    /// Puts a tuple in the place of the last `len` values.
    #[inline]
    fn short_tuple(&mut self, len: usize) -> Result<()> {
        match self.stack.len().checked_sub(len) {
            Some(start) if start >= self.floor => self.tuple(start),
            _ => Err(self.fault("the pickle makes a tuple of more values than its stack has")),
        }
    }

    /// Gives what stands above the last mark to the value below it.
    fn fill(&mut self, fill: fn(&mut Arena<'a>, Id, &[Id], usize) -> Result<()>) -> Result<()> {
        let start = self.take_mark()?;
        let Some(target) = start.checked_sub(1).filter(|&below| below >= self.floor) else {
            return Err(self.fault("the pickle fills a value that its stack does not have"));
        };
        let target = self.stack.get(target).copied().unwrap_or(NONE);
        fill(&mut self.arena, target, self.stack.get(start..).unwrap_or_default(), self.at)?;
        self.stack.truncate(start);
        Ok(())
    }

    #[inline]
    fn object(&mut self, callable: Id, args: Id, kwargs: Option<Id>) -> Result<()> {
        let id = self.arena.push_object(callable, args, kwargs)?;
        self.push(id)
    }

    fn push_text(&mut self, text: Cow<'a, str>) -> Result<()> {
        match text {
            Cow::Borrowed(text) => self.push_node(Node::Str(text)),
            Cow::Owned(text) => {
                let id = self.arena.push_text(&text)?;
                self.push(id)
            }
        }
    }

    /// A string of Python 3.
    #[inline]
    fn string(&mut self, len: u64) -> Result<()> {
        let bytes = self.reader.take(len)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => self.push_node(Node::Str(text)),
            Err(_) => self.push_text(text::unicode(bytes)),
        }
    }

    #[inline]
    fn bytes(&mut self, len: u64) -> Result<()> {
        let bytes = self.reader.take(len)?;
        self.push_node(Node::Bytes(bytes))
    }

    /// A string of Python 2, which is bytes; those that are text are taken as text.
    fn byte_string(&mut self, bytes: &'a [u8]) -> Result<()> {
        match std::str::from_utf8(bytes) {
            Ok(text) => self.push_node(Node::Str(text)),
            Err(_) => self.push_node(Node::Bytes(bytes)),
        }
    }

    fn long(&mut self, len: u64) -> Result<()> {
        let bytes = self.reader.take(len)?;
        match text::long(bytes).map(i64::try_from) {
            Some(Ok(value)) => self.push_node(Node::Int(value)),
            _ => self.push_node(Node::Long(bytes)),
        }
    }

    fn decimal(&mut self, text: &'a str) -> Result<()> {
        match text::decimal(text) {
            Some(Decimal::Small(value)) => self.push_node(Node::Int(value)),
            Some(Decimal::Large(digits)) => self.push_node(Node::Digits(digits)),
            None => Err(self.fault("an integer of the pickle is not decimal").with_got(text)),
        }
    }

    fn memo_index(&mut self) -> Result<u64> {
        let line = self.reader.text_line()?;
        match text::decimal(line) {
            Some(Decimal::Small(value)) if value >= 0 => Ok(value as u64),
            _ => Err(self.fault("a number of the memo is none").with_got(line)),
        }
    }

    #[inline]
    fn put(&mut self, index: u64) -> Result<()> {
        let top = self.top()?;
        self.memo.put(index, top);
        Ok(())
    }

    #[inline]
    fn get(&mut self, index: u64) -> Result<()> {
        match self.memo.get(index) {
            Some(id) => self.push(id),
            None => Err(self.fault("the pickle takes a value from its memo that was never put there").with_got(index)),
        }
    }

    fn global(&mut self) -> Result<Id> {
        let module = self.reader.text_line()?;
        let name = self.reader.text_line()?;
        self.arena.push_global(module, name, self.at)
    }

    fn stack_global(&mut self) -> Result<()> {
        let (name, module) = (self.pop()?, self.pop()?);
        let text = |id| self.arena.str(id).map(str::to_owned);
        // Names that are computed when the file is loaded are those of a file that hides them.
        let (module, name) = text(module).zip(text(name)).unwrap_or((COMPUTED.to_owned(), COMPUTED.to_owned()));
        let id = self.arena.push_global(&module, &name, self.at)?;
        self.push(id)
    }

    /// A global under a number that the loading program has registered.
    fn extension(&mut self, code: u32) -> Result<()> {
        let id = self.arena.push_global("copyreg", &format!("extension {code}"), self.at)?;
        self.push(id)
    }

    /// Executes up to the end of the pickle, and returns its value.
    pub(super) fn run(&mut self) -> Result<Id> {
        loop {
            self.at = self.reader.at();
            let opcode = self.reader.u8()?;
            match opcode {
                op::STOP => return self.pop(),
                op::MARK => {
                    self.floor = self.stack.len();
                    self.marks.push(self.floor);
                }
                op::BINGET => {
                    let index = self.reader.u8()?;
                    self.get(index.into())?;
                }
                op::BINPUT => {
                    let index = self.reader.u8()?;
                    self.put(index.into())?;
                }
                op::LONG_BINGET => {
                    let index = self.reader.u32()?;
                    self.get(index.into())?;
                }
                op::LONG_BINPUT => {
                    let index = self.reader.u32()?;
                    self.put(index.into())?;
                }
                op::GET => {
                    let index = self.memo_index()?;
                    self.get(index)?;
                }
                op::PUT => {
                    let index = self.memo_index()?;
                    self.put(index)?;
                }
                op::MEMOIZE => self.put(self.memo.len())?,
                op::NONE => self.push(NONE)?,
                op::NEWTRUE => self.push(TRUE)?,
                op::NEWFALSE => self.push(FALSE)?,
                op::EMPTY_TUPLE => self.push(EMPTY)?,
                op::BININT1 => {
                    let value = self.reader.u8()?;
                    self.push(Arena::small(value))?;
                }
                op::BININT2 => {
                    let value = self.reader.u16()?;
                    self.push_node(Node::Int(value.into()))?;
                }
                op::BININT => {
                    let value = self.reader.i32()?;
                    self.push_node(Node::Int(value.into()))?;
                }
                op::LONG1 => {
                    let len = self.reader.u8()?;
                    self.long(len.into())?;
                }
                op::LONG4 => match u64::try_from(self.reader.i32()?) {
                    Ok(len) => self.long(len)?,
                    Err(_) => return Err(self.fault("an integer of the pickle has a negative length")),
                },
                op::BINFLOAT => {
                    let value = f64::from_be_bytes(self.reader.array()?);
                    self.push_node(Node::Float(value))?;
                }
                op::SHORT_BINUNICODE => {
                    let len = self.reader.u8()?;
                    self.string(len.into())?;
                }
                op::BINUNICODE => {
                    let len = self.reader.u32()?;
                    self.string(len.into())?;
                }
                op::BINUNICODE8 => {
                    let len = self.reader.u64()?;
                    self.string(len)?;
                }
                op::SHORT_BINBYTES => {
                    let len = self.reader.u8()?;
                    self.bytes(len.into())?;
                }
                op::BINBYTES => {
                    let len = self.reader.u32()?;
                    self.bytes(len.into())?;
                }
                op::BINBYTES8 | op::BYTEARRAY8 => {
                    let len = self.reader.u64()?;
                    self.bytes(len)?;
                }
                op::TUPLE1 => self.short_tuple(1)?,
                op::TUPLE2 => self.short_tuple(2)?,
                op::TUPLE3 => self.short_tuple(3)?,
                op::TUPLE => {
                    let start = self.take_mark()?;
                    self.tuple(start)?;
                }
                op::EMPTY_LIST => {
                    let id = self.arena.push_list(&[], Node::List)?;
                    self.push(id)?;
                }
                op::EMPTY_DICT => {
                    let id = self.arena.push_list(&[], Node::Dict)?;
                    self.push(id)?;
                }
                op::EMPTY_SET => {
                    let id = self.arena.push_list(&[], Node::Set)?;
                    self.push(id)?;
                }
                op::LIST => self.collect(Node::List)?,
                op::FROZENSET => self.collect(Node::Set)?,
                op::DICT => {
                    let start = self.take_mark()?;
                    let id = self.arena.push_list(&[], Node::Dict)?;
                    self.arena.set_items(id, self.stack.get(start..).unwrap_or_default(), self.at)?;
                    self.stack.truncate(start);
                    self.push(id)?;
                }
                op::APPENDS | op::ADDITEMS => self.fill(Arena::append)?,
                op::SETITEMS => self.fill(Arena::set_items)?,
                op::APPEND => {
                    let item = self.pop()?;
                    self.arena.append(self.top()?, &[item], self.at)?;
                }
                op::SETITEM => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.arena.set_items(self.top()?, &[key, value], self.at)?;
                }
                op::GLOBAL => {
                    let id = self.global()?;
                    self.push(id)?;
                }
                op::STACK_GLOBAL => self.stack_global()?,
                op::REDUCE | op::NEWOBJ => {
                    let (args, callable) = (self.pop()?, self.pop()?);
                    self.object(callable, args, None)?;
                }
                op::NEWOBJ_EX => {
                    let (kwargs, args, callable) = (self.pop()?, self.pop()?, self.pop()?);
                    self.object(callable, args, Some(kwargs))?;
                }
                op::BUILD => {
                    let state = self.pop()?;
                    self.arena.build(self.top()?, state, self.at)?;
                }
                op::BINPERSID => {
                    let name = self.pop()?;
                    self.push_node(Node::Persistent(name))?;
                }
                _ => self.rare(opcode)?,
            }
        }
    }

    /// The opcodes that today's pickles do not have, apart from those at the beginning.
    fn rare(&mut self, opcode: u8) -> Result<()> {
        match opcode {
            op::PROTO => {
                let protocol = self.reader.u8()?;
                if protocol > 5 {
                    return Err(self
                        .fault("a pickle protocol that does not exist")
                        .with_expected("0 to 5")
                        .with_got(protocol));
                }
            }
            op::FRAME => self.reader.frame()?,
            op::POP => match self.stack.len() > self.floor {
                true => _ = self.pop()?,
                // Nothing stands above the mark: the mark itself is the topmost.
                false => {
                    if self.take_mark().is_err() {
                        return Err(self.fault("the pickle takes a value from its stack, which has none"));
                    }
                }
            },
            op::POP_MARK => {
                let start = self.take_mark()?;
                self.stack.truncate(start);
            }
            op::DUP => {
                let top = self.top()?;
                self.push(top)?;
            }
            op::INT => match self.reader.text_line()? {
                // So protocol 0 writes the two.
                "00" => self.push(FALSE)?,
                "01" => self.push(TRUE)?,
                line => self.decimal(line)?,
            },
            op::LONG => {
                let line = self.reader.text_line()?;
                self.decimal(line.strip_suffix('L').unwrap_or(line))?;
            }
            op::FLOAT => {
                let line = self.reader.text_line()?;
                let Some(value) = text::float(line) else {
                    return Err(self.fault("a float of the pickle is none").with_got(line));
                };
                self.push_node(Node::Float(value))?;
            }
            op::STRING => match text::quoted(self.reader.line()?) {
                Some(Cow::Borrowed(bytes)) => self.byte_string(bytes)?,
                Some(Cow::Owned(bytes)) => {
                    let id = match std::str::from_utf8(&bytes) {
                        Ok(text) => self.arena.push_text(text)?,
                        Err(_) => self.arena.push_blob(&bytes)?,
                    };
                    self.push(id)?;
                }
                None => return Err(self.fault("a string of the pickle has no quotes, or a wrong escape")),
            },
            op::UNICODE => match text::raw_unicode(self.reader.line()?) {
                Some(text) => self.push_text(text)?,
                None => return Err(self.fault("a string of the pickle has a wrong escape")),
            },
            op::BINSTRING => match u64::try_from(self.reader.i32()?) {
                Ok(len) => {
                    let bytes = self.reader.take(len)?;
                    self.byte_string(bytes)?;
                }
                Err(_) => return Err(self.fault("a string of the pickle has a negative length")),
            },
            op::SHORT_BINSTRING => {
                let len = self.reader.u8()?;
                let bytes = self.reader.take(len.into())?;
                self.byte_string(bytes)?;
            }
            op::PERSID => {
                let line = self.reader.text_line()?;
                let name = self.arena.push(Node::Str(line))?;
                self.push_node(Node::Persistent(name))?;
            }
            op::INST => {
                let class = self.global()?;
                let start = self.take_mark()?;
                let args = self.arena.push_tuple(self.stack.get(start..).unwrap_or_default())?;
                self.stack.truncate(start);
                self.object(class, args, None)?;
            }
            op::OBJ => {
                let start = self.take_mark()?;
                let Some((&class, args)) = self.stack.get(start..).and_then(<[Id]>::split_first) else {
                    return Err(self.fault("the pickle makes an object without a class"));
                };
                let args = self.arena.push_tuple(args)?;
                self.stack.truncate(start);
                self.object(class, args, None)?;
            }
            op::EXT1 => {
                let code = self.reader.u8()?;
                self.extension(code.into())?;
            }
            op::EXT2 => {
                let code = self.reader.u16()?;
                self.extension(code.into())?;
            }
            op::EXT4 => {
                let code = self.reader.u32()?;
                self.extension(code)?;
            }
            op::NEXT_BUFFER | op::READONLY_BUFFER => {
                return Err(self.fault("the pickle has parts that are not in this file"));
            }
            _ => return Err(self.fault("no opcode of pickles is so").with_got(format!("0x{opcode:02x}"))),
        }
        Ok(())
    }
}

/// In the place of a module and name that are not strings.
pub(super) const COMPUTED: &str = "<computed>";
