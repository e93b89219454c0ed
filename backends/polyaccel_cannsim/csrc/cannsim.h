/* The simulated ACL runtime, shared by its translation units. Facts about names and codes: the ACL headers that the
 * torch_npu wheel carries (include/third_party/acl/inc). */
#ifndef CANNSIM_H
#define CANNSIM_H
#define _GNU_SOURCE
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

typedef int aclError;

enum {
  OK = 0,
  PARAM_INVALID = 107000,
  INVALID_DEVICE = 107001,
  CONTEXT_NULL = 107002,
  INVALID_HANDLE = 107017,
  CAPTURE_DEPENDENCY = 107024,
  STREAM_UNJOINED = 107025,
  STREAM_CAPTURED = 107027,
  STREAM_NOT_CAPTURED = 107029,
  CAPTURE_UNSUPPORTED = 107030,
  CAPTURE_UNMATCHED = 107036,
  NOT_SUPPORTED = 207000,
  MEMORY_ALLOCATION = 207001,
  LEGACY_OPERATOR = 500002,
  AICORE_EXCEPTION = 507015,
  SYNC_TIMEOUT = 507046,
};

enum { MAX_DEVICES = 64 };

/* error.c */
EXPORT void cannsim_set_error(const char *text);
EXPORT const char *cannsim_last_error(void);
const char *missing_function(void);
EXPORT int64_t cannsim_unsimulated(const char *name);
aclError fail(aclError code, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* device.c */
int device_count(void);
int current_device(void);
void adopt_device(int device);

/* memory.c */
EXPORT int cannsim_device_of(const void *address, uint64_t bytes);
aclError check_range(const char *call, const char *role, const void *address, size_t bytes, int on_device);

/* gil.c: a thread that holds Python's lock must not wait for one that needs it. */
void *python_unlock(void);
void python_lock(void *state);
void python_adopt_thread(void);

/* waits.c */
void note_launcher(void);

/* stream.c */
typedef struct stream stream;
typedef struct event event;
typedef struct graph graph;

enum kind { ITEM_CALL, ITEM_COPY, ITEM_SET, ITEM_RECORD, ITEM_WAIT, ITEM_HOST, ITEM_GRAPH_DONE };

typedef struct item {
  struct item *next;
  enum kind kind;
  uint64_t sequence;
  int64_t token;      /* ITEM_CALL: number of a Python closure */
  int keep;           /* ITEM_CALL: it runs again, a graph owns it */
  int64_t task_group; /* in a graph: the group that may be replaced, or 0 */
  void *to;
  const void *from;
  size_t bytes;
  int value;
  event *event;
  uint64_t generation;
  stream *source;           /* ITEM_WAIT: where the event is recorded, and how far that stream must run */
  uint64_t source_sequence;
  void (*host)(void *);
  void *argument;
  graph *graph;
} item;

extern pthread_mutex_t state_lock;
stream *find_stream(void *handle);
aclError append(stream *s, item *one, int64_t *graph_id);
void append_locked(stream *s, item *one);
item *new_item(enum kind kind);
aclError drain_device(int device);
void fail_streams(const char *text);
int64_t stream_graph_id(stream *s);
graph **stream_graph(stream *s);
int capturing_on(int device);
void leave_capture(graph *g);
int stream_device(const stream *s);

/* graph.c */
int64_t graph_add(graph *g, item *one);
int graph_done(graph *g);
int64_t graph_id(const graph *g);
void forget_call(int64_t token);

#endif
