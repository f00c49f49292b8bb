# void *memcpy(to, from, n), memmove, memset(to, byte, n); int memcmp(a, b, n), bcmp; size_t strlen(s). By words where it is
# long, so that an instruction counts for eight bytes.
.section .text.memory, "ax"
.global memcpy, memmove, memset, memcmp, bcmp, strlen
memmove:
mov rax, rdi
sub rax, rsi
cmp rax, rdx
jae memcpy                      # not into what is still to be read
lea rdi, [rdi + rdx - 1]
lea rsi, [rsi + rdx - 1]
mov rcx, rdx
std
rep movsb
cld
lea rax, [rdi + 1]
ret
memcpy:
mov rax, rdi
mov rcx, rdx
shr rcx, 3
rep movsq
mov ecx, edx
and ecx, 7
rep movsb
ret
memset:
mov r8, rdi
movzx eax, sil
movabs rcx, 0x0101010101010101
imul rax, rcx
mov rcx, rdx
shr rcx, 3
rep stosq
mov ecx, edx
and ecx, 7
rep stosb
mov rax, r8
ret
memcmp:
bcmp:
mov rcx, rdx
xor eax, eax
test rcx, rcx
jz 1f
repe cmpsb
movzx eax, byte ptr [rdi - 1]
movzx ecx, byte ptr [rsi - 1]
sub ecx, eax
mov eax, ecx
1:
ret
strlen:
xor eax, eax
1:
cmp byte ptr [rdi + rax], 0
je 2f
inc rax
jmp 1b
2:
ret
