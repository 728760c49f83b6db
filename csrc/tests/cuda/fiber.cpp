#include "fiber.h"

#include <sys/mman.h>

#include <new>

// The implementation for processors other than x86-64. Defining DLVAE_UCONTEXT tests it.
#if !defined(__x86_64__)
#define DLVAE_UCONTEXT
#endif
#if defined(DLVAE_UCONTEXT)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(DLVAE_UCONTEXT)
// Pushes the callee-saved registers, switches stacks, and pops those of the other fiber. swapcontext would make a
// system call as well.
extern "C" void dlvae_switch_stacks(void** from, void* to);
asm(R"(
.text
.globl dlvae_switch_stacks
.hidden dlvae_switch_stacks
.type dlvae_switch_stacks, @function
dlvae_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size dlvae_switch_stacks, .-dlvae_switch_stacks
)");
#endif

namespace dlvae::emulator {
namespace {

constexpr size_t GUARD_BYTES = 4096;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t STACK_BYTES = 512 * 1024;
#else
constexpr size_t STACK_BYTES = 128 * 1024;
#endif

#if defined(__SANITIZE_ADDRESS__)
Fiber* came_from;

void leave(Fiber* from, Fiber* to, bool ends) {
  came_from = from;
  __sanitizer_start_switch_fiber(ends ? nullptr : &from->fake_stack, to->stack, to->stack_bytes);
}

void arrive(void* fake_stack) {
  const void* stack;
  // This is the only way to learn the stack of the launching thread.
  __sanitizer_finish_switch_fiber(fake_stack, &stack, &came_from->stack_bytes);
  came_from->stack = const_cast<void*>(stack);
}

// Functions that never returned have left poisoned memory.
void forget(const Fiber& fiber) { __asan_unpoison_memory_region(fiber.stack, fiber.stack_bytes); }
#else
void leave(Fiber*, Fiber*, bool) {}
void arrive(void*) {}
void forget(const Fiber&) {}
#endif

}  // namespace

Fiber* new_fiber() {
  Fiber* const fiber = new Fiber{};
  fiber->stack_bytes = STACK_BYTES;
  void* const memory = mmap(
      nullptr, GUARD_BYTES + STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  // A stack overflow ends the program instead of overwriting other memory.
  if (memory == MAP_FAILED || mprotect(memory, GUARD_BYTES, PROT_NONE) != 0) throw std::bad_alloc();
  fiber->stack = static_cast<char*>(memory) + GUARD_BYTES;
  return fiber;
}

void enter_fiber() { arrive(nullptr); }

#if defined(DLVAE_UCONTEXT)
void prepare_fiber(Fiber* fiber, void (*main)()) {
  forget(*fiber);
  if (fiber->stack_pointer == nullptr) fiber->stack_pointer = new ucontext_t;
  ucontext_t* const context = static_cast<ucontext_t*>(fiber->stack_pointer);
  getcontext(context);
  context->uc_stack.ss_sp = fiber->stack;
  context->uc_stack.ss_size = fiber->stack_bytes;
  makecontext(context, main, 0);
}

void switch_fibers(Fiber* from, Fiber* to, bool ends) {
  if (from->stack_pointer == nullptr) from->stack_pointer = new ucontext_t;
  leave(from, to, ends);
  swapcontext(static_cast<ucontext_t*>(from->stack_pointer), static_cast<ucontext_t*>(to->stack_pointer));
  arrive(from->fake_stack);
}
#else
void prepare_fiber(Fiber* fiber, void (*main)()) {
  forget(*fiber);
  // Six registers, and the return address `main`. On entry to a function the stack pointer is 8 bytes off a multiple of
  // 16.
  void** const top = reinterpret_cast<void**>(static_cast<char*>(fiber->stack) + fiber->stack_bytes);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(main);
  fiber->stack_pointer = top - 8;
}

void switch_fibers(Fiber* from, Fiber* to, bool ends) {
  leave(from, to, ends);
  dlvae_switch_stacks(&from->stack_pointer, to->stack_pointer);
  arrive(from->fake_stack);
}
#endif

}  // namespace dlvae::emulator
