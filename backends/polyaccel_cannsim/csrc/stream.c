/* Streams are ordered queues, each with a thread of its own that sleeps until somebody waits for the stream, asks for its
 * state, or nothing was added for a while. Work is therefore late on purpose: what reads a result without a
 * synchronisation sees the old bytes, every time. */
#include "stream.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef int (*call_function)(int64_t token, int keep, int stream, int device);
typedef int (*check_function)(int64_t token, void *stream);
typedef void (*captured_function)(int64_t token, int64_t graph);

pthread_mutex_t state_lock = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t progress;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static stream *streams;
static stream *defaults[MAX_DEVICES];
static int next_id;
static int64_t quiet_nanoseconds = 50000000;
static call_function call;
static check_function check;
static captured_function captured;
static int stopped;

static void set_up(void) {
  pthread_condattr_t monotonic;
  pthread_condattr_init(&monotonic);
  pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
  pthread_cond_init(&progress, &monotonic);
  pthread_condattr_destroy(&monotonic);
}

void lock(void) {
  pthread_once(&once, set_up);
  pthread_mutex_lock(&state_lock);
}
void unlock(void) { pthread_mutex_unlock(&state_lock); }

EXPORT void cannsim_set_call(call_function function) { call = function; }
EXPORT void cannsim_set_check(check_function function) { check = function; }
EXPORT void cannsim_set_captured(captured_function function) { captured = function; }
EXPORT void cannsim_set_quiet(int64_t milliseconds) { quiet_nanoseconds = milliseconds < 0 ? -1 : milliseconds * 1000000; }

static struct timespec after(struct timespec start, int64_t nanoseconds) {
  start.tv_sec += nanoseconds / 1000000000;
  start.tv_nsec += nanoseconds % 1000000000;
  if (start.tv_nsec >= 1000000000) { start.tv_sec++; start.tv_nsec -= 1000000000; }
  return start;
}

static struct timespec now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t;
}

static int earlier(struct timespec a, struct timespec b) {
  return a.tv_sec < b.tv_sec || (a.tv_sec == b.tv_sec && a.tv_nsec < b.tv_nsec);
}

item *new_item(enum kind kind) {
  item *one = calloc(1, sizeof *one);
  if (one) one->kind = kind;
  return one;
}

void demand(stream *s, uint64_t sequence) {
  if (sequence > s->demanded) {
    s->demanded = sequence;
    pthread_cond_signal(&s->wake);
  }
}

/* Called without the lock. */
static aclError work(const stream *s, item *one) {
  switch (one->kind) {
    case ITEM_CALL: return call ? call(one->token, one->keep, s->id, s->device) : fail(NOT_SUPPORTED, "cannsim: no operators are installed");
    case ITEM_COPY: memmove(one->to, one->from, one->bytes); return OK;
    case ITEM_SET: memset(one->to, one->value, one->bytes); return OK;
    case ITEM_HOST: one->host(one->argument); return OK;
    default: return OK;
  }
}

