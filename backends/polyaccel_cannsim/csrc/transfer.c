/* Copies and fills, at once or on a stream. */
#include "stream.h"

#include <string.h>

static aclError check_copy(const char *name, void *to, size_t room, const void *from, size_t bytes, int kind) {
  if (bytes > room) return fail(PARAM_INVALID, "EE1001: %s: %zu bytes into %zu", name, bytes, room);
  int to_device = kind == 1 || kind == 3 || kind == 6 || kind == 7, from_device = kind == 2 || kind == 3 || kind == 6 || kind == 7;
  if (kind < 0 || kind > 7 || kind == 5) return fail(PARAM_INVALID, "cannsim: %s of kind %d is not simulated", name, kind);
  if (kind == 4) return OK; /* default: the runtime looks for itself */
  aclError code = check_range(name, "destination", to, bytes, to_device);
  return code ? code : check_range(name, "source", from, bytes, from_device);
}

EXPORT aclError aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, int kind) {
  aclError code = check_copy("aclrtMemcpy", to, room, from, bytes, kind);
  if (code) return code;
  memmove(to, from, bytes);
  return OK;
}

EXPORT aclError aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes, int kind, void *handle) {
  aclError code = check_copy("aclrtMemcpyAsync", to, room, from, bytes, kind);
  if (code) return code;
  item *one = new_item(ITEM_COPY);
  if (one) { one->to = to; one->from = from; one->bytes = bytes; }
  return queue("aclrtMemcpyAsync", handle, one);
}

EXPORT aclError aclrtMemcpyAsyncWithCondition(void *to, size_t room, const void *from, size_t bytes, int kind, void *handle) {
  return aclrtMemcpyAsync(to, room, from, bytes, kind, handle);
}

EXPORT aclError aclrtMemset(void *to, size_t room, int32_t value, size_t bytes) {
  if (bytes > room) return fail(PARAM_INVALID, "EE1001: aclrtMemset: %zu bytes into %zu", bytes, room);
  aclError code = check_range("aclrtMemset", "destination", to, bytes, 1);
  if (code) return code;
  memset(to, value, bytes);
  return OK;
}

EXPORT aclError aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t bytes, void *handle) {
  if (bytes > room) return fail(PARAM_INVALID, "EE1001: aclrtMemsetAsync: %zu bytes into %zu", bytes, room);
  aclError code = check_range("aclrtMemsetAsync", "destination", to, bytes, 1);
  if (code) return code;
  item *one = new_item(ITEM_SET);
  if (one) { one->to = to; one->value = value; one->bytes = bytes; }
  return queue("aclrtMemsetAsync", handle, one);
}

EXPORT aclError aclrtLaunchHostFunc(void *handle, void (*function)(void *), void *argument) {
  item *one = new_item(ITEM_HOST);
  if (one) { one->host = function; one->argument = argument; }
  return queue("aclrtLaunchHostFunc", handle, one);
}

