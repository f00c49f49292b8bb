//! The QEMU plugin behind pagefirst-record.
//!
//! It reports the first read, write and execution of each page since the last call that may have changed the page's
//! mapping, and those calls, to a pipe (see `raw.rs`). The emulator calls it on the program's threads, never
//! from a signal handler.

mod buffers;
mod calls;
mod filter;
mod processes;
#[expect(dead_code, reason = "tiny-kernel's plugin uses the rest")]
mod qemu;
mod raw;
mod stream;

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};

/// The version of the interface that the plugin wants, behind a mark by which the driver finds it in the
/// file: the driver puts the number there that the emulator at hand supports.
#[repr(C)]
pub struct Version {
    number: c_int,
    mark: [u8; 20],
}

/// What QEMU looks at first.
#[unsafe(no_mangle)]
#[used]
#[allow(non_upper_case_globals)]
pub static qemu_plugin_version: Version = Version { number: 1, mark: *b"pagefirst's version\0" };

/// Accesses, by virtual CPU, each on a cache line of its own.
#[repr(align(64))]
struct Count(AtomicU64);

const COUNTS: usize = 64;
static ACCESSES: [Count; COUNTS] = [const { Count(AtomicU64::new(0)) }; COUNTS];
/// The exit status that the program asked for last.
static STATUS: AtomicU64 = AtomicU64::new(raw::UNKNOWN);

/// What QEMU calls when it has loaded the plugin.
///
/// # Safety
/// `argv` points to `argc` strings, as QEMU's interface says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qemu_plugin_install(
    id: qemu::Id,
    _info: *const qemu::Info,
    argc: c_int,
    argv: *const *const c_char,
) -> c_int {
    let arguments = (0..argc as usize).map(|index| {
        // SAFETY: the caller says that there are `argc` strings.
        unsafe { CStr::from_ptr(*argv.add(index)) }.to_string_lossy()
    });
    let (mut path, mut process) = (None, raw::FIRST_PROCESS);
    for argument in arguments {
        match argument.split_once('=') {
            Some(("stream", value)) => path = Some(value.to_owned()),
            Some(("process", value)) => process = value.parse().unwrap_or(process),
            _ => {}
        }
    }
    if path.is_none_or(|path| stream::open(path, process).is_err()) || !processes::install() {
        return 1;
    }
    // SAFETY: the callbacks have the signatures that QEMU's interface asks for, and live as long as the process:
    // the plugin is never unloaded, for it never asks for it.
    unsafe {
        qemu::qemu_plugin_register_vcpu_init_cb(id, on_start);
        qemu::qemu_plugin_register_vcpu_exit_cb(id, on_exit);
        qemu::qemu_plugin_register_vcpu_tb_trans_cb(id, on_translate);
        qemu::qemu_plugin_register_vcpu_syscall_cb(id, on_call);
        qemu::qemu_plugin_register_vcpu_syscall_ret_cb(id, on_return);
        qemu::qemu_plugin_register_atexit_cb(id, on_end, std::ptr::null_mut());
    }
    0
}

extern "C" fn on_start(_: qemu::Id, cpu: c_uint) {
    stream::lock().thread_start(cpu);
}

extern "C" fn on_exit(_: qemu::Id, cpu: c_uint) {
    stream::lock().thread_exit(cpu);
}

extern "C" fn on_end(_: qemu::Id, _: *mut c_void) {
    stream::lock().end(accesses(), STATUS.load(Ordering::Relaxed));
}

/// The program is about to end with this status, if all goes well.
fn note_status(status: u64) {
    STATUS.store(status & 0xff, Ordering::Relaxed);
}

/// In a new process: it has done nothing yet.
fn count_from_zero() {
    ACCESSES.iter().for_each(|count| count.0.store(0, Ordering::Relaxed));
    STATUS.store(raw::UNKNOWN, Ordering::Relaxed);
}

/// The accesses so far.
fn accesses() -> u64 {
    ACCESSES.iter().map(|count| count.0.load(Ordering::Relaxed)).sum()
}

extern "C" fn on_translate(_: qemu::Id, block: *mut qemu::Block) {
    static FIRST: Once = Once::new();
    FIRST.call_once(|| {
        let maps = std::fs::read("/proc/self/maps").unwrap_or_default();
        stream::lock().maps(&maps);
    });
    // SAFETY: QEMU passes a block that lives during this call; the indices are below its number of instructions.
    let (first, last) = unsafe {
        let count = qemu::qemu_plugin_tb_n_insns(block);
        let mut last = qemu::qemu_plugin_tb_vaddr(block);
        let first = last;
        for index in 0..count {
            let instruction = qemu::qemu_plugin_tb_get_insn(block, index);
            let size = qemu::qemu_plugin_insn_size(instruction) as u64;
            last = qemu::qemu_plugin_insn_vaddr(instruction) + size.saturating_sub(1);
            // Not two callbacks, one for each kind: QEMU 7.2 gets them mixed up.
            let (flags, kinds) = (qemu::NO_REGISTERS, qemu::READS_AND_WRITES);
            qemu::qemu_plugin_register_vcpu_mem_cb(
                instruction,
                on_access,
                flags,
                kinds,
                std::ptr::null_mut(),
            );
        }
        (first >> 12, last >> 12)
    };
    // A block may reach into the next page: that one is executed too.
    for page in first..=last.max(first) {
        // SAFETY: the block lives during this call. The data are a number, never followed as a pointer.
        unsafe {
            let data = std::ptr::without_provenance_mut(page as usize);
            qemu::qemu_plugin_register_vcpu_tb_exec_cb(block, on_execute, qemu::NO_REGISTERS, data);
        }
    }
}

extern "C" fn on_execute(cpu: c_uint, data: *mut c_void) {
    touch(cpu, data.addr() as u64, filter::EXECUTE, raw::TOUCH_EXECUTE);
}

extern "C" fn on_access(cpu: c_uint, info: u32, address: u64, _: *mut c_void) {
    /// No access has more bytes.
    const LONGEST: u64 = 64;
    let count = &ACCESSES[cpu as usize % COUNTS].0;
    // Not a read-modify-write: more threads than counters may lose some, which the format allows.
    count.store(count.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    // Most accesses end here, before QEMU is asked what kind they are: its answers cost more than all the rest.
    if address % 4096 <= 4096 - LONGEST && filter::seen(address >> 12, filter::READ | filter::WRITE) {
        return;
    }
    // SAFETY: `info` is what QEMU passed to this callback.
    let (store, shift) =
        unsafe { (qemu::qemu_plugin_mem_is_store(info), qemu::qemu_plugin_mem_size_shift(info)) };
    let (bit, flag) = if store { (filter::WRITE, raw::TOUCH_WRITE) } else { (filter::READ, 0) };
    let (first, last) = (address >> 12, address.saturating_add((1 << shift) - 1) >> 12);
    touch(cpu, first, bit, flag);
    if last != first {
        touch(cpu, last, bit, flag);
    }
}

/// Reports an access to a page unless that was done since its mapping last changed.
#[inline]
fn touch(cpu: u32, page: u64, bit: u8, flags: u8) {
    if !filter::seen(page, bit) {
        report(cpu, page, bit, flags);
    }
}

#[cold]
fn report(cpu: u32, page: u64, bit: u8, flags: u8) {
    let mut stream = stream::lock();
    if filter::mark(page, bit) {
        stream.touch(cpu, flags, page);
    }
}

extern "C" fn on_call(
    _: qemu::Id,
    cpu: c_uint,
    number: i64,
    a: u64,
    b: u64,
    c: u64,
    d: u64,
    e: u64,
    f: u64,
    _: u64,
    _: u64,
) {
    calls::enter(cpu, number as u64, [a, b, c, d, e, f]);
}

extern "C" fn on_return(_: qemu::Id, cpu: c_uint, number: i64, result: i64) {
    calls::leave(cpu, number as u64, result);
}
