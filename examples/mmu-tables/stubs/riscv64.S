# Runs in M mode on QEMU's `virt` machine, without firmware: makes each access of the image's list through the image's
# tables, as a U-mode program would, and prints what came of it.
#
# The image begins with satp, the number of probes, a word that is not for us, and the probes: kind, address, what to
# store, where to look. For each it prints `cause value address` in hexadecimal: the cause of the trap, 0 for none; what
# was loaded, what is found at the physical address after a store, what the fetched code left in a0; and the address that
# trapped.

.equ UART, 0x10000000
.equ FINISHER, 0x100000
.equ IMAGE, 0x84000000

.section .text
.globl _start
_start:
    # PMP: one region, everything, read, write, execute.
    li t0, -1
    csrw pmpaddr0, t0
    li t0, 0x1f
    csrw pmpcfg0, t0
    # menvcfg.PBMTE: memory types in entries (Svpbmt).
    li t0, 1 << 62
    csrw 0x30a, t0
    la t0, trap
    csrw mtvec, t0
    li s0, IMAGE
    ld t0, 0(s0)
    csrw satp, t0
    sfence.vma
    ld s1, 8(s0)
    addi s0, s0, 24

next:
    beqz s1, done
    li s2, 0            # cause
    li s3, 0            # value
    li s4, 0            # address
    ld t1, 0(s0)        # kind: 0 load, 1 store, 2 fetch
    ld a1, 8(s0)
    ld a2, 16(s0)
    ld a3, 24(s0)
    # MPP = U.
    li t0, 3 << 11
    csrc mstatus, t0
    li t0, 2
    beq t1, t0, fetch
    # MPRV: loads and stores as in the mode of MPP.
    li t0, 1 << 17
    csrs mstatus, t0
    bnez t1, store
    ld s3, 0(a1)
    j after
store:
    sd a2, 0(a1)
    # (After a trap the word is left alone: it prints as 0.)
    li t0, 1 << 17
    csrc mstatus, t0
    ld s3, 0(a3)
    j after
fetch:
    csrw mepc, a1
    li a0, 0
    mret
after:
    li t0, 1 << 17
    csrc mstatus, t0
    mv a0, s2
    call print
    mv a0, s3
    call print
    mv a0, s4
    call print
    li a0, '\n'
    call put
    addi s0, s0, 32
    addi s1, s1, -1
    j next

done:
    li t0, FINISHER
    li t1, 0x5555
    sw t1, 0(t0)
    j .

.balign 4
trap:
    li t0, 1 << 17
    csrc mstatus, t0
    csrr s2, mcause
    csrr s4, mtval
    li t0, 8
    bne s2, t0, 1f
    # ecall from U: the fetch succeeded. (The code's `lui` has extended the sign.)
    slli s3, a0, 32
    srli s3, s3, 32
    li s2, 0
    li s4, 0
1:  la t0, after
    csrw mepc, t0
    li t0, 3 << 11
    csrs mstatus, t0
    mret

# Prints a0 in hexadecimal, and a space.
print:
    mv t3, ra
    mv t4, a0
    li t5, 60
1:  srl a0, t4, t5
    andi a0, a0, 15
    addi a0, a0, '0'
    li t0, '9'
    ble a0, t0, 2f
    addi a0, a0, 'a' - '9' - 1
2:  call put
    addi t5, t5, -4
    bgez t5, 1b
    li a0, ' '
    mv ra, t3
put:
    li t0, UART
    sb a0, 0(t0)
    ret