static void ordered(stream *s, item *one) { /* with the lock */
  struct timespec t;
  switch (one->kind) {
    case ITEM_RECORD:
      t = now();
      if (one->generation > one->event->reached) one->event->reached = one->generation;
      one->event->nanoseconds = (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
      event_unref(one->event);
      break;
    case ITEM_WAIT:
      while (one->event->reached < one->generation && !s->closing) {
        demand(one->source, one->source_sequence);
        pthread_cond_wait(&progress, &state_lock);
      }
      if (one->source->fault && !s->fault) {
        s->fault = one->source->fault;
        s->fault_text = one->source->fault_text ? strdup(one->source->fault_text) : NULL;
      }
      event_unref(one->event);
      break;
    case ITEM_GRAPH_DONE:
      unlock();
      graph_done(one->graph);
      lock();
      break;
    default: break;
  }
}

static void *serve(void *argument) {
  stream *s = argument;
  adopt_device(s->device);
  python_adopt_thread();
  lock();
  while (!s->closing) {
    if (!s->head) { pthread_cond_wait(&s->wake, &state_lock); continue; }
    if (s->head->sequence > s->demanded) {
      if (quiet_nanoseconds < 0) { pthread_cond_wait(&s->wake, &state_lock); continue; }
      struct timespec until = after(s->last, quiet_nanoseconds);
      if (earlier(now(), until)) { pthread_cond_timedwait(&s->wake, &state_lock, &until); continue; }
      s->demanded = s->issued;
    }
    item *one = s->head;
    s->head = one->next;
    if (!s->head) s->tail = NULL;
    int marks = one->kind == ITEM_RECORD || one->kind == ITEM_WAIT || one->kind == ITEM_GRAPH_DONE;
    if (marks) {
      ordered(s, one);
    } else if (!s->fault) {
      unlock();
      aclError code = work(s, one);
      lock();
      if (code) {
        s->fault = code;
        s->fault_text = strdup(cannsim_last_error());
        cannsim_set_error("");
      }
    } else if (one->kind == ITEM_CALL && !one->keep) {
      unlock();
      forget_call(one->token); /* dropped, as hardware drops what follows a failure on the stream */
      lock();
    }
    s->done = one->sequence;
    free(one);
    if (marks || (s->awaited && s->done >= s->awaited)) {
      s->awaited = 0;
      pthread_cond_broadcast(&progress);
    }
  }
  s->has_worker = 0;
  pthread_cond_broadcast(&progress);
  unlock();
  return NULL;
}

static aclError start_worker(stream *s) {
  pthread_t thread;
  pthread_attr_t detached;
  pthread_attr_init(&detached);
  pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
  s->has_worker = 1;
  int rc = pthread_create(&thread, &detached, serve, s);
  pthread_attr_destroy(&detached);
  if (!rc) return OK;
  s->has_worker = 0;
  return fail(NOT_SUPPORTED, "cannsim: no thread for stream %d: error %d", s->id, rc);
}

static stream *make(int device) {
  stream *s = calloc(1, sizeof *s);
  if (!s) return NULL;
  pthread_condattr_t monotonic;
  pthread_condattr_init(&monotonic);
  pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
  pthread_cond_init(&s->wake, &monotonic);
  pthread_condattr_destroy(&monotonic);
  s->id = next_id++;
  s->device = device;
  s->next = streams;
  streams = s;
  return s;
}

/* The stream of a handle; NULL is the device's default stream. With the lock. */
stream *find_stream(void *handle) {
  if (!handle) {
    int device = current_device();
    if (device < 0) return NULL;
    if (!defaults[device]) defaults[device] = make(device);
    return defaults[device];
  }
  for (stream *s = streams; s; s = s->next)
    if (s == handle && !s->destroyed) return s;
  return NULL;
}

int stream_device(const stream *s) { return s->device; }
graph **stream_graph(stream *s) { return &s->graph; }
int64_t stream_graph_id(stream *s) { return s->graph ? graph_id(s->graph) : 0; }

int capturing_on(int device) {
  for (stream *s = streams; s; s = s->next)
    if (s->graph && s->device == device) return 1;
  return 0;
}

void leave_capture(graph *g) {
  for (stream *s = streams; s; s = s->next)
    if (s->graph == g) s->graph = NULL;
}

void append_locked(stream *s, item *one) {
  one->sequence = ++s->issued;
  if (s->tail) s->tail->next = one;
  else s->head = one;
  s->tail = one;
  s->last = now();
  if (!s->has_worker) start_worker(s);
  else if (s->head == one) pthread_cond_signal(&s->wake);
}

/* Queues the item, or hands it to the graph that the stream is captured into, whose number *graph_id then is. */
aclError append(stream *s, item *one, int64_t *id) {
  if (id) *id = 0;
  if (s->graph) {
    int64_t number = graph_add(s->graph, one);
    if (id) *id = number;
    return OK;
  }
  append_locked(s, one);
  return OK;
}

aclError bad_stream(const char *name, void *handle) { return fail(INVALID_HANDLE, "EE1001: %s: no stream %p", name, handle); }

/* A Python closure on a stream, or into the graph that the stream is captured into. */
EXPORT aclError cannsim_enqueue(void *handle, int64_t token) {
  item *one = new_item(ITEM_CALL);
  if (!one) return MEMORY_ALLOCATION;
  one->token = token;
  int64_t id = 0;
  lock();
  stream *s = find_stream(handle);
  aclError code = s ? append(s, one, &id) : bad_stream("launch", handle);
  unlock();
  if (code) free(one);
  else if (id && captured) captured(token, id);
  return code;
}

/* Phase 2 of every aclnn function. Python is asked only where the operator has something left to check: the executor's
 * lowest bit. */
EXPORT aclError cannsim_launch(void *workspace, uint64_t size, int64_t executor, void *handle) {
  (void)workspace; (void)size;
  note_launcher();
  int64_t token = executor >> 1;
  aclError code = executor & 1 ? check(token, handle) : OK;
  return code ? code : cannsim_enqueue(handle, token);
}

EXPORT int cannsim_stream_id(void *handle) {
  lock();
  stream *s = find_stream(handle);
  int id = s ? s->id : -1;
  unlock();
  return id;
}

/* Number of queued items that have not run. */
EXPORT int64_t cannsim_pending(void *handle) {
  lock();
  stream *s = find_stream(handle);
  int64_t count = s ? (int64_t)(s->issued - s->done) : -1;
  unlock();
  return count;
}

static aclError finish(stream *s, int timeout_ms) { /* with the lock */
  uint64_t target = s->issued;
  demand(s, target);
  struct timespec until = after(now(), timeout_ms < 0 ? 0 : (int64_t)timeout_ms * 1000000);
  while (s->done < target && !s->closing) {
    if (!s->awaited || target < s->awaited) s->awaited = target;
    if (timeout_ms < 0) pthread_cond_wait(&progress, &state_lock);
    else if (pthread_cond_timedwait(&progress, &state_lock, &until) == ETIMEDOUT && s->done < target)
      return fail(SYNC_TIMEOUT, "EE1002: stream %d: synchronisation took longer than %d ms", s->id, timeout_ms);
  }
  if (s->fault) return fail(s->fault, "%s", s->fault_text ? s->fault_text : "cannsim: the stream failed");
  return OK;
}

EXPORT aclError aclrtSynchronizeStreamWithTimeout(void *handle, int32_t timeout_ms) {
  void *python = python_unlock();
  lock();
  stream *s = find_stream(handle);
  aclError code = !s           ? bad_stream("aclrtSynchronizeStream", handle)
                  : s->graph ? fail(STREAM_CAPTURED, "EE1016: stream %d is captured: it cannot be synchronised", s->id)
                             : finish(s, timeout_ms);
  unlock();
  python_lock(python);
  return code;
}
EXPORT aclError aclrtSynchronizeStream(void *handle) { return aclrtSynchronizeStreamWithTimeout(handle, -1); }

aclError drain_device(int device) {
  void *python = python_unlock();
  lock();
  aclError code = OK;
  for (stream *s = streams; s; s = s->next)
    if (s->device == device && s->issued != s->done && !s->closing) {
      aclError one = finish(s, -1);
      if (!code) code = one;
    } else if (s->device == device && s->fault && !code && !s->destroyed) {
      code = fail(s->fault, "%s", s->fault_text ? s->fault_text : "cannsim: the stream failed");
    }
  unlock();
  python_lock(python);
  return code;
}

/* Nothing that was queued can be trusted any more: said on the error stream, and by every later wait. */
void fail_streams(const char *text) {
  fprintf(stderr, "%s\n", text);
  lock();
  for (stream *s = streams; s; s = s->next)
    if (!s->fault) {
      s->fault = SYNC_TIMEOUT;
      s->fault_text = strdup(text);
    }
  unlock();
}

EXPORT aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout_ms) {
  (void)timeout_ms;
  int device = current_device();
  if (device < 0) return fail(CONTEXT_NULL, "EE1001: aclrtSynchronizeDevice: no device is set");
  lock();
  int captured = capturing_on(device);
  unlock();
  if (captured) return fail(CAPTURE_UNSUPPORTED, "EE1016: a stream of device %d is captured: the device cannot be synchronised", device);
  return drain_device(device);
}
EXPORT aclError aclrtSynchronizeDevice(void) { return aclrtSynchronizeDeviceWithTimeout(-1); }

