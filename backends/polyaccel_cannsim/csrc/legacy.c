/* The legacy operator path (aclop). Descriptions may be built, as torch_npu does before it calls; running one never works:
 * an answer of success without work would be silent garbage. */
#include "cannsim.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { int type, dimensions, format; int64_t sizes[16]; } description;

EXPORT description *aclCreateTensorDesc(int type, int dimensions, const int64_t *sizes, int format) {
  description *d = calloc(1, sizeof *d);
  if (!d || dimensions > 16) { free(d); return NULL; }
  d->type = type;
  d->dimensions = dimensions;
  d->format = format;
  if (dimensions > 0) memcpy(d->sizes, sizes, (size_t)dimensions * sizeof *sizes);
  return d;
}
EXPORT void aclDestroyTensorDesc(const description *d) { free((void *)d); }
EXPORT int aclGetTensorDescType(const description *d) { return d->type; }
EXPORT int aclGetTensorDescFormat(const description *d) { return d->format; }
EXPORT size_t aclGetTensorDescNumDims(const description *d) { return (size_t)d->dimensions; }
EXPORT aclError aclGetTensorDescDimV2(const description *d, size_t i, int64_t *size) {
  if (i >= (size_t)d->dimensions) return PARAM_INVALID;
  *size = d->sizes[i];
  return OK;
}
EXPORT void aclSetTensorDescName(description *d, const char *name) { (void)d; (void)name; }
EXPORT aclError aclSetTensorFormat(description *d, int format) { d->format = format; return OK; }
EXPORT aclError aclSetTensorPlaceMent(description *d, int kind) { (void)d; (void)kind; return OK; }
EXPORT aclError aclSetTensorShape(description *d, int n, const int64_t *sizes) { (void)d; (void)n; (void)sizes; return OK; }
EXPORT void *aclCreateDataBuffer(void *data, size_t bytes) {
  void **b = calloc(2, sizeof *b);
  if (b) { b[0] = data; b[1] = (void *)bytes; }
  return b;
}
EXPORT aclError aclDestroyDataBuffer(const void *b) { free((void *)b); return OK; }
EXPORT void *aclopCreateAttr(void) { return calloc(1, 8); }
EXPORT void aclopDestroyAttr(const void *a) { free((void *)a); }

#define ATTRIBUTE(kind) EXPORT aclError aclopSetAttr##kind(void) { return OK; }
ATTRIBUTE(Bool) ATTRIBUTE(DataType) ATTRIBUTE(Float) ATTRIBUTE(Int) ATTRIBUTE(ListBool) ATTRIBUTE(ListFloat)
ATTRIBUTE(ListInt) ATTRIBUTE(ListListInt) ATTRIBUTE(String)

static aclError refused(const char *operator_name) {
  const char *wanted = missing_function();
  fprintf(stderr, "cannsim: the legacy aclop kernel %s is not simulated%s%s\n", operator_name,
          *wanted ? "; the last aclnn function looked for in vain: " : "", wanted);
  return fail(LEGACY_OPERATOR, "EZ3002: cannsim: the legacy aclop kernel %s is not simulated%s%s", operator_name,
              *wanted ? "; the last aclnn function looked for in vain: " : "", wanted);
}
EXPORT aclError aclopCompileAndExecute(const char *name) { return refused(name); }
EXPORT aclError aclopCompileAndExecuteV2(const char *name) { return refused(name); }

/* Operators are never compiled at run time: aclnn functions are taken where there are any. */
EXPORT aclError aclSetCompileopt(int option, const char *value) { (void)option; (void)value; return OK; }
EXPORT size_t aclGetCompileoptSize(int option) { (void)option; return 16; }
EXPORT aclError aclGetCompileopt(int option, char *value, size_t room) { (void)option; snprintf(value, room, "disable"); return OK; }

/* Nothing is profiled or dumped. */
EXPORT uint64_t MsprofGetHashId(void) { return 0; }
EXPORT uint64_t MsprofSysCycleTime(void) { return 0; }
#define QUIET(name) EXPORT int name(void) { return 0; }
QUIET(MsprofRegisterCallback) QUIET(MsprofReportAdditionalInfo) QUIET(MsprofReportApi) QUIET(MsprofReportCompactInfo)
QUIET(aclmdlFinalizeDump) QUIET(aclmdlInitDump)

/* Channels that carry data or dumps out of a running graph: torch_npu links against them. */
static aclError not_simulated(const char *name) {
  fprintf(stderr, "cannsim: %s is not simulated\n", name);
  return fail(LEGACY_OPERATOR, "EZ3002: cannsim: %s is not simulated", name);
}
#define REFUSED(name) EXPORT aclError name(void) { return not_simulated(#name); }
#define NOTHING(name) EXPORT void *name(void) { not_simulated(#name); return NULL; }
REFUSED(aclopStartDumpArgs) REFUSED(aclopStopDumpArgs)
REFUSED(acltdtReceiveTensor) REFUSED(acltdtDestroyChannel) REFUSED(acltdtDestroyDataset) REFUSED(acltdtGetDimsFromItem)
NOTHING(acltdtCreateChannelWithCapacity) NOTHING(acltdtCreateDataset) NOTHING(acltdtGetDataItem) NOTHING(acltdtGetDataAddrFromItem)
/* Sizes and a data type: none. */
NOTHING(acltdtGetDataTypeFromItem) NOTHING(acltdtGetDatasetSize) NOTHING(acltdtGetDataSizeFromItem) NOTHING(acltdtGetDimNumFromItem)
