# Into the kernel and out of it. Every way in builds the same frame (`Frame` in trap.rs), saves what Rust may change, SSE
# state among it, and calls `trap`. GS is the kernel's while the kernel runs: its base is this CPU's `Cpu`, of which
# word 1 keeps a user's stack pointer for an instant, and word 2 is the stack that `enter_user` left.

.section .text.trap, "ax"
.balign 16
.irp vector, 0,1,2,3,4,5,6,7,9,16,18,19,20,28,32
trap_\vector:
push 0                          # no error code
push \vector
jmp trap_entry
.endr
.irp vector, 8,10,11,12,13,17,21,29,30
trap_\vector:
push \vector
jmp trap_entry
.endr

.global page_fault_entry, syscall_entry, trap_exit
.balign 16
page_fault_entry:
trap_14:
push 14
trap_entry:
test byte ptr [rsp + 24], 3     # the code segment's privilege level: 3 for a user
jz save
swapgs
save:
push rax
push rcx
push rdx
push rsi
push rdi
push r8
push r9
push r10
push r11
push rbp
mov rdi, rsp
mov rbp, rsp
sub rsp, 512
and rsp, -16
fxsave64 [rsp]
cld
call trap
fxrstor64 [rsp]
mov rsp, rbp
pop rbp
pop r11
pop r10
pop r9
pop r8
pop rdi
pop rsi
pop rdx
pop rcx
pop rax
add rsp, 16                     # vector, error code
test byte ptr [rsp + 8], 3
jz trap_exit
swapgs
trap_exit:
iretq

.balign 16
syscall_entry:                  # RCX has the return address, R11 the flags (SDM 2B, SYSCALL)
swapgs
mov gs:[8], rsp
mov rsp, gs:[16]
push 27                         # the selectors that boot gives out: user data, user code
push gs:[8]
push r11
push 35
push rcx
push 0
push 256                        # no vector: a system call
jmp save

# u64 enter_user(rip, rsp, argument, arguments): runs a user until `leave_user`.
.global enter_user, leave_user
enter_user:
push rbx
push rbp
push r12
push r13
push r14
push r15
mov gs:[16], rsp
push 27
push rsi
push 0x202                      # interrupts on
push 35
push rdi
mov rdi, rdx
mov rsi, rcx
fxrstor64 [rip + clean_sse]     # a user sees nothing of what the kernel had in its registers
xor eax, eax
xor ebx, ebx
xor ecx, ecx
xor edx, edx
xor ebp, ebp
xor r8d, r8d
xor r9d, r9d
xor r10d, r10d
xor r11d, r11d
xor r12d, r12d
xor r13d, r13d
xor r14d, r14d
xor r15d, r15d
swapgs
iretq

# leave_user(status): `enter_user` returns it. Whatever the kernel's stacks hold of this user is given up.
leave_user:
mov rax, rdi
mov rsp, gs:[16]
pop r15
pop r14
pop r13
pop r12
pop rbp
pop rbx
ret

# What a program measures is told apart from outside by which of these is called.
.balign 16
.global case_marks
case_marks:
.rept 64
ret
.balign 16
.endr

.section .rodata.trap, "a"
.balign 8
.global trap_table
trap_table:                     # addresses by vector; 0 for those that no CPU has
.irp vector, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14
.quad trap_\vector
.endr
.quad 0
.irp vector, 16,17,18,19,20,21
.quad trap_\vector
.endr
.quad 0, 0, 0, 0, 0, 0
.irp vector, 28,29,30
.quad trap_\vector
.endr
.quad 0
.quad trap_32

.section .data.trap, "aw"
.balign 16
clean_sse:
.word 0x37f                     # SDM 1, 10.2.3 and 8.1.5: all exceptions masked
.fill 22, 1, 0
.long 0x1f80
.fill 484, 1, 0