EXPORT aclError aclrtCreateStreamWithConfig(void **handle, uint32_t priority, uint32_t flags) {
  (void)priority; (void)flags;
  int device = current_device();
  if (device < 0) return fail(CONTEXT_NULL, "EE1001: aclrtCreateStream: no device is set");
  lock();
  *handle = make(device);
  unlock();
  return *handle ? OK : MEMORY_ALLOCATION;
}
EXPORT aclError aclrtCreateStream(void **handle) { return aclrtCreateStreamWithConfig(handle, 0, 0); }

EXPORT aclError aclrtDestroyStream(void *handle) {
  void *python = python_unlock();
  lock();
  stream *s = find_stream(handle);
  aclError code = s ? finish(s, -1) : bad_stream("aclrtDestroyStream", handle);
  if (s) {
    s->closing = s->destroyed = 1;
    pthread_cond_signal(&s->wake);
  }
  unlock();
  python_lock(python);
  return code;
}
EXPORT aclError aclrtDestroyStreamForce(void *handle) { aclrtDestroyStream(handle); return OK; }

EXPORT aclError aclrtStreamQuery(void *handle, int *status) {
  lock();
  stream *s = find_stream(handle);
  aclError code = s ? OK : bad_stream("aclrtStreamQuery", handle);
  if (s) {
    demand(s, s->issued);
    *status = s->done < s->issued; /* 0 complete, 1 not ready */
    if (s->fault) code = fail(s->fault, "%s", s->fault_text ? s->fault_text : "");
  }
  unlock();
  return code;
}

