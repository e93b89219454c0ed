"""torch_npu's queue ends at its first failure, and a call may slip in behind its end."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from polyaccel_cannsim.build import compiler

# What torch_npu does between looking for a failure and adding the call: it takes a lock, the last before it wakes the
# queue's thread. The library learns that place from a call that wakes it, and later holds another call there.
SLIP = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

static pthread_t caller;
static void *last, *place;
static int learning, held;
static useconds_t pause_for;

void slip_learn(void) { caller = pthread_self(); learning = 1; }
void slip_hold(int milliseconds) { pause_for = milliseconds * 1000; }
int slip_known(void) { return place != NULL; }
int slip_held(void) { return held; }

int pthread_mutex_lock(pthread_mutex_t *mutex) {
  static int (*real)(pthread_mutex_t *);
  void *from = __builtin_return_address(0);
  Dl_info about;
  if ((learning || pause_for) && pthread_equal(pthread_self(), caller)) {
    if (learning && dladdr(from, &about) && strstr(about.dli_fname, "libtorch_npu.so")) last = from;
    if (pause_for && from == place) {
      useconds_t until_over = pause_for;
      pause_for = 0;
      held = 1;
      usleep(until_over);
    }
  }
  if (!real) real = (int (*)(pthread_mutex_t *))dlsym(RTLD_NEXT, "pthread_mutex_lock");
  return real(mutex);
}

int eventfd_write(int file, eventfd_t value) {
  if (learning && pthread_equal(pthread_self(), caller)) {
    place = last;
    learning = 0;
  }
  return write(file, &value, sizeof value) == sizeof value ? 0 : -1;
}
"""
PROGRAM = """
    import ctypes, time
    import torch, torch_npu
    from polyaccel_cannsim.descriptor import AclTensor

    x, w = torch.randn(8, 4).half().npu(), torch.randn(8, 16).half().npu()
    y, gamma = torch.ones(2, 8).npu(), torch.ones(8).npu()
    torch_npu.npu_rms_norm(y, gamma, 1e-5)
    torch.npu.synchronize()
    time.sleep(0.2)
    slip = ctypes.CDLL(None)
    slip.slip_learn()
    torch_npu.npu_rms_norm(y, gamma, 1e-5)
    torch.npu.synchronize()
    assert slip.slip_known()

    exact = AclTensor.contiguous.fget
    def late(self):
        time.sleep(0.3)
        return exact(self)
    AclTensor.contiguous = property(late)
    torch_npu.npu_mm_all_reduce_base(x.t(), w, "group")
    slip.slip_hold(1500)
    torch_npu.npu_rms_norm(y, gamma, 1e-5)
    assert slip.slip_held()
    print("slipped in", flush=True)
    for _ in range(2):
        try:
            torch.npu.synchronize()
            print("all is well")
        except RuntimeError as problem:
            print("raised", problem)
    """


def test_a_call_that_slips_in_behind_the_end_of_the_queue_makes_waits_fail_and_not_last_for_ever(
    program: Any, tmp_path: Path
) -> None:
    """On a card torch_npu 2.13 waits for ever there: for its queue's thread, which has ended and empties nothing."""
    source, library = tmp_path / "slip.c", tmp_path / "libslip.so"
    source.write_text(SLIP)
    subprocess.run([*compiler(), "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    out = program(PROGRAM, CANNSIM_RULES="tests.cannsim.rules", TASK_QUEUE_ENABLE="1", LD_PRELOAD=str(library))
    after = out[out.index("slipped in") :]
    assert "all is well" not in after
    assert after.count("raised") >= 2
    assert "whose thread has ended" in after
