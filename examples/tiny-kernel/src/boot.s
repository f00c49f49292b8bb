# From power-on to Rust. QEMU (PVH) enters at pvh_start in 32-bit mode, with EBX = hvm_start_info; the second CPU enters
# at ap_start in 16-bit mode, with EBX cleared on the way. Both meet in enter_long.

.section .note.pvh, "a", @note
.balign 4
.long 4, 8, 18                  # sizes of name and descriptor, XEN_ELFNOTE_PHYS32_ENTRY
.asciz "Xen"
.quad pvh_start

.section .boot, "awx", @progbits
.balign 4096
.global boot_pml4
boot_pml4:                      # 4 GiB at 0 (for booting) and in the upper half (the direct map), the kernel at -2 GiB
.quad boot_low + 3
.fill 255, 8, 0
.quad boot_low + 3
.fill 254, 8, 0
.quad boot_high + 3
boot_low:                       # present, writable
.quad boot_2m + 3, boot_2m + 0x1003, boot_2m + 0x2003, boot_2m + 0x3003
.fill 508, 8, 0
boot_high:
.fill 510, 8, 0
.quad boot_2m + 3, boot_2m + 0x1003
boot_2m:                        # present, writable, 2 MiB each
.set address, 0
.rept 2048
.quad address + 0x83
.set address, address + 0x200000
.endr

boot_gdt:
.quad 0, 0x00209a0000000000, 0x00cf92000000ffff, 0x00cf9a000000ffff  # 64-bit code 8, data 16, 32-bit code 24
boot_gdt_pointer:
.word 31
.long boot_gdt

.code16
.global ap_start, ap_end
ap_start:                       # copied to 0x8000
cli
xor ax, ax
mov ds, ax
lgdtd [ap_gdt_copied]
mov eax, 0x11
mov cr0, eax
.byte 0x66, 0xea                # far jump with a 32-bit offset
.long ap_start32
.word 24
ap_gdt_pointer:
.word 31
.long boot_gdt
ap_end:
.set ap_gdt_copied, 0x8000 + ap_gdt_pointer - ap_start

.code32
ap_start32:
xor ebx, ebx
jmp enter_long
pvh_start:
cli
lgdt [boot_gdt_pointer]
enter_long:
mov eax, 16
mov ds, eax
mov es, eax
mov ss, eax
mov eax, offset boot_pml4
mov cr3, eax
mov eax, cr4
or eax, 0x620                   # PAE, OSFXSR, OSXMMEXCPT
mov cr4, eax
mov ecx, 0xc0000080             # EFER: SCE, LME, NXE
rdmsr
or eax, 0x901
wrmsr
mov eax, cr0
and eax, 0xfffffffb             # no EM
or eax, 0x80010023              # PG, WP, NE, MP, PE
mov cr0, eax
.byte 0xea
.long start64
.word 8

.code64
start64:
xor eax, eax
mov ds, eax
mov es, eax
mov ss, eax
mov fs, eax
mov gs, eax
mov edi, ebx
test edi, edi
movabs rax, offset boot_stack_end
movabs rcx, offset kernel_main
jnz 1f
sub rax, 32768                  # the second CPU's stack lies below the first's
movabs rcx, offset ap_main
1:
mov rsp, rax
xor ebp, ebp
call rcx
ud2

.section .bss.boot_stack, "aw", @nobits
.balign 64
.fill 65536
.global boot_stack_end
boot_stack_end:
