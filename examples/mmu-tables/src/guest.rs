//! What differs between the machines whose MMUs walk the tables.

use pagefirst::arch::{Aarch64, Format, Riscv64};
use pagefirst::types::{Access, Pfn};

/// Why an MMU refuses an access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Why {
    /// Nothing is there.
    Translation,
    /// What is there does not allow it.
    Permission,
}

/// A machine of QEMU with tables of this format.
pub trait Guest: Format {
    /// Where the image lies in its memory.
    const IMAGE: u64;
    /// Whether there is an instruction that translates without an access.
    const TRANSLATES: bool = false;
    /// What the stub wants to know beside the root.
    const MORE: u64 = 0;
    /// The register that names the root.
    fn root(pfn: Pfn) -> u64;
    /// Code that puts a number below 2^32, a multiple of 4096, into the first argument's register and calls the system.
    fn code(number: u64) -> Vec<u32>;
    /// How the refusal of an access at an address is told.
    fn refused(access: Access, why: Why, at: u64) -> String;
}

impl<const LEVELS: u8> Guest for Riscv64<LEVELS>
where
    Riscv64<LEVELS>: Format,
{
    const IMAGE: u64 = 0x8400_0000;
    /// `satp`: mode 8 for Sv39, which has three levels, 9 for Sv48.
    fn root(pfn: Pfn) -> u64 {
        (5 + LEVELS as u64) << 60 | pfn.0 as u64
    }
    /// `lui a0, number >> 12` and `ecall`.
    fn code(number: u64) -> Vec<u32> {
        vec![number as u32 & 0xffff_f000 | 0x537, 0x73]
    }
    /// RISC-V tells the access alone.
    fn refused(access: Access, _: Why, at: u64) -> String {
        let what = match access {
            Access::Read => "load",
            Access::Write => "store",
            Access::Execute => "fetch",
        };
        format!("{what} fault at {at:#x}")
    }
}

impl Guest for Aarch64 {
    const IMAGE: u64 = 0x4400_0000;
    const TRANSLATES: bool = true;
    const MORE: u64 = Aarch64::MAIR;
    fn root(pfn: Pfn) -> u64 {
        pfn.phys()
    }
    /// `movz x0, #low`, `movk x0, #high, lsl #16`, `svc #0`.
    fn code(number: u64) -> Vec<u32> {
        let (low, high) = (number as u32 & 0xffff, (number >> 16) as u32);
        vec![0xd280_0000 | low << 5, 0xf2a0_0000 | high << 5, 0xd400_0001]
    }
    fn refused(_: Access, why: Why, at: u64) -> String {
        let why = if why == Why::Translation { "translation" } else { "permission" };
        format!("{why} fault at {at:#x}")
    }
}
