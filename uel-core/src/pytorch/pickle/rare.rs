//! The opcodes of protocols 0 and 1, and others that are seldom seen.

use super::arena::{FALSE, Id, Node, TRUE};
use super::machine::Machine;
use super::opcodes as op;
use super::text;
use crate::Result;
use std::borrow::Cow;

impl<'a> Machine<'a> {
    /// The opcodes that today's pickles do not have, apart from those at the beginning.
    pub(super) fn rare(&mut self, opcode: u8) -> Result<()> {
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
