// Runs at EL1 on QEMU's `virt` machine: makes each access of the image's list through the image's tables, as an EL0
// program would, and prints what came of it. The stub itself lies in the other half, by TTBR1: the first GiB with the
// UART, the second with memory.
//
// The image begins with TTBR0, the number of probes, MAIR, and the probes: kind, address, what to store, where to look.
// For each it prints `syndrome value address` in hexadecimal: ESR_EL1 of the trap, 0 for none; what was loaded, what is
// found at the physical address after a store, what the fetched code left in x0, PAR_EL1 of a translation by AT; and the
// address that trapped.

.equ UART, 0x09000000
.equ IMAGE, 0x44000000
.equ HIGH, 0xffffff8000000000

.section .text
.globl _start
_start:
    adr x0, tables
    // Device memory, read and write at EL1, not executable; then normal memory, executable at EL1.
    ldr x1, =0x0060000000000409
    str x1, [x0]
    ldr x1, =0x0040000040000701
    str x1, [x0, #8]
    msr ttbr1_el1, x0
    ldr x2, =IMAGE
    ldr x1, [x2]
    msr ttbr0_el1, x1
    // The library's three types (Aarch64::MAIR), read from the image.
    ldr x1, [x2, #16]
    msr mair_el1, x1
    // TCR_EL1: T0SZ 16, T1SZ 25, granules of 4 KiB, cacheable and inner shareable walks, 40 bits of physical address.
    ldr x1, =(2 << 32) | (2 << 30) | (3 << 28) | (1 << 26) | (1 << 24) | (25 << 16) | (3 << 12) | (1 << 10) | (1 << 8) | 16
    msr tcr_el1, x1
    ldr x1, =HIGH
    adr x0, vectors
    orr x0, x0, x1
    msr vbar_el1, x0
    adr x0, high
    orr x0, x0, x1
    msr elr_el1, x0
    // EL1h, everything masked.
    mov x0, #0x3c5
    msr spsr_el1, x0
    isb
    mov x20, #0             // no probe yet
    mrs x0, sctlr_el1
    orr x0, x0, #1          // M
    bic x0, x0, #2          // A: no alignment check
    msr sctlr_el1, x0
    // The next instruction is fetched through the image's tables, which do not map it: the trap goes on at `high`.
    isb
    b .

high:
    ldr x1, =HIGH
    ldr x19, =IMAGE
    orr x19, x19, x1
    ldr x20, [x19, #8]
    add x19, x19, #24

next:
    cbz x20, done
    mov x21, #0             // syndrome
    mov x22, #0             // value
    mov x23, #0             // address
    ldp x9, x10, [x19]      // kind: 0 load, 1 store, 2 fetch, 3 AT S1E0R, 4 AT S1E0W; address
    ldp x11, x12, [x19, #16]
    cmp x9, #1
    b.lo load
    b.eq store
    cmp x9, #3
    b.lo fetch
    b.eq at_read
    at s1e0w, x10
    b 1f
at_read:
    at s1e0r, x10
1:  isb
    mrs x22, par_el1
    b after
load:
    ldtr x22, [x10]
    b after
store:
    sttr x11, [x10]
    ldr x1, =HIGH
    orr x12, x12, x1
    ldr x22, [x12]
    b after
fetch:
    msr elr_el1, x10
    mov x0, #0x3c0          // EL0t
    msr spsr_el1, x0
    mov x0, #0
    eret
after:
    mov x0, x21
    bl print
    mov x0, x22
    bl print
    mov x0, x23
    bl print
    mov w0, #'\n'
    bl put
    add x19, x19, #32
    sub x20, x20, #1
    b next

done:
    ldr x0, =0x84000008     // PSCI SYSTEM_OFF
    hvc #0
    b .

// A trap of a probe.
trapped:
    mrs x21, esr_el1
    mrs x23, far_el1
    lsr x1, x21, #26
    cmp x1, #0x15           // SVC: the fetch succeeded
    b.ne 1f
    mov x22, x0
    mov x21, #0
    mov x23, #0
1:  adr x0, after
    msr elr_el1, x0
    mov x0, #0x3c5
    msr spsr_el1, x0
    eret

// Before the stub lies high there is one trap: its own.
first:
    adr x0, high
    msr elr_el1, x0
    mov x0, #0x3c5
    msr spsr_el1, x0
    eret

// Prints x0 in hexadecimal, and a space.
print:
    mov x3, x30
    mov x4, x0
    mov x5, #60
1:  lsr x0, x4, x5
    and x0, x0, #15
    add x0, x0, #'0'
    cmp x0, #'9'
    b.ls 2f
    add x0, x0, #'a' - '9' - 1
2:  bl put
    subs x5, x5, #4
    b.pl 1b
    mov w0, #' '
    mov x30, x3
put:
    ldr x1, =HIGH + UART
    strb w0, [x1]
    ret

.ltorg

.balign 2048
vectors:
    .balign 128             // current EL, SP0
    b .
    .balign 128
    b .
    .balign 128
    b .
    .balign 128
    b .
    .balign 128             // current EL, SPx, synchronous
    cbz x20, first
    b trapped
    .balign 128
    b .
    .balign 128
    b .
    .balign 128
    b .
    .balign 128             // EL0, synchronous
    b trapped
    .balign 128

.section .bss
.balign 4096
tables:
    .skip 4096
