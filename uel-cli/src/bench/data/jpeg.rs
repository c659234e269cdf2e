//! JPEG files out of random numbers: nothing to look at, but as much work for a decoder as a photograph is.

/// How many AC coefficients a block has in the mean: about what photographs have at quality 75.
const COEFFICIENTS: u64 = 7;

/// Quantisation of every coefficient.
const QUANTISER: u8 = 12;

/// A colour JPEG whose chroma has half the sides, as cameras write it. Its blocks have random coefficients, so nothing is
/// transformed, and the codes all have one length.
pub(crate) fn made_up(width: u16, height: u16, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0xff, 0xd8, 0xff, 0xdb, 0, 67, 0];
    bytes.extend([QUANTISER; 64]);
    let ([h0, h1], [w0, w1]) = (height.to_be_bytes(), width.to_be_bytes());
    bytes.extend([0xff, 0xc0, 0, 17, 8, h0, h1, w0, w1, 3, 1, 0x22, 0, 2, 0x11, 0, 3, 0x11, 0]);
    // Differences of DC: 12 sizes, whose codes are the sizes themselves.
    table(&mut bytes, 0x00, 4, 0..12);
    // AC: pairs of run and size, whose codes are their positions; the first ends the block.
    table(&mut bytes, 0x10, 8, (0..64).map(|code| if code == 0 { 0 } else { pair(code) }));
    bytes.extend([0xff, 0xda, 0, 12, 3, 1, 0, 2, 0, 3, 0, 0, 63, 0]);
    let mut bits = Bits { bytes, word: 0, len: 0 };
    let mut random = Random(seed);
    let blocks = u32::from(width).div_ceil(16) * u32::from(height).div_ceil(16);
    let mut levels = [0i64; 3];
    for _ in 0..blocks {
        // Four blocks of luma, one of each chroma.
        for component in [0, 0, 0, 0, 1, 2] {
            let Some(level) = levels.get_mut(component) else { continue };
            block(&mut bits, &mut random, level);
        }
    }
    bits.finish()
}

/// A table of codes that all have `code_len` bits, of at most 15.
fn table(bytes: &mut Vec<u8>, class: u8, code_len: usize, symbols: impl ExactSizeIterator<Item = u8>) {
    let count = symbols.len() as u8;
    bytes.extend([0xff, 0xc4, 0, 19 + count, class]);
    bytes.extend((1..=16).map(|len| if len == code_len { count } else { 0 }));
    bytes.extend(symbols);
}

/// The run of zeros and the size of a coefficient behind them, of a code that is not the first.
fn pair(code: u8) -> u8 {
    let (run, size) = ((code - 1) / 4, (code - 1) % 4 + 1);
    run << 4 | size
}

fn block(bits: &mut Bits, random: &mut Random, level: &mut i64) {
    // Neighbours differ a little, and no level is far from the middle.
    let next = (*level + random.below(41) as i64 - 20).clamp(-60, 60);
    let difference = next - *level;
    *level = next;
    let size = 64 - difference.unsigned_abs().leading_zeros();
    bits.push(u64::from(size), 4);
    bits.push_number(difference, size);
    let mut at = 0;
    for _ in 0..random.below(2 * COEFFICIENTS + 1) {
        // Mostly runs of few zeros and small coefficients.
        let (run, size) = (random.below(4) * random.below(3), 1 + random.below(2) * random.below(3).min(2));
        if at + run + 1 > 63 {
            break;
        }
        at += run + 1;
        bits.push(run * 4 + size, 8);
        bits.push(random.below(1 << size), size as u32);
    }
    if at < 63 {
        bits.push(0, 8);
    }
}

/// Bits behind each other, where a byte of ones is followed by a zero.
struct Bits {
    bytes: Vec<u8>,
    word: u64,
    len: u32,
}

impl Bits {
    fn push(&mut self, value: u64, len: u32) {
        self.word = self.word << len | value;
        self.len += len;
        while self.len >= 8 {
            self.len -= 8;
            let byte = (self.word >> self.len & 0xff) as u8;
            self.bytes.push(byte);
            if byte == 0xff {
                self.bytes.push(0);
            }
        }
    }

    /// A number of `size` bits as JPEG has it: negative ones are one less than what their bits say without a sign.
    fn push_number(&mut self, number: i64, size: u32) {
        let offset = if number < 0 { (1i64 << size) - 1 } else { 0 };
        self.push((number + offset).unsigned_abs(), size);
    }

    fn finish(mut self) -> Vec<u8> {
        let missing = (8 - self.len % 8) % 8;
        self.push((1 << missing) - 1, missing);
        self.bytes.extend([0xff, 0xd9]);
        self.bytes
    }
}

/// The numbers of splitmix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let bits = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// A number below `end`, which is small.
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}
