/* Events: marks in the queues that other streams and the host wait for. */
#include "stream.h"

#include <stdlib.h>

void event_unref(event *e) {
  if (e && --e->references == 0) free(e);
}

enum { EVENT_IPC = 0x40, EVENT_EXTERNAL = 0x20 };

static aclError create_event(const char *name, void **handle, uint32_t flags) {
  if (flags & (EVENT_IPC | EVENT_EXTERNAL)) return fail(NOT_SUPPORTED, "cannsim: %s: external and inter-process events are not simulated", name);
  event *e = calloc(1, sizeof *e);
  if (!e) return MEMORY_ALLOCATION;
  e->references = 1;
  *handle = e;
  return OK;
}
EXPORT aclError aclrtCreateEvent(void **handle) { return create_event("aclrtCreateEvent", handle, 0); }
EXPORT aclError aclrtCreateEventWithFlag(void **handle, uint32_t flags) { return create_event("aclrtCreateEventWithFlag", handle, flags); }
EXPORT aclError aclrtCreateEventExWithFlag(void **handle, uint32_t flags) { return create_event("aclrtCreateEventExWithFlag", handle, flags); }

EXPORT aclError aclrtDestroyEvent(void *handle) {
  lock();
  event_unref(handle);
  unlock();
  return OK;
}

EXPORT aclError aclrtRecordEvent(void *handle, void *stream_handle) {
  event *e = handle;
  item *one = new_item(ITEM_RECORD);
  if (!one) return MEMORY_ALLOCATION;
  lock();
  stream *s = find_stream(stream_handle);
  if (!s) { unlock(); free(one); return bad_stream("aclrtRecordEvent", stream_handle); }
  if (s->graph) { /* a captured graph keeps the order of its calls: the event only joins streams to it */
    e->graph = s->graph;
    unlock();
    free(one);
    return OK;
  }
  e->graph = NULL;
  e->references++;
  one->event = e;
  one->generation = ++e->recorded;
  append_locked(s, one);
  e->source = s;
  e->source_sequence = one->sequence;
  unlock();
  return OK;
}

EXPORT aclError aclrtStreamWaitEvent(void *stream_handle, void *handle) {
  event *e = handle;
  item *one = new_item(ITEM_WAIT);
  if (!one) return MEMORY_ALLOCATION;
  lock();
  stream *s = find_stream(stream_handle);
  aclError code = OK;
  if (!s) code = bad_stream("aclrtStreamWaitEvent", stream_handle);
  else if (e->graph && s->graph && s->graph != e->graph) code = fail(CAPTURE_DEPENDENCY, "EE1016: stream %d waits for an event of another capture", s->id);
  else if (e->graph && s->graph == e->graph) ; /* in order already */
  else if (e->graph) s->graph = e->graph;      /* the stream joins the capture */
  else if (s->graph && e->recorded > e->reached) code = fail(CAPTURE_DEPENDENCY, "EE1016: captured stream %d waits for an event recorded outside its capture", s->id);
  else if (!s->graph && e->recorded > e->reached && e->source != s) {
    e->references++;
    one->event = e;
    one->generation = e->recorded;
    one->source = e->source;
    one->source_sequence = e->source_sequence;
    append_locked(s, one);
    one = NULL;
  }
  unlock();
  free(one);
  return code;
}

EXPORT aclError aclrtResetEvent(void *handle, void *stream_handle) { (void)handle; (void)stream_handle; return OK; }

static aclError source_fault(event *e) {
  if (e->source && e->source->fault) return fail(e->source->fault, "%s", e->source->fault_text ? e->source->fault_text : "");
  return OK;
}

EXPORT aclError aclrtSynchronizeEvent(void *handle) {
  event *e = handle;
  void *python = python_unlock();
  lock();
  aclError code = OK;
  if (e->graph) code = fail(STREAM_CAPTURED, "EE1016: the event is recorded in a capture: it cannot be synchronised");
  else {
    uint64_t target = e->recorded;
    e->references++;
    while (e->reached < target) {
      demand(e->source, e->source_sequence);
      pthread_cond_wait(&progress, &state_lock);
    }
    code = source_fault(e);
    event_unref(e);
  }
  unlock();
  python_lock(python);
  return code;
}

EXPORT aclError aclrtQueryEventStatus(void *handle, int *status) { /* 0 not ready, 1 complete */
  event *e = handle;
  lock();
  aclError code = OK;
  *status = e->reached >= e->recorded;
  if (!*status && e->source) demand(e->source, e->source_sequence);
  if (*status) code = source_fault(e);
  unlock();
  return code;
}

EXPORT aclError aclrtQueryEventWaitStatus(void *handle, int *status) { /* 0 complete, 1 not ready */
  int recorded;
  aclError code = aclrtQueryEventStatus(handle, &recorded);
  *status = !recorded;
  return code;
}

EXPORT aclError aclrtEventElapsedTime(float *milliseconds, void *start, void *end) {
  lock();
  *milliseconds = (float)((double)(((event *)end)->nanoseconds - ((event *)start)->nanoseconds) / 1e6);
  unlock();
  return OK;
}

EXPORT aclError aclrtEventGetTimestamp(void *handle, uint64_t *timestamp) {
  lock();
  *timestamp = ((event *)handle)->nanoseconds / 1000;
  unlock();
  return OK;
}

