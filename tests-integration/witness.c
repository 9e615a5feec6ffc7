/* Counts the bytes that torch's CPU allocator holds, on every thread: LD_PRELOAD=witness.so. Each of its blocks gets a
   mark at its end, by which `free` knows it again. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MARK 0x7769746e65737321ull

static atomic_long now, most;
static _Atomic(void *) callers[256], others[256];

static int torch_asks(void *from) { /* looked up once for each place that calls */
    size_t slot = (uintptr_t)from / 4 % 256;
    Dl_info info;
    if (atomic_load(&callers[slot]) == from) return 1;
    if (atomic_load(&others[slot]) == from) return 0;
    int asks = dladdr(from, &info) && info.dli_fname && strstr(info.dli_fname, "libc10.so");
    atomic_store(asks ? &callers[slot] : &others[slot], from);
    return asks;
}

static uint64_t *mark_of(void *block) {
    size_t size = malloc_usable_size(block);
    return size < 24 ? NULL : (uint64_t *)((char *)block + size / 8 * 8 - 16);
}

int posix_memalign(void **block, size_t alignment, size_t size) {
    static int (*real)(void **, size_t, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "posix_memalign");
    if (!torch_asks(__builtin_return_address(0))) return real(block, alignment, size);
    int failed = real(block, alignment, size + 32);
    if (!failed) {
        uint64_t *mark = mark_of(*block);
        mark[0] = MARK ^ (uint64_t)*block, mark[1] = size;
        long total = atomic_fetch_add(&now, size) + size, before = atomic_load(&most);
        while (total > before && !atomic_compare_exchange_weak(&most, &before, total)) {}
    }
    return failed;
}

void free(void *block) {
    static void (*real)(void *);
    if (!real) real = dlsym(RTLD_NEXT, "free");
    uint64_t *mark = block && (uintptr_t)block % 64 == 0 ? mark_of(block) : NULL;
    if (mark && mark[0] == (MARK ^ (uint64_t)block)) {
        atomic_fetch_sub(&now, mark[1]);
        mark[0] = 0;
    }
    real(block);
}

long witness_now(void) { return atomic_load(&now); }
long witness_most(void) { return atomic_load(&most); }
void witness_reset(void) { atomic_store(&most, atomic_load(&now)); }
