# Into the kernel and out of it. Every way in builds the same frame (`Frame` in trap.rs), saves what Rust may change, SSE
# state among it, and calls `trap`. In the kernel GS is this CPU's `Cpu`: word 1 keeps a user's stack pointer for an
# instant, word 2 is the stack that `enter_user` left, on which system calls run.
.section .text.trap, "ax"
.global traps, page_fault_entry, syscall_entry, trap_exit, enter_user, leave_user, case_marks
.balign 16
traps:                          # one each 16 bytes
.irp vector, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31,32,33
.balign 16
.ifeq (0x60227d00 >> \vector) & 1
push 0                          # for these the CPU pushes no error code
.endif
push \vector
jmp trap_entry
.endr
.set page_fault_entry, traps + 16 * 14

trap_entry:
test byte ptr [rsp + 24], 3     # who was interrupted: a user, if the code segment says 3
jz save
swapgs
save:
push rax; push rcx; push rdx; push rsi; push rdi; push r8; push r9; push r10; push r11; push rbp
mov rdi, rsp; mov rbp, rsp
sub rsp, 512; and rsp, -16; fxsave64 [rsp]
cld; call trap
fxrstor64 [rsp]; mov rsp, rbp
pop rbp; pop r11; pop r10; pop r9; pop r8; pop rdi; pop rsi; pop rdx; pop rcx; pop rax
add rsp, 16                     # vector, error code
test byte ptr [rsp + 8], 3
jz trap_exit
swapgs
trap_exit:
iretq

syscall_entry:                  # RCX has the return address, R11 the flags (SDM 2B, SYSCALL)
swapgs
mov gs:[8], rsp; mov rsp, gs:[16]
push 27; push gs:[8]; push r11; push 35; push rcx; push 0; push 256  # 27, 35: a user's data and code segment
jmp save

enter_user:                     # enter_user(rip, rsp, argument, arguments): runs a user until `leave_user`
push rbx; push rbp; push r12; push r13; push r14; push r15
mov gs:[16], rsp
push 27; push rsi; push 0x202; push 35; push rdi     # interrupts on
mov rdi, rdx; mov rsi, rcx
fxrstor64 [rip + clean_sse]     # a user sees nothing of what the kernel had in its registers
xor eax, eax; xor ebx, ebx; xor ecx, ecx; xor edx, edx; xor ebp, ebp; xor r8d, r8d; xor r9d, r9d
xor r10d, r10d; xor r11d, r11d; xor r12d, r12d; xor r13d, r13d; xor r14d, r14d; xor r15d, r15d
swapgs
jmp trap_exit

leave_user:                     # `enter_user` returns; what lies on the stack since is given up
mov rsp, gs:[16]
pop r15; pop r14; pop r13; pop r12; pop rbp; pop rbx
ret

.balign 16
case_marks:                     # which of these is called tells who watches from outside what is measured
.rept 64
ret
.balign 16
.endr

.section .data.trap, "aw"
.balign 16
clean_sse:                      # SDM 1, 10.5.1: x87 and SSE exceptions masked
.word 0x37f; .fill 22, 1, 0; .long 0x1f80; .fill 484, 1, 0
