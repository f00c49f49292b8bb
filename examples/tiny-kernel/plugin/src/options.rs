//! The plugin's arguments.

use std::path::PathBuf;

/// How many cases there are, case 0 included.
pub const CASES: u64 = 64;
/// How far apart the functions are that mark a case.
const MARK_STEP: u64 = 16;

/// What the plugin was told.
#[derive(Default, PartialEq, Eq, Debug)]
pub struct Options {
    /// The first instructions of windows.
    pub entry: Vec<u64>,
    /// The last instructions of windows.
    pub exit: Vec<u64>,
    /// The function that marks case 0.
    pub marks: u64,
    /// The file to write.
    pub out: PathBuf,
}

impl Options {
    /// Reads `name=value` arguments.
    pub fn parse<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Result<Self, String> {
        let mut options = Self::default();
        for argument in arguments {
            match argument.split_once('=') {
                Some(("entry", value)) => options.entry = addresses(value)?,
                Some(("exit", value)) => options.exit = addresses(value)?,
                Some(("marks", value)) => options.marks = address(value)?,
                Some(("out", value)) => options.out = value.into(),
                _ => return Err(format!("`{argument}` is not an argument of this plugin")),
            }
        }
        let is_complete = !options.entry.is_empty() && !options.exit.is_empty() && options.marks != 0;
        if !is_complete || options.out.as_os_str().is_empty() {
            return Err("`entry`, `exit`, `marks` and `out` are needed".into());
        }
        Ok(options)
    }

    /// The case that an instruction marks.
    pub fn case(&self, pc: u64) -> Option<u8> {
        let offset = pc.checked_sub(self.marks)?;
        let case = offset / MARK_STEP;
        (offset % MARK_STEP == 0 && case < CASES).then_some(case as u8)
    }
}

fn addresses(text: &str) -> Result<Vec<u64>, String> {
    text.split('+').map(address).collect()
}

fn address(text: &str) -> Result<u64, String> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    u64::from_str_radix(digits, 16).map_err(|_| format!("`{text}` is not an address"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_read() {
        let options = Options::parse(["entry=0x10+20", "exit=0x30", "marks=0x1000", "out=/a=b"]);
        let expected = Options { entry: vec![16, 32], exit: vec![48], marks: 4096, out: "/a=b".into() };
        assert_eq!(options, Ok(expected));
        assert!(Options::parse(["entry=1", "exit=1", "marks=1"]).is_err(), "no `out`");
        assert!(Options::parse(["entry=x"]).is_err());
        assert!(Options::parse(["other=1"]).is_err());
    }

    #[test]
    fn marks_are_told_apart() {
        let options = Options { marks: 0x1000, ..Options::default() };
        let cases = [0xff0, 0x1000, 0x1008, 0x1010, 0x13f0, 0x1400].map(|pc| options.case(pc));
        assert_eq!(cases, [None, Some(0), None, Some(1), Some(63), None]);
    }
}
