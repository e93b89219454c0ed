/* What streams, events and transfers know of one another. Everything here is guarded by the state lock. */
#ifndef CANNSIM_STREAM_H
#define CANNSIM_STREAM_H
#include "cannsim.h"

#include <time.h>

struct stream {
  stream *next;
  int id, device;
  item *head, *tail;
  uint64_t issued, done, demanded;
  uint64_t awaited; /* the lowest sequence that a thread sleeps for, or 0: waking it for each item costs a switch each */
  struct timespec last;
  aclError fault;
  char *fault_text;
  pthread_cond_t wake;
  int has_worker, closing, destroyed;
  graph *graph;
};

struct event {
  int references;
  uint64_t recorded, reached;
  uint64_t nanoseconds;
  stream *source;
  uint64_t source_sequence;
  graph *graph; /* recorded inside this capture */
};

extern pthread_cond_t progress;

void lock(void);
void unlock(void);
void demand(stream *s, uint64_t sequence);
aclError bad_stream(const char *name, void *handle);
aclError queue(const char *name, void *handle, item *one);
void event_unref(event *e);

#endif
