/* Error texts of the calling thread, and the loud answer to anything that is not simulated. */
#include "cannsim.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum { TEXT = 8192 };
static __thread char pending[TEXT];
static __thread char handed_out[TEXT];

EXPORT void cannsim_set_error(const char *text) { snprintf(pending, sizeof pending, "%s", text ? text : ""); }

EXPORT const char *cannsim_last_error(void) { return pending; }

/* Reading clears it; the text stays valid until the thread reads again. */
EXPORT const char *aclGetRecentErrMsg(void) {
  if (!pending[0]) return NULL;
  memcpy(handed_out, pending, sizeof handed_out);
  pending[0] = 0;
  return handed_out;
}

/* torch_npu's own log. It says which aclnn function it looked for in vain, which the loud error of the legacy path names. */
static __thread char missing[256];
static int log_shown;

EXPORT void cannsim_show_log(int shown) { log_shown = shown; }
const char *missing_function(void) { return missing; }

EXPORT void aclAppLog(int level, const char *function, const char *file, uint32_t line, const char *format, ...) {
  char text[1024];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof text, format, values);
  va_end(values);
  const char *found = strstr(text, "aclnn");
  if (found && strstr(text, "not in libopapi")) {
    size_t n = strcspn(found, " ,");
    snprintf(missing, sizeof missing, "%.*s", (int)n, found);
  }
  if (log_shown) fprintf(stderr, "torch_npu[%d] %s:%u %s: %s\n", level, file, line, function, text);
}

aclError fail(aclError code, const char *format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(pending, sizeof pending, format, values);
  va_end(values);
  return code;
}

EXPORT int64_t cannsim_unsimulated(const char *name) {
  fprintf(stderr, "cannsim: %s is not simulated\n", name);
  return fail(NOT_SUPPORTED, "cannsim: %s is not simulated", name);
}
