/* Descriptors that operators receive, laid out so that Python reads them in one piece. */
#include "cannsim.h"

#include <stdlib.h>
#include <string.h>

enum { TENSOR = 0x7e501, TENSORS, INTS, BOOLS, FLOATS, SCALAR, SCALARS, EXECUTOR };

enum { ROOM = 24, INT4 = 29 };

/* The sizes, the strides and the storage's sizes follow one another in the values. There are always at least ROOM of them, zeros
 * where nothing is said, so that Python reads a descriptor of up to eight axes, or a short list, at once. */
typedef struct {
  int64_t mark, dimensions, dtype, offset, format, storage_dimensions;
  void *data;
  int64_t device; /* whose memory the whole view lies in; -1 pinned host memory, -2 unknown */
  int64_t values[];
} tensor;

typedef struct {
  int64_t mark, count;
  int64_t values[];
} array;

/* Bytes of one value, by ACL data type; 0 where the type has no whole byte. */
static size_t value_bytes(int dtype) {
  static const char sizes[] = {4, 2, 1, 4, 1, 0, 2, 2, 4, 8, 8, 8, 1, 0, 0, 0, 8, 16};
  if (dtype >= 0 && (size_t)dtype < sizeof sizes) return (size_t)sizes[dtype];
  return dtype == 27 ? 2 : 0;
}

static uint64_t end_of_view(const tensor *t) {
  int64_t last = t->offset;
  for (int64_t i = 0; i < t->dimensions; i++) {
    if (!t->values[i]) return 0;
    last += (t->values[i] - 1) * t->values[t->dimensions + i];
  }
  if (t->dtype == INT4) return (uint64_t)(last + 2) / 2;
  size_t bytes = value_bytes((int)t->dtype);
  return (uint64_t)(last + 1) * (bytes ? bytes : 1);
}

EXPORT tensor *aclCreateTensor(const int64_t *sizes, uint64_t n, int dtype, const int64_t *strides, int64_t offset, int format,
                               const int64_t *storage, uint64_t storage_n, void *data) {
  tensor *t = calloc(1, sizeof *t + (2 * n + storage_n + ROOM) * sizeof(int64_t));
  if (!t) return NULL;
  t->mark = TENSOR;
  t->dimensions = (int64_t)n;
  t->dtype = dtype;
  t->offset = offset;
  t->format = format;
  t->storage_dimensions = (int64_t)storage_n;
  t->data = data;
  if (n) memcpy(t->values, sizes, n * sizeof *sizes);
  if (n && strides) {
    memcpy(t->values + n, strides, n * sizeof *strides);
  } else {
    int64_t step = 1;
    for (uint64_t i = n; i-- > 0; step *= sizes[i]) t->values[n + i] = step;
  }
  if (storage_n) memcpy(t->values + 2 * n, storage, storage_n * sizeof *storage);
  t->device = data ? cannsim_device_of(data, end_of_view(t)) : -2;
  return t;
}
EXPORT aclError aclDestroyTensor(const tensor *t) { free((void *)t); return OK; }

EXPORT aclError aclGetViewShape(const tensor *t, int64_t **sizes, uint64_t *n) {
  *n = (uint64_t)t->dimensions;
  *sizes = malloc((*n ? *n : 1) * sizeof **sizes); /* the caller deletes it */
  if (!*sizes) return MEMORY_ALLOCATION;
  memcpy(*sizes, t->values, *n * sizeof **sizes);
  return OK;
}

static array *make(int64_t mark, uint64_t count) {
  array *a = calloc(1, sizeof *a + (count + ROOM) * sizeof(int64_t));
  if (a) { a->mark = mark; a->count = (int64_t)count; }
  return a;
}

static array *of_words(int64_t mark, const void *values, uint64_t count) {
  array *a = make(mark, count);
  if (a && count) memcpy(a->values, values, count * sizeof(int64_t));
  return a;
}

EXPORT array *aclCreateIntArray(const int64_t *values, uint64_t n) { return of_words(INTS, values, n); }
EXPORT array *aclCreateTensorList(const void *const *values, uint64_t n) { return of_words(TENSORS, values, n); }
EXPORT array *aclCreateScalarList(const void *const *values, uint64_t n) { return of_words(SCALARS, values, n); }
EXPORT array *aclCreateBoolArray(const _Bool *values, uint64_t n) {
  array *a = make(BOOLS, n);
  for (uint64_t i = 0; a && i < n; i++) a->values[i] = values[i];
  return a;
}
EXPORT array *aclCreateFloatArray(const float *values, uint64_t n) {
  array *a = make(FLOATS, n);
  for (uint64_t i = 0; a && i < n; i++) {
    double wide = values[i];
    memcpy(a->values + i, &wide, sizeof wide);
  }
  return a;
}

EXPORT array *aclCreateScalar(const void *value, int dtype) {
  array *a = make(SCALAR, 3); /* the type, and up to 16 bytes */
  if (!a) return NULL;
  a->values[0] = dtype;
  memcpy(a->values + 1, value, value_bytes(dtype));
  return a;
}

static aclError destroy(const array *a) { free((void *)a); return OK; }
static aclError destroy_all(const array *a) {
  for (int64_t i = 0; a && i < a->count; i++) free((void *)a->values[i]);
  return destroy(a);
}
EXPORT aclError aclDestroyIntArray(const array *a) { return destroy(a); }
EXPORT aclError aclDestroyBoolArray(const array *a) { return destroy(a); }
EXPORT aclError aclDestroyFloatArray(const array *a) { return destroy(a); }
EXPORT aclError aclDestroyScalar(const array *a) { return destroy(a); }
EXPORT aclError aclDestroyTensorList(const array *a) { return destroy_all(a); }
EXPORT aclError aclDestroyScalarList(const array *a) { return destroy_all(a); }
