//! The pickle machine: it builds plain data and calls nothing.

use super::arena::{Arena, EMPTY, FALSE, Id, NONE, Node, TRUE};
use super::memo::Memo;
use super::opcodes as op;
use super::reader::{Reader, fault};
use super::text::{self, Decimal};
use crate::{Error, Kind, Result, limits};
use std::borrow::Cow;

#[derive(Debug)]
pub(super) struct Machine<'a> {
    pub(super) reader: Reader<'a>,
    pub(super) arena: Arena<'a>,
    pub(super) stack: Vec<Id>,
    /// How high the stack was at each mark. What lies below the last one is out of reach until that is taken.
    marks: Vec<usize>,
    pub(super) floor: usize,
    memo: Memo,
    /// Where the opcode stands that is being executed.
    at: usize,
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
    pub(super) fn fault(&self, message: impl Into<String>) -> Error {
        fault(self.at, message)
    }

    #[inline]
    pub(super) fn push(&mut self, id: Id) -> Result<()> {
        if self.stack.len() >= limits::MAX_PICKLE_VALUES {
            return Err(Error::new(Kind::Limit, "the stack of the pickle is too high")
                .with_offset(self.at as u64)
                .with_expected(limits::MAX_PICKLE_VALUES));
        }
        self.stack.push(id);
        Ok(())
    }

    #[inline]
    pub(super) fn push_node(&mut self, node: Node<'a>) -> Result<()> {
        let id = self.arena.push(node).map_err(|error| error.with_offset(self.at as u64))?;
        self.push(id)
    }

    #[inline]
    pub(super) fn pop(&mut self) -> Result<Id> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    #[inline]
    pub(super) fn top(&self) -> Result<Id> {
        match self.stack.get(self.floor..).and_then(<[Id]>::last) {
            Some(&id) => Ok(id),
            None => Err(self.fault("the pickle takes a value from its stack, which has none")),
        }
    }

    /// Takes the last mark away; what lies above it begins there on the stack.
    #[inline]
    pub(super) fn take_mark(&mut self) -> Result<usize> {
        let Some(start) = self.marks.pop() else {
            return Err(self.fault("the pickle takes the values above a mark, but there is no mark"));
        };
        self.floor = self.marks.last().copied().unwrap_or(0);
        Ok(start)
    }

    /// Puts a list, dict or set in the place of what stands above the last mark.
    pub(super) fn collect(&mut self, kind: fn(u32) -> Node<'a>) -> Result<()> {
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
    pub(super) fn object(&mut self, callable: Id, args: Id, kwargs: Option<Id>) -> Result<()> {
        let id = self.arena.push_object(callable, args, kwargs)?;
        self.push(id)
    }

    pub(super) fn push_text(&mut self, text: Cow<'a, str>) -> Result<()> {
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
    pub(super) fn byte_string(&mut self, bytes: &'a [u8]) -> Result<()> {
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

    pub(super) fn decimal(&mut self, text: &'a str) -> Result<()> {
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

    pub(super) fn global(&mut self) -> Result<Id> {
        let module = self.reader.text_line()?;
        let name = self.reader.text_line()?;
        self.arena.push_global(module, name, self.at)
    }

    fn stack_global(&mut self) -> Result<()> {
        let (name, module) = (self.pop()?, self.pop()?);
        // A name in the memo may be long, and be taken from there very often.
        let short = |text: &&str| text.len() <= limits::MAX_PICKLE_NAME_BYTES;
        let text = |id| self.arena.str(id).filter(short).map(str::to_owned);
        // Python has no such long names; those that are computed when the file is loaded hide what they are.
        let (module, name) = text(module).zip(text(name)).unwrap_or((COMPUTED.to_owned(), COMPUTED.to_owned()));
        let id = self.arena.push_global(&module, &name, self.at)?;
        self.push(id)
    }

    /// A global under a number that the loading program has registered.
    pub(super) fn extension(&mut self, code: u32) -> Result<()> {
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
}

/// In the place of a module and name that are not strings.
pub(super) const COMPUTED: &str = "<computed>";