EXPORT aclError aclrtStreamGetId(void *handle, int32_t *id) {
  *id = cannsim_stream_id(handle);
  return *id < 0 ? bad_stream("aclrtStreamGetId", handle) : OK;
}

EXPORT aclError aclrtSetStreamFailureMode(void *handle, uint64_t mode) { (void)handle; (void)mode; return OK; }
EXPORT aclError aclrtSetStreamOverflowSwitch(void *handle, uint32_t flag) { (void)handle; (void)flag; return OK; }
EXPORT aclError aclrtGetStreamOverflowSwitch(void *handle, uint32_t *flag) { (void)handle; *flag = 0; return OK; }
EXPORT aclError aclrtSetStreamAttribute(void *handle, int attribute, void *value) { (void)handle; (void)attribute; (void)value; return OK; }

aclError queue(const char *name, void *handle, item *one) {
  if (!one) return MEMORY_ALLOCATION;
  lock();
  stream *s = find_stream(handle);
  aclError code = s ? append(s, one, NULL) : bad_stream(name, handle);
  unlock();
  if (code) free(one);
  return code;
}

/* Runs what is queued everywhere, then ends all workers: before the interpreter goes. */
EXPORT void cannsim_shutdown(void) {
  void *python = python_unlock();
  lock();
  if (!stopped) {
    stopped = 1;
    for (stream *s = streams; s; s = s->next)
      if (!s->closing && !s->graph) finish(s, 10000);
    for (stream *s = streams; s; s = s->next) {
      s->closing = 1;
      pthread_cond_signal(&s->wake);
    }
    call = NULL;
  }
  unlock();
  python_lock(python);
}
