/* Captured graphs: a list of recorded work that runs again at the captured addresses. Streams that join a capture share
 * its one list, in the order of the calls, which satisfies every dependency that events could state. */
#include "cannsim.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct graph {
  int64_t id;
  stream *origin;
  item *head, *tail;
  int64_t count;
  int references, ended;
  int64_t group;  /* the open task group, or 0 */
  graph *updates; /* this list replaces a task group of that graph */
};

typedef struct {
  graph *owner;
  int64_t id;
} task_group;

static void (*replayed)(int64_t id);
static void (*forgotten)(int64_t token);
static int64_t next_id, next_group;

EXPORT void cannsim_set_replayed(void (*function)(int64_t)) { replayed = function; }
EXPORT void cannsim_set_forgotten(void (*function)(int64_t)) { forgotten = function; }

void forget_call(int64_t token) {
  if (forgotten) forgotten(token);
}

int64_t graph_id(const graph *g) { return g->id; }

int64_t graph_add(graph *g, item *one) { /* with the state lock */
  one->keep = 1;
  one->task_group = g->group;
  if (g->tail) g->tail->next = one;
  else g->head = one;
  g->tail = one;
  g->count++;
  return g->id;
}

static void clear(graph *g) {
  while (g->head) {
    item *one = g->head;
    g->head = one->next;
    if (one->kind == ITEM_CALL) forget_call(one->token);
    free(one);
  }
  g->tail = NULL;
  g->count = 0;
}

/* One use less; 1 when it was the last. Without the state lock, since Python is told of closures that are gone. */
int graph_done(graph *g) {
  pthread_mutex_lock(&state_lock);
  int last = --g->references == 0;
  pthread_mutex_unlock(&state_lock);
  if (last) {
    clear(g);
    free(g);
  }
  return last;
}

static aclError no_stream(const char *name, void *handle) { return fail(INVALID_HANDLE, "EE1001: %s: no stream %p", name, handle); }

EXPORT aclError aclmdlRICaptureBegin(void *handle, int mode) {
  (void)mode;
  pthread_mutex_lock(&state_lock);
  stream *s = find_stream(handle);
  aclError code = OK;
  if (!s) code = no_stream("aclmdlRICaptureBegin", handle);
  else if (*stream_graph(s)) code = fail(STREAM_CAPTURED, "EE1016: the stream is captured already");
  else {
    graph *g = calloc(1, sizeof *g);
    if (!g) code = MEMORY_ALLOCATION;
    else {
      g->id = ++next_id;
      g->origin = s;
      g->references = 1;
      *stream_graph(s) = g;
    }
  }
  pthread_mutex_unlock(&state_lock);
  return code;
}

EXPORT aclError aclmdlRICaptureGetInfo(void *handle, int *status, void **model) {
  pthread_mutex_lock(&state_lock);
  stream *s = find_stream(handle);
  graph *g = s ? *stream_graph(s) : NULL;
  if (g && g->updates) g = NULL; /* an update is no capture */
  *status = g != NULL;           /* 0 none, 1 active */
  if (model) *model = g;
  pthread_mutex_unlock(&state_lock);
  return s ? OK : no_stream("aclmdlRICaptureGetInfo", handle);
}

EXPORT aclError aclmdlRICaptureEnd(void *handle, void **model) {
  pthread_mutex_lock(&state_lock);
  stream *s = find_stream(handle);
  graph *g = s ? *stream_graph(s) : NULL;
  aclError code = OK;
  if (!g) code = fail(STREAM_NOT_CAPTURED, "EE1016: aclmdlRICaptureEnd: the stream is not captured");
  else if (g->origin != s) code = fail(CAPTURE_UNMATCHED, "EE1016: aclmdlRICaptureEnd: the capture began on another stream");
  else if (g->group) code = fail(STREAM_UNJOINED, "EE1016: aclmdlRICaptureEnd: a task group is still open");
  else {
    leave_capture(g);
    g->ended = 1;
    *model = g;
  }
  pthread_mutex_unlock(&state_lock);
  return code;
}

EXPORT aclError aclmdlRICaptureThreadExchangeMode(int *mode) { *mode = 0; return OK; }
EXPORT aclError aclmdlRIGetId(void *model, uint32_t *id) { *id = (uint32_t)((graph *)model)->id; return OK; }
EXPORT int64_t cannsim_graph_items(void *model) { return ((graph *)model)->count; }

