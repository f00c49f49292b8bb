//! What differs between the machines whose MMUs walk the tables.

use pagefirst::arch::{Aarch64, Format, Sv39, Sv48};
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

const fn riscv_root(mode: u64, pfn: Pfn) -> u64 {
    mode << 60 | pfn.0 as u64
}

/// `lui a0, number >> 12` and `ecall`.
fn riscv_code(number: u64) -> Vec<u32> {
    vec![number as u32 & 0xffff_f000 | 0x537, 0x73]
}

/// RISC-V tells the access alone.
fn riscv_refused(access: Access, _: Why, at: u64) -> String {
    let what = match access {
        Access::Read => "load",
        Access::Write => "store",
        Access::Execute => "fetch",
    };
    format!("{what} fault at {at:#x}")
}

impl Guest for Sv39 {
    const IMAGE: u64 = 0x8400_0000;
    fn root(pfn: Pfn) -> u64 {
        riscv_root(8, pfn)
    }
    fn code(number: u64) -> Vec<u32> {
        riscv_code(number)
    }
    fn refused(access: Access, why: Why, at: u64) -> String {
        riscv_refused(access, why, at)
    }
}

impl Guest for Sv48 {
    const IMAGE: u64 = 0x8400_0000;
    fn root(pfn: Pfn) -> u64 {
        riscv_root(9, pfn)
    }
    fn code(number: u64) -> Vec<u32> {
        riscv_code(number)
    }
    fn refused(access: Access, why: Why, at: u64) -> String {
        riscv_refused(access, why, at)
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
