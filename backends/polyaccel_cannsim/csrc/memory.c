/* Device memory is host memory with an owner: every allocation is known by its address, size and device. */
#include "cannsim.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { HOST = -1, UNKNOWN = -2, GUARD = 4096 };

typedef struct {
  uintptr_t start;
  size_t bytes;
  size_t mapped;
  int device;
} block;

static pthread_rwlock_t table_lock = PTHREAD_RWLOCK_INITIALIZER;
static block *table; /* ordered by address */
static size_t blocks, room;
static uint64_t used[MAX_DEVICES], peak[MAX_DEVICES];
static uint64_t capacity = (uint64_t)64 << 30;
static int poison = -1;

EXPORT void cannsim_memory(uint64_t bytes_a_device, int poison_byte) {
  capacity = bytes_a_device;
  poison = poison_byte;
}

EXPORT uint64_t cannsim_memory_used(int device) { return device >= 0 && device < MAX_DEVICES ? used[device] : 0; }
EXPORT uint64_t cannsim_memory_peak(int device) { return device >= 0 && device < MAX_DEVICES ? peak[device] : 0; }

/* The last block that starts at or before the address; blocks where there is none. */
static size_t at_or_before(uintptr_t address) {
  size_t low = 0, high = blocks;
  while (low < high) {
    size_t middle = (low + high) / 2;
    if (table[middle].start <= address) low = middle + 1;
    else high = middle;
  }
  return low ? low - 1 : blocks;
}

/* Owner of the whole range: a device, -1 pinned host memory, -2 no allocation of this runtime. */
EXPORT int cannsim_device_of(const void *address, uint64_t bytes) {
  uintptr_t start = (uintptr_t)address;
  pthread_rwlock_rdlock(&table_lock);
  size_t i = at_or_before(start);
  int owner = UNKNOWN;
  if (i < blocks && start - table[i].start <= table[i].bytes && bytes <= table[i].bytes - (start - table[i].start))
    owner = table[i].device;
  pthread_rwlock_unlock(&table_lock);
  return owner;
}

aclError check_range(const char *call, const char *role, const void *address, size_t bytes, int on_device) {
  if (!bytes) return OK;
  int owner = cannsim_device_of(address, bytes);
  if (on_device && owner < 0)
    return fail(PARAM_INVALID, "EE1001: %s: %s %p (%zu bytes) is not device memory, or not all of it", call, role, address, bytes);
  if (!on_device && owner >= 0)
    return fail(PARAM_INVALID, "EE1001: %s: %s %p is memory of device %d, and must be host memory", call, role, address, owner);
  return OK;
}

static aclError allocate(const char *call, void **address, size_t bytes, int device) {
  if (!address || !bytes) return fail(PARAM_INVALID, "EE1001: %s: size %zu", call, bytes);
  size_t mapped = (bytes + GUARD - 1) / GUARD * GUARD;
  pthread_rwlock_wrlock(&table_lock);
  if (device >= 0 && used[device] + bytes > capacity) {
    uint64_t now = used[device];
    pthread_rwlock_unlock(&table_lock);
    return fail(MEMORY_ALLOCATION, "EL0004: Failed to allocate memory: %s of %zu bytes on device %d, %llu of %llu in use", call,
                bytes, device, (unsigned long long)now, (unsigned long long)capacity);
  }
  if (blocks == room) {
    size_t more = room ? room * 2 : 256;
    block *bigger = realloc(table, more * sizeof *bigger);
    if (!bigger) { pthread_rwlock_unlock(&table_lock); return MEMORY_ALLOCATION; }
    table = bigger;
    room = more;
  }
  void *start = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) {
    pthread_rwlock_unlock(&table_lock);
    return fail(MEMORY_ALLOCATION, "EL0004: Failed to allocate memory: the host has no %zu bytes", mapped);
  }
  size_t i = at_or_before((uintptr_t)start);
  i = i == blocks ? 0 : i + 1;
  memmove(table + i + 1, table + i, (blocks - i) * sizeof *table);
  table[i] = (block){(uintptr_t)start, bytes, mapped, device};
  blocks++;
  if (device >= 0) {
    used[device] += bytes;
    if (used[device] > peak[device]) peak[device] = used[device];
  }
  pthread_rwlock_unlock(&table_lock);
  if (poison >= 0) memset(start, poison, bytes);
  *address = start;
  return OK;
}

static aclError release(const char *call, void *address, int on_device) {
  if (!address) return OK;
  int owner = cannsim_device_of(address, 0);
  if (owner == UNKNOWN || (owner >= 0) != on_device) return fail(PARAM_INVALID, "EE1001: %s: %p was not allocated by it", call, address);
  if (on_device) drain_device(owner); /* as the runtime: memory in use by queued work is not freed under it */
  pthread_rwlock_wrlock(&table_lock);
  size_t i = at_or_before((uintptr_t)address);
  if (i == blocks || table[i].start != (uintptr_t)address) {
    pthread_rwlock_unlock(&table_lock);
    return fail(PARAM_INVALID, "EE1001: %s: %p is not the start of an allocation", call, address);
  }
  block gone = table[i];
  memmove(table + i, table + i + 1, (blocks - i - 1) * sizeof *table);
  blocks--;
  if (gone.device >= 0) used[gone.device] -= gone.bytes;
  pthread_rwlock_unlock(&table_lock);
  munmap((void *)gone.start, gone.mapped);
  return OK;
}

static aclError on_current(const char *call, void **address, size_t bytes) {
  int device = current_device();
  if (device < 0) return fail(CONTEXT_NULL, "EE1001: %s: no device is set", call);
  return allocate(call, address, bytes, device);
}

EXPORT aclError aclrtMalloc(void **address, size_t bytes, int policy) { (void)policy; return on_current("aclrtMalloc", address, bytes); }
EXPORT aclError aclrtMallocAlign32(void **address, size_t bytes, int policy) { (void)policy; return on_current("aclrtMallocAlign32", address, bytes); }
EXPORT aclError aclrtMallocHost(void **address, size_t bytes) { return allocate("aclrtMallocHost", address, bytes, HOST); }
EXPORT aclError aclrtMallocHostWithCfg(void **address, uint64_t bytes, void *settings) { (void)settings; return allocate("aclrtMallocHostWithCfg", address, bytes, HOST); }
EXPORT aclError aclrtFree(void *address) { return release("aclrtFree", address, 1); }
EXPORT aclError aclrtFreeHost(void *address) { return release("aclrtFreeHost", address, 0); }

EXPORT aclError aclrtGetMemInfo(int kind, size_t *free_bytes, size_t *total) {
  (void)kind;
  int device = current_device();
  if (device < 0) return fail(CONTEXT_NULL, "EE1001: aclrtGetMemInfo: no device is set");
  *total = capacity;
  *free_bytes = capacity - used[device];
  return OK;
}

typedef struct { uint32_t id; int type; } location;
typedef struct { location where; uint32_t page; uint32_t rest[4]; } attributes;

/* Types 0 host, 1 device, 2 not registered with the runtime. */
EXPORT aclError aclrtPointerGetAttributes(const void *address, attributes *out) {
  int owner = cannsim_device_of(address, 0);
  memset(out, 0, sizeof *out);
  out->page = GUARD;
  out->where.id = owner >= 0 ? (uint32_t)owner : 0;
  out->where.type = owner >= 0 ? 1 : owner == HOST ? 0 : 2;
  return OK;
}