EXPORT aclError aclmdlRIExecuteAsync(void *model, void *handle) {
  graph *g = model;
  pthread_mutex_lock(&state_lock);
  stream *s = find_stream(handle);
  aclError code = OK;
  if (!s) code = no_stream("aclmdlRIExecuteAsync", handle);
  else if (!g->ended) code = fail(STREAM_CAPTURED, "EE1016: aclmdlRIExecuteAsync: the graph is still being captured");
  else if (*stream_graph(s)) code = fail(CAPTURE_UNSUPPORTED, "EE1016: aclmdlRIExecuteAsync: the stream is captured");
  else if (stream_device(s) != stream_device(g->origin)) code = fail(PARAM_INVALID, "EE1001: aclmdlRIExecuteAsync: the graph is of device %d, the stream of %d", stream_device(g->origin), stream_device(s));
  for (item *one = g->head; one && !code; one = one->next) {
    item *again = new_item(one->kind);
    if (!again) { code = MEMORY_ALLOCATION; break; }
    *again = *one;
    again->next = NULL;
    append_locked(s, again);
  }
  if (!code) {
    item *last = new_item(ITEM_GRAPH_DONE);
    if (!last) code = MEMORY_ALLOCATION;
    else {
      last->graph = g;
      g->references++;
      append_locked(s, last);
    }
  }
  pthread_mutex_unlock(&state_lock);
  if (!code && replayed) replayed(g->id);
  return code;
}

EXPORT aclError aclmdlRIDestroy(void *model) {
  graph_done(model);
  return OK;
}

/* --- task groups: part of a graph whose calls are issued again with other host values ----------------------------- */

EXPORT aclError aclmdlRICaptureTaskGrpBegin(void *handle) {
  pthread_mutex_lock(&state_lock);
  stream *s = find_stream(handle);
  graph *g = s ? *stream_graph(s) : NULL;
  aclError code = OK;
  if (!g) code = fail(STREAM_NOT_CAPTURED, "EE1016: aclmdlRICaptureTaskGrpBegin: the stream is not captured");
  else if (g->group) code = fail(PARAM_INVALID, "EE1016: aclmdlRICaptureTaskGrpBegin: a task group is open already");
  else g->group = ++next_group;
  pthread_mutex_unlock(&state_lock);
  return code;
}

EXPORT aclError aclmdlRICaptureTaskGrpEnd(void *handle, void **out) {
  pthread_mutex_lock(&state_lock);
  stream *s = find_stream(handle);
  graph *g = s ? *stream_graph(s) : NULL;
  aclError code = OK;
  task_group *group = NULL;
  if (!g || !g->group) code = fail(STREAM_NOT_CAPTURED, "EE1016: aclmdlRICaptureTaskGrpEnd: no task group is open");
  else if (!(group = calloc(1, sizeof *group))) code = MEMORY_ALLOCATION;
  else {
    *group = (task_group){g, g->group};
    g->group = 0;
    *out = group;
  }
  pthread_mutex_unlock(&state_lock);
  return code;
}

EXPORT aclError aclmdlRICaptureTaskUpdateBegin(void *handle, void *which) {
  task_group *group = which;
  pthread_mutex_lock(&state_lock);
  stream *s = find_stream(handle);
  aclError code = OK;
  graph *collected = NULL;
  if (!s) code = no_stream("aclmdlRICaptureTaskUpdateBegin", handle);
  else if (*stream_graph(s)) code = fail(STREAM_CAPTURED, "EE1016: aclmdlRICaptureTaskUpdateBegin: the stream is captured");
  else if (!(collected = calloc(1, sizeof *collected))) code = MEMORY_ALLOCATION;
  else {
    collected->id = group->owner->id;
    collected->group = group->id;
    collected->origin = group->owner->origin;
    collected->references = 1;
    collected->updates = group->owner;
    *stream_graph(s) = collected;
  }
  pthread_mutex_unlock(&state_lock);
  return code;
}

/* The recorded calls take the places of the group's, one for one. */
EXPORT aclError aclmdlRICaptureTaskUpdateEnd(void *handle) {
  pthread_mutex_lock(&state_lock);
  stream *s = find_stream(handle);
  graph *collected = s ? *stream_graph(s) : NULL;
  aclError code = OK;
  if (!collected || !collected->updates) {
    pthread_mutex_unlock(&state_lock);
    return fail(STREAM_NOT_CAPTURED, "EE1016: aclmdlRICaptureTaskUpdateEnd: no update was begun on this stream");
  }
  *stream_graph(s) = NULL;
  graph *g = collected->updates;
  int64_t in_group = 0;
  for (item *one = g->head; one; one = one->next) in_group += one->task_group == collected->group;
  if (in_group != collected->count) {
    code = fail(PARAM_INVALID, "EE1016: the task group has %lld calls and the update %lld", (long long)in_group, (long long)collected->count);
  } else {
    item *fresh = collected->head;
    for (item *old = g->head; old; old = old->next) {
      if (old->task_group != collected->group) continue;
      item *after_old = old->next, *after_fresh = fresh->next, kept = *old;
      *old = *fresh;
      old->next = after_old;
      *fresh = kept; /* the replaced call is forgotten with the collected list */
      fresh->next = after_fresh;
      fresh = after_fresh;
    }
  }
  /* What was replaced may still be queued: it is forgotten when this stream has done what the caller made it wait for. */
  item *last = new_item(ITEM_GRAPH_DONE);
  if (last) {
    last->graph = collected;
    append_locked(s, last);
  }
  pthread_mutex_unlock(&state_lock);
  return last ? code : MEMORY_ALLOCATION;
}
