/* torch_npu waits for its own queue with Python's lock held (it lets go only after legacy operators ran). The real CANN
 * needs no Python on the queue's thread; the simulated one does, so the wait must let go here. Its call of eventfd_read is
 * led through a function that does.
 *
 * The queue's thread ends at the first failure. A call that torch_npu adds in that very moment, having seen no failure yet,
 * stays in the queue, and each later wait for the queue, that of the process's end included, is for ever, on a card too.
 * Here it is given up, with every stream failed.
 *
 * The thread that frees what launches held asks for more by sleeping one microsecond at a time. A server with a card spares it
 * a core; here each question interrupts what simulates the card, and doubled an operator's time on one core. It asks less
 * often, through select. */
#include "cannsim.h"

#include <elf.h>
#include <errno.h>
#include <link.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <unistd.h>

enum { PATIENCE_MS = 2000, RELEASE_US = 500 };

static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_key_t consumer;
static atomic_int ended;

static int is_named(const char *wanted) {
  char name[16] = "";
  return !pthread_getname_np(pthread_self(), name, sizeof name) && !strcmp(name, wanted);
}
static int is_consumer(void) { return is_named("acl_thread"); }

static void count_end(void *unused) {
  (void)unused;
  atomic_fetch_add(&ended, 1);
}
static void make_key(void) { pthread_key_create(&consumer, count_end); }

/* Called by every launch: the end of a queue's thread is to be known. */
void note_launcher(void) {
  pthread_once(&once, make_key);
  if (!pthread_getspecific(consumer) && is_consumer()) pthread_setspecific(consumer, &consumer);
}

static int wait_for(int file) {
  struct pollfd one = {.fd = file, .events = POLLIN};
  for (int rc = 0; rc <= 0;) {
    rc = poll(&one, 1, PATIENCE_MS);
    if (rc < 0 && errno != EINTR) return -1;
    if (rc || !atomic_load(&ended) || is_consumer()) continue;
    fail_streams("EE1002: cannsim: torch_npu waits for a queue whose thread has ended after a failure, with a call left in "
                 "it; on a card this wait is for ever");
    errno = EPIPE;
    return -1;
  }
  return 0;
}

static int read_unlocked(int file, eventfd_t *value) {
  void *python = python_unlock();
  int rc = wait_for(file) ? -1 : eventfd_read(file, value), saved = errno;
  python_lock(python);
  errno = saved;
  return rc;
}

static int select_less(int count, fd_set *in, fd_set *out, fd_set *error, struct timeval *time) {
  struct timeval longer = {.tv_usec = RELEASE_US};
  int asks = !count && time && !time->tv_sec && time->tv_usec < RELEASE_US && is_named("release_thread");
  return select(count, in, out, error, asks ? &longer : time);
}

static int redirect(uintptr_t base, const ElfW(Rela) *table, size_t bytes, const ElfW(Sym) *symbols, const char *names) {
  int changed = 0;
  for (size_t i = 0; table && i < bytes / sizeof *table; i++) {
    const char *name = names + symbols[ELF64_R_SYM(table[i].r_info)].st_name;
    int waits = !strcmp(name, "eventfd_read");
    if (!waits && strcmp(name, "select")) continue;
    uintptr_t slot = base + table[i].r_offset, page = (uintptr_t)sysconf(_SC_PAGESIZE);
    if (mprotect((void *)(slot & ~(page - 1)), page, PROT_READ | PROT_WRITE)) continue;
    *(void **)slot = waits ? (void *)read_unlocked : (void *)select_less;
    changed += waits;
  }
  return changed;
}

static int visit(struct dl_phdr_info *library, size_t size, void *count) {
  (void)size;
  if (!strstr(library->dlpi_name, "libtorch_npu.so")) return 0;
  const ElfW(Rela) *jumps = NULL, *others = NULL;
  const ElfW(Sym) *symbols = NULL;
  const char *names = NULL;
  size_t jump_bytes = 0, other_bytes = 0;
  for (int i = 0; i < library->dlpi_phnum; i++) {
    if (library->dlpi_phdr[i].p_type != PT_DYNAMIC) continue;
    for (const ElfW(Dyn) *one = (const void *)(library->dlpi_addr + library->dlpi_phdr[i].p_vaddr); one->d_tag; one++) {
      if (one->d_tag == DT_JMPREL) jumps = (const void *)one->d_un.d_ptr;
      else if (one->d_tag == DT_PLTRELSZ) jump_bytes = one->d_un.d_val;
      else if (one->d_tag == DT_RELA) others = (const void *)one->d_un.d_ptr;
      else if (one->d_tag == DT_RELASZ) other_bytes = one->d_un.d_val;
      else if (one->d_tag == DT_SYMTAB) symbols = (const void *)one->d_un.d_ptr;
      else if (one->d_tag == DT_STRTAB) names = (const void *)one->d_un.d_ptr;
    }
  }
  if (symbols && names)
    *(int *)count += redirect(library->dlpi_addr, jumps, jump_bytes, symbols, names) +
                     redirect(library->dlpi_addr, others, other_bytes, symbols, names);
  return 0;
}

/* Number of waits led aside; 0 where torch_npu is not loaded. */
EXPORT int cannsim_release_python_in_waits(void) {
  int changed = 0;
  dl_iterate_phdr(visit, &changed);
  return changed;
}
