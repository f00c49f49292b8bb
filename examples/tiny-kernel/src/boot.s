# From power-on to Rust. QEMU enters at pvh_start in 32-bit mode, EBX = hvm_start_info; the second CPU at ap_start in 16-bit
# mode. They meet in enter_long, with EBX = 0 on the second CPU.
.section .note.pvh, "a", @note
.balign 4
.long 4, 8, 18                  # lengths of name and descriptor, XEN_ELFNOTE_PHYS32_ENTRY
.asciz "Xen"
.quad pvh_start

.section .boot, "awx", @progbits
.balign 4096
.global boot_root, ap_start, ap_end
.if LA57
boot_root:                      # one table more above, in which both halves lead to the same
.quad boot_pml4 + 3; .fill 510, 8, 0; .quad boot_pml4 + 3
boot_pml4:
.else
boot_root:
.endif
                                # 4 GiB at 0, for booting, and in the upper half: the direct map; the kernel at -2 GiB
.quad boot_low + 3; .fill 255, 8, 0; .quad boot_low + 3; .fill 254, 8, 0; .quad boot_high + 3
boot_low:                       # 3: present, writable; 0x83: 2 MiB as well
.quad boot_2m + 3, boot_2m + 0x1003, boot_2m + 0x2003, boot_2m + 0x3003; .fill 508, 8, 0
boot_high:
.fill 510, 8, 0; .quad boot_2m + 3, boot_2m + 0x1003
boot_2m:
.set address, 0x83
.rept 2048
.quad address; .set address, address + 0x200000
.endr
boot_gdt:                       # 8: 64-bit code, 16: data, 24: 32-bit code
.quad 0, 0x00209a0000000000, 0x00cf92000000ffff, 0x00cf9a000000ffff
boot_gdt_pointer:
.word 31; .long boot_gdt

.code16
ap_start:                       # runs as a copy at 0x8000
cli; xor ax, ax; mov ds, ax
lgdtd [ap_gdt_copied]
mov eax, 0x11; mov cr0, eax     # protected mode
.byte 0x66, 0xea; .long ap_start32; .word 24    # far jump
ap_gdt_pointer:
.word 31; .long boot_gdt
ap_end:
.set ap_gdt_copied, 0x8000 + ap_gdt_pointer - ap_start

.code32
ap_start32:
xor ebx, ebx; jmp enter_long
pvh_start:
cli; lgdt [boot_gdt_pointer]
enter_long:
mov eax, 16; mov ds, eax; mov es, eax; mov ss, eax
mov eax, offset boot_root; mov cr3, eax
mov eax, cr4; or eax, 0x620 + LA57 * 0x1000; mov cr4, eax # PAE, OSFXSR, OSXMMEXCPT, LA57
mov ecx, 0xc0000080; rdmsr; or eax, 0x901; wrmsr # EFER: SCE, LME, NXE
mov eax, cr0; and eax, 0xfffffffb; or eax, 0x80010023; mov cr0, eax # no EM; PG, WP, NE, MP, PE
.byte 0xea; .long start64; .word 8              # far jump

.code64
start64:
xor eax, eax; mov ds, eax; mov es, eax; mov ss, eax; mov fs, eax; mov gs, eax
mov edi, ebx; test edi, edi
movabs rsp, offset boot_stack_end
movabs rcx, offset kernel_main
jnz 1f
sub rsp, 131072                 # the second CPU's stack lies below the first's
movabs rcx, offset ap_main
1:
call rcx

.section .bss.boot_stack, "aw", @nobits
.balign 64
boot_stacks:
.fill 262144
boot_stack_end:

# What `core` calls and bare hardware does not have: memcpy, memmove, memset, memcmp, bcmp, strlen (System V ABI).
.section .text.memory, "ax"
.global memcpy, memmove, memset, memcmp, bcmp, strlen
memmove:
mov rax, rdi; sub rax, rsi; cmp rax, rdx; jae memcpy # does not write into what is still to be read
lea rdi, [rdi + rdx - 1]; lea rsi, [rsi + rdx - 1]
mov rcx, rdx; std; rep movsb; cld; lea rax, [rdi + 1]; ret
memcpy:                         # by words, then the rest
mov rax, rdi; mov rcx, rdx; shr rcx, 3; rep movsq; mov ecx, edx; and ecx, 7; rep movsb; ret
memset:
mov r8, rdi; movzx eax, sil; movabs rcx, 0x0101010101010101; imul rax, rcx
mov rcx, rdx; shr rcx, 3; rep stosq; mov ecx, edx; and ecx, 7; rep stosb; mov rax, r8; ret
memcmp:
bcmp:
mov rcx, rdx; xor eax, eax; cmp eax, eax; repe cmpsb; je 1f
movzx eax, byte ptr [rdi - 1]; movzx ecx, byte ptr [rsi - 1]; sub eax, ecx
1:
ret
strlen:
mov rdx, rdi; xor eax, eax; mov rcx, -1; repne scasb; lea rax, [rdi - 1]; sub rax, rdx; ret
