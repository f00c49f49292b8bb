//! What QEMU calls. Each CPU has a thread of its own, which calls for that CPU alone.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use crate::options::Options;
use crate::qemu;
use crate::window::{Cpu, Store};

/// How many CPUs are counted.
const CPUS: usize = 64;
/// The end of the user's half.
const USER_END: u64 = 1 << 47;
const LINE: u64 = 64;

/// The version of the interface.
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals)]
pub static qemu_plugin_version: c_int = 1;

/// A CPU, on cache lines of its own.
#[derive(Default)]
#[repr(align(128))]
struct Slot {
    /// Whether a window is open that counts. Only the CPU's thread uses it, and it spares most calls the lock.
    is_open: AtomicBool,
    /// Locked for the end alone: a CPU that ends QEMU does so while the others run.
    cpu: Mutex<Cpu>,
}

impl Slot {
    fn lock(&self) -> MutexGuard<'_, Cpu> {
        self.cpu.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct State {
    options: Options,
    cpus: [Slot; CPUS],
}

static STATE: OnceLock<State> = OnceLock::new();

fn slot(cpu: c_uint) -> Option<&'static Slot> {
    STATE.get()?.cpus.get(cpu as usize)
}

/// The CPU if it has a window open.
fn open(cpu: c_uint) -> Option<MutexGuard<'static, Cpu>> {
    let slot = slot(cpu)?;
    slot.is_open.load(Ordering::Relaxed).then(|| slot.lock())
}

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
        // SAFETY: the caller says that there are `argc` strings; they live as long as QEMU.
        unsafe { CStr::from_ptr(*argv.add(index)) }.to_str().unwrap_or("?")
    });
    let options = match Options::parse(arguments) {
        Ok(options) => options,
        Err(problem) => {
            eprintln!("tiny-kernel-plugin: {problem}");
            return 1;
        }
    };
    STATE.get_or_init(|| State { options, cpus: std::array::from_fn(|_| Slot::default()) });
    // SAFETY: the callbacks have the signatures that QEMU's interface asks for, and live as long as the process:
    // the plugin is never unloaded, for it never asks for it.
    unsafe {
        qemu::qemu_plugin_register_vcpu_tb_trans_cb(id, on_translate);
        qemu::qemu_plugin_register_atexit_cb(id, on_end, std::ptr::null_mut());
    }
    0
}

extern "C" fn on_translate(_: qemu::Id, block: *mut qemu::Block) {
    let Some(State { options, .. }) = STATE.get() else { return };
    // SAFETY: QEMU passes a block that lives during this call.
    let count = unsafe { qemu::qemu_plugin_tb_n_insns(block) };
    for index in 0..count {
        // SAFETY: the block lives during this call, and so do its instructions; `index` is below their number.
        let (instruction, pc) = unsafe {
            let instruction = qemu::qemu_plugin_tb_get_insn(block, index);
            (instruction, qemu::qemu_plugin_insn_vaddr(instruction))
        };
        if pc < USER_END {
            continue;
        }
        // QEMU calls them in this order.
        if let Some(case) = options.case(pc) {
            call(instruction, on_mark, case.into());
        }
        if options.entry.contains(&pc) {
            call(instruction, on_entry, pc);
        }
        call(instruction, on_execute, pc);
        // SAFETY: as above; the data are a number, never followed as a pointer.
        unsafe {
            qemu::qemu_plugin_register_vcpu_mem_cb(
                instruction,
                on_store,
                qemu::NO_REGISTERS,
                qemu::WRITES,
                data(pc),
            );
        }
        if options.exit.contains(&pc) {
            call(instruction, on_exit, pc);
        }
    }
}

/// Has `callback` called with `number` before each execution of an instruction that is being translated.
fn call(instruction: *mut qemu::Instruction, callback: extern "C" fn(c_uint, *mut c_void), number: u64) {
    // SAFETY: the caller's instruction lives; the data are a number, never followed as a pointer.
    unsafe {
        qemu::qemu_plugin_register_vcpu_insn_exec_cb(instruction, callback, qemu::NO_REGISTERS, data(number));
    }
}

fn data(number: u64) -> *mut c_void {
    std::ptr::without_provenance_mut(number as usize)
}

extern "C" fn on_mark(cpu: c_uint, case: *mut c_void) {
    if let Some(slot) = slot(cpu) {
        slot.lock().mark(case.addr() as u8);
        slot.is_open.store(false, Ordering::Relaxed);
    }
}

extern "C" fn on_entry(cpu: c_uint, _: *mut c_void) {
    if let Some(slot) = slot(cpu) {
        slot.is_open.store(slot.lock().enter(), Ordering::Relaxed);
    }
}

extern "C" fn on_execute(cpu: c_uint, pc: *mut c_void) {
    if let Some(mut cpu) = open(cpu) {
        cpu.execute(pc.addr() as u64);
    }
}

extern "C" fn on_exit(cpu: c_uint, _: *mut c_void) {
    if let Some(slot) = slot(cpu).filter(|slot| slot.is_open.load(Ordering::Relaxed)) {
        slot.is_open.store(slot.lock().leave(), Ordering::Relaxed);
    }
}

extern "C" fn on_store(cpu: c_uint, info: u32, address: u64, pc: *mut c_void) {
    let Some(mut cpu) = open(cpu) else { return };
    // SAFETY: `info` is what QEMU passed to this callback.
    let (is_store, shift) =
        unsafe { (qemu::qemu_plugin_mem_is_store(info), qemu::qemu_plugin_mem_size_shift(info)) };
    // QEMU 7.2 calls it for the load of a read-modify-write as well.
    if !is_store {
        return;
    }
    let last = address + (1 << shift) - 1;
    // A store may reach into the next line, which may be on the next page.
    for part in [address, last].iter().take(if address / LINE == last / LINE { 1 } else { 2 }) {
        // SAFETY: as above; the answer is good until the next question of this thread.
        let (is_device, physical) = unsafe {
            let place = qemu::qemu_plugin_get_hwaddr(info, *part);
            if place.is_null() {
                continue;
            }
            (qemu::qemu_plugin_hwaddr_is_io(place), qemu::qemu_plugin_hwaddr_phys_addr(place))
        };
        cpu.store(Store { is_device, line: physical / LINE * LINE, pc: pc.addr() as u64 });
    }
}

extern "C" fn on_end(_: qemu::Id, _: *mut c_void) {
    let Some(state) = STATE.get() else { return };
    if let Err(error) = write(state) {
        eprintln!("tiny-kernel-plugin: {}: {error}", state.options.out.display());
    }
}

fn write(state: &State) -> io::Result<()> {
    let mut out = BufWriter::new(File::create(&state.options.out)?);
    for (number, slot) in state.cpus.iter().enumerate() {
        slot.lock().write(number, &mut out)?;
    }
    out.flush()
}
