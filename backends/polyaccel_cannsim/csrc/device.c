/* Devices, contexts and what the chip says of itself. Set once, before torch_npu is imported. */
#include "cannsim.h"

#include <stdio.h>
#include <string.h>

static struct {
  int devices;
  char soc[64];
  char cann[64];
  int cube_cores;
  int vector_cores;
  int bf16;
} machine = {1, "Ascend910B3", "8.3.RC1", 20, 40, 1};

static __thread int current = -1;
static int active[MAX_DEVICES];

EXPORT void cannsim_machine(int devices, const char *soc, const char *cann, int cube_cores, int vector_cores, int bf16) {
  machine.devices = devices < MAX_DEVICES ? devices : MAX_DEVICES;
  snprintf(machine.soc, sizeof machine.soc, "%s", soc);
  snprintf(machine.cann, sizeof machine.cann, "%s", cann);
  machine.cube_cores = cube_cores;
  machine.vector_cores = vector_cores;
  machine.bf16 = bf16;
}

int device_count(void) { return machine.devices; }
int current_device(void) { return current; }
void adopt_device(int device) { current = device; }

static aclError known(int device) {
  if (device >= 0 && device < machine.devices) return OK;
  return fail(INVALID_DEVICE, "EE1001: The argument is invalid. Reason: device %d, and there are %d", device, machine.devices);
}

EXPORT aclError aclInit(const char *path) { (void)path; return OK; }
EXPORT aclError aclFinalize(void) { return OK; }
EXPORT aclError aclrtGetDeviceCount(uint32_t *count) { *count = (uint32_t)machine.devices; return OK; }

EXPORT aclError aclrtSetDevice(int32_t device) {
  aclError code = known(device);
  if (code) return code;
  current = device;
  active[device] = 1;
  return OK;
}

EXPORT aclError aclrtGetDevice(int32_t *device) {
  if (current < 0) return CONTEXT_NULL;
  *device = current;
  return OK;
}

EXPORT aclError aclrtResetDevice(int32_t device) {
  aclError code = known(device);
  if (code) return code;
  active[device] = 0;
  return drain_device(device);
}

EXPORT aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *is_active) {
  aclError code = known(device);
  if (code) return code;
  if (flags) *flags = 0;
  *is_active = active[device];
  return OK;
}

/* A context is a device's primary one; its handle is the device number plus one. */
EXPORT aclError aclrtGetCurrentContext(void **context) {
  if (current < 0) return CONTEXT_NULL;
  *context = (void *)(uintptr_t)(current + 1);
  return OK;
}

EXPORT aclError aclrtSetCurrentContext(void *context) { return aclrtSetDevice((int)(uintptr_t)context - 1); }

EXPORT aclError aclrtGetLogicDevIdByUserDevId(int32_t user, int32_t *logic) { *logic = user; return OK; }

EXPORT aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer) {
  *can = device != peer && !known(device) && !known(peer);
  return OK;
}

EXPORT aclError aclrtDeviceEnablePeerAccess(int32_t peer, uint32_t flags) { (void)flags; return known(peer); }

EXPORT const char *aclrtGetSocName(void) { return machine.soc; }

/* Attributes 0 infinity and NaN, 1 bfloat16, 2 compiling operators at run time. */
EXPORT aclError aclGetCannAttribute(int attribute, int32_t *value) {
  switch (attribute) {
    case 0: case 1: *value = machine.bf16; return OK;
    case 2: *value = 1; return OK;
  }
  return fail(PARAM_INVALID, "cannsim: aclGetCannAttribute(%d) is not simulated", attribute);
}

/* Kinds 0 cube cores, 1 vector cores. */
EXPORT aclError aclGetDeviceCapability(uint32_t device, int kind, int64_t *value) {
  aclError code = known((int)device);
  if (code) return code;
  switch (kind) {
    case 0: *value = machine.cube_cores; return OK;
    case 1: *value = machine.vector_cores; return OK;
  }
  return fail(PARAM_INVALID, "cannsim: aclGetDeviceCapability(%d) is not simulated", kind);
}

/* Attributes 1 cube cores, 101 vector cores. */
EXPORT aclError aclrtGetDeviceInfo(uint32_t device, int attribute, int64_t *value) {
  aclError code = known((int)device);
  if (code) return code;
  switch (attribute) {
    case 1: *value = machine.cube_cores; return OK;
    case 101: *value = machine.vector_cores; return OK;
  }
  return fail(PARAM_INVALID, "cannsim: aclrtGetDeviceInfo(%d) is not simulated", attribute);
}

/* CANN answers from 8.1 on; before, torch_npu finds no such function and knows no version. */
EXPORT aclError aclsysGetCANNVersion(int package, void *version) {
  (void)package;
  if (!machine.cann[0]) return fail(NOT_SUPPORTED, "cannsim: this CANN has no aclsysGetCANNVersion");
  memset(version, 0, 128);
  snprintf(version, 128, "%s", machine.cann);
  return OK;
}

EXPORT aclError aclsysGetVersionStr(char *package, char *version) {
  (void)package;
  if (!machine.cann[0]) return fail(NOT_SUPPORTED, "cannsim: this CANN has no aclsysGetVersionStr");
  snprintf(version, 64, "%s", machine.cann);
  return OK;
}

/* Settings that change no result here. */
EXPORT aclError aclrtSetDeviceSatMode(int mode) { (void)mode; return OK; }
EXPORT aclError aclrtSetOpExecuteTimeOut(uint32_t seconds) { (void)seconds; return OK; }
EXPORT aclError aclrtSetOpExecuteTimeOutV2(uint64_t microseconds, uint64_t *set) { if (set) *set = microseconds; return OK; }
EXPORT aclError aclrtSetOpWaitTimeout(uint32_t seconds) { (void)seconds; return OK; }
EXPORT aclError aclrtPeekAtLastError(int level) { (void)level; return OK; }
EXPORT aclError aclrtGetLastError(int level) { (void)level; return OK; }

enum { OPTIONS = 16 };
static int64_t options[OPTIONS];

EXPORT aclError aclrtSetSysParamOpt(int option, int64_t value) {
  if (option < 0 || option >= OPTIONS) return fail(PARAM_INVALID, "cannsim: aclrtSetSysParamOpt(%d) is not simulated", option);
  options[option] = value;
  return OK;
}

EXPORT aclError aclrtCtxSetSysParamOpt(int option, int64_t value) { return aclrtSetSysParamOpt(option, value); }

EXPORT aclError aclrtGetSysParamOpt(int option, int64_t *value) {
  if (option < 0 || option >= OPTIONS) return fail(PARAM_INVALID, "cannsim: aclrtGetSysParamOpt(%d) is not simulated", option);
  *value = options[option];
  return OK;
}

/* torch_npu looks for it in libopapi and in libnnopbase, which both link to this library. */
EXPORT aclError aclDestroyAclOpExecutor(void *executor) { (void)executor; return OK; }
