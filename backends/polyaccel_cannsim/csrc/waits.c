/* torch_npu waits for its own queue with Python's lock held (it lets go only after legacy operators ran). The real CANN
 * needs no Python on the queue's thread; the simulated one does, so the wait must let go here. Its call of eventfd_read is
 * led through a function that does. */
#include "cannsim.h"

#include <elf.h>
#include <errno.h>
#include <link.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

static int read_unlocked(int file, eventfd_t *value) {
  void *python = python_unlock();
  int rc = eventfd_read(file, value), saved = errno;
  python_lock(python);
  errno = saved;
  return rc;
}

static int redirect(uintptr_t base, const ElfW(Rela) *table, size_t bytes, const ElfW(Sym) *symbols, const char *names) {
  int changed = 0;
  for (size_t i = 0; table && i < bytes / sizeof *table; i++) {
    const char *name = names + symbols[ELF64_R_SYM(table[i].r_info)].st_name;
    if (strcmp(name, "eventfd_read")) continue;
    uintptr_t slot = base + table[i].r_offset, page = (uintptr_t)sysconf(_SC_PAGESIZE);
    if (mprotect((void *)(slot & ~(page - 1)), page, PROT_READ | PROT_WRITE)) continue;
    *(void **)slot = (void *)read_unlocked;
    changed++;
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

/* Number of calls led aside; 0 where torch_npu is not loaded. */
EXPORT int cannsim_release_python_in_waits(void) {
  int changed = 0;
  dl_iterate_phdr(visit, &changed);
  return changed;
}
