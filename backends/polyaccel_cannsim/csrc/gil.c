/* Python's lock, found at run time so that the library loads into any process. */
#include "cannsim.h"

#include <dlfcn.h>

static pthread_once_t once = PTHREAD_ONCE_INIT;
static int (*held)(void);
static void *(*save)(void);
static void (*restore)(void *);
static int (*alive)(void);
static int (*ensure)(void);

static void look_up(void) {
  held = (int (*)(void))dlsym(RTLD_DEFAULT, "PyGILState_Check");
  save = (void *(*)(void))dlsym(RTLD_DEFAULT, "PyEval_SaveThread");
  restore = (void (*)(void *))dlsym(RTLD_DEFAULT, "PyEval_RestoreThread");
  ensure = (int (*)(void))dlsym(RTLD_DEFAULT, "PyGILState_Ensure");
  alive = (int (*)(void))dlsym(RTLD_DEFAULT, "Py_IsInitialized");
}

void *python_unlock(void) {
  pthread_once(&once, look_up);
  if (!held || !save || !restore || !alive || !alive() || !held()) return NULL;
  return save();
}

void python_lock(void *state) {
  if (state) restore(state);
}

/* Gives the calling thread a state of its own in Python, for its lifetime: each callback would make and drop one. */
void python_adopt_thread(void) {
  pthread_once(&once, look_up);
  if (!ensure || !save || !alive || !alive()) return;
  ensure();
  save();
}
